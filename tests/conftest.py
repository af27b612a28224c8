"""Small models that every test can afford, and one thread: two on a busy core are many times slower."""

import json
import signal

import pytest
import torch
from tokenizers import pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo_lab.cli import main as cli
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


# --- GSM8K without the Hub, and `grpo-lab train` on a tiny chat model ---------------------------------------

# in GSM8K's format: calculations in << >>, thousands with a comma, a minus, and the answer after ####
PROBLEMS = [
    ("Natalia has 48 clips and gives half away. How many?", "She gives 48/2 = <<48/2=24>>24 clips.\n#### 24", 24),
    (
        "A car costs $1,000 and a van $200 more.",
        "The van costs 1000 + 200 = $<<1000+200=1200>>1,200.\n#### 1,200",
        1200,
    ),
    ("It is 3 degrees and falls by 10.", "It is then 3 - 10 = <<3-10=-7>>-7 degrees.\n#### -7", -7),
]

QUICK = ["--max-steps", "2", "--batch-size", "2", "--gradient-accumulation-steps", "1", "--max-new-tokens", "4"]
QUICK += ["--warmup-steps", "0", "--num-generations", "2", "--eval-steps", "1"]


def gsm8k_rows(copies: int):
    """Return a `datasets.Dataset` in GSM8K's format with `copies` numbered variants of each problem."""
    datasets = pytest.importorskip("datasets")
    rows = [(f"{question} ({copy})", answer) for copy in range(copies) for question, answer, _ in PROBLEMS]
    return datasets.Dataset.from_dict({"question": [q for q, _ in rows], "answer": [a for _, a in rows]})


@pytest.fixture
def problems(tmp_path):
    """A file of problems in GSM8K's format."""
    file = tmp_path / "problems.jsonl"
    gsm8k_rows(2).to_json(str(file))
    return str(file)


@pytest.fixture
def hub(monkeypatch):
    """Replace `datasets.load_dataset` by one that returns rows in GSM8K's format; the list of its calls."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(**where):
        asked.append(where)
        return gsm8k_rows({"train": 4, "test": 5}[where["split"]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.fixture(scope="session")
def chat_model(model_folder, tmp_path_factory):
    """Folder of the tiny model with a chat template and room for a system prompt."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def train(chat_model, tmp_path, capsys):
    """Run `grpo-lab train` on the tiny chat model; returns (exit status, stdout, error message)."""

    def run(*arguments, model=chat_model):
        status = cli.main(["train", "--model-name", model, "--output-dir", str(tmp_path / "out"), *QUICK, *arguments])
        captured = capsys.readouterr()
        return status, captured.out, " ".join(s for s in captured.err.splitlines() if s.startswith("grpo-lab:"))

    return run


def parse_train(*arguments):
    """Parse the flags of `grpo-lab train`."""
    return cli.make_parser().parse_args(["train", *arguments])


def lines_of(file):
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]
