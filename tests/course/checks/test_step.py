"""The judge of a whole training step: right answers in several styles, wrong ones by name."""

import torch
from judges import JudgeTests, learner

from grpo_lab import checks
from grpo_lab.algorithm.advantages import group_advantages
from grpo_lab.algorithm.losses import grpo_loss


def step_by_package(model, optimizer, tokens, mask, rewards, old_logprobs):
    optimizer.zero_grad(set_to_none=False)
    logprobs = checks.token_logprobs.reference(model(tokens), tokens)
    loss = grpo_loss(logprobs, old_logprobs, group_advantages(rewards).view(-1), mask).loss
    loss.backward()
    optimizer.step()


def step_by_hand(model, optimizer, tokens, mask, rewards, old_logprobs):
    p = model(tokens).log_softmax(-1).double()
    loss = 0.0
    for i, A in enumerate(group_advantages(rewards.double()).flatten()):
        for t in range(int(mask[i].sum())):
            c = (p[i, t, tokens[i, t]] - old_logprobs[i, t]).exp()
            loss = loss - torch.min(c * A, c.clamp(0.8, 1.2) * A) / mask[i].sum() / len(tokens)
    (weights,) = optimizer.param_groups[0]["params"]
    (gradient,) = torch.autograd.grad(loss, weights)
    with torch.no_grad():
        weights -= optimizer.param_groups[0]["lr"] * gradient


def step_with_hygiene(
    model, optimizer, tokens, mask, rewards, old_logprobs, ref_logprobs=None, kl_coef=0.0, clip_range=0.2
):
    loss = grpo_loss(
        checks.token_logprobs.reference(model(tokens), tokens),
        old_logprobs,
        group_advantages(rewards).flatten(),
        mask,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        clip_range=clip_range,
    ).loss
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 10.0)
    optimizer.step()
    optimizer.zero_grad()
    return {"loss": loss.item()}


class TestTrainingStep(JudgeTests):
    judge = checks.training_step
    right = [step_by_package, step_by_hand, step_with_hygiene]
    solution = """
def training_step(model, optimizer, tokens, mask, rewards, old_logprobs, ref_logprobs=None, kl_coef=0.0):
    logprobs = model(tokens).log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    A = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    A = A.flatten()
    ratio = (logprobs - old_logprobs).exp()
    gain = torch.min(ratio * A[:, None], ratio.clamp(0.8, 1.2) * A[:, None])
    if kl_coef:
        d = ref_logprobs - logprobs
        gain = gain - kl_coef * (d.exp() - d - 1)
    loss = -((gain * mask).sum(1) / mask.sum(1)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
"""
    mutants = {
        "    optimizer.step()\n": {
            "": "the weights do not move",
            "    optimizer.step()\n    optimizer.step()\n": "you make two steps",
            '    torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1e-3)\n    optimizer.step()\n': "",
        },
        "    optimizer.zero_grad()\n": {
            "": "the gradients of an earlier step are still there",
            "    model.zero_grad()\n": "your function raises AttributeError: model is only a function here; clear the",
        },
        "    loss.backward()\n    optimizer.step()\n": {
            "    loss.backward()\n    optimizer.zero_grad()\n    optimizer.step()\n": "the weights do not move",
        },
        "loss = -": {
            "loss = ": "your sign is flipped: the optimizer lowers the loss",
        },
        "A = A.flatten()": {
            "A = A.T.flatten()": "your advantages are in another order",
            "pass": "perhaps advantages are [P, K], the loss wants [B]: flatten",
            "A = rewards.flatten()": "you use the rewards as they are",
        },
        " / (rewards.std(1, keepdim=True) + 1e-4)": {
            "": "you do not divide the advantages by the std",
        },
        "rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True)": {
            "rewards.mean()) / (rewards.std()": "you compare wi",
        },
        "(logprobs - old_logprobs)": {
            "(logprobs - logprobs)": "the weights do not move",
            "(logprobs - logprobs.detach())": "your ratio is always 1",
            "(old_logprobs - logprobs)": "your ratio is inverted",
        },
        ".log_softmax(-1)": {
            ".softmax(-1)": "you score with probabilities, not with their logarithms",
        },
        "if kl_coef": {
            "if False": "your step drops the KL: pass ref_logprobs and kl_coef to grpo_loss",
        },
        "torch.min(": {
            "torch.max(": "you take the larger",
        },
        "gain = torch.min(ratio * A[:, None], ratio.clamp(0.8, 1.2) * A[:, None])": {
            "gain = ratio * A[:, None]": "you do not",
            "gain = ratio.clamp(0.8, 1.2) * A[:, None]": "you clip even where",
        },
        "(gain * mask).sum(1) / mask.sum(1)": {
            "gain.sum(1) / mask.shape[1]": "you ignore the mask",
        },
        "((gain * mask).sum(1) / mask.sum(1)).mean()": {
            "(gain * mask).sum() / mask.sum()": "each token counts the same",
        },
        "loss.backward()": {
            "loss.detach().backward()": "your function raises RuntimeError: element 0 of tensors does not",
        },
    }


def test_advantages_that_are_not_flattened_are_named_with_the_packages_loss_too():
    def step(model, optimizer, tokens, mask, rewards, old_logprobs, ref_logprobs=None, kl_coef=0.0):
        logprobs = checks.token_logprobs.reference(model(tokens), tokens)
        penalty = {"ref_logprobs": ref_logprobs, "kl_coef": kl_coef}
        loss = grpo_loss(logprobs, old_logprobs, group_advantages(rewards), mask, **penalty).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    assert checks.training_step(step).message == "perhaps advantages are [P, K], the loss wants [B]: flatten."


def test_two_updates_are_told_from_one_update_that_steps_twice():
    step = learner(TestTrainingStep.solution)
    verdict = checks.training_step(lambda *inputs, **settings: [step(*inputs, **settings) for _ in range(2)])
    assert verdict.message == "you update twice."
