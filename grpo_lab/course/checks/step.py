"""The judge of a whole training step (notebook 07)."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from grpo_lab.algorithm.advantages import group_advantages as _adv
from grpo_lab.algorithm.logprobs import token_logprobs as _lp
from grpo_lab.algorithm.losses import clipped_surrogate as _gain
from grpo_lab.course.checks.inputs import SHORT_LONG, log_of
from grpo_lab.course.checks.judge import Case, Judge
from grpo_lab.course.checks.losses import clip_to, grpo_loss, least, loss_from


class _Policy(nn.Module):
    """The smallest policy: one logit per token, whatever the context."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.weights, self.calls = nn.Parameter(weights.clone()), 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return self.weights.expand(*tokens.shape, -1)


class _Asked:
    """The policy as notebook 07 passes it: a function from tokens to logits, and nothing else."""

    def __init__(self, policy: _Policy):
        self.policy = policy

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.policy(tokens)

    def __getattr__(self, name: str):
        raise AttributeError("model is only a function here; clear the gradients with optimizer.zero_grad()")


def _weights_after(fn: Callable) -> Callable:
    def play(weights, gradient, tokens, mask, rewards, old_logprobs, **s):
        policy = _Policy(weights)
        policy.weights.grad = gradient.clone()
        optimizer = torch.optim.SGD([policy.weights], lr=1.0)
        result = fn(_Asked(policy), optimizer, tokens, mask, rewards, old_logprobs, **s)
        return result if policy.calls == 0 and (result is None or result is ...) else policy.weights.detach()

    return play


def _flat(rewards: Tensor) -> Tensor:
    return _adv(rewards).flatten()


def _step(order="zero_grad backward step", rank=_flat, loss=loss_from(), old_of=lambda lp, old: old, score=_lp,  # noqa: B008
          times=1, penalty=True) -> Callable:  # fmt: skip
    def step(model, optimizer, tokens, mask, rewards, old_logprobs, ref_logprobs=None, kl_coef=0.0):
        for _ in range(times):
            lp = score(model(tokens), tokens)
            settings = {"ref_logprobs": ref_logprobs, "kl_coef": kl_coef} if penalty else {}
            value = loss(lp, old_of(lp, old_logprobs), rank(rewards), mask, **settings)
            for do in order.split():
                value.backward() if do == "backward" else getattr(optimizer, do)()

    return step


_TWO = [0.0, 0.0], [0.0, 0.0], [[0], [1]], [[True]] * 2, [[10.0, 0.0]]
training_step = Judge(
    contract="training_step(model, optimizer, tokens[B, T], mask[B, T], rewards[P, K], old_logprobs[B, T],"
    " ref_logprobs=None, kl_coef=0.0): one update, clip_range 0.2; model(tokens) -> logits [B, T, V], position t"
    " predicts tokens[:, t]; return what you like",
    reference=_step(),
    adapt=_weights_after,
    hint="Log-probabilities, advantages, loss; then the calls of every PyTorch step. What must be cleared first?",
    cases=(
        Case("the better token becomes likelier", *_TWO, log_of([0.5], [0.5])),
        Case("gradients of an earlier step do not count", [0.0, 0.0], [1.0, 0.0], *_TWO[2:], log_of([0.5], [0.5])),
        Case("a row of rewards is the completions of one prompt, which stand next to each other", *_TWO[:2],
             [[0], [1], [0], [0]], [[True]] * 4, [[10.0, 0.0], [70.0, 30.0]], log_of(*[[0.5]] * 4)),
        Case("padding does not count, and each completion counts the same", [0.5, 0.0], _TWO[1],
             [[0, 1], [1, 1]], SHORT_LONG, [[10.0, 0.0]], log_of([0.6225, 0.3775], [0.3775, 0.3775])),
        Case("the ratio compares with the policy that sampled", [0.5, 0.0], *_TWO[1:], log_of([0.6], [0.4])),
        Case("what has moved far enough is clipped, and nothing else", [1.0, 0.0], _TWO[1],
             [[0], [0], [1], [1]], [[True]] * 4, [[10.0, 0.0, 0.0, 10.0]], log_of([0.604], [0.4], [0.34], [0.6])),
        Case("the KL moves the policy towards the reference, even where all rewards are equal", *_TWO[:4], [[1.0, 1.0]],
             log_of([0.5], [0.5]), ref_logprobs=log_of([0.9], [0.1]), kl_coef=0.5),
    ),
    diagnoses={
        "advantages are [P, K], the loss wants [B]: flatten": _step(rank=_adv, loss=loss_from(gain=clip_to(least))),
        "the weights do not move: no step after backward, or a ratio without gradient": _step("backward"),
        "the weights do not move: your ratio has no gradient": _step(loss=loss_from(
            gain=lambda lp, old, *a, **s: _gain(lp - lp, old - old, *a, **s)
        )),
        "the gradients of an earlier step are still there": _step("backward step"),
        "you make two steps": _step("zero_grad backward step step"),
        "you update twice": _step(times=2),
        "your step drops the KL: pass ref_logprobs and kl_coef to grpo_loss": _step(penalty=False),
        "you score with probabilities, not with their logarithms": _step(score=lambda *a: _lp(*a).exp()),
        "you use the rewards as they are, not compared within the group": _step(rank=lambda r: r.flatten()),
        "you compare with all completions, not within the group": _step(rank=lambda r: _flat(r.view(1, -1))),
        "you do not divide the advantages by the std of the group": _step(
            rank=lambda r: _adv(r, scale="none").flatten()
        ),
        "your advantages are in another order than the completions": _step(rank=lambda r: _adv(r).T.flatten()),
        "your ratio is always 1: it must compare with old_logprobs": _step(old_of=lambda lp, old: lp.detach()),
        **{sentence: _step(loss=wrong) for sentence, wrong in grpo_loss.diagnoses.items() if "KL" not in sentence},
    },
)  # fmt: skip
