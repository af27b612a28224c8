"""Small models that every test can afford, and one thread: two on a busy core are many times slower."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from grpo_lab.pocket.make import make_tokenizer

torch.set_num_threads(1)


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
