"""What judges a completion: a callable, a model, or a list of them, behind one protocol.

A reward function is called as `f(prompts, completions, **columns)` and returns one number per
completion, or None where it does not score. Models are wrapped into such functions here.
"""

import inspect
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lab.models.forward import evaluating
from grpo_lab.rewards.verifiable import RewardFunction
from grpo_lab.rollout.prompts import Prompt, chat_text, encode_prompt
from grpo_lab.rollout.sampling import left_pad, pad_token_id
from grpo_lab.rollout.scoring import completion_logprobs

LARGEST_REWARD = 1e15  # its square, in a standard deviation, still fits into float32
PATIENCE = 60.0  # seconds until a reward function that is still running is named

RewardModel = nn.Module | RewardFunction | Sequence[nn.Module | RewardFunction]


class SequenceClassifierReward:
    """The single logit of an `AutoModelForSequenceClassification` with `num_labels=1`.

    A chat is written out by the tokenizer's chat template; a text prompt and its completion are joined.

    Args:
        model: the classifier.
        tokenizer: the one it was trained with, not necessarily the policy's.
    Raises: ValueError if the model has more than one output.
    """

    def __init__(self, model: nn.Module, tokenizer):
        if model.config.num_labels != 1:
            raise ValueError(
                f"a reward model needs one output, {type(model).__name__} has {model.config.num_labels}. "
                "Load it with num_labels=1."
            )
        self.model, self.tokenizer, self.__name__ = model, tokenizer, "reward_model"
        self.pad_id = model.config.pad_token_id

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """One logit per completion, in whatever unit the model was trained to give."""
        fill = pad_token_id(self.tokenizer, self.model)
        rows = [self._ids(p, c) or [fill] for p, c in zip(prompts, completions, strict=True)]
        width = max(map(len, rows))
        pad = self.pad_id
        if pad is None:
            # The model judges at the last token that is not padding. It has none of its own, so take one that ends
            # no text: the tokenizer's, often its end token, would make the model judge one token early.
            pad = next(i for i in count() if all(row[-1] != i for row in rows))
            self.model.config.pad_token_id = pad
        device = next(self.model.parameters()).device
        input_ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        with evaluating(self.model):
            logits = self.model(input_ids=input_ids, attention_mask=mask).logits
        return logits.squeeze(-1).float().tolist()

    def _ids(self, prompt: Prompt, completion: str) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt + completion)["input_ids"]
        chat = [*prompt, {"role": "assistant", "content": completion}]
        if self.tokenizer.chat_template is None:
            return self.tokenizer("\n".join(message["content"] for message in chat))["input_ids"]
        text = chat_text(self.tokenizer, chat)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has written them


class CausalLMReward:
    """How likely a causal LM finds a completion: the mean log-probability per token, in nats.

    A demonstration that needs no other model. It rewards what is fluent and short of surprises, not what
    is right or useful, so it warns when it is made.

    Args:
        model: the language model; the policy itself will do.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: nn.Module, tokenizer):
        self.model, self.tokenizer, self.__name__ = model, tokenizer, "mean_logprob"
        warnings.warn(
            "A causal LM as reward_model is a demonstration: it rewards what the model finds likely, not what is "
            "good. For real training use a trained reward model or a reward function.",
            stacklevel=4,
        )

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """One mean log-probability per completion, in nats per token, at most 0."""
        heads = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        # an empty completion is judged by its only token, the end
        end = self.tokenizer.eos_token_id
        ends = [pad_token_id(self.tokenizer, self.model) if end is None else end]
        tails = [self.tokenizer(c, add_special_tokens=False)["input_ids"] or ends for c in completions]
        device = next(self.model.parameters()).device
        pad, longest = pad_token_id(self.tokenizer, self.model), max(map(len, tails))
        head_ids, head_mask = left_pad(heads, pad)
        tail_ids = torch.tensor([tail + [pad] * (longest - len(tail)) for tail in tails])
        tail_mask = torch.tensor([[1] * len(tail) + [0] * (longest - len(tail)) for tail in tails])
        input_ids, mask = torch.cat([head_ids, tail_ids], 1), torch.cat([head_mask, tail_mask], 1)
        with evaluating(self.model):
            logprobs = completion_logprobs(self.model, input_ids.to(device), mask.to(device), longest).cpu()
        return ((logprobs * tail_mask).sum(1) / tail_mask.sum(1)).tolist()


@dataclass(frozen=True)
class Scored:
    """What the reward functions said about B completions."""

    total: Tensor
    """[B] float32, the weighted sum; NaN where no function scored."""
    parts: dict[str, Tensor]
    """Function's name -> [B] float32, unweighted; NaN where it did not score."""

    @property
    def first(self) -> Tensor:
        """[B] what the first function said, unweighted: it decides what is right."""
        return next(iter(self.parts.values()))


