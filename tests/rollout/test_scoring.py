"""Scoring: one padded batch gives the log-probabilities that the model gives token by token."""

import math

import pytest
import torch
from conftest import tiny_model
from rows import COMPLETIONS, PROMPTS, Bigram, T, V, batch

from grpo_lab.course.lessons.hardware import kept_for_backward
from grpo_lab.rollout import scoring
from grpo_lab.rollout.scoring import completion_logprobs, completion_scores


@torch.no_grad()
def step_by_step(model, prompt, completion, temperature=1.0):
    """The specification: a growing input without padding, and its last position's distribution each time."""
    logprobs = []
    for t, token in enumerate(completion):
        logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1].double() / temperature
        logprobs.append((logits[token] - logits.logsumexp(0)).item())
    return logprobs


@pytest.mark.parametrize("pad", [0, 1], ids=["pad", "pad == end"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_padded_batch_equals_decoding_step_by_step(any_model, pad, temperature):
    input_ids, mask = batch(pad)
    with torch.no_grad():
        scores = completion_scores(any_model, input_ids, mask, T, temperature=temperature)
    assert scores.logprobs.isfinite().all()
    for row, prompt, completion in zip(scores.logprobs, PROMPTS, COMPLETIONS, strict=True):
        expected = step_by_step(any_model, prompt, completion, temperature)
        assert row[: len(completion)].tolist() == pytest.approx(expected, abs=2e-5)
        assert row[: len(completion)].sum().item() == pytest.approx(math.fsum(expected), abs=5e-5)


def test_tokens_at_padding_cannot_leak(any_model):
    input_ids, mask = batch()
    noise = torch.randint(2, 22, input_ids.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clean = completion_logprobs(any_model, input_ids, mask, T)
        noisy = completion_logprobs(any_model, torch.where(mask == 1, input_ids, noise), mask, T)
    real = mask[:, -T:] == 1
    assert torch.allclose(clean[real], noisy[real], atol=2e-5)


def test_numbers_by_hand_and_the_shift_by_one():
    # prompt 0, completion 1 2 2: p(1|0) = 0.8, p(2|1) = 0.25, p(2|2) = 0.6.
    # Not shifted it would be p(1|1) = 0.25 ...; shifted by two, 0.8 would be missing.
    scores = completion_scores(Bigram(), torch.tensor([[0, 1, 2, 2]]), torch.ones(1, 4), 3)
    assert scores.logprobs.exp().squeeze().tolist() == pytest.approx([0.8, 0.25, 0.6])
    # what stands before each token: the rows 0, 1 and 2 of the table; -(0.2 ln 0.2 + 0.8 ln 0.8) = 0.5004 ...
    assert scores.entropies.squeeze().tolist() == pytest.approx([0.5004, 1.0397, 0.8979], abs=1e-4)
    # among the kept 0 and 1, p(1|0) stays 0.8 / (0.2 + 0.8); among 1 and 2, p(2|1) = 0.5; alone, 1
    kept = torch.tensor([[[1, 0], [2, 1], [2, -1]]])
    truncated = completion_logprobs(Bigram(), torch.tensor([[0, 1, 2, 2]]), torch.ones(1, 4), 3, kept=kept)
    assert truncated.exp().squeeze().tolist() == pytest.approx([0.8, 0.5, 1.0])


def test_entropies_are_those_of_the_whole_distribution_at_the_temperature(model):
    input_ids, mask = batch()
    with torch.no_grad():
        scores = completion_scores(model, input_ids, mask, T, temperature=0.7)
        logits = model(input_ids, attention_mask=mask).logits[2] / 0.7  # the longest prompt: no padding on the left
    for t in range(len(COMPLETIONS[2])):
        probs = logits[len(PROMPTS[2]) - 1 + t].softmax(0).tolist()
        assert scores.entropies[2, t].item() == pytest.approx(-sum(p * math.log(p) for p in probs), abs=1e-5)


def test_gradient_flows_through_log_probabilities_and_not_through_entropies(model):
    scores = completion_scores(model, *batch(), T)
    assert scores.logprobs.requires_grad
    assert not scores.entropies.requires_grad


REAL = sum(map(len, COMPLETIONS))


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize(("elements", "sizes"), [(1, [1] * REAL), (3 * V, [3, 3, 2]), (REAL * V, [REAL])])
def test_chunks_change_neither_values_nor_gradients(monkeypatch, elements, sizes, truncated):
    input_ids, mask = batch()
    kept = torch.stack([input_ids[:, -T:], input_ids[:, -T:] + 1], -1) if truncated else None
    seen, original = [], scoring.token_logprobs

    def spy(logits, *args, **settings):
        seen.append(len(logits))
        return original(logits, *args, **settings)

    def run():
        model = tiny_model()
        scores = completion_scores(model, input_ids, mask, T, temperature=0.7, kept=kept)
        forward = list(seen)
        (scores.logprobs * torch.arange(1.0, T + 1)).sum().backward()
        return forward, scores, torch.cat([p.grad.flatten() for p in model.parameters()])

    _, whole, gradient = run()
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(scoring, "token_logprobs", spy)
    forward, chunked, chunked_gradient = run()
    assert forward == sizes  # the positions of each chunk, in order, without padding
    assert sorted(seen) == sorted(sizes * (2 if len(sizes) > 1 else 1))  # chunks are recomputed in backward, not kept
    assert torch.allclose(whole.logprobs, chunked.logprobs, atol=1e-6)
    assert torch.allclose(whole.entropies, chunked.entropies, atol=1e-6)
    assert torch.allclose(gradient, chunked_gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


def test_the_memory_of_a_score_does_not_grow_with_the_vocabulary(monkeypatch):
    """Bytes kept for backward, without weights, when the logits no longer fit into one chunk."""
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 2**16)
    kept = [kept_for_backward(tiny_model(vocab_size=size), 32, 4, 12) for size in (1000, 150_000)]
    assert kept[1] == pytest.approx(kept[0], rel=0.1)


def test_entropies_are_not_computed_again_in_backward(monkeypatch):
    counted = []
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", V)
    monkeypatch.setattr(scoring, "token_entropies", lambda x, temperature: counted.append(1) or x[..., 0])
    completion_scores(tiny_model(), *batch(), T).logprobs.sum().backward()
    assert len(counted) == REAL
