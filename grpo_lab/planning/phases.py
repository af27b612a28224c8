"""Memory and operations of each phase of a step, from dry runs of the package's own code (dry_run.py).

The dry runs are one micro-batch of the update, one of the reference and of each reward model, the prefill, and two
decoding steps, in the worst case: all completions differ and have the maximum length. Weights, gradients and optimizer
state are added from their sizes.

`_decode_step`, `_update` and `_prepare` repeat what sampling.py and the trainer do; change them together.
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
from grpo_lab.planning.dry_run import (
    TOP_P_TOKENS,
    LayerExtrapolation,
    MemoryTracker,
    OpCost,
    RunCost,
    empty_copy,
    size_of,
)
from grpo_lab.planning.machines import Machine
from grpo_lab.rollout.decoding import CudaGraphDecoder, DynamicCacheDecoder, can_capture
from grpo_lab.rollout.sampling import sample_token
from grpo_lab.rollout.scoring import completion_logprobs, completion_scores
from grpo_lab.training.config import GRPOConfig
from grpo_lab.training.memory import rollout_batch_size, weight_bytes

CATEGORIES = ("weights", "gradients", "optimizer", "reference", "reward model", "cache", "activations", "logits",
              "rollouts", "everything else")  # fmt: skip
ADAM_TRAFFIC = 7 * 4  # bytes per weight: weight, gradient and two moments are read, weight and moments written


Operations = list[tuple[float, list[OpCost]]]
"""Pairs of (repetitions, operations)."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the micro-batches of a run."""

    config: GRPOConfig
    precision: str
    prompt: int
    """Tokens of the longest prompt."""
    kept: int
    """Tokens left by top-k and top-p at each position; 0 without truncation."""
    processes: int = 1
    rollout_batch_size: int = 1
    """Prompts that are sampled together."""

    @classmethod
    def of(cls, config: GRPOConfig, model: nn.Module, precision: str, prompt: int, processes: int = 1) -> "Shape":
        """Return the shape of a run with this config, whose longest prompt has `prompt` tokens."""
        vocabulary = model.get_input_embeddings().weight.shape[0]
        truncated = 0 < config.top_k < vocabulary or config.top_p < 1
        kept = min(config.top_k or TOP_P_TOKENS, vocabulary) if truncated else 0
        return cls(config, precision, prompt, kept, processes)

    @property
    def prompts(self) -> int:
        """Prompts per step on the most loaded rank."""
        return -(-self.config.prompts_per_step // self.processes)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per step on the most loaded rank."""
        return -(-self.prompts // self.config.batch_size)

    @property
    def shards(self) -> int:
        """Number of ranks that gradients and optimizer state are sharded over; 1 without FSDP."""
        return self.processes if self.config.fsdp else 1

    def rows(self, prompts: int, columns: int) -> tuple[Tensor, Tensor]:
        """Return token ids and mask [prompts * K, columns]: distinct prompts, each with K distinct completions."""
        K, random = self.config.num_generations_per_prompt, torch.Generator().manual_seed(0)
        ids = torch.randint(2, 20, (prompts * K, columns), generator=random)
        ids[:, : self.prompt] = ids[::K, : self.prompt].repeat_interleave(K, 0)
        return ids, torch.ones_like(ids)

    def micro_batch(self) -> tuple[tuple[Tensor, Tensor, int], dict[str, Any]]:
        """Return positional and keyword arguments for `completion_scores`, for one micro-batch."""
        config = self.config
        ids, mask = self.rows(min(self.prompts, config.batch_size), self.prompt + config.max_new_tokens)
        kept = torch.zeros(len(ids), config.max_new_tokens, self.kept, dtype=torch.long) if self.kept else None
        options = {"dedup": config.disable_dropout, "temperature": config.temperature, "kept": kept}
        return (ids, mask, config.max_new_tokens), options

    def autocast(self) -> torch.autocast:
        """Return the trainer's autocast context, for fake tensors, whose device is the CPU."""
        return autocast(torch.device("cpu"), self.precision)


class Phase(NamedTuple):
    """One phase of a step (sampling, scoring, update), or the saving of the model at the end."""

    name: str
    peak: dict[str, int]
    """Bytes by category at the highest point, without the machine's own share."""
    operations: Operations

    def on(self, machine: Machine, reserve: float) -> dict[str, int]:
        """Return bytes by category on a machine, including what its software and its allocator take."""
        return self.peak | {"everything else": int(machine.taken + reserve * sum(self.peak.values()))}

    def seconds(self, machine: Machine, precision: str) -> float:
        """Return the time of all operations on a machine."""
        return sum(times * machine.seconds(costs, precision) for times, costs in self.operations)


def simulate_step(
    shape: Shape, model: nn.Module, reward_models: list[nn.Module], device: str, limit: float = math.inf
) -> list[Phase] | None:
    """Return the phases of a step on this kind of device; None as soon as one is found to exceed `limit` bytes."""
    config = shape.config
    policy = LayerExtrapolation(model, lambda copy: _prepare(copy, config))
    static = policy.evaluate(lambda copy: _static_bytes(copy, shape))
    saved, gathered, gradients = (static.pop(name) for name in ("saved", "gathered", "gradients"))
    columns, sizes = shape.prompt + config.max_new_tokens, policy.evaluate(weight_bytes)
    together = rollout_batch_size(model, config, shape.precision, columns, **sizes)
    shape = replace(shape, rollout_batch_size=min(shape.prompts, together))
    static["reward model"] = sum(_model_bytes(judge) for judge in reward_models if judge is not model)
    # ids and mask; sampled, log-probability, kept; twice: as sampled, and as micro-batches
    row = columns * 16 + config.max_new_tokens * (5 + 8 * shape.kept)
    static["rollouts"] = 2 * shape.prompts * config.num_generations_per_prompt * row

    # the update, which nearly always has the highest peak, comes first
    if sum(static.values()) > limit:
        return None
    during_update = {"weights": static["weights"] + gathered, "gradients": gradients + gathered}
    if shape.micro_batches == 1 and shape.shards == 1:
        during_update["gradients"] = 0  # gradients are made while activations are freed: the dry run counts them
    run = policy.evaluate(lambda copy: _update(copy, shape))
    adam = OpCost(0, gradients // 4 * ADAM_TRAFFIC)
    update = _phase("update", static | during_update, [run], [*_repeat(shape.micro_batches, run), (1, [adam])])
    if sum(update.peak.values()) > limit:
        return None

    captures = can_capture(torch.device(device), config.max_new_tokens)
    prefill, *tokens = policy.evaluate(lambda copy: _sampling(copy, shape, captures=captures))
    rollouts = shape.prompts / shape.rollout_batch_size
    steps = rollouts * (config.max_new_tokens - 1) / len(tokens)
    operations = [*_repeat(rollouts, prefill), *(pair for token in tokens for pair in _repeat(steps, token))]
    runs = [prefill, tokens[-1]] if config.sampler != "vllm" else []  # vLLM's memory is in Machine.taken
    sampling = _phase("sampling", static, runs, operations)

    runs = []
    if config.kl_coef > 0:
        runs.append(policy.evaluate(lambda copy: _scoring(copy, shape, as_reference=True)))
    if config.kl_coef > 0 and config.kl_in == "reward":
        runs.append(policy.evaluate(lambda copy: _scoring(copy, shape)))
    runs += [LayerExtrapolation(judge).evaluate(lambda copy: _reward(copy, shape)) for judge in reward_models]
    scoring = _phase("scoring", static, runs, [pair for run in runs for pair in _repeat(shape.micro_batches, run)])
    if not saved or device == "cuda":  # the model is saved from main memory
        return [sampling, scoring, update]
    return [sampling, scoring, update, _phase("saving", static | {"weights": static["weights"] + saved}, [], [])]


def _phase(name: str, static: dict[str, int], runs: list[RunCost], operations: Operations) -> Phase:
    """Return the phase whose peak is `static` plus the highest peak among the runs."""
    highest = max((run.peak for run in runs), key=lambda peak: sum(peak.values()), default={})
    return Phase(name, {key: static.get(key, 0) + highest.get(key, 0) for key in CATEGORIES}, operations)


def _repeat(times: float, run: RunCost) -> Operations:
    return [(times * repetitions, costs) for repetitions, costs in run.operations]


def _prepare(policy: nn.Module, config: GRPOConfig) -> nn.Module:
    """Prepare the policy as the trainer does."""
    if config.lora_rank:
        with torch.device("meta"):
            policy = add_lora(policy, rank=config.lora_rank, alpha=config.lora_alpha, seed=0)
    trainable_in_float32(policy)
    if config.disable_dropout:
        disable_dropout(policy)
    if config.gradient_checkpointing:
        enable_checkpointing(policy)
    model, tracker = _fake_model(policy)
    with tracker:  # finds out, once for all copies, whether body and head can be called separately
        completion_states(model, *2 * [torch.ones(1, 2, dtype=torch.long)], 1)
    return built_like(policy, model)


def _static_bytes(policy: nn.Module, shape: Shape) -> dict[str, int]:
    """Return the bytes of weights, gradients, optimizer state and reference.

    Temporary ones besides: "gathered" by FSDP for the update, and "saved", copied to save the model or the optimizer.
    """
    whole, trained = _model_bytes(policy), [p for p in policy.parameters() if p.requires_grad]
    gradients = size_of(trained) // shape.shards
    adapted = [m for m in policy.modules() if hasattr(m, "base_layer") and hasattr(m, "merge")]
    saved, gathered = size_of(layer.base_layer.weight for layer in adapted), 0  # merged in main memory
    if shape.shards > 1:  # FSDP gathers what belongs to no layer, the current layer, and the next one by prefetching
        layers = [m for m in policy.modules() if type(m).__name__ in (policy._no_split_modules or ())]
        sizes = [size_of(layer.parameters()) for layer in layers]
        saved = _optimizer_bytes(trained, shape.config)  # rank 0 gathers the whole optimizer state
        gathered = size_of(policy.parameters()) - sum(sizes) + 2 * max(sizes, default=0)
    return {
        "weights": whole + (gradients if shape.shards > 1 else 0),  # the shards, and a full copy for sampling
        "gradients": gradients,
        "optimizer": _optimizer_bytes(trained, shape.config) // shape.shards,
        "reference": whole if shape.config.kl_coef > 0 and not is_adapted(policy) else 0,
        "saved": saved,
        "gathered": gathered,
    }


def _optimizer_bytes(trained: list[nn.Parameter], config: GRPOConfig) -> int:
    """Return the bytes of AdamW's two moments; in 8 bits they have one scale per 256 values.

    bitsandbytes keeps the moments of tensors below 4096 weights in float32.
    """
    if config.optimizer == "adamw":
        return 2 * size_of(trained)
    return sum(8 * p.numel() if p.numel() < 4096 else 2 * p.numel() + 8 * -(-p.numel() // 256) for p in trained)


def _model_bytes(model: nn.Module) -> int:
    return size_of([*model.parameters(), *model.buffers()])


def _fake_model(model: nn.Module, *, trains: bool = True) -> tuple[nn.Module, MemoryTracker]:
    """Return a copy of the model on fake tensors, and the tracker to run it in."""
    tracker = MemoryTracker()
    copy = empty_copy(model, tracker.fake_mode)
    tracker.exclude(copy)
    return copy if trains else copy.requires_grad_(False), tracker


def _cost(tracker: MemoryTracker, cache: object = None) -> RunCost:
    layers = getattr(cache, "layers", ())
    held = size_of(x for layer in layers for x in vars(layer).values() if isinstance(x, Tensor) and x.dim() > 1)
    return RunCost(tracker.peaks, [(1, tracker.operations)], held)


def _sampling(policy: nn.Module, shape: Shape, *, captures: bool) -> list[RunCost]:
    """Return the costs of the prefill and of decoding steps: the one CUDA graph, or the first and the last step."""
    config, K = shape.config, shape.config.num_generations_per_prompt
    model, tracker = _fake_model(policy, trains=shape.shards == 1)
    ids, mask = shape.rows(shape.rollout_batch_size, shape.prompt + config.max_new_tokens)
    with tracker, torch.no_grad(), shape.autocast():
        model.eval()
        decoder = DynamicCacheDecoder(model, ids[::K, : shape.prompt], mask[::K, : shape.prompt], K)
        costs = [_cost(tracker, decoder.cache)]
        if captures and (captured := _cuda_graph_decoder(model, decoder, K, ids.shape[1])) is not None:
            tracker.reset()
            _decode_step(captured, ids, config)
            return [*costs, _cost(tracker, captured.cache)]
        tracker.reset()
        _decode_step(decoder, ids, config)
        costs.append(_cost(tracker))
        tracker.reset()
        del decoder
        columns = max(1, ids.shape[1] - 2)  # the last step reads the last token but one; the last is never read
        decoder = DynamicCacheDecoder(model, ids[:, :columns], mask[:, :columns], 1)
        tracker.reset()
        _decode_step(decoder, ids, config)
        return [*costs, _cost(tracker, decoder.cache)]


def _cuda_graph_decoder(
    model: nn.Module, prefilled: DynamicCacheDecoder, num_generations: int, columns: int
) -> CudaGraphDecoder | None:
    try:
        decoder = CudaGraphDecoder(model, len(prefilled.row_index), columns, torch.device("cpu"))
        decoder.start(prefilled, num_generations)
    except (ValueError, TypeError, AttributeError, RuntimeError):  # the fallback of decoding.py for such models
        return None
    return decoder


def _decode_step(decoder: DynamicCacheDecoder | CudaGraphDecoder, ids: Tensor, config: GRPOConfig) -> None:
    """Do one iteration of the loop in `sample`, keeping the same tensors alive."""
    logits = decoder.logits[decoder.row_index]
    kept = truncate(logits, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)
    uniforms = torch.rand(len(logits))
    chosen = sample_token(logits, uniforms, temperature=config.temperature, kept=kept)
    one_step = None if kept is None else kept[:, None]
    drawn = token_logprobs(logits[:, None], chosen[:, None], temperature=config.temperature, kept=one_step)
    decoder.step(torch.ones(len(ids), dtype=torch.bool), ids[:, -1])
    del drawn  # `sample` still holds it during the step


def _scoring(policy: nn.Module, shape: Shape, *, as_reference: bool = False) -> RunCost:
    """Return the cost of the log-probabilities of one micro-batch under the policy or the reference."""
    adapted = as_reference and is_adapted(policy)  # with LoRA the reference is the policy without its adapter
    model, tracker = _fake_model(policy, trains=shape.shards == 1 and (adapted or not as_reference))
    inputs, options = shape.micro_batch()
    with tracker, torch.no_grad(), shape.autocast():
        model.eval()
        with model.disable_adapter() if adapted else nullcontext():
            completion_logprobs(model, *inputs, **options)
    return _cost(tracker)


def _reward(reward_model: nn.Module, shape: Shape) -> RunCost:
    """Return the cost of one micro-batch under a reward model."""
    model, tracker = _fake_model(reward_model)
    (ids, mask, tokens), _ = shape.micro_batch()
    with tracker, torch.no_grad():
        model.eval()
        if "SequenceClassification" in type(reward_model).__name__:
            model(input_ids=ids, attention_mask=mask)
        else:
            completion_logprobs(model, ids, mask, tokens)
    return _cost(tracker)


def _update(policy: nn.Module, shape: Shape) -> RunCost:
    """Return the cost of forward and backward pass of the last micro-batch of an update."""
    config = shape.config
    model, tracker = _fake_model(policy)
    if shape.shards > 1:  # FSDP reduces each gradient into its shard as soon as it is computed
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    elif shape.micro_batches > 1:  # gradients of the earlier micro-batches exist
        with tracker.fake_mode:
            for weight in model.parameters():
                weight.grad = torch.empty_like(weight) if weight.requires_grad else None
        tracker.exclude(model)
    inputs, options = shape.micro_batch()
    ids, _, tokens = inputs
    logprobs = torch.zeros(len(ids), tokens)
    with tracker:
        model.train()
        with shape.autocast():
            scores = completion_scores(model, *inputs, **options)
        terms = grpo_loss(
            scores.logprobs,
            logprobs if config.num_iterations > 1 else None,
            torch.zeros(len(ids)),
            torch.ones(len(ids), tokens, dtype=torch.bool),
            ref_logprobs=logprobs if config.kl_coef > 0 else None,
            kl_coef=config.kl_coef if config.kl_in == "loss" else 0.0,
            kl_estimator=config.kl_estimator,
            importance=config.importance,
            surrogate=config.surrogate,
            aggregation=config.aggregation,
            constant=config.aggregation_constant or tokens,
        )
        tracker.is_backward = True
        terms.loss.backward()
    return _cost(tracker)
