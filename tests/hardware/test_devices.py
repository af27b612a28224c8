"""Precision of a run: which one "auto" is, and what autocast computes in."""

import torch
from torch import nn

from grpo_lab.hardware import devices


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
