"""Every setting of a run, in one frozen dataclass, checked when it is made.

The docstring under a field is its only documentation: the command line's help is made from it.
"""

import ast
import inspect
import math
import os
import sys
import typing
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal

from grpo_lab.training.presets import PRESETS


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Settings of a GRPO run; see each field. `GRPOConfig.preset("dr_grpo")` gives a named variant.

    An optimizer step uses `batch_size * gradient_accumulation_steps` prompts and
    `num_generations_per_prompt` completions of each.
    """

    # Generation
    num_generations_per_prompt: int = 4
    """Completions per prompt (K); at least 2, usually 4 to 16. More: better advantages, more time."""
    max_new_tokens: int = 256
    """Longest completion, in tokens."""
    temperature: float = 0.7
    """Sampling temperature; 1.0 samples from the model as it is. Scoring uses the same."""
    top_k: int = 50
    """Sample among the k likeliest tokens; 0 turns it off. Scoring uses the same set."""
    top_p: float = 0.9
    """Sample among the likeliest tokens that make up this probability; 1.0 turns it off. Scoring uses the same set."""
    keep_special_tokens: bool = False
    """Leave special tokens, such as <think> in some tokenizers, in the text that reward functions and
    completions.jsonl get; end tokens are always cut. What the chat template writes itself is part of the prompt."""
    sampler: Literal["model", "vllm"] = "model"
    """What generates the completions: "model" (in this process) or "vllm" (faster on a GPU; needs top_k 0 and
    top_p 1.0). Only "model" repeats a run bit for bit."""
    vllm_server: str | None = None
    """Address of a running `vllm serve` that sees output_dir too, such as http://localhost:8000; see
    grpo_lab.rollout.vllm on how to start it. Without one vLLM runs in this process."""
    vllm_gpu_memory: float = 0.3
    """Share of the GPU's memory that vLLM takes when it runs in this process."""
    sampler_correction: Literal["sequence", "token"] = "sequence"
    """Truncated importance weights correct for vLLM's rounding: one per completion (unbiased), or one per token (less
    variance for long completions)."""
    sampler_ratio_cap: float = 2.0
    """Cap of these weights (C); usually 2 to 5."""

    # Training
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW; 5e-7 to 5e-6 for models of a billion parameters, more for small ones."""
    batch_size: int = 4
    """Prompts per micro-batch if completions have the maximum length; more are taken if they are short. Lower it to
    save memory."""
    num_epochs: int = 3
    """Times that every prompt is used."""
    gradient_accumulation_steps: int = 4
    """Micro-batches per optimizer step. Saves memory, changes nothing else."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this norm where it is longer; inf turns it off."""
    warmup_steps: int = 100
    """Optimizer steps over which the learning rate rises from 0."""
    lr_scheduler: Literal["linear", "cosine", "constant_with_warmup", "constant", "inverse_sqrt", "polynomial"] = (
        "linear"
    )
    """What the learning rate does after the warmup; a name from `transformers.get_scheduler`."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW, or AdamW whose two running means take a byte each per weight instead of four (needs bitsandbytes)."""
    max_steps: int | None = None
    """Optimizer steps in all; overrides num_epochs, and starts new epochs as needed."""
    num_iterations: int = 1
    """Optimizer steps per rollout (μ). With 1 the ratio is 1 at every update and clipping cannot act."""
    seed: int = 0
    """Random seed of prompt order and sampling. The same seed gives the same run on the same machine."""
    disable_dropout: bool = True
    """Set dropout to 0, so that a ratio compares the policies and not two dropout masks."""

    # GRPO
    kl_coef: float = 0.1
    """Weight of the KL divergence from the reference model (β); 0 needs no reference model. Usually 0 to 0.1."""
    clip_range: float = 0.2
    """The gradient of a token is cut once its importance ratio leaves [1 - ε, 1 + ε]."""
    clip_range_high: float | None = None
    """Upper ε, if it differs ("clip higher", DAPO: 0.28)."""
    gamma: float = 1.0
    """Discount: the advantage of token t of n is multiplied by gamma^(n-1-t). 1.0 is GRPO."""
    baseline: Literal["mean", "leave-one-out", "none"] = "mean"
    """Baseline of the advantage: the group's mean, the mean of the other completions (RLOO), or none (REINFORCE)."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """The standard deviation that divides the advantage: of the group, of the batch, or none (Dr. GRPO)."""
    std_eps: float = 1e-4
    """Added to that standard deviation; in the units of the reward."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """How the KL is estimated from sampled tokens; k1 is of no use in the loss, see grpo_lab.algorithm.kl."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL penalty goes: into the loss (GRPO), or into the reward before the advantage (RLOO; always k1)."""
    surrogate: Literal["clip", "cispo"] = "clip"
    """The clipped objective: PPO's minimum, or REINFORCE with capped weights (CISPO)."""
    importance: Literal["token", "sequence"] = "token"
    """The importance ratio of each token, or one for the whole completion (GSPO)."""
    aggregation: Literal["sequence-mean", "token-mean", "constant"] = "sequence-mean"
    """How tokens are averaged: per completion first (GRPO), all alike (DAPO), or divided by a constant (Dr. GRPO)."""
    aggregation_constant: float | None = None
    """The constant for aggregation "constant", in tokens; max_new_tokens if not set."""
    reward_weights: tuple[float, ...] | None = None
    """One weight per reward function; all 1 if not set."""
    reward_timeout: float | None = None
    """Stop if one call of a reward function takes longer than this, in seconds; without it a slow one is only reported.
    The function then runs in a thread, which fails for functions that use signals (math_verify) or sqlite."""

    # LoRA
    lora_rank: int | None = None
    """Train a LoRA adapter of this rank instead of all weights: much less memory, small checkpoints. Needs peft."""
    lora_alpha: float = 32.0
    """The adapter's update is scaled by lora_alpha / lora_rank."""

    # Machine
    device: str = "auto"
    """Where to compute: auto, cuda, cpu or mps. auto takes the first of cuda, mps, cpu that is there."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the arithmetic; weights that are trained stay in float32. auto: bf16 or fp16 on CUDA, else fp32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, one more forward pass."""

    fsdp: bool = False
    """Shard trained weights, gradients and optimizer state between processes (FSDP); each keeps a full copy of the
    weights to sample with. Without it each process keeps everything."""

    # Logging and saving
    logging_steps: int = 10
    """Log metrics (means since the last log) and completions every N optimizer steps."""
    save_steps: int = 500
    """Save a checkpoint every N optimizer steps."""
    save_total_limit: int | None = None
    """Keep only the newest N checkpoints; all if not set."""
    eval_steps: int | None = None
    """Evaluate on eval_dataset every N optimizer steps; never if not set."""
    success_reward: float = 1.0
    """An answer counts as right, for pass@1 and pass@k, if the first reward function gives it at least this."""
    max_skipped_steps: int = 5
    """Stop after this many steps in a row whose gradient is not finite; each is skipped, not applied."""
    output_dir: str = "./grpo_checkpoints"
    """Where everything is written."""
    overwrite_output_dir: bool = False
    """Replace the results of an earlier run in output_dir."""
    use_wandb: bool = False
    """Log to Weights & Biases."""
    wandb_project: str = "grpo-lab"
    """W&B project name."""
    wandb_run_name: str | None = None
    """W&B run name."""
    report_to: tuple[str, ...] = ()
    """Further trackers, through accelerate: tensorboard, mlflow, comet_ml, clearml, aim, trackio, …"""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _checked(field.name, getattr(self, field.name)))
        if self.num_generations_per_prompt < 2:
            raise ValueError(
                f"num_generations_per_prompt must be at least 2, got {_shown(self.num_generations_per_prompt)}: "
                "one completion has no group to be compared with, so nothing would be learned."
            )
        for name, (low, high, low_is_allowed) in _RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            inside = (low <= value if low_is_allowed else low < value) and value <= high
            if not inside or math.isnan(value):
                raise ValueError(f"{name} must be {_words(low, high, low_is_allowed, value)}, got {_shown(value)}.")
        if self.temperature < 0.01:
            raise ValueError(
                f"temperature must be at least 0.01, got {self.temperature}: use top_k=1 to sample greedily."
            )
        if self.sampler == "vllm" and (self.top_k or self.top_p < 1):
            raise ValueError(
                f'sampler "vllm" needs top_k 0 and top_p 1.0, got {self.top_k} and {self.top_p}: vLLM does not say '
                "which tokens it chose among, so what it samples could not be scored under the same distribution."
            )
        if self.vllm_server is not None and not self.vllm_server.startswith(("http://", "https://")):
            raise ValueError(f"vllm_server must start with http:// or https://, got {_shown(self.vllm_server)}.")
        if self.vllm_server is not None and self.sampler != "vllm":
            raise ValueError('vllm_server needs sampler "vllm".')
        if self.baseline == "none" and self.scale_rewards != "none":
            raise ValueError(
                'baseline "none" (REINFORCE) needs scale_rewards "none": without a baseline, equal rewards '
                "would be divided by a standard deviation of 0."
            )
        if not all(isinstance(w, int | float) and abs(w) <= sys.float_info.max for w in self.reward_weights or ()):
            raise ValueError(f"reward_weights must be finite numbers, got {_shown(self.reward_weights)}.")
        if not all(isinstance(tracker, str) for tracker in self.report_to):
            raise TypeError(f"report_to must be names of trackers, got {_shown(self.report_to)}.")
        if not _is_path(self.output_dir):
            raise ValueError(f"output_dir must be the name of a folder, got {_shown(self.output_dir)}.")
        if self.aggregation_constant is not None and self.aggregation != "constant":
            raise ValueError(f'aggregation_constant needs aggregation "constant", not {self.aggregation!r}.')
        if self.kl_in == "reward" and self.kl_estimator != "k1":
            raise ValueError(
                f'kl_in "reward" penalises by k1, whose sum over tokens is the log-ratio; got {self.kl_estimator!r}. '
                'Set kl_estimator "k1" too.'
            )

    # Derived sizes
    @property
    def prompts_per_step(self) -> int:
        """Prompts per optimizer step."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def trackers(self) -> tuple[str, ...]:
        """Everything to report to besides the JSONL files."""
        return (("wandb",) if self.use_wandb else ()) + tuple(
            t for t in self.report_to if t != "wandb" or not self.use_wandb
        )

    def loss_settings(self, *, tokens: int, completions: int) -> dict[str, Any]:
        """Return the keyword arguments of `grpo_loss` that these settings decide.

        Args:
            tokens, completions: of the whole optimizer batch, over which the loss is a mean.
        """
        names = ("kl_estimator", "clip_range", "clip_range_high", "importance", "surrogate", "aggregation")
        return {name: getattr(self, name) for name in names} | {
            "kl_coef": self.kl_coef if self.kl_in == "loss" else 0.0,
            "constant": self.aggregation_constant or self.max_new_tokens,
            "total": tokens if self.aggregation == "token-mean" else completions,
        }

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "GRPOConfig":
        """The settings of a paper or model by name, with changes. Raises ValueError for an unknown name."""
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}. Presets: {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **changes})

    def replace(self, **changes: Any) -> "GRPOConfig":
        """A copy with some settings changed, checked anew."""
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}

    @classmethod
    @cache
    def docs(cls) -> dict[str, str]:
        """Each field's docstring, read from this file."""
        body = ast.parse(inspect.getsource(cls)).body[0].body
        return {
            statement.target.id: inspect.cleandoc(following.value.value)
            for statement, following in pairwise(body)
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr)
        }


