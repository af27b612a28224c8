"""Rows of prompts and completions to be scored."""

from types import SimpleNamespace

import torch
from torch import nn

from grpo_lab.rollout.sampling import left_pad
from grpo_lab.tasks.pocket.make import make_tokenizer

PROMPTS = [[5], [6, 7, 8], [9, 3, 4, 5, 6, 7, 8]]


COMPLETIONS = [[7, 3, 9, 4, 1], [4, 1], [1]]  # 1 ends; the padding after it is 1 as well in one of the tests


T, V = 5, len(make_tokenizer())


def batch(pad: int = 0):
    """Rows of [left-padded prompt | right-padded completion], as the sampler makes them."""
    input_ids, mask = left_pad(PROMPTS, pad)
    tails = torch.tensor([c + [pad] * (T - len(c)) for c in COMPLETIONS])
    real = torch.tensor([[1] * len(c) + [0] * (T - len(c)) for c in COMPLETIONS])
    return torch.cat([input_ids, tails], 1), torch.cat([mask, real], 1)


class Bigram(nn.Module):
    """Predicts the next token from the last one alone, and takes no keyword that a plain model need not take."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.log(torch.tensor([[0.2, 0.8, 0.0], [0.5, 0.25, 0.25], [0.1, 0.3, 0.6]])))

    def forward(self, input_ids, attention_mask, use_cache):
        return SimpleNamespace(logits=self.table[input_ids])
