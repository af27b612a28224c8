"""What each phase of a step takes: the trainer's own code, rehearsed on tensors without contents (rehearsal.py).

Rehearsed are one micro-batch of the update, one of the reference and of the reward model, the reading of the prompts
and two tokens of sampling, at their worst: all completions differ and are as long as they may be. To this come the
weights and what the optimizer keeps.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo_lab.algorithm.logprobs import token_logprobs, truncate
from grpo_lab.algorithm.losses import grpo_loss
from grpo_lab.hardware.devices import autocast
from grpo_lab.models.adapters import add_lora, is_adapted
from grpo_lab.models.forward import built_like, completion_states
from grpo_lab.models.preparation import disable_dropout, enable_checkpointing, trainable_in_float32
from grpo_lab.planning.machines import Machine
from grpo_lab.planning.rehearsal import NUCLEUS, Count, LayerExtrapolation, Rehearsal, Work, emptied, size_of
from grpo_lab.rollout.decoding import CudaGraphDecoder, DynamicCacheDecoder, can_capture
from grpo_lab.rollout.sampling import sample_token
from grpo_lab.rollout.scoring import completion_logprobs, completion_scores
from grpo_lab.training.config import GRPOConfig
from grpo_lab.training.memory import rollout_batch_size, weight_bytes

PARTS = ("weights", "gradients", "optimizer", "reference", "reward model", "cache", "activations", "logits",
         "rollouts", "everything else")  # fmt: skip
ADAM_TRAFFIC = 7 * 4  # bytes a weight: itself, its gradient and two averages are read, all but the gradient written


@dataclass(frozen=True)
class Shape:
    """Of one micro-batch, and of what is sampled at a time."""

    config: GRPOConfig
    precision: str
    prompt: int
    kept: int
    """Tokens that could have been drawn, at each position; 0 if all could."""
    processes: int = 1
    sampled_at_once: int = 1
    """Prompts."""

    @classmethod
    def of(cls, config: GRPOConfig, model: nn.Module, precision: str, prompt: int, processes: int = 1) -> "Shape":
        """That of a run of this config, whose longest prompt has so many tokens."""
        vocabulary = model.get_input_embeddings().weight.shape[0]
        some = 0 < config.top_k < vocabulary or config.top_p < 1
        return cls(config, precision, prompt, min(config.top_k or NUCLEUS, vocabulary) if some else 0, processes)

    @property
    def prompts(self) -> int:
        """Of a step, that the process with the most has."""
        return -(-self.config.prompts_per_step // self.processes)

    @property
    def micro_batches(self) -> int:
        """Of its prompts."""
        return -(-self.prompts // self.config.batch_size)

    @property
    def shards(self) -> int:
        """Among how many processes what is trained is shared out."""
        return self.processes if self.config.fsdp else 1

    def rows(self, prompts: int, columns: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask: prompts that differ, each with K completions that differ."""
        K, draws = self.config.num_generations_per_prompt, torch.Generator().manual_seed(0)
        ids = torch.randint(2, 20, (prompts * K, columns), generator=draws)
        ids[:, : self.prompt] = ids[::K, : self.prompt].repeat_interleave(K, 0)
        return ids, torch.ones_like(ids)

    def micro_batch(self) -> tuple[tuple[Tensor, Tensor, int], dict[str, Any]]:
        """Arguments for the scorer."""
        config = self.config
        ids, mask = self.rows(min(self.prompts, config.batch_size), self.prompt + config.max_new_tokens)
        kept = torch.zeros(len(ids), config.max_new_tokens, self.kept, dtype=torch.long) if self.kept else None
        how = {"dedup": config.disable_dropout, "temperature": config.temperature, "kept": kept}
        return (ids, mask, config.max_new_tokens), how

    def autocast(self) -> torch.autocast:
        """What the trainer computes in, for tensors that are on the CPU in name."""
        return autocast(torch.device("cpu"), self.precision)


