"""One step of GRPO: sample, score, compare, update.

    sample_groups          K completions for each prompt                      -> SampledGroups
    score_completions      a reward for each completion                       -> ScoredGroups
    compare_within_groups  an advantage for each completion, from its group   -> Batch
    update                 one optimizer step on the clipped loss with KL     -> its metrics

Each part takes what the one before returned. A run calls the two halves of the update, `accumulate_gradients` and
`apply_gradients`, with a check between them in its first step. With several processes each works on its share of the
prompts, whole groups; advantages that are scaled by the batch, means and metrics are over all of them.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_lab.algorithm.advantages import discounted, group_advantages
from grpo_lab.algorithm.kl import kl_estimate
from grpo_lab.algorithm.losses import LossTerms, grpo_loss
from grpo_lab.hardware.processes import Processes
from grpo_lab.rewards.reward_models import Rewards, Scored
from grpo_lab.rollout.prompts import Prompt, Row, encode_prompts
from grpo_lab.rollout.sampling import Rollouts, check_context
from grpo_lab.rollout.scoring import Scores
from grpo_lab.training.batches import Batch, MicroBatch, make_micro_batches
from grpo_lab.training.config import GRPOConfig
from grpo_lab.training.engine import Engine
from grpo_lab.training.metrics import UpdateSums, batch_metrics, update_metrics
from grpo_lab.training.policy import PolicyModels
from grpo_lab.training.samplers import Sampler


@dataclass
class Components:
    """What a step works with; made once for a run."""

    config: GRPOConfig
    models: PolicyModels
    tokenizer: Any
    sampler: Sampler
    rewards: Rewards
    engine: Engine
    processes: Processes
    end_ids: list[int]
    """Token ids that end a completion."""
    pad_id: int
    rollout_batch_size: int
    """Prompts that are sampled together."""


@dataclass(frozen=True)
class SampledGroups:
    """K completions for each of P prompts, B = P * K rows; those of a prompt stand next to each other."""

    rows: list[Row]
    """P rows of the data set."""
    rollouts: Rollouts
    """Token ids, masks and log-probabilities, [B, ...]."""
    texts: list[str]
    """B completions as text."""


@dataclass(frozen=True)
class ScoredGroups:
    """Sampled groups with their rewards."""

    sampled: SampledGroups
    rewards: Tensor
    """[B] weighted sum of the reward functions; NaN where none scored."""
    by_function: dict[str, Tensor]
    """Name of a reward function -> [B], unweighted."""


@dataclass(frozen=True)
class Gradients:
    """What is known of an update once its gradients are there."""

    sums: UpdateSums
    """Over all completions of the batch, of all processes."""
    tokens: int
    """Completion tokens of the batch."""


def make_batch(c: Components, rows: Sequence[Row], uniforms: Tensor) -> Batch:
    """Sample, score and compare: everything of a step that comes before the update.

    Args:
        rows: P prompts with their columns, this process's share.
        uniforms: [P * K, max_new_tokens] numbers in [0, 1) that decide what is sampled.
    """
    sampled = sample_groups(c, rows, uniforms)
    scored = score_completions(c, sampled)
    return compare_within_groups(c, scored)


# --- sample -------------------------------------------------------------------------------------------------


def sample_groups(c: Components, rows: Sequence[Row], uniforms: Tensor) -> SampledGroups:
    """Draw K completions for each prompt, as many prompts at a time as memory allows."""
    K, size = c.config.num_generations_per_prompt, c.rollout_batch_size
    rollouts, texts = [], []
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        numbers = uniforms[start * K : (start + len(some)) * K]
        rollouts.append(sample_completions(c, [row["prompt"] for row in some], numbers, K))
        texts += decode(c, rollouts[-1])
    return SampledGroups(list(rows), Rollouts.join(rollouts, c.pad_id), texts)


def sample_completions(
    c: Components, prompts: Sequence[Prompt], uniforms: Tensor, num_generations: int, **truncation
) -> Rollouts:
    """Draw completions, with the temperature and truncation of the configuration unless `truncation` says otherwise.

    Args:
        uniforms: [P * num_generations, T] numbers in [0, 1).
        truncation: temperature, top_k, top_p.
    Raises: ValueError for a prompt that does not fit into the model's context.
    """
    config = c.config
    ids = encode_prompts(c.tokenizer, prompts)
    check_context(c.models.whole, prompts, ids, config.max_new_tokens)
    settings = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p} | truncation
    return c.sampler.sample(
        ids, num_generations=num_generations, uniforms=uniforms, end_ids=c.end_ids, pad_id=c.pad_id, **settings
    )


def decode(c: Components, rollouts: Rollouts) -> list[str]:
    """Return the completions as text without the end token, and without special tokens unless the config keeps them."""
    ids, lengths = rollouts.completion_ids.tolist(), rollouts.completion_mask.sum(1).tolist()
    # the tokenizer may not call an end token special, so it is cut here: what follows it was never sampled
    lengths = [n - (n > 0 and row[n - 1] in c.end_ids) for row, n in zip(ids, lengths, strict=True)]
    texts = [row[:n] for row, n in zip(ids, lengths, strict=True)]
    return c.tokenizer.batch_decode(texts, skip_special_tokens=not c.config.keep_special_tokens)


# --- score --------------------------------------------------------------------------------------------------


def score_completions(c: Components, sampled: SampledGroups) -> ScoredGroups:
    """Call the reward functions, on batch_size prompts at a time."""
    K, size = c.config.num_generations_per_prompt, c.config.batch_size
    scored = [
        score_texts(c.rewards, sampled.rows[start : start + size], sampled.texts[start * K : (start + size) * K], K)
        for start in range(0, len(sampled.rows), size)
    ]
    by_function = {name: torch.cat([s.parts[name] for s in scored]) for name in c.rewards.names}
    return ScoredGroups(sampled, torch.cat([s.total for s in scored]), by_function)


def score_texts(rewards: Rewards, rows: Sequence[Row], texts: list[str], K: int) -> Scored:
    """Score K texts for each row; the functions get each prompt and column once beside each text."""
    columns = {name: [row[name] for row in rows for _ in range(K)] for name in rows[0]}
    return rewards(columns.pop("prompt"), texts, columns)


# --- compare ------------------------------------------------------------------------------------------------


def compare_within_groups(c: Components, scored: ScoredGroups) -> Batch:
    """Give each completion its advantage over its group, and cut the batch into micro-batches.

    The log-probabilities under the reference are taken here: they are needed for a KL penalty in the reward, which
    changes the advantages, and stay the same for every update on this batch.
    """
    config, K = c.config, c.config.num_generations_per_prompt
    rollouts = scored.sampled.rollouts
    advantages = advantages_of(c, scored.rewards)
    without_kl = config.kl_coef == 0 and c.engine.skips_no_gradient
    no_gradient = (advantages.view(-1, K) == 0).all(1) & without_kl
    longest = rollouts.input_ids.shape[1] - rollouts.num_tokens + config.max_new_tokens
    micro_batches = make_micro_batches(rollouts, K, config.batch_size * K * longest, no_gradient)
    for part in micro_batches:
        part.ref_logprobs = c.models.reference_logprobs(part.rollouts)
    if config.kl_in == "reward" and config.kl_coef > 0:
        advantages = advantages_of(c, scored.rewards - kl_in_reward(c, micro_batches))
    for part in micro_batches:
        part.advantages = advantages[part.rows].to(c.models.device)
        if config.gamma < 1:
            part.advantages = discounted(part.advantages, part.rollouts.completion_mask, gamma=config.gamma)

    gather = c.processes.gather
    lengths, ended = rollouts.completion_mask.sum(1).cpu(), rollouts.ended.cpu()
    metrics = batch_metrics(
        *(torch.cat(gather([mine])) for mine in (lengths, ended)), torch.cat(gather([scored.rewards])).view(-1, K),
        {name: torch.cat(gather([mine])) for name, mine in scored.by_function.items()},
    )  # fmt: skip
    completions = completion_rows(scored, advantages, micro_batches, K)
    return Batch(micro_batches, gather(completions), metrics)


def advantages_of(c: Components, rewards: Tensor) -> Tensor:
    """Return how much better each of this process's completions is than its group, [B] from rewards [B]."""
    config, K = c.config, c.config.num_generations_per_prompt
    rewards = torch.cat(c.processes.gather([rewards]))
    if rewards.isnan().all():
        raise ValueError("no reward function scored any completion of this step: all returned None or NaN.")
    advantages = group_advantages(
        rewards.view(-1, K), baseline=config.baseline, scale=config.scale_rewards, std_eps=config.std_eps
    )
    mine = c.processes.shard_range(len(advantages))
    return advantages[mine.start : mine.stop].flatten()


