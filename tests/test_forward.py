"""One pass over prompts and completions: shared prompts, a head apart and padding change no number."""

import pytest
import torch
from conftest import ARCHITECTURES, tiny_architecture, tiny_model
from test_scoring import Bigram, T, batch
from torch import nn

from grpo_lab import forward
from grpo_lab.devices import enable_checkpointing
from grpo_lab.forward import completion_logits, evaluating
from grpo_lab.sampling import left_pad, sample
from grpo_lab.scoring import completion_logprobs, completion_scores

K = 4
# a window that is full before the prompt ends; logits that are capped; convolutions between the attention layers
MORE = {"mistral": {"sliding_window": 4}, "gemma2": {"sliding_window": 4}, "lfm2": {"full_attn_idxs": [1]}}


def rollouts(model):
    """Completions of three prompts, two of them padded, with the gradient of everything that scoring gives."""
    uniforms = torch.rand(3 * K, 6, generator=torch.Generator().manual_seed(0))
    input_ids, mask = left_pad([[5], [6, 7, 8], [9, 3, 4, 5, 6, 7, 8]], 0)
    return sample(model, input_ids, mask, num_generations=K, uniforms=uniforms, end_ids=[1], pad_id=0)


def scored(model, rows, num_generations):
    model.zero_grad()
    scores = completion_scores(
        model, rows.input_ids, rows.attention_mask, rows.num_tokens, num_generations=num_generations
    )
    scores.logprobs.square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return scores.logprobs.detach(), scores.entropies, gradient


@pytest.mark.parametrize("name", [*ARCHITECTURES, *MORE])
def test_a_prompt_read_once_for_its_completions_is_as_good_as_read_with_each(name):
    model = tiny_architecture(name, **MORE.get(name, {}))
    rows = rollouts(model)
    for shared, apart in zip(scored(model, rows, K), scored(model, rows, 1), strict=True):
        assert torch.allclose(shared, apart, rtol=1e-5, atol=1e-5 * apart.abs().max().item())


def test_a_shared_prompt_is_read_once(model, monkeypatch):
    rows, seen = rollouts(model), []
    monkeypatch.setattr(
        model.model.layers[0], "forward", spied(model.model.layers[0].forward, lambda x: seen.append(x.shape[:2]))
    )
    completion_logprobs(model, rows.input_ids, rows.attention_mask, rows.num_tokens, num_generations=K)
    assert seen[-2:] == [(3, 7), (3 * K, rows.num_tokens - 1)]  # before them the model was asked for its head


def test_completions_of_one_token_need_the_prompt_alone(model):
    rows = rollouts(model)
    one = rows.input_ids[:, :8], rows.attention_mask[:, :8], 1
    shared, apart = (completion_logprobs(model, *one, num_generations=n) for n in (K, 1))
    assert torch.allclose(shared, apart, atol=1e-6)


def test_rows_of_different_prompts_cannot_share_one(model):
    with pytest.raises(ValueError, match="every 3 rows that follow one another must have the same prompt"):
        completion_logprobs(model, *batch(), T, num_generations=3)


def test_where_activations_are_recomputed_prompts_are_not_shared_and_the_gradient_is_the_same(model):
    rows = rollouts(model)
    expected = scored(model, rows, K)
    enable_checkpointing(model)
    model.train()
    for one, other in zip(scored(model, rows, K), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize(("name", "apart"), [("qwen2", True), ("gpt2", True), ("gemma2", False), ("cohere", False)])
def test_a_head_that_is_not_all_that_follows_the_body_is_not_taken_alone(name, apart):
    model = tiny_architecture(name)
    rows = rollouts(model)
    head = forward.completion_states(model, rows.input_ids, rows.attention_mask, rows.num_tokens)[1]
    assert (head is model.get_output_embeddings()) == apart
    whole = model(
        input_ids=rows.input_ids[-1:], attention_mask=rows.attention_mask[-1:]
    ).logits  # no padding on the left
    ours = completion_logits(model, rows.input_ids, rows.attention_mask, rows.num_tokens)[-1:]
    assert torch.allclose(ours, whole[:, -rows.num_tokens - 1 : -1], atol=1e-5)


def spied(function, look):
    def wrapper(hidden_states, *arguments, **settings):
        look(hidden_states)
        return function(hidden_states, *arguments, **settings)

    return wrapper


@pytest.mark.parametrize("num_tokens", [0, 12, 13])
def test_a_completion_needs_a_token_and_something_before_it(model, num_tokens):
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


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks transformers so
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