class Phase(NamedTuple):
    """Of a step: sampling, scoring, update; or saving, after the last."""

    name: str
    parts: dict[str, int]
    """Bytes at its highest point, without what the machine itself takes."""
    work: list[tuple[float, list[Work]]]
    """How many times which operations."""

    def on(self, machine: Machine, reserve: float) -> dict[str, int]:
        """The parts, with what the machine takes."""
        return self.parts | {"everything else": int(machine.taken + reserve * sum(self.parts.values()))}

    def seconds(self, machine: Machine, precision: str) -> float:
        """How long all of it takes."""
        return sum(times * machine.seconds(work, precision) for times, work in self.work)


def rehearse(
    shape: Shape, model: nn.Module, judges: list[nn.Module], device: str, room: float = math.inf
) -> list[Phase] | None:
    """The phases of a step on this kind of device; None if it is seen on the way that they do not fit into the room."""
    config, times = shape.config, shape.micro_batches
    policy = LayerExtrapolation(model, lambda copy: _prepared(copy, config))
    standing = policy.each(lambda copy: _standing(copy, shape))
    saved, gathered, gradients = (standing.pop(name) for name in ("saved", "gathered", "gradients"))
    columns, sizes = shape.prompt + config.max_new_tokens, policy.each(weight_bytes)
    together = rollout_batch_size(model, config, shape.precision, columns, **sizes)
    shape = replace(shape, sampled_at_once=min(shape.prompts, together))
    standing["reward model"] = sum(_whole(judge) for judge in judges if judge is not model)
    # ids and mask; sampled, log-probability, kept; twice: as they were sampled, and cut into micro-batches
    row = columns * 16 + config.max_new_tokens * (5 + 8 * shape.kept)
    standing["rollouts"] = 2 * shape.prompts * config.num_generations_per_prompt * row

    def phase(name: str, counts: list[Count], work: list[tuple[float, list[Work]]], **stays: int) -> Phase:
        parts = dict.fromkeys(PARTS, 0) | standing | stays
        highest = max((count.peak for count in counts), key=lambda peak: sum(peak.values()), default={})
        return Phase(name, {part: parts[part] + highest.get(part, 0) for part in parts}, work)

    # what nearly always decides comes first
    if sum(standing.values()) > room:
        return None
    stays = {"weights": standing["weights"] + gathered, "gradients": gradients + gathered}
    if times == 1 and shape.shards == 1:
        stays["gradients"] = 0  # they arise as the activations go
    count = policy.each(lambda copy: _update(copy, shape))
    adam = Work(0, gradients // 4 * ADAM_TRAFFIC)
    update = phase("update", [count], [*_repeated(times, count), (1, [adam])], **stays)
    if sum(update.parts.values()) > room:
        return None

    captures = can_capture(torch.device(device), config.max_new_tokens)
    reading, *tokens = policy.each(lambda copy: _sampling(copy, shape, captures=captures))
    groups = shape.prompts / shape.sampled_at_once
    each = groups * (config.max_new_tokens - 1) / len(tokens)
    work = [*_repeated(groups, reading), *(part for token in tokens for part in _repeated(each, token))]
    ours = config.sampler != "vllm"  # whose cache is counted with the machine
    sampling = phase("sampling", [reading, tokens[-1]] if ours else [], work)

    scored = []
    if config.kl_coef > 0:
        scored.append(policy.each(lambda copy: _scoring(copy, shape, as_reference=True)))
    if config.kl_coef > 0 and config.kl_in == "reward":
        scored.append(policy.each(lambda copy: _scoring(copy, shape)))
    scored += [LayerExtrapolation(judge).each(lambda copy: _judging(copy, shape)) for judge in judges]
    work = [part for count in scored for part in _repeated(times, count)]
    scoring = phase("scoring", scored, work)
    saving = [phase("saving", [], [], weights=standing["weights"] + saved)] if saved and device != "cuda" else []
    return [sampling, scoring, update, *saving]


def _repeated(times: float, count: Count) -> list[tuple[float, list[Work]]]:
    return [(times * often, work) for often, work in count.work]


def _prepared(policy: nn.Module, config: GRPOConfig) -> nn.Module:
    """The policy as the trainer prepares it."""
    if config.lora_rank:
        with torch.device("meta"):
            policy = add_lora(policy, rank=config.lora_rank, alpha=config.lora_alpha, seed=0)
    trainable_in_float32(policy)
    if config.disable_dropout:
        disable_dropout(policy)
    if config.gradient_checkpointing:
        enable_checkpointing(policy)
    asked, stage = _stage(policy)
    with stage:  # once where its head begins, and not with each of the copies
        completion_states(asked, *2 * [torch.ones(1, 2, dtype=torch.long)], 1)
    return built_like(policy, asked)


def _standing(policy: nn.Module, shape: Shape) -> dict[str, int]:
    """The bytes of all that stays, and of what joins it for a while: gathered from shards, made to be saved."""
    whole, trained = _whole(policy), [p for p in policy.parameters() if p.requires_grad]
    gradients = size_of(trained) // shape.shards
    adapted = [m for m in policy.modules() if hasattr(m, "base_layer") and hasattr(m, "merge")]
    saved, gathered = size_of(layer.base_layer.weight for layer in adapted), 0  # merged, in main memory
    if shape.shards > 1:  # what belongs to no layer; the layer that computes, and the next one, on its way
        layers = [m for m in policy.modules() if type(m).__name__ in (policy._no_split_modules or ())]
        sizes = [size_of(layer.parameters()) for layer in layers]
        saved = _optimizer(trained, shape.config)  # whole, by the first process
        gathered = size_of(policy.parameters()) - sum(sizes) + 2 * max(sizes, default=0)
    return {
        "weights": whole + (gradients if shape.shards > 1 else 0),  # beside shards, a whole copy to sample from
        "gradients": gradients,
        "optimizer": _optimizer(trained, shape.config) // shape.shards,
        "reference": whole if shape.config.kl_coef > 0 and not is_adapted(policy) else 0,
        "saved": saved,
        "gathered": gathered,
    }


def _optimizer(trained: list[nn.Parameter], config: GRPOConfig) -> int:
    """Bytes of AdamW's two averages; in 8 bits with a scale for 256 of them, but for small weights as ever."""
    if config.optimizer == "adamw":
        return 2 * size_of(trained)
    return sum(8 * p.numel() if p.numel() < 4096 else 2 * p.numel() + 8 * -(-p.numel() // 256) for p in trained)


def _whole(model: nn.Module) -> int:
    return size_of([*model.parameters(), *model.buffers()])


def _stage(model: nn.Module, *, trains: bool = True) -> tuple[nn.Module, Rehearsal]:
    stage = Rehearsal()
    hollow = emptied(model, stage.fake)
    stage.watch(hollow)
    return hollow if trains else hollow.requires_grad_(False), stage


def _counted(stage: Rehearsal, cache: object = None) -> Count:
    layers = getattr(cache, "layers", ())
    held = size_of(x for layer in layers for x in vars(layer).values() if isinstance(x, Tensor) and x.dim() > 1)
    return Count(stage.moments, [(1, stage.work)], held)


def _sampling(policy: nn.Module, shape: Shape, *, captures: bool) -> list[Count]:
    """The reading of the prompts, and a token: the one that is captured, or the first and the last."""
    config, K = shape.config, shape.config.num_generations_per_prompt
    model, stage = _stage(policy, trains=shape.shards == 1)
    ids, mask = shape.rows(shape.sampled_at_once, shape.prompt + config.max_new_tokens)
    with stage, torch.no_grad(), shape.autocast():
        model.eval()
        says = DynamicCacheDecoder(model, ids[::K, : shape.prompt], mask[::K, : shape.prompt], K)
        counts = [_counted(stage, says.cache)]
        if captures and (fixed := _captured(model, says, K, ids.shape[1])) is not None:
            stage.reset()
            _one_token(fixed, ids, config)
            return [*counts, _counted(stage, fixed.cache)]
        stage.reset()
        _one_token(says, ids, config)
        counts.append(_counted(stage))
        stage.reset()
        del says
        columns = max(1, ids.shape[1] - 2)  # as it stands before the last token that is read: the one after is not
        says = DynamicCacheDecoder(model, ids[:, :columns], mask[:, :columns], 1)
        stage.reset()
        _one_token(says, ids, config)
        return [*counts, _counted(stage, says.cache)]


def _captured(
    model: nn.Module, grown: DynamicCacheDecoder, num_generations: int, columns: int
) -> CudaGraphDecoder | None:
    try:
        says = CudaGraphDecoder(model, len(grown.row_index), columns, torch.device("cpu"))
        says.start(grown, num_generations)
    except (ValueError, TypeError, AttributeError, RuntimeError):  # as decoding.decoder: it goes on without
        return None
    return says


def _one_token(says: DynamicCacheDecoder | CudaGraphDecoder, ids: Tensor, config: GRPOConfig) -> None:
    """What `sample` does at each step, with all that it holds meanwhile."""
    logits = says.logits[says.row_index]
    kept = truncate(logits, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    uniforms = torch.rand(len(logits))
    chosen = sample_token(logits, uniforms, temperature=config.temperature, kept=kept)
    one_step = None if kept is None else kept[:, None]
    drawn = token_logprobs(logits[:, None], chosen[:, None], temperature=config.temperature, kept=one_step)
    says.step(torch.ones(len(ids), dtype=torch.bool), ids[:, -1])
    del drawn


def _scoring(policy: nn.Module, shape: Shape, *, as_reference: bool = False) -> Count:
    adapted = as_reference and is_adapted(policy)  # the policy is its own reference
    model, stage = _stage(policy, trains=shape.shards == 1 and (adapted or not as_reference))
    inputs, how = shape.micro_batch()
    with stage, torch.no_grad(), shape.autocast():
        model.eval()
        with model.disable_adapter() if adapted else nullcontext():
            completion_logprobs(model, *inputs, **how)
    return _counted(stage)


def _judging(judge: nn.Module, shape: Shape) -> Count:
    model, stage = _stage(judge)
    (ids, mask, tokens), _ = shape.micro_batch()
    with stage, torch.no_grad():
        model.eval()
        if "SequenceClassification" in type(judge).__name__:
            model(input_ids=ids, attention_mask=mask)
        else:
            completion_logprobs(model, ids, mask, tokens)
    return _counted(stage)


def _update(policy: nn.Module, shape: Shape) -> Count:
    config = shape.config
    model, stage = _stage(policy)
    if shape.shards > 1:  # each goes into the shards as soon as it is there
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    elif shape.micro_batches > 1:  # there are the gradients of the micro-batches before
        with stage.fake:
            for weight in model.parameters():
                weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        stage.watch(model)
    inputs, how = shape.micro_batch()
    ids, _, tokens = inputs
    before = torch.zeros(len(ids), tokens)
    with stage:
        model.train()
        with shape.autocast():
            scores = completion_scores(model, *inputs, **how)
        terms = grpo_loss(
            scores.logprobs,
            before if config.num_iterations > 1 else None,
            torch.zeros(len(ids)),
            torch.ones(len(ids), tokens, dtype=torch.bool),
            ref_logprobs=before if config.kl_coef > 0 else None,
            kl_coef=config.kl_coef if config.kl_in == "loss" else 0.0,
            kl_estimator=config.kl_estimator,
            importance=config.importance,
            surrogate=config.surrogate,
            aggregation=config.aggregation,
            constant=config.aggregation_constant or tokens,
        )
        stage.backward = True
        terms.loss.backward()
    return _counted(stage)
