"""AdamW, AdamW in 8 bits, and loss scaling in fp16."""

import sys
import types

import pytest
import torch
from conftest import tiny_model
from torch import nn
from trainers import make_trainer, weights

from grpo_lab import GRPOConfig
from grpo_lab.training import step
from grpo_lab.training.checkpoints import load_state
from grpo_lab.training.optimizer import make_optimizer


def test_adamw_is_fused_where_it_can_be_and_takes_trained_weights_alone():
    model, config = tiny_model(), GRPOConfig(learning_rate=0.5, weight_decay=0.25)
    model.model.embed_tokens.weight.requires_grad_(False)
    for device, fused in (("cpu", True), ("cuda", True), ("mps", False)):
        optimizer = make_optimizer(model, config, torch.device(device))
        (group,) = optimizer.param_groups
        assert (type(optimizer), group["fused"]) == (torch.optim.AdamW, fused)
        assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
        assert len(group["params"]) == len(list(model.parameters())) - 1


# --- 8-bit AdamW ------------------------------------------------------------------------------------------

EIGHT = {"optimizer": "adamw_8bit"}


def wide_model():
    """Tiny, but with matrices of at least 4096 weights, whose means bitsandbytes keeps in 8 bits."""
    return tiny_model(hidden_size=64, intermediate_size=128)


def test_without_bitsandbytes_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"adamw_8bit needs bitsandbytes: pip install .*bitsandbytes"):
        make_trainer(tmp_path, **EIGHT)


def test_a_bitsandbytes_that_cannot_step_on_this_device_is_refused_before_training(tmp_path, monkeypatch):
    class AdamW8bit(torch.optim.SGD):
        def step(self):  # the words of version 0.49 on a CPU
            raise RuntimeError("All input tensors need to be on the same GPU,\nand a long list")

    for name in ("bitsandbytes", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(AdamW8bit=AdamW8bit))
    with pytest.raises(ValueError, match=r"not run on cpu with this bitsandbytes \(All .* GPU,\)\. Use a newer one"):
        make_trainer(tmp_path, **EIGHT)


def test_eight_bits_hold_the_means_and_the_first_step_is_that_of_adamw(tmp_path):
    pytest.importorskip("bitsandbytes", minversion="0.50")
    rate = 1e-3
    runs = [make_trainer(tmp_path, model=wide_model(), learning_rate=rate, **how) for how in ({}, EIGHT)]
    start = weights(runs[0])
    for run in runs:
        run.update(run.collect([0, 1, 2, 3]))
    exact, eight = (weights(run) for run in runs)
    # Nothing has been rounded to 8 bits yet: each update is rate * g / (|g| + 1e-8), by another program. It differs
    # where g itself is some 1e-8, by twice the rate at most.
    assert ((exact - eight).abs() > 1e-3 * rate).float().mean() < 1e-3
    assert (exact - eight).abs().max() <= 2 * rate
    assert (exact - start).abs().max() > 0.9 * rate
    sizes = set()
    for p in runs[1].model.parameters():
        state = runs[1].components.engine.optimizer.state[p]
        assert state["state1"].dtype == state["state2"].dtype == (torch.uint8 if p.numel() >= 4096 else torch.float32)
        sizes.add(p.numel() >= 4096)
    assert sizes == {True, False}


@pytest.mark.parametrize(("spread", "low", "high"), [(0.0, 1e-4, 0.03), (1.0, 0.2, 1.0)])
def test_eight_bits_follow_adamw_where_the_gradients_of_a_block_are_of_one_size(spread, low, high):
    """How far twenty steps end from AdamW's, as a share of the way: per cents, or much of it.

    The map of 8 bits has 7 decades, each number in it good to some per cent of itself, and a scale for 256 weights.
    Squares of gradients of one size (spread 0) fit in. Where their sizes spread over four decades (a standard
    deviation of one in log10), their squares spread over eight, the smallest become 0, and weights go other ways.
    """
    pytest.importorskip("bitsandbytes", minversion="0.50")
    ends = []
    for optimizer in ("adamw", "adamw_8bit"):
        model, random = nn.Linear(64, 64, bias=False), torch.Generator().manual_seed(0)
        nn.init.zeros_(model.weight)
        config = GRPOConfig(learning_rate=1e-3, optimizer=optimizer)
        stepper = make_optimizer(model, config, torch.device("cpu"))
        sizes = 10 ** (spread * torch.randn(64, 64, generator=random))
        for _ in range(20):
            model.weight.grad = sizes * (0.5 + torch.randn(64, 64, generator=random))
            stepper.step()
        ends.append(model.weight.detach())
    exact, eight = ends
    assert low < (exact - eight).norm() / exact.norm() < high


