"""Dry runs: tensors count while they live, and two short models give the cost of a deep one."""

import pytest
import torch
from conftest import ARCHITECTURES, tiny_architecture, tiny_model
from planning.test_planning import CONFIG, planned
from torch import nn

from grpo_lab.planning import dry_run, phases
from grpo_lab.planning.dry_run import LayerExtrapolation, MemoryTracker, empty_copy, size_of

DEEP = 4
VARIANTS = {
    "plain": {},
    "checkpointing": {"gradient_checkpointing": True},
    "LoRA": {"lora_rank": 2},
    "truncated, bf16": {"top_k": 5, "precision": "bf16"},
    "one micro-batch": {"gradient_accumulation_steps": 1},
    "KL in the reward, dropout": {"kl_in": "reward", "kl_estimator": "k1", "disable_dropout": False},
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [*((name, {}) for name in ARCHITECTURES), *(("qwen2", changes) for changes in VARIANTS.values())],
    ids=[*ARCHITECTURES, *VARIANTS],
)
def test_two_short_models_give_the_bytes_of_a_deep_one_exactly(monkeypatch, name, changes):
    model = tiny_architecture(name, num_hidden_layers=DEEP, vocab_size=500)
    settings = {"config": CONFIG.replace(**changes), "model": model, "machine": "H100"}
    if not changes:
        settings |= {"reward_model": model, "machine": "laptop"}
    assert len(LayerExtrapolation(model).models) == 2
    quick = planned(**settings)
    monkeypatch.setattr(dry_run, "SHORT_LAYERS", DEEP)
    assert not LayerExtrapolation(model).models
    whole = planned(**settings)
    assert quick.phases == whole.phases
    assert quick.seconds == pytest.approx(whole.seconds)


def test_another_operation_may_have_the_highest_peak_with_many_layers():
    config = CONFIG.replace(batch_size=1, gradient_accumulation_steps=1, num_generations_per_prompt=2, max_new_tokens=8)
    model = tiny_model(num_hidden_layers=12, vocab_size=1500, intermediate_size=512)
    shape = phases.Shape.of(config, model, "fp32", 10)

    def update(copy):
        return phases._update(copy, shape)

    def highest(cost):
        return max(cost.peaks, key=lambda moment: sum(cost.peaks[moment].values()))

    extrapolation = LayerExtrapolation(model, lambda copy: phases._prepare(copy, config))
    whole = update(phases._prepare(empty_copy(model), config))
    found = extrapolation.evaluate(update)
    assert highest(update(extrapolation.models[0]))[1] == (1500, 32)  # accumulating the embedding's gradient
    assert highest(found)[1] == highest(whole)[1] == (32, 512)  # the first layer's gradient, after all others
    assert found.peaks == whole.peaks
    assert found.peak == whole.peak


def test_layers_that_differ_are_all_run():
    alternating = tiny_architecture("gemma2", num_hidden_layers=DEEP)  # every other layer has a sliding window
    assert not LayerExtrapolation(alternating).models
    other = tiny_model(num_hidden_layers=DEEP)
    other.model.layers[3].mlp.up_proj.weight.requires_grad_(False)
    assert not LayerExtrapolation(other).models


def test_what_does_not_grow_linearly_is_run_on_the_whole_model():
    model = tiny_model(num_hidden_layers=DEEP)
    layers = lambda copy: len(copy.model.layers)  # noqa: E731
    assert LayerExtrapolation(model).evaluate(lambda copy: {"layers": layers(copy)}) == {"layers": DEEP}
    assert LayerExtrapolation(model).evaluate(lambda copy: {layers(copy): 1}) == {DEEP: 1}
    assert LayerExtrapolation(model).evaluate(lambda copy: [1] * layers(copy)) == [1] * DEEP


def test_an_empty_copy_keeps_tied_weights_and_takes_no_memory():
    model = tiny_model(tie_word_embeddings=True)
    copy = empty_copy(model)
    assert copy.lm_head.weight is copy.model.embed_tokens.weight
    assert {p.device.type for p in copy.parameters()} == {"meta"}
    assert size_of(copy.parameters()) == size_of(model.parameters())


def test_a_tensor_counts_while_it_lives():
    tracker = MemoryTracker(fake=False)
    with tracker:
        first = torch.ones(10)
        second = first + 1
        view = second.view(2, 5)
        del second
        assert tracker.live["activations"] == 80  # the view keeps the storage
        del view
    assert tracker.live["activations"] == 40
    assert max(sum(live.values()) for live in tracker.peaks.values()) == 80


@pytest.mark.parametrize("number", [1, 1.0, True, torch.tensor(1)])
def test_a_remembered_output_is_what_pytorch_would_return(number):
    for _ in range(2):  # the second time from the cache
        tracker = MemoryTracker()
        weights = empty_copy(nn.Linear(4, 4), tracker.fake_mode)
        with tracker, torch.no_grad():
            for half in (weights.weight.int(), weights.weight.half()):
                expected = torch.ones(4, 4, dtype=half.dtype) * number
                assert (half * number).dtype == expected.dtype
                assert (half.t() * number).stride() == (torch.ones(4, 4, dtype=half.dtype).t() * number).stride()
