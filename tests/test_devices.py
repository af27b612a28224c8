"""Devices, precision and threads."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import tiny_model
from torch import nn

from grpo_lab import devices


@pytest.mark.parametrize(
    ("quota", "cores"), [("max 100000", 8), ("100000 100000", 1), ("250000 100000", 2), ("50000 100000", 1)]
)
def test_threads_follow_the_containers_quota(monkeypatch, quota, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda *_: quota + "\n")
    assert devices.available_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 8), ("100000", 1), ("250000", 2), ("50000", 1)])
def test_threads_follow_the_quota_of_older_kernels_too(monkeypatch, quota, cores):
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    files = {"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"}

    def read(path):
        if path.name not in files:
            raise FileNotFoundError(path)
        return files[path.name] + "\n"

    monkeypatch.setattr(Path, "read_text", read)
    assert devices.available_cores() == cores


def test_a_small_model_gets_one_thread_and_a_large_one_all_cores(monkeypatch):
    monkeypatch.setattr(devices, "available_cores", lambda: 4)
    assert devices.threads_for(nn.Linear(10, 10)) == 1
    assert devices.threads_for(nn.Linear(4000, 4000)) == 4


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


def test_an_update_at_a_usual_learning_rate_is_lost_in_bf16_and_kept_in_float32():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(model.weight)
    lost = model.weight.data - 1e-6  # what Adam subtracts at learning rate 1e-6
    assert lost.item() == 1.0
    devices.trainable_in_float32(model)
    assert (model.weight.data - 1e-6).item() < 1.0


def test_frozen_weights_keep_their_precision_and_buffers_theirs():
    policy = tiny_model().bfloat16()
    policy.model.embed_tokens.weight.requires_grad_(False)
    devices.trainable_in_float32(policy)
    reference = tiny_model()
    devices.match_precision(reference, policy)
    assert reference.model.embed_tokens.weight.dtype == torch.bfloat16
    assert reference.model.layers[0].mlp.up_proj.weight.dtype == torch.float32
    assert reference.model.rotary_emb.inv_freq.dtype == torch.float32


def test_every_kind_of_dropout_is_found():
    model = tiny_model(attention_dropout=0.5)
    model.extra = nn.Dropout(0.3)
    devices.disable_dropout(model)
    assert model.extra.p == model.model.layers[0].self_attn.attention_dropout == 0.0
    assert model.config.attention_dropout == 0.5  # what is saved still says how it was made


@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in platform.libc_ver()[0], reason="glibc's allocator")
def test_freed_memory_goes_back_to_the_system_where_checkpointing_asks_for_it():
    code = """
import psutil, torch
from grpo_lab.devices import return_freed_memory

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
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * 10**9, available=8 * 10**9))
    assert (devices.free_memory("cpu"), devices.container_memory()) == (8 * 10**9, None)
    (tmp_path / "memory.max").write_text(f"{2 * 10**9}\n")
    (tmp_path / "memory.stat").write_text("anon 500000000\nfile 9\n")
    assert (devices.free_memory("cpu"), devices.container_memory()) == (15 * 10**8, (2 * 10**9, 5 * 10**8))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7, 9))
    assert devices.free_memory("cuda") == 7
