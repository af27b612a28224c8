"""The static cache that CUDA graphs need gives what the dynamic one gives; here without the graph."""

import logging

import pytest
import torch
from conftest import tiny_architecture, tiny_model
from rollouts import PROMPTS, TRUNCATIONS, K, T, draw, texts, uniforms
from torch.utils._python_dispatch import TorchDispatchMode

from grpo_lab.rollout import decoding
from grpo_lab.rollout.sampling import sample
from grpo_lab.rollout.scoring import completion_logprobs


@pytest.fixture
def fixed(monkeypatch):
    """Use the CUDA decoder without capturing its step. Returns the rows and columns of each decoder made."""
    made = []
    init = decoding.CudaGraphDecoder.__init__
    monkeypatch.setattr(decoding, "can_capture", lambda *_: True)
    monkeypatch.setattr(
        decoding.CudaGraphDecoder, "__init__", lambda self, *a: (init(self, *a), made.append(a[1:3]))[0]
    )
    return made


@pytest.mark.parametrize("settings", [TRUNCATIONS[0], TRUNCATIONS[3]], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "llama", "qwen2"])
def test_a_static_cache_gives_the_same_completions(request, monkeypatch, name, settings):
    model = tiny_architecture(name)
    growing = draw(model, **settings)
    made = request.getfixturevalue("fixed")
    fixed = draw(model, **settings)
    assert texts(fixed) == texts(growing)
    assert torch.allclose(fixed.logprobs, growing.logprobs, atol=1e-5)
    width = growing.input_ids.shape[1] - growing.num_tokens
    assert made == [(len(growing.input_ids), width + T)]


def test_a_static_cache_takes_float32_keys_under_autocast(request, model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        growing = draw(model)
        made = request.getfixturevalue("fixed")
        fixed = draw(model)
    assert len(made) == 1
    assert texts(fixed) == texts(growing)
    assert torch.allclose(fixed.logprobs, growing.logprobs, atol=1e-5)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma2"])  # gemma2 is called whole, not body and head
def test_the_cache_argument_has_the_name_of_the_installed_transformers(monkeypatch, recwarn, name, capture):
    logged = []  # some deprecations are logged, and only once in a process
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, message, *args: logged.append(message))
    monkeypatch.setattr(decoding, "can_capture", lambda *_: capture)
    model = tiny_architecture(name)
    rollouts = draw(model)
    completion_logprobs(model, rollouts.input_ids, rollouts.attention_mask, rollouts.num_tokens)
    said = logged + [str(warning.message) for warning in recwarn]
    assert [message for message in said if "past_key_values" in message or "`cache`" in message] == []


class Casts(TorchDispatchMode):
    """Count how often a weight is cast to half precision."""

    def __init__(self, model):
        super().__init__()
        self.number, self.shapes = 0, {p.shape for p in model.parameters() if p.dim() == 2}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._to_copy.default and args[0].shape in self.shapes
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("capture", [False, True])
def test_under_autocast_the_weights_are_cast_once_in_a_rollout(model, monkeypatch, capture):
    monkeypatch.setattr(decoding, "can_capture", lambda *_: capture)
    matrices = 2 * 7 + 1  # in two layers, and the head
    for tokens in (2, 9):
        with torch.autocast("cpu", dtype=torch.bfloat16), Casts(model) as casts:
            draw(model, numbers=uniforms(len(PROMPTS) * K, tokens), ends=[])
        assert casts.number == matrices


@pytest.mark.parametrize("name", ["bloom", "mistral"])
def test_a_model_without_cuda_graph_support_is_sampled_with_one_warning(name, fixed, recwarn):
    model = tiny_architecture(name, **({"sliding_window": 4} if name == "mistral" else {}))
    first, second = draw(model), draw(model)
    assert [str(w.message) for w in recwarn if "without a CUDA graph" in str(w.message)] != []
    assert len(recwarn) == 1
    assert texts(first) == texts(second)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("half", [False, True])
def test_a_captured_step_gives_the_completions_of_a_dynamic_cache(monkeypatch, half):
    model = tiny_model().cuda()
    inputs = {name: x.cuda() for name, x in zip(("input_ids", "attention_mask"), _padded(), strict=True)}
    numbers = torch.rand(12, 40, generator=torch.Generator().manual_seed(0))
    settings = {"num_generations": 4, "uniforms": numbers, "end_ids": [], "pad_id": 0}
    captures, capture = [], decoding.CudaGraphDecoder._capture
    monkeypatch.setattr(
        decoding.CudaGraphDecoder, "_capture", lambda self: (capture(self), captures.append(self.graph))[0]
    )
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
        captured = [sample(model, **inputs, **settings) for _ in range(2)]
        assert len(captures) == 2
        assert None not in captures
        monkeypatch.setattr(decoding, "can_capture", lambda *_: False)
        growing = sample(model, **inputs, **settings)
    for rollouts in captured:
        if not half:
            assert torch.equal(rollouts.input_ids, growing.input_ids)
        assert torch.allclose(rollouts.logprobs[:, 0], growing.logprobs[:, 0], atol=0.05 if half else 1e-4)


def _padded():
    from grpo_lab.rollout.sampling import left_pad

    return left_pad(PROMPTS, 0)