_INF = math.inf
# name: (low, high, whether low itself is allowed)
_RANGES: dict[str, tuple[float, float, bool]] = {
    "num_generations_per_prompt": (2, 2**20, True),
    "max_new_tokens": (1, 2**20, True),
    "temperature": (0, 100, False),
    "top_k": (0, 2**31, True),
    "top_p": (0, 1, False),
    "vllm_gpu_memory": (0, 1, False),
    "sampler_ratio_cap": (1, 1e6, True),
    "learning_rate": (0, 10, False),
    "batch_size": (1, 2**20, True),
    "num_epochs": (1, 2**31, True),
    "gradient_accumulation_steps": (1, 2**20, True),
    "max_grad_norm": (0, _INF, False),
    "warmup_steps": (0, 2**31, True),
    "weight_decay": (0, 10, True),
    "max_steps": (1, 2**31, True),
    "num_iterations": (1, 1000, True),
    "seed": (0, 2**32 - 1, True),  # as far as NumPy goes
    "kl_coef": (0, 1e6, True),
    "clip_range": (0, 1, False),
    "clip_range_high": (0, 1e6, False),
    "gamma": (0, 1, False),
    "std_eps": (0, 1e3, False),
    "aggregation_constant": (0, 1e9, False),
    "reward_timeout": (0, 1e9, False),
    "logging_steps": (1, 2**31, True),
    "save_steps": (1, 2**31, True),
    "save_total_limit": (1, 2**31, True),
    "eval_steps": (1, 2**31, True),
    "success_reward": (-1e9, 1e9, True),
    "max_skipped_steps": (1, 2**31, True),
    "lora_rank": (1, 2**16, True),
    "lora_alpha": (0, 1e6, False),
}


