"""Small models that every test can afford, and one thread: two on a busy core are many times slower."""

import signal

import pytest
import torch
from tokenizers import pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo_lab.tasks.pocket.make import make_tokenizer

torch.set_num_threads(1)

# A shell starts its background jobs with SIGINT ignored, and child processes inherit that: the tests of Ctrl-C
# would wait for an interrupt that never comes. A handler of our own is not inherited: children get the default.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW_LIMIT = 1200  # seconds for a test marked `slow`; pyproject.toml has the limit of all others


def pytest_collection_modifyitems(items):
    """Give tests marked `slow` more time before pytest-timeout stops them."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_LIMIT))


def tiny_model(seed: int = 0, **changes) -> Qwen2ForCausalLM:
    """A Qwen2 of 30,000 random weights over the pocket tokenizer's vocabulary, in eval mode."""
    settings = {
        "vocab_size": len(make_tokenizer()),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.3,  # far from uniform, so that a wrong temperature or shift is seen
    }
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**settings | changes)).eval()


# learned positions (gpt2, opt), rotary ones (gpt_neox, llama, qwen2), a bias by distance (bloom)
ARCHITECTURES = ("gpt2", "opt", "gpt_neox", "llama", "qwen2", "bloom")


def tiny_architecture(name: str, seed: int = 0, **changes) -> PreTrainedModel:
    """Another family of models, as small and as random as `tiny_model`; id 0 pads, id 1 ends."""
    settings = {
        "vocab_size": 22, "hidden_size": 32, "word_embed_proj_dim": 32, "intermediate_size": 64, "ffn_dim": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "initializer_range": 0.3, "init_std": 0.3, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings | changes)).eval()


CHAT = [{"role": "user", "content": "2+2="}]
TEMPLATE = "{{ '<eos>' }}{% for m in messages %}{{ m.content }}:{% endfor %}{% if add_generation_prompt %}={% endif %}"


def starting_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """The pocket model's, but it starts every text with <eos>, as Llama's starts it with <s>."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="session", params=ARCHITECTURES)
def any_model(request):
    """One of each family; shared, so not to be changed."""
    return tiny_architecture(request.param)


@pytest.fixture
def tokenizer():
    """The pocket model's: one token per character."""
    return make_tokenizer()


@pytest.fixture
def model():
    """A fresh random model."""
    return tiny_model()


@pytest.fixture
def uniform_model():
    """Every token is equally likely, and yet the gradient is not zero: what it learns is easy to predict."""
    model = tiny_model(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A model and tokenizer as `save_pretrained` leaves them: what stands in for a Hub id without a network."""
    folder = tmp_path_factory.mktemp("tiny")
    any_text = make_tokenizer(sorted(pre_tokenizers.ByteLevel.alphabet()))
    tiny_model(vocab_size=len(any_text), max_position_embeddings=128).save_pretrained(folder)
    any_text.save_pretrained(folder)
    return str(folder)
