"""The judge of token log-probabilities: right answers in several styles, wrong ones by name."""

import torch
from judges import JudgeTests

from grpo_lab import checks


def logprobs_by_loop(logits, tokens):
    rows = []
    for row, ids in zip(logits, tokens, strict=True):
        rows.append([z[i] - z.max() - (z - z.max()).exp().sum().log() for z, i in zip(row, ids, strict=True)])
    return rows


def logprobs_by_einsum(logits, tokens, *, temperature):
    one_hot = torch.nn.functional.one_hot(tokens, logits.shape[-1]).double()
    return torch.einsum("btv,btv->bt", (logits.double() / temperature).log_softmax(-1), one_hot)


def logprobs_by_cross_entropy(logits, tokens, temperature=1):
    return -torch.nn.functional.cross_entropy((logits / temperature).transpose(1, 2), tokens, reduction="none")


class TestTokenLogprobs(JudgeTests):
    judge = checks.token_logprobs
    right = [logprobs_by_loop, logprobs_by_einsum, logprobs_by_cross_entropy]
    solution = """
def token_logprobs(logits, tokens, temperature=1.0, kept=None):
    logits = logits / temperature
    if kept is not None:
        out = torch.ones_like(logits, dtype=torch.bool)
        for v in range(logits.shape[-1]):
            out[..., v] = ~(kept == v).any(-1)
        logits = logits.masked_fill(out, -torch.inf)
    logprobs = logits.log_softmax(-1)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
"""
    mutants = {
        "logits.log_softmax(-1)": {
            "logits.softmax(-1)": "you return probabilities",
            "-logits.log_softmax(-1)": "your sign is flipped",
            "logits": "you return the raw logits",
            "logits.log_softmax(1)": "you normalise over the positions",
            "logits.log_softmax(0)": "",
            "logits.softmax(-1).log()": "your probability is rounded to 0",
            "(logits.exp() / logits.exp().sum(-1, keepdim=True)).log()": "your exp overflows",
            "(logits.softmax(-1) + 1e-9).log()": "",
            "logits.log_softmax(-1) / math.log(2)": "you measure in bits",
            "logits - logits.exp().sum(-1, keepdim=True).log()": "your exp overflows to infinity.",
        },
        "logits / temperature": {
            "logits * temperature": "you multiply by the temperature",
            "logits": "you ignore the temperature",
        },
        "logits = logits / temperature": {
            "logits = logits.detach() / temperature": "the value is right, but no gradient",
        },
        "if kept is not None": {
            "if False": "you count tokens that the sampler had cut away",
        },
        "return logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)": {
            "return logprobs[:, :, tokens]": "you look every token up at every position",
            "return logprobs.amax(-1)": "you score the lik",
        },
        "(-1, tokens.unsqueeze(-1))": {
            "(-1, tokens.unsqueeze(-1).roll(1, 1))": "",
        },
        ".squeeze(-1)\n": {
            ".squeeze(-1).sum(1)\n": "you add up the tokens",
            "\n": "your answer has the shape [1, 1, 1], expected [1, 1]",
        },
        "logprobs.gather(-1, tokens.": {
            "logprobs[:, :-1].gather(-1, tokens[:, 1:].": "you shift by one",
        },
        "return logprobs.": {
            "return torch.cat([logprobs[:, :1], logprobs[:, :-1]], 1).": "",
            "return logprobs.roll(1, 1).": "you score each token with the logits of the position bef",
        },
    }