def _words(low: float, high: float, low_is_allowed: bool, value: float) -> str:
    at_least = f"at least {low:g}" if low_is_allowed else f"greater than {low:g}"
    if value <= high and high > 1e5:  # a limit so high is worth a word only to who has passed it
        return at_least
    return f"{at_least} and at most {high:.12g}" if math.isfinite(high) else f"{at_least} and finite"


@cache
def field_types() -> dict[str, tuple[tuple[type, ...], tuple[str, ...]]]:
    """For each field the types it accepts and, if it is one of a few words, those words."""
    result = {}
    for name, hint in typing.get_type_hints(GRPOConfig).items():
        if typing.get_origin(hint) is Literal:
            result[name] = ((str,), typing.get_args(hint))
        else:
            options = [o for o in (typing.get_args(hint) or (hint,)) if o is not Ellipsis]
            is_tuple = any(typing.get_origin(o) is tuple for o in [hint, *options])
            result[name] = (
                (tuple, *([type(None)] if type(None) in options else [])) if is_tuple else tuple(options),
                (),
            )
    return result


def _checked(name: str, value: Any) -> Any:
    """The value, if it is of its field's type (an int will do for a float, a list for a tuple); else a clear error."""
    types, words = field_types()[name]
    if words and not (isinstance(value, str) and value in words):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, words))}, got {_shown(value)}.")
    if str in types and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if tuple in types and isinstance(value, list):
        value = tuple(value)
    is_number_for_float = float in types and isinstance(value, int) and not isinstance(value, bool)
    is_bool_for_int = isinstance(value, bool) and bool not in types
    if is_bool_for_int or not (isinstance(value, types) or is_number_for_float):
        wanted = " or ".join("None" if t is type(None) else t.__name__ for t in types)
        raise TypeError(f"{name} must be {wanted}, got {_shown(value)}.")
    if not is_number_for_float:
        return value
    try:
        return float(value)
    except OverflowError:  # the range will refuse it, in words
        return math.inf if value > 0 else -math.inf


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python writes, an object with a broken repr
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:99]}…"


def _is_path(text: str) -> bool:
    try:
        return text.strip() != "" and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