class Rewards:
    """One or several reward functions with weights, whose answers are checked.

    Args:
        reward_model: a model, a callable, or a list of them.
        tokenizer: the policy's; models are given it. Another one? Wrap the model yourself:
            SequenceClassifierReward(model, its_tokenizer).
        weights: one per function; None means 1 each.
        timeout: seconds for one call of one function, which then runs in a thread; None: no limit, and no thread.
    Raises: ValueError if weights and functions differ in number, TypeError for what is neither model nor callable.
    """

    def __init__(
        self,
        reward_model: RewardModel,
        tokenizer,
        weights: Sequence[float] | None = None,
        timeout: float | None = None,
    ):
        self.timeout = timeout
        several = reward_model if isinstance(reward_model, list | tuple) else [reward_model]
        self.functions = [_as_function(f, tokenizer) for f in several]
        if not self.functions:
            raise ValueError("at least one reward function is needed, got an empty list.")
        self.weights = list(weights) if weights is not None else [1.0] * len(self.functions)
        if len(self.weights) != len(self.functions):
            raise ValueError(f"got {len(self.weights)} reward_weights for {len(self.functions)} reward functions.")
        names = [getattr(f, "__name__", type(f).__name__) for f in self.functions]
        self.names = [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]

    def to(self, device: torch.device, replaced: dict[nn.Module, nn.Module]) -> None:
        """Move reward models to the device, and use the second of each pair in `replaced` in place of the first."""
        for function in self.functions:
            if isinstance(model := getattr(function, "model", None), nn.Module):
                model.to(device)
                function.model = replaced.get(model, model)

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str], columns: dict[str, list]) -> Scored:
        """Score B completions; `prompts` and each column have B entries too.

        Raises: ValueError that names the function, and the completion, if a function raises, returns the wrong
            number of values, something that is no number, or an infinite value; TimeoutError if it takes too long.
        """
        parts = {
            name: _call(function, name, prompts, completions, columns, self.timeout)
            for name, function in zip(self.names, self.functions, strict=True)
        }
        stacked = torch.stack(list(parts.values()))  # [functions, B]
        weighted = (stacked * torch.tensor(self.weights)[:, None]).nansum(0)
        if (weighted.abs() > LARGEST_REWARD).any():
            raise ValueError(f"the weighted sum of the rewards is beyond {LARGEST_REWARD:g}: lower reward_weights.")
        return Scored(weighted.where(~stacked.isnan().all(0), torch.nan), parts)


def _as_function(judge: nn.Module | RewardFunction, tokenizer) -> RewardFunction:
    if isinstance(judge, nn.Module):
        is_classifier = "SequenceClassification" in type(judge).__name__
        return (SequenceClassifierReward if is_classifier else CausalLMReward)(judge, tokenizer)
    if not callable(judge):
        raise TypeError(f"a reward model is a model or a callable f(prompts, completions, **columns), got {judge!r}.")
    return judge


def _call(function: Callable, name: str, prompts, completions, columns: dict[str, list], timeout) -> Tensor:
    size = len(completions)

    def ask() -> Any:
        values = function(prompts, completions, **_wanted(function, columns))
        return list(islice(values, size + 1)) if isinstance(values, Iterable) else values

    try:
        values = _in_time(ask, f"the reward function {name!r} on {size} completions", timeout)
    except _TooSlowError:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"the reward function {name!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(values, list):
        raise ValueError(
            f"the reward function {name!r} must return a list with one number per completion, got {values!r:.80}."
        )
    if len(values) != size:
        more = " or more" if len(values) > size else ""
        raise ValueError(f"the reward function {name!r} returned {len(values)}{more} values for {size} completions.")
    for value, completion in zip(values, completions, strict=True):
        if value is None:
            continue
        try:
            too_large = math.fabs(value) > LARGEST_REWARD
        except OverflowError:
            too_large, value = True, math.inf  # an int with more digits than could be shown
        except (TypeError, ValueError):
            raise ValueError(f"the reward function {name!r} must return numbers or None, got {value!r}.") from None
        if too_large:
            raise ValueError(
                f"the reward function {name!r} returned {value} for the completion {completion[:80]!r}. "
                f"A reward must be finite, and at most {LARGEST_REWARD:g} in size."
            )
    return torch.tensor([math.nan if v is None else float(v) for v in values])


class _TooSlowError(TimeoutError):
    pass


def _in_time(work: Callable[[], Any], what: str, timeout: float | None) -> Any:
    """What `work()` returns. With a timeout it runs in a thread of its own, the only thing that can be left behind."""
    if timeout is None:
        words = f"{what} has run for {PATIENCE:g} s. Does it hang? --reward-timeout SECONDS would stop it."
        notice = threading.Timer(PATIENCE, warnings.warn, [words, RuntimeWarning])
        notice.daemon = True
        notice.start()
        try:
            return work()
        finally:
            notice.cancel()
    outcome: Future = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    began = time.monotonic()
    while not outcome.done():
        if time.monotonic() - began > timeout:
            raise _TooSlowError(
                f"{what} did not return within {timeout:g} s (reward_timeout). Mend it, or allow it more time, "
                "and go on with --resume (resume=True)."
            )
        thread.join(min(timeout, 0.2))  # in slices: on Windows, Ctrl-C is heard only between them
    return outcome.result()


def _wanted(function: Callable, columns: dict[str, list]) -> dict[str, list]:
    """The columns that the function takes: all with **columns, else those it names."""
    parameters = inspect.signature(function).parameters
    for name, parameter in list(parameters.items())[2:]:
        needed = parameter.default is parameter.empty and parameter.kind in (0, 1, 3)  # by position or keyword
        if needed and name not in columns:
            raise LookupError(f"it needs the column {name!r}, and the dataset has {', '.join(['prompt', *columns])}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return columns
    return {name: values for name, values in columns.items() if name in parameters}
