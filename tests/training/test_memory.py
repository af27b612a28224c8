"""How many prompts are sampled at a time."""

import pytest
import torch
from conftest import ARCHITECTURES, tiny_architecture, tiny_model
from transformers import MambaConfig

from grpo_lab import GRPOConfig
from grpo_lab.models.forward import cache_of
from grpo_lab.training import memory


def at_once(model, *how):
    return memory.rollout_batch_size(model, *how, **memory.weight_bytes(model))


def test_what_is_sampled_together_takes_the_room_of_the_gradients():
    model = tiny_model()  # 22 tokens; 2 layers, each with keys and values of 2 heads of 8 numbers for each token
    room = 4 * sum(p.numel() for p in model.parameters())
    completion = 40 * (2 * 2 * 2 * 8) * 4 + 22 * 28  # 40 tokens in float32, and the logits of one
    config = GRPOConfig(num_generations_per_prompt=2, batch_size=1, gradient_checkpointing=True)
    assert at_once(model, config, "fp32", 40) == room // (2 * completion) == 3
    assert at_once(model, config, "bf16", 40) == 7  # half the bytes for keys and values
    model.requires_grad_(False)
    assert at_once(model, config, "bf16", 40) == 3  # half the room: no gradients, half the weights


def test_four_micro_batches_are_sampled_together_at_least_and_one_with_checkpointing():
    model, K = tiny_model(), 64
    for checkpointing, prompts in [(False, 12), (True, 3)]:
        config = GRPOConfig(num_generations_per_prompt=K, batch_size=3, gradient_checkpointing=checkpointing)
        assert at_once(model, config, "fp32", 64) == prompts


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_room_that_is_counted_for_keys_and_values_is_what_they_take(name):
    model = tiny_architecture(name, num_key_value_heads=None)  # as many as others
    cache = cache_of(model(torch.ones(1, 40, dtype=torch.long), use_cache=True))
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    config = GRPOConfig(num_generations_per_prompt=2, batch_size=1, gradient_checkpointing=True)
    room = 4 * sum(p.numel() for p in model.parameters())
    assert at_once(model, config, "fp32", 40) == room // (2 * (taken + 22 * 28))


def test_a_model_with_another_kind_of_cache_is_sampled_by_micro_batches():
    model = tiny_model()
    model.config = MambaConfig(num_hidden_layers=2)  # names no heads
    assert at_once(model, GRPOConfig(batch_size=2), "fp32", 40) == 8
