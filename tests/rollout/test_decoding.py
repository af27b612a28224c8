"""The cache of fixed size that CUDA graphs need says what the growing one says; here without the graph."""

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
    """As on CUDA, except that the step is not captured. Returns the shapes of what is made: rows, columns."""
    made = []
    init = decoding.CudaGraphDecoder.__init__
    monkeypatch.setattr(decoding, "can_capture", lambda *_: True)
    monkeypatch.setattr(
        decoding.CudaGraphDecoder, "__init__", lambda self, *a: (init(self, *a), made.append(a[1:3]))[0]
    )
    return made


@pytest.mark.parametrize("settings", [TRUNCATIONS[0], TRUNCATIONS[3]], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "llama", "qwen2"])
def test_a_cache_of_fixed_size_gives_the_same_completions(request, monkeypatch, name, settings):
    model = tiny_architecture(name)
    growing = draw(model, **settings)
    made = request.getfixturevalue("fixed")
    fixed = draw(model, **settings)
    assert texts(fixed) == texts(growing)
    assert torch.allclose(fixed.logprobs, growing.logprobs, atol=1e-5)
    width = growing.input_ids.shape[1] - growing.num_tokens
    assert made == [(len(growing.input_ids), width + T)]


def test_in_half_precision_too_where_rotated_keys_come_in_float32(request, model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        growing = draw(model)
        made = request.getfixturevalue("fixed")
        fixed = draw(model)
    assert len(made) == 1
    assert texts(fixed) == texts(growing)
    assert torch.allclose(fixed.logprobs, growing.logprobs, atol=1e-5)


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma2"])  # of gemma2 the whole model is called, not its body
def test_the_cache_is_called_as_this_transformers_calls_it(monkeypatch, recwarn, name, capture):
    logged = []  # some deprecations are logged, and only once in a process
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, message, *args: logged.append(message))
    monkeypatch.setattr(decoding, "can_capture", lambda *_: capture)
    model = tiny_architecture(name)
    rollouts = draw(model)
    completion_logprobs(model, rollouts.input_ids, rollouts.attention_mask, rollouts.num_tokens)
    said = logged + [str(warning.message) for warning in recwarn]
    assert [message for message in said if "past_key_values" in message or "`cache`" in message] == []


class Casts(TorchDispatchMode):
    """Counts how often a weight is cast to half precision."""

    def __init__(self, model):
        super().__init__()
        self.number, self.shapes = 0, {p.shape for p in model.parameters() if p.dim() == 2}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten._to_copy.default and args[0].shape in self.shapes
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("capture", [False, True])
def test_under_autocast_the_weights_are_cast_once_in_a_rollout(model, monkeypatch, capture):
    monkeypatch.setattr(decoding, "can_capture", lambda *_: capture)
    matrices = 2 * 7 + 1  # of two layers, and the head
    for tokens in (2, 9):
        with torch.autocast("cpu", dtype=torch.bfloat16), Casts(model) as casts:
            draw(model, numbers=uniforms(len(PROMPTS) * K, tokens), ends=[])
        assert casts.number == matrices


@pytest.mark.parametrize("name", ["bloom", "mistral"])
def test_a_model_that_refuses_is_sampled_all_the_same_and_that_is_said_once(name, fixed, recwarn):
    model = tiny_architecture(name, **({"sliding_window": 4} if name == "mistral" else {}))
    first, second = draw(model), draw(model)
    assert [str(w.message) for w in recwarn if "without a CUDA graph" in str(w.message)] != []
    assert len(recwarn) == 1
    assert texts(first) == texts(second)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("half", [False, True])
def test_a_captured_step_gives_the_completions_of_a_growing_cache(monkeypatch, half):
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
