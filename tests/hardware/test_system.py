"""CPU cores, threads and free memory, with the limits of a container."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from grpo_lab.hardware import system


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
