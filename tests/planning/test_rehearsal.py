"""The rehearsal: what is made is counted while it lives, and a deep model is known from two short ones."""

import pytest
import torch
from conftest import ARCHITECTURES, tiny_architecture, tiny_model
from planning.test_planning import CONFIG, planned
from torch import nn

from grpo_lab.planning import phases, rehearsal
from grpo_lab.planning.rehearsal import LayerExtrapolation, Rehearsal, emptied, size_of

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
def test_a_deep_model_takes_to_the_byte_what_follows_from_two_short_ones(monkeypatch, name, changes):
    model = tiny_architecture(name, num_hidden_layers=DEEP, vocab_size=500)
    settings = {"config": CONFIG.replace(**changes), "model": model, "machine": "H100"}
    if not changes:
        settings |= {"reward_model": model, "machine": "laptop"}
    assert len(LayerExtrapolation(model).models) == 2
    quick = planned(**settings)
    monkeypatch.setattr(rehearsal, "FEW", DEEP)
    assert not LayerExtrapolation(model).models
    whole = planned(**settings)
    assert quick.phases == whole.phases
    assert quick.seconds == pytest.approx(whole.seconds)


def test_another_moment_may_be_the_highest_where_layers_are_many():
    config = CONFIG.replace(batch_size=1, gradient_accumulation_steps=1, num_generations_per_prompt=2, max_new_tokens=8)
    model = tiny_model(num_hidden_layers=12, vocab_size=1500, intermediate_size=512)
    shape = phases.Shape.of(config, model, "fp32", 10)

    def update(copy):
        return phases._update(copy, shape)

    def highest(count):
        return max(count.moments, key=lambda moment: sum(count.moments[moment].values()))

    depths = LayerExtrapolation(model, lambda copy: phases._prepared(copy, config))
    whole = update(phases._prepared(emptied(model), config))
    found = depths.each(update)
    assert highest(update(depths.models[0]))[1] == (1500, 32)  # the embedding's gradient is added up
    assert highest(found)[1] == highest(whole)[1] == (32, 512)  # the first layer's, when all others are there
    assert found.moments == whole.moments
    assert found.peak == whole.peak


def test_layers_that_differ_are_all_rehearsed():
    assert not LayerExtrapolation(tiny_architecture("gemma2", num_hidden_layers=DEEP)).models  # every other one slides
    other = tiny_model(num_hidden_layers=DEEP)
    other.model.layers[3].mlp.up_proj.weight.requires_grad_(False)
    assert not LayerExtrapolation(other).models


def test_what_does_not_grow_evenly_is_rehearsed_whole():
    model = tiny_model(num_hidden_layers=DEEP)
    layers = lambda copy: len(copy.model.layers)  # noqa: E731
    assert LayerExtrapolation(model).each(lambda copy: {"layers": layers(copy)}) == {"layers": DEEP}
    assert LayerExtrapolation(model).each(lambda copy: {layers(copy): 1}) == {DEEP: 1}
    assert LayerExtrapolation(model).each(lambda copy: [1] * layers(copy)) == [1] * DEEP


def test_a_model_without_contents_shares_what_the_model_shares_and_takes_no_memory():
    model = tiny_model(tie_word_embeddings=True)
    hollow = emptied(model)
    assert hollow.lm_head.weight is hollow.model.embed_tokens.weight
    assert {p.device.type for p in hollow.parameters()} == {"meta"}
    assert size_of(hollow.parameters()) == size_of(model.parameters())


def test_what_is_made_is_counted_while_it_lives():
    stage = Rehearsal(pretend=False)
    with stage:
        first = torch.ones(10)
        second = first + 1
        view = second.view(2, 5)
        del second
        assert stage.live["activations"] == 80  # the view holds what it looks at
        del view
    assert stage.live["activations"] == 40
    assert max(sum(parts.values()) for parts in stage.moments.values()) == 80


@pytest.mark.parametrize("number", [1, 1.0, True, torch.tensor(1)])
def test_what_was_seen_before_comes_out_as_pytorch_would_make_it(number):
    for _ in range(2):  # the second time it is remembered
        stage = Rehearsal()
        weights = emptied(nn.Linear(4, 4), stage.fake)
        with stage, torch.no_grad():
            for half in (weights.weight.int(), weights.weight.half()):
                expected = torch.ones(4, 4, dtype=half.dtype) * number
                assert (half * number).dtype == expected.dtype
                assert (half.t() * number).stride() == (torch.ones(4, 4, dtype=half.dtype).t() * number).stride()
