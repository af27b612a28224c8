"""The twelve bugs of the museum, each one changed line of the package. Spoilers: notebook 10 comes first.

A bug is made by changing that line in the source of its function, so the line shown is the line that ran.
"""

import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Bug:
    """One wrong line, its symptoms, and the check that finds it."""

    name: str
    """The learner's answer."""
    function: str
    """The function that has the line, below the package: "algorithm.losses.clipped_surrogate"."""
    right: str
    """A part of its source that occurs once."""
    wrong: str
    """The wrong version of that part."""
    expect: str
    """The symptoms of this bug."""
    cure: str
    """The check that finds it in your own run."""


BUGS: dict[str, Bug] = {
    "clip": Bug(
        "the clip is inverted where the advantage is negative",
        "algorithm.losses.clipped_surrogate",
        "torch.minimum(ratio * advantages, clipped * advantages)",
        "torch.minimum(ratio, clipped) * advantages",
        "The clip would still be counted, since the ratio does leave its range, but where A < 0 nothing stops "
        "a token on its way down: within a rollout gradient norm and KL would rise above the healthy run's. "
        "The first two updates of all agree with it.",
        "Ask checks.clipped_surrogate, or look at the gradient in all six regions: A above and below 0, ratio "
        "below, inside and above.",
    ),
    "kl-upside-down": Bug(
        "the KL estimate is upside down",
        "algorithm.kl.kl_estimate",
        "(ref_logprobs.detach() - logprobs)",
        "(logprobs - ref_logprobs.detach())",
        "A plausible KL, never negative, 0 at step 1; but in the first rollout about half the healthy one's, "
        "since it charges little for tokens that the policy has turned away from; later it charges hugely for "
        "those that it has learned to like, with the gradient norm to match.",
        "Ask checks.kl_estimate, or average it over a vocabulary that can be enumerated, on two policies far "
        "apart: it must be the exact KL.",
    ),
    "kl-gradient": Bug(
        "the KL carries no gradient",
        "algorithm.kl.kl_estimate",
        "(ref_logprobs.detach() - logprobs)",
        "(ref_logprobs - logprobs.detach())",
        "Nothing would pull back: already within the first rollout KL leaves the healthy run's, by far at its "
        "peaks, entropy falls further, and the loss rises with the KL, because the value is added while the "
        "gradient is not.",
        "Change kl_coef: if no gradient changes, even after the policy has moved, it carries none. Or ask "
        "checks.kl_estimate.",
    ),
    "kl-old": Bug(
        "the KL is measured against the policy that sampled, not against the reference",
        "training.policy.PolicyModels.reference_logprobs",
        "return self._logprobs_under(self.reference, rollouts)",
        "return self._logprobs_under(self.trained, rollouts)",
        "KL would start from 0 again with every rollout, not only with the first: the policy that sampled is "
        "never far away.",
        "At the first update of the second rollout KL must not be 0: the policy has moved from the reference by then.",
    ),
    "truncation": Bug(
        "tokens are sampled with top-p, but scored without",
        "training.policy.PolicyModels._score_under",
        "kept=rollouts.kept",
        "kept=None",
        "Before anything is learned, sampler and scorer would disagree, by up to -log 0.95 = 0.051 nats with "
        "top-p 0.95.",
        "Compare the log-probabilities of sampler and scorer right after a rollout: the ratio must be 1. The "
        "run reports it at step 1.",
    ),
    "end": Bug(
        "the end token is masked",
        "rollout.sampling.sample",
        "completion_mask = columns < lengths[:, None]",
        "completion_mask = columns < lengths[:, None] - 1",
        "Every completion would be one token shorter than what was sampled, from step 1 on: 5 tokens, not 6.",
        "Count by hand: five characters and the end are 6 tokens. With longer texts look at clipped_ratio: "
        "can the model still stop?",
    ),
    "shift": Bug(
        "the log-probabilities are shifted by one",
        "models.forward.completion_states",
        "{name: columns[:, :-1] for name, columns in inputs.items()}",
        "{name: columns for name, columns in inputs.items()}",
        "Sampler and scorer would disagree by whole nats at step 1, and the reward would not rise: other "
        "tokens than the sampled ones learn.",
        "Compare the log-probabilities of sampler and scorer right after a rollout, or add up step by step "
        "what one completion scores.",
    ),
    "groups": Bug(
        "the groups are mixed up",
        "training.step.advantages_of",
        "rewards.view(-1, K), baseline",
        "rewards.view(K, -1).T, baseline",
        "The reward would not rise, and among the samples right answers would have negative advantages, wrong "
        "ones positive ones.",
        "Read one group: in it, a higher reward must have a higher advantage. A test permutes the prompts: "
        "advantages permute with them.",
    ),
    "ratio": Bug(
        "the old log-probabilities are taken anew at every update",
        "training.step.accumulate_gradients",
        "part.old_logprobs,  # None",
        "None,  # None",
        "The share clipped would be exactly 0 at every update, even at the fourth on the same rollout; "
        "gradient norm and KL grow with it.",
        "clip_ratio must be above 0 somewhere once a rollout is used for several updates; if it never is, the "
        "ratio is 1 by mistake.",
    ),
    "entropy": Bug(
        "what is logged as entropy is -log p of the sampled tokens",
        "rollout.scoring._scores",
        "_spread(entropies, real)[number] if",
        "-_spread(logprobs, real)[number].detach() if",
        "Every number would be that of the healthy run, digit for digit, except one curve: entropy.",
        "Compute the metric from its definition for one batch. Of one token, entropy lies between 0 and log "
        "V; -log p has no upper end.",
    ),
    "dropout": Bug(
        "dropout is on while the policy is scored",
        "training.policy.prepare_models",
        "if config.disable_dropout:",
        "if not config.disable_dropout:",
        "Sampler and scorer would disagree at step 1, and so would two forward passes of one model: KL would "
        "not be 0 there, though policy and reference are still the same weights.",
        "KL to an untouched reference must be exactly 0 at step 1, and the same batch scored twice must give "
        "the same numbers.",
    ),
    "minus": Bug(
        "the reward loses every minus sign",
        "rewards.verifiable.evaluate_expression",
        "text = text.strip()",
        'text = text.strip().replace("-", "+")',
        "Some samples that earn 1 would be wrong, and some right ones would earn 0: read those with a minus sign. "
        "Over the run minus signs would die out, and with them the problems that need one.",
        "Read what earns a reward. And enumerate: all expressions of three numbers are few; those that earn 1 can be "
        "listed and looked at. checks.reward asks for some of them.",
    ),
}

