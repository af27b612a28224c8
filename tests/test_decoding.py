"""The cache of fixed size that CUDA graphs need says what the growing one says; here without the graph."""

import pytest
import torch
from conftest import tiny_architecture, tiny_model
from test_sampling import PROMPTS, TRUNCATIONS, draw, texts

from grpo_lab import decoding
from grpo_lab.sampling import sample


@pytest.fixture
def fixed(monkeypatch):
    """As on CUDA, except that the step is not captured."""
    monkeypatch.setattr(decoding, "can_capture", lambda device: True)


@pytest.mark.parametrize("settings", [TRUNCATIONS[0], TRUNCATIONS[3]], ids=str)
@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "llama", "qwen2"])
def test_a_cache_of_fixed_size_gives_the_same_completions(monkeypatch, name, settings):
    model = tiny_architecture(name)
    growing = draw(model, **settings)
    monkeypatch.setattr(decoding, "can_capture", lambda device: True)
    for _ in range(2):  # the second time with what the first has left in the cache
        fixed = draw(model, **settings)
        assert texts(fixed) == texts(growing)
        assert torch.allclose(fixed.logprobs, growing.logprobs, atol=1e-5)
    (key, captured), (rows, _) = decoding._captured[model], growing.input_ids.shape
    assert captured.ids.shape == (rows, 1)
    assert key[1] == captured.mask.shape[-1] == decoding.ROUND


def test_a_shorter_prompt_does_not_see_what_a_longer_one_left(model, fixed, monkeypatch):
    draw(model, [[9, 3, 4, 5, 6, 7, 8]] * 3)
    captured = decoding._captured[model][1]
    again = draw(model, [[5], [6], [7]])
    assert decoding._captured[model][1] is captured
    monkeypatch.setattr(decoding, "can_capture", lambda device: False)
    assert texts(again) == texts(draw(model, [[5], [6], [7]]))


def test_weights_that_moved_or_other_sizes_need_another_cache(model, fixed):
    draw(model)
    first = decoding._captured[model][1]
    draw(model, PROMPTS[:2])
    second = decoding._captured[model][1]
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.clone()
    draw(model, PROMPTS[:2])
    assert len({id(x) for x in (first, second, decoding._captured[model][1])}) == 3


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
    numbers = torch.rand(12, 30, generator=torch.Generator().manual_seed(0))
    settings = {"num_generations": 4, "uniforms": numbers, "end_ids": [], "pad_id": 0}
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=half):
        captured = [sample(model, **inputs, **settings) for _ in range(2)]
        assert decoding._captured[model][1].graph is not None
        monkeypatch.setattr(decoding, "can_capture", lambda device: False)
        growing = sample(model, **inputs, **settings)
    for rollouts in captured:
        if not half:
            assert torch.equal(rollouts.input_ids, growing.input_ids)
        assert torch.allclose(rollouts.logprobs[:, 0], growing.logprobs[:, 0], atol=0.05 if half else 1e-4)


def _padded():
    from grpo_lab.sampling import left_pad

    return left_pad(PROMPTS, 0)
