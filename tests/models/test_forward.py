"""One forward pass over prompts and completions: dedup, a separate head and padding change no result."""

import pytest
import torch
from conftest import ARCHITECTURES, tiny_architecture, tiny_model
from rows import Bigram, batch
from torch import nn

from grpo_lab.models import forward
from grpo_lab.models.forward import completion_logits, evaluating
from grpo_lab.models.preparation import enable_checkpointing
from grpo_lab.rollout.sampling import left_pad, sample
from grpo_lab.rollout.scoring import completion_logprobs, completion_scores

K = 4
# a window that is full before the prompt ends; logits that are capped; convolutions between the attention layers
MORE = {"mistral": {"sliding_window": 4}, "gemma2": {"sliding_window": 4}, "lfm2": {"full_attn_idxs": [1]}}


def rollouts(model):
    """Completions of three prompts, one of them padded."""
    uniforms = torch.rand(3 * K, 6, generator=torch.Generator().manual_seed(0))
    input_ids, mask = left_pad([[5], [6, 7, 8, 9, 3, 4, 5], [9, 3, 4, 5, 6, 7, 8]], 0)
    return sample(model, input_ids, mask, num_generations=K, uniforms=uniforms, end_ids=[1], pad_id=0)


def scored(model, rows, *, dedup):
    model.zero_grad()
    scores = completion_scores(model, rows.input_ids, rows.attention_mask, rows.num_tokens, dedup=dedup)
    scores.logprobs.square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return scores.logprobs.detach(), scores.entropies, gradient


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_a_prompt_computed_once_gives_the_same_scores_and_gradients(name):
    model = tiny_architecture(name, **MORE.get(name, {}))
    rows = rollouts(model)
    for shared, apart in zip(scored(model, rows, dedup=True), scored(model, rows, dedup=False), strict=True):
        assert torch.allclose(shared, apart, rtol=1e-5, atol=1e-5 * apart.abs().max().item())


def passes(model, monkeypatch) -> list[tuple[int, int]]:
    """Record the batch and sequence sizes of the first layer's inputs."""
    seen, layer = [], model.model.layers[0]
    forward.completion_states(model, torch.ones(1, 2).long(), torch.ones(1, 2).long(), 1)  # checks body and head
    whole = layer.forward
    monkeypatch.setattr(layer, "forward", lambda x, *a, **k: seen.append(tuple(x.shape[:2])) or whole(x, *a, **k))
    return seen


def test_equal_prompts_and_equal_rows_are_computed_once(model, monkeypatch):
    rows, seen = rollouts(model), passes(model, monkeypatch)
    order = torch.tensor([3, 0, 7, 7, 11, 0])  # two rows twice, and prompts apart from one another
    some = rows.select(order)
    values = completion_logprobs(model, some.input_ids, some.attention_mask, some.num_tokens)
    assert seen == [(3, 7), (4, some.num_tokens - 1)]
    whole = completion_logprobs(model, rows.input_ids, rows.attention_mask, rows.num_tokens, dedup=False)
    assert seen[2:] == [(3 * K, 7 + rows.num_tokens - 1)]
    assert torch.allclose(values, whole[order, : some.num_tokens], atol=1e-5)
    assert torch.equal(values[2], values[3])


def test_rows_with_other_kept_ids_are_not_equal(model):
    rows = rollouts(model).select(torch.tensor([0, 0]))
    drawn = rows.completion_ids[..., None]
    kept = torch.cat([drawn, torch.full_like(drawn, -1)], -1)
    kept[1, :, 1] = drawn[1, :, 0] ^ 1  # two tokens could have been drawn here, there one
    alone, among_two = completion_logprobs(model, rows.input_ids, rows.attention_mask, rows.num_tokens, kept=kept)
    assert alone.abs().max() == 0
    assert among_two.max() < 0


def test_completions_of_one_token_need_only_the_prompt(model):
    rows = rollouts(model)
    one = rows.input_ids[:, :8], rows.attention_mask[:, :8], 1
    shared, apart = (completion_logprobs(model, *one, dedup=dedup) for dedup in (True, False))
    assert torch.allclose(shared, apart, atol=1e-6)


def test_where_activations_are_recomputed_prompts_are_not_shared_and_the_gradient_is_the_same(model):
    rows = rollouts(model)
    expected = scored(model, rows, dedup=True)
    enable_checkpointing(model)
    model.train()
    for one, other in zip(scored(model, rows, dedup=True), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize(("name", "apart"), [("qwen2", True), ("gpt2", True), ("gemma2", False), ("cohere", False)])
def test_the_head_is_called_separately_only_if_nothing_else_follows_the_body(name, apart):
    model = tiny_architecture(name)
    rows = rollouts(model)
    head = forward.completion_states(model, rows.input_ids, rows.attention_mask, rows.num_tokens)[1]
    assert (head is model.get_output_embeddings()) == apart
    whole = model(
        input_ids=rows.input_ids[-1:], attention_mask=rows.attention_mask[-1:]
    ).logits  # no padding on the left
    ours = completion_logits(model, rows.input_ids, rows.attention_mask, rows.num_tokens)[-1:]
    assert torch.allclose(ours, whole[:, -rows.num_tokens - 1 : -1], atol=1e-5)


def test_a_model_whose_body_cannot_be_called_separately_is_called_whole(model, monkeypatch):
    rows = rollouts(model)
    expected = completion_logprobs(model, rows.input_ids, rows.attention_mask, rows.num_tokens)
    again = tiny_model()
    monkeypatch.setattr(type(again), "base_model_prefix", "lm_head")  # takes no input_ids
    values = completion_logprobs(again, rows.input_ids, rows.attention_mask, rows.num_tokens)
    assert not forward._separable[again]
    assert torch.allclose(values, expected, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [0, 12, 13])
def test_a_completion_needs_a_token_and_a_prompt(model, num_tokens):
    with pytest.raises(ValueError, match=f"at least one column of prompt: got {num_tokens} of 12 columns"):
        completion_logprobs(model, *batch(), num_tokens)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_turns_dropout_off_and_restores_the_mode_even_after_an_error(training):
    net = nn.Sequential(nn.Dropout(0.9)).train(training)
    with evaluating(net):
        assert torch.equal(net(torch.ones(100)), torch.ones(100))
    assert net.training == net[0].training == training
    with pytest.raises(KeyError), evaluating(net):
        raise KeyError
    assert net.training == net[0].training == training


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # from peft
def test_wrappers_do_not_hide_what_a_model_takes(model):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    distributed = nn.Module()  # DistributedDataParallel keeps the model as .module and takes anything
    distributed.module = model
    for outer in (model, wrapped, distributed):
        assert forward.accepts(outer, "position_ids")
        assert not forward.accepts(outer, "position")
    assert forward.position_ids(Bigram(), torch.ones(1, 4)) == {}
    assert forward.position_ids(model, torch.tensor([[0, 0, 1, 1, 1]]))["position_ids"].tolist() == [[0, 0, 0, 1, 2]]