def test_a_run_with_eight_bits_goes_on_bit_for_bit(tmp_path):
    pytest.importorskip("bitsandbytes", minversion="0.50")
    settings = {"save_steps": 1, "learning_rate": 1e-3, "max_steps": 4, **EIGHT}
    whole = make_trainer(tmp_path / "whole", model=wide_model(), **settings)
    rows = [{k: v for k, v in r.metrics.items() if k != "step_time"} for r in whole.steps()]
    state = load_state(tmp_path / "whole" / "checkpoint-2")["optimizer"]  # read with weights_only=True
    assert torch.uint8 in {t.dtype for t in tensors_in(state)}
    again = make_trainer(tmp_path / "again", model=wide_model(), **settings)
    resumed = list(again.steps(resume=tmp_path / "whole" / "checkpoint-2"))
    assert [{k: v for k, v in r.metrics.items() if k != "step_time"} for r in resumed] == rows[2:]
    assert torch.equal(weights(whole), weights(again))
    with pytest.raises(ValueError, match="optimizer: adamw_8bit -> adamw"):
        make_trainer(tmp_path / "other", model=wide_model(), **settings | {"optimizer": "adamw"}).train(
            resume=tmp_path / "whole" / "checkpoint-2"
        )


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


# --- fp16 with loss scaling -------------------------------------------------------------------------------
# Accelerate makes a GradScaler on GPUs only. These tests use PyTorch's CPU GradScaler in float32 instead, and a hook
# that turns what fp16 cannot hold into infinity.

FP16_MAX = 65504.0


def scaled_trainer(folder, *, scale, growth_interval=1000, **settings):
    """A trainer as in fp16 on a GPU: its losses are multiplied by a scale that halves at each overflow."""
    run = make_trainer(folder, device="cpu", **settings)
    accelerator = run.accelerator
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    accelerator._optimizers.clear()
    run.components.engine.optimizer = accelerator.prepare(run.components.engine.optimizer.optimizer)
    for weight in run.model.parameters():
        weight.register_hook(lambda gradient: gradient.where(gradient.abs() < FP16_MAX, torch.inf))
    return run


def test_scaling_by_a_power_of_two_changes_nothing(tmp_path):
    plain, scaled = make_trainer(tmp_path / "plain"), scaled_trainer(tmp_path / "scaled", scale=2.0**8)
    assert [r.metrics["grad_norm"] for r in plain.steps()] == [r.metrics["grad_norm"] for r in scaled.steps()]
    assert torch.equal(weights(plain), weights(scaled))
    assert scaled.accelerator.scaler.get_scale() == 2.0**8


def test_a_scaler_that_looks_for_its_scale_skips_steps_and_stops_no_run(tmp_path):
    run = scaled_trainer(tmp_path, scale=2.0**26, max_steps=14)
    before, norms = weights(run), []
    for record in run.steps():
        norms.append(record.metrics["grad_norm"])
        skipped = norms.count(torch.inf)
        assert record.metrics["skipped_steps"] == skipped
        assert run.accelerator.scaler.get_scale() == 2.0 ** (26 - skipped)  # halved at every overflow
        assert run.components.engine.scheduler.last_epoch == record.step - skipped  # the schedule waits
        # a skipped step changes nothing, nor does one in which all groups agree
        assert torch.equal(before, weights(run)) == (norms[-1] in (0.0, torch.inf))
        assert run.components.engine.skipped_in_a_row == 0
        before = weights(run)
    assert norms[: run.config.max_skipped_steps + 1] == [torch.inf] * 6  # more in a row than a run may have otherwise
    assert any(0 < norm < torch.inf for norm in norms)


def test_what_is_not_finite_at_any_scale_still_stops_the_run(tmp_path, monkeypatch):
    run, real = scaled_trainer(tmp_path, scale=4.0, max_steps=20, max_skipped_steps=3), step.grpo_loss
    monkeypatch.setattr(step, "grpo_loss", lambda logprobs, *a, **k: real(logprobs * float("nan"), *a, **k))
    monkeypatch.setattr(step, "check_first_step", lambda c, gradients: {})
    before = weights(run)
    with pytest.raises(ArithmeticError, match="3 steps in a row"):
        list(run.steps())
    # with scales 4 and 2 it may have been the scale; with 1, 1/2 and 1/4 it was not
    assert (run.components.engine.skipped_steps, run.accelerator.scaler.get_scale()) == (5, 0.125)
    assert torch.equal(before, weights(run))


def test_a_run_goes_on_with_the_scale_it_had_found(tmp_path):
    settings = {"scale": 2.0**20, "growth_interval": 2, "max_steps": 8, "save_steps": 1}
    whole, scales = scaled_trainer(tmp_path / "whole", **settings), []
    for _ in whole.steps():
        scales.append(whole.accelerator.scaler.get_scale())
    assert len(set(scales)) > 2  # it went down and up
    for done in (1, 4):
        again = scaled_trainer(tmp_path / "again", **settings)
        found = []
        for _ in again.steps(resume=tmp_path / "whole" / f"checkpoint-{done}"):
            found.append(again.accelerator.scaler.get_scale())
        assert found == scales[done:]
        assert torch.equal(weights(whole), weights(again))
