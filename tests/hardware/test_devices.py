"""Devices, precision, optimizers and threads."""

import os
import platform
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ARCHITECTURES, tiny_architecture, tiny_model
from safetensors.torch import load_file
from torch import nn
from trainers import make_trainer, weights
from transformers import MambaConfig

from grpo_lab import GRPOConfig
from grpo_lab.hardware import devices, system
from grpo_lab.models import preparation
from grpo_lab.models.forward import cache_of
from grpo_lab.training import memory, step
from grpo_lab.training.checkpoints import load_state
from grpo_lab.training.optimizer import make_optimizer


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("100000 100000", 1), ("250000 100000", 2), ("50000 100000", 1)]
)
def test_threads_follow_the_containers_quota(monkeypatch, quota, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda *_: quota + "\n")
    assert system.available_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("100000", 1), ("250000", 2), ("50000", 1)])
def test_threads_follow_the_quota_of_older_kernels_too(monkeypatch, quota, cores):
    monkeypatch.setattr(system.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"}

    def read(path):
        if path.name not in files:
            raise FileNotFoundError(path)
        return files[path.name] + "\n"

    monkeypatch.setattr(Path, "read_text", read)
    assert system.available_cores() == cores


@pytest.mark.parametrize(("processes", "cores"), [("2", 4), ("3", 2), ("16", 1)])
def test_processes_of_one_run_share_the_cores(monkeypatch, processes, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda *_: "max 100000\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert system.available_cores() == cores


def test_a_small_model_gets_one_thread_and_a_large_one_all_cores(monkeypatch):
    monkeypatch.setattr(system, "available_cores", lambda: 4)
    assert system.threads_for(nn.Linear(10, 10)) == 1
    assert system.threads_for(nn.Linear(4000, 4000)) == 4


def test_auto_precision_is_half_only_where_the_gpu_can(monkeypatch):
    assert devices.resolve_precision("auto", "cpu") == devices.resolve_precision("auto", "mps") == "fp32"
    for real, expected in ((True, "bf16"), (False, "fp16")):
        # a T4 emulates bf16: it says yes unless it is asked not to count that
        def supported(including_emulation=True, real=real):
            return including_emulation or real

        monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
        assert devices.resolve_precision("auto", "cuda") == expected


def test_autocast_computes_in_half_precision_and_fp32_in_full():
    product = nn.Linear(4, 4)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with devices.autocast(torch.device("cpu"), precision):
            assert product(torch.ones(1, 4)).dtype == dtype


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


# --- fp16 with loss scaling -------------------------------------------------------------------------------
# Accelerate makes a scaler on GPUs only. Here PyTorch's works on a CPU in its place, in float32, and a hook takes what
# fp16 cannot hold for infinite.

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
    monkeypatch.setattr(run, "_check_first_update", lambda sums: None)
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


def test_adamw_is_fused_where_it_can_be_and_takes_trained_weights_alone():
    model, config = tiny_model(), GRPOConfig(learning_rate=0.5, weight_decay=0.25)
    model.model.embed_tokens.weight.requires_grad_(False)
    for device, fused in (("cpu", True), ("cuda", True), ("mps", False)):
        optimizer = make_optimizer(model, config, torch.device(device))
        (group,) = optimizer.param_groups
        assert (type(optimizer), group["fused"]) == (torch.optim.AdamW, fused)
        assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
        assert len(group["params"]) == len(list(model.parameters())) - 1


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


# --- what is left as it is --------------------------------------------------------------------------------


def test_frozen_weights_keep_their_precision_and_buffers_theirs():
    policy = tiny_model().bfloat16()
    policy.model.embed_tokens.weight.requires_grad_(False)
    preparation.trainable_in_float32(policy)
    reference = tiny_model()
    preparation.match_precision(reference, policy)
    assert reference.model.embed_tokens.weight.dtype == torch.bfloat16
    assert reference.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert reference.model.rotary_emb.inv_freq.dtype == torch.float32


def test_every_kind_of_dropout_is_found():
    model = tiny_model(attention_dropout=0.5)
    model.extra = nn.Dropout(0.3)
    preparation.disable_dropout(model)
    assert model.extra.p == model.model.layers[0].self_attn.attention_dropout == 0.0
    assert model.config.attention_dropout == 0.5  # what is saved still says how it was made


@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in platform.libc_ver()[0], reason="glibc's allocator")
def test_freed_memory_goes_back_to_the_system_where_checkpointing_asks_for_it():
    code = """
import psutil, torch
from grpo_lab.hardware.system import return_freed_memory

def kept():  # MiB that are still held after 60 of 61 blocks of 4 MiB are freed
    torch.ones(2**22)  # a block of 16 MiB that is freed teaches glibc to keep smaller ones
    before = psutil.Process().memory_info().rss
    blocks = [torch.ones(2**20) for _ in range(61)]
    del blocks[:-1]
    return (psutil.Process().memory_info().rss - before) / 2**20

without = kept()
return_freed_memory()
print(without > 200, kept() < 20)
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "True True\n"


def test_what_is_free_is_what_the_machine_and_its_container_have(monkeypatch, tmp_path):
    monkeypatch.setattr(system, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * 10**9, available=8 * 10**9))
    assert (system.free_memory("cpu"), system.container_memory()) == (8 * 10**9, None)
    (tmp_path / "memory.max").write_text(f"{2 * 10**9}\n")
    (tmp_path / "memory.stat").write_text("anon 500000000\nfile 9\n")
    assert (system.free_memory("cpu"), system.container_memory()) == (15 * 10**8, (2 * 10**9, 5 * 10**8))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7, 9))
    assert system.free_memory("cuda") == 7


# --- how much is sampled at a time -------------------------------------------------------------------------


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
