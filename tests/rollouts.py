"""Completions that are sampled from tiny models."""

import torch

from grpo_lab.rollout.sampling import left_pad, sample

PROMPTS = [[5], [6, 7, 8], [9, 3, 4, 5, 6, 7, 8]]


P, K, T = 3, 4, 8


ENDS = [1, 2, 3]  # several, so that a random model ends early now and then


TRUNCATIONS = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},  # the defaults; 50 is more than the vocabulary has
    {"temperature": 1.3, "top_k": 4, "top_p": 0.7},
]


def uniforms(rows, columns=T, seed=0):
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))


def draw(model, prompts=PROMPTS, numbers=None, *, k=K, ends=ENDS, pad=0, **settings):
    numbers = uniforms(len(prompts) * k) if numbers is None else numbers
    input_ids, mask = left_pad(prompts, pad)
    return sample(model, input_ids, mask, num_generations=k, uniforms=numbers, end_ids=ends, pad_id=pad, **settings)


def texts(rollouts):
    return [ids[m].tolist() for ids, m in zip(rollouts.completion_ids, rollouts.completion_mask, strict=True)]
