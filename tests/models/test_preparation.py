"""Trained weights are float32, frozen ones keep their precision, and dropout is off."""

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from torch import nn
from trainers import make_trainer

from grpo_lab.models import preparation

# --- float32 weights under half precision ---------------------------------------------------------------


def after_steps(weight, steps):
    """One weight after so many steps of AdamW at learning rate 1e-6 with gradient 1: each step is 1e-6."""
    optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
    for _ in range(steps):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    return weight.detach()


def test_at_learning_rate_1e_6_a_bf16_weight_never_moves_and_a_float32_weight_arrives():
    # bf16 has 8 binary digits. 0.02 lies between 2^-6 = 0.0156 and 2^-5, where its numbers are 2^-6 * 2^-7 = 2^-13 =
    # 1.2e-4 apart, and the nearest to 0.02 is 164 of these steps. What is less than half a step away is rounded back:
    # 6.1e-5, sixty times an update of AdamW, whose mean / root mean square is 1 where all gradients are alike. Each
    # of a thousand updates is lost alone, and with them the 1e-3 that they add up to.
    half, full = (nn.Parameter(torch.full((8,), 0.02, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    assert half[0].item() == 164 * 2**-13
    assert after_steps(half, 1000).eq(164 * 2**-13).all()
    # float32 has 24 digits: steps of 2^-6 * 2^-23 = 1.9e-9, so each update is off by at most half of that
    torch.testing.assert_close(after_steps(full, 1000), torch.full((8,), 0.02 - 1000e-6), rtol=0, atol=1000 * 2**-30)


def test_in_bf16_weights_move_only_where_they_are_small_enough():
    # Half a step is 2^-8 of the power of two below the weight: below 2^-11 = 4.9e-4 at most 2^-12 * 2^-8 = 9.5e-7,
    # which 1e-6 passes; above it 1.9e-6, which it does not.
    below, above = nn.Parameter(torch.tensor([4e-4]).bfloat16()), nn.Parameter(torch.tensor([6e-4]).bfloat16())
    before = below.item(), above.item()
    assert after_steps(below, 1).item() < before[0]
    assert after_steps(above, 100).item() == before[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bf16_model_is_trained_and_saved_in_float32(tmp_path, precision):
    model = tiny_model().bfloat16()
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    run = make_trainer(tmp_path, model=model, learning_rate=1e-6, precision=precision, top_k=0, top_p=1.0, max_steps=2)
    list(run.steps())
    saved = load_file(tmp_path / "final_model" / "model.safetensors")
    moved = rounded = total = 0
    for name, weight in run.model.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, saved[name]) or name == "lm_head.weight"
        moved += (weight != before[name].float()).sum().item()
        rounded += (weight.bfloat16() != before[name]).sum().item()
        total += weight.numel()
    assert moved > 0.5 * total  # a token that no prompt has gets no gradient
    assert rounded < 0.1 * moved  # and nearly all of it would have been lost in bf16


def test_frozen_weights_keep_their_precision_and_buffers_theirs():
    policy = tiny_model().bfloat16()
    policy.model.embed_tokens.weight.requires_grad_(False)
    preparation.trainable_in_float32(policy)
    reference = tiny_model()
    preparation.match_precision(reference, policy)
    assert reference.model.embed_tokens.weight.dtype == torch.bfloat16
    assert reference.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert reference.model.rotary_emb.inv_freq.dtype == torch.float32


# --- dropout ----------------------------------------------------------------------------------------------


def test_every_kind_of_dropout_is_found():
    model = tiny_model(attention_dropout=0.5)
    model.extra = nn.Dropout(0.3)
    preparation.disable_dropout(model)
    assert model.extra.p == model.model.layers[0].self_attn.attention_dropout == 0.0
    assert model.config.attention_dropout == 0.5  # what is saved still says how it was made