def kl_in_reward(c: Components, micro_batches: Sequence[MicroBatch]) -> Tensor:
    """Return what the KL takes off each reward [B]: beta times the log-ratio of the whole completion."""
    penalties = torch.empty(sum(len(part.rows) for part in micro_batches))
    for part in micro_batches:
        # both sides from the scorer: in half precision the sampler's rounding would pass for a reward
        logprobs = c.models.logprobs(part.rollouts)
        k1 = kl_estimate(logprobs, part.ref_logprobs, part.rollouts.completion_mask, estimator="k1")
        penalties[part.rows] = c.config.kl_coef * k1.sum(1).float().cpu()
    return penalties


def completion_rows(
    scored: ScoredGroups, advantages: Tensor, micro_batches: Sequence[MicroBatch], K: int
) -> list[dict[str, Any]]:
    """Return a row of completions.jsonl for each completion, in the order of the batch."""
    tokens = {row: values for part in micro_batches for row, values in part.token_rows()}
    return [
        {
            "prompt": scored.sampled.rows[i // K]["prompt"],
            "completion": text,
            "reward": scored.rewards[i].item(),
            "rewards": {name: _or_none(values[i].item()) for name, values in scored.by_function.items()},
            "advantage": advantages[i].item(),
            **tokens[i],
        }
        for i, text in enumerate(scored.sampled.texts)
    ]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


# --- update -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Terms:
    """The terms of one micro-batch's loss and what they were made from."""

    terms: LossTerms
    scores: Scores
    weights: Tensor | None

    @property
    def loss(self) -> Tensor:
        return self.terms.loss


def update(c: Components, batch: Batch, step: int) -> dict[str, float]:
    """Take one optimizer step on the clipped loss with KL to the reference; return its metrics.

    Args:
        step: its number, for messages.
    """
    gradients = accumulate_gradients(c, batch)
    if step == 1:
        check_first_step(c, gradients)
    return apply_gradients(c, batch, gradients, step)


def accumulate_gradients(c: Components, batch: Batch) -> Gradients:
    """Add up the gradient of the loss over all micro-batches; the weights stay as they are."""
    total = c.processes.sum
    tokens = int(total(sum(int(part.rollouts.completion_mask.sum()) for part in batch.parts)))
    completions = int(total(sum(len(part.rollouts.ended) for part in batch.parts)))
    settings = c.config.loss_settings(tokens=tokens, completions=completions)

    def compute(part: MicroBatch) -> _Terms:
        scores = c.models.scores(part.rollouts)
        before = scores.logprobs.detach() if part.old_logprobs is None else part.old_logprobs
        weights = c.sampler.weights(before, part.rollouts)
        terms = grpo_loss(
            scores.logprobs,
            part.old_logprobs,  # None at the first update: the policy is the one that sampled
            part.advantages,
            part.rollouts.completion_mask,
            ref_logprobs=part.ref_logprobs,
            weights=weights,
            **settings,
        )
        return _Terms(terms, scores, weights)

    sums = UpdateSums()
    c.models.trained.train()
    try:
        for part, found in c.engine.accumulate(batch.parts, compute):
            if batch.updates == 0:
                part.old_logprobs = found.scores.logprobs.detach()
            sums.add(found.terms, found.scores, part, found.weights)
    finally:
        c.models.trained.eval()  # as from_pretrained gave it
    sums = UpdateSums.merged(c.processes.gather([sums]))
    if not batch.updates:
        c.sampler.check(sums.difference / tokens)
    return Gradients(sums, tokens)


def apply_gradients(c: Components, batch: Batch, gradients: Gradients, step: int) -> dict[str, float]:
    """Take the optimizer step with the gradients that have been accumulated; return the metrics of the update."""
    learning_rate = c.engine.scheduler.get_last_lr()[0]
    grad_norm = c.engine.step(step)
    batch.updates += 1
    return update_metrics(
        gradients.sums, gradients.tokens, grad_norm=grad_norm, learning_rate=learning_rate, first=batch.updates == 1,
        with_kl=batch.parts[0].ref_logprobs is not None,
    )  # fmt: skip


def check_first_step(c: Components, gradients: Gradients) -> dict[str, float]:
    """Check before the first update that sampler and scorer see one distribution, and where the reference starts.

    Returns: "ratio", the largest deviation of the importance ratio from 1, and "kl", the largest KL term, in nats.
    Raises: ArithmeticError if log-probabilities are not finite.
    """
    sums = gradients.sums
    if not math.isfinite(sums.difference + sums.kl):
        raise ArithmeticError("log-probabilities are not finite: the weights of the model or reference are damaged.")
    check = {"ratio": math.expm1(min(sums.largest_difference, 80.0)), "kl": sums.largest_kl}
    allowed = 1e-3 if c.models.precision == "fp32" else 0.5  # half precision rounds by per cents
    if check["ratio"] > allowed and c.sampler.is_policy:
        warnings.warn(
            f"right after sampling the ratio should be 1, but is off by up to {check['ratio']:.2g}: "
            "this model does not give the same log-probabilities token by token as all at once.",
            stacklevel=4,
        )
    return check
