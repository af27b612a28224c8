"""The judge of the KL estimate: right answers in several styles, wrong ones by name."""

import torch
from judges import JudgeTests

from grpo_lab import checks


def kl_by_loop(logprobs, ref_logprobs, mask):
    def k3(p, q):
        return (q - p).exp() - (q - p) - 1

    return [
        [k3(logprobs[i, t], ref_logprobs[i, t]) if mask[i, t] else torch.tensor(0.0) for t in range(mask.shape[1])]
        for i in range(mask.shape[0])
    ]


def kl_by_expm1(logprobs, ref_logprobs, mask):
    d = (ref_logprobs.double() - logprobs.double()).masked_fill(~mask, 0.0)
    return torch.expm1(d) - d


def kl_by_index(logprobs, ref_logprobs, mask, estimator):
    assert estimator == "k3"
    out = torch.zeros(mask.shape)
    p, q = logprobs[mask], ref_logprobs[mask]
    out[mask] = (q - p).exp() + p - q - 1
    return out


class TestKlEstimate(JudgeTests):
    judge = checks.kl_estimate
    right = [kl_by_loop, kl_by_expm1, kl_by_index]
    solution = """
def kl_estimate(logprobs, ref_logprobs, mask):
    log_ratio = torch.where(mask, ref_logprobs - logprobs, 0.0)
    k3 = torch.exp(log_ratio) - log_ratio - 1
    return torch.where(mask, k3, 0.0)
"""
    mutants = {
        "ref_logprobs - logprobs": {
            "logprobs - ref_logprobs": "your KL is upside down",
        },
        "torch.exp(log_ratio) - log_ratio - 1": {
            "-log_ratio": "your KL is k1",
            "log_ratio**2 / 2": "your KL is k2",
            "log_ratio**2": "",
            "log_ratio.abs()": "",
            "torch.exp(log_ratio) + log_ratio - 1": "the linear term of your KL has",
            "torch.exp(log_ratio) - 1": "the linear term of your KL is missing",
            "torch.exp(log_ratio) - log_ratio": "your KL lacks the -1",
            "1 + log_ratio - torch.exp(log_ratio)": "your KL has its sign flipped",
        },
        "k3 = ": {
            "k3 = 0.9 * ": "",
        },
        "k3 = torch.exp(log_ratio)": {
            "k3 = logprobs.exp() * (logprobs - ref_logprobs) + 0 * torch.exp(log_ratio)": "",
        },
        "return torch.where(mask, k3, 0.0)": {
            "return k3.sum(1)": "you add up the tokens",
            "return k3.detach()": "the value is right, but no gradient",
        },
        "torch.where(mask, ref_logprobs - logprobs, 0.0)": {
            "ref_logprobs - logprobs": "you mask after exp",
            "logprobs.sub_(ref_logprobs).neg()": "you change an input",
        },
        "torch.where(mask, ref_logprobs - logprobs, 0.0)\n": {
            "ref_logprobs - logprobs\n    mask = mask | True\n": "you ign",
        },
    }
