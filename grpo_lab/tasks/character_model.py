"""A small Qwen2 model over single characters, with random weights, and its tokenizer."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHARACTERS = "0123456789+-*/(),:="


def make_tokenizer(characters: Iterable[str] = CHARACTERS) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per character; it drops unknown characters.

    It is a byte-pair encoding without merges, because `AutoTokenizer` makes one of any tokenizer that is saved with a
    Qwen2 model.
    """
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *characters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token=None, padding_side="left"
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int = 96, layers: int = 3, heads: int = 4
) -> Qwen2ForCausalLM:
    """Return an untrained Qwen2; with the defaults it has 446,000 parameters."""
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=4 * hidden_size, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)