EXHIBITS = dict(
    zip(
        "ABCDEFGHIJKL",
        ("end", "kl-gradient", "ratio", "minus", "truncation", "kl-upside-down",
         "shift", "clip", "kl-old", "entropy", "groups", "dropout"),
        strict=True,
    )
)  # fmt: skip
"""Which bug stands behind which letter."""


def broken(bug: Bug):
    """Return the function with the wrong line in it."""
    right = _home(bug)[1]
    source = textwrap.dedent(inspect.getsource(right))
    if source.count(bug.right) != 1:
        raise ValueError(f"{bug.right!r} stands {source.count(bug.right)} times in {bug.function}")
    names: dict = {}
    exec(compile(source.replace(bug.right, bug.wrong), bug.function, "exec"), inspect.unwrap(right).__globals__, names)
    return names[bug.function.rpartition(".")[2]]


@contextmanager
def patched(bug: Bug) -> Iterator[None]:
    """Put this bug into the package within the context."""
    owner, right = _home(bug)
    wrong = broken(bug)
    modules = [module for name, module in sys.modules.items() if name.startswith("grpo_lab.")]
    places = [(m, name) for m in (owner, *modules) for name, value in list(vars(m).items()) if value is right]
    for place, name in places:
        setattr(place, name, wrong)
    try:
        yield
    finally:
        for place, name in places:
            setattr(place, name, right)


def _home(bug: Bug):
    room, module, *path = bug.function.split(".")
    owner = importlib.import_module(f"grpo_lab.{room}.{module}")
    for name in path[:-1]:
        owner = getattr(owner, name)
    return owner, getattr(owner, path[-1])
