"""Reward models and reward functions behind one interface.

A reward function is called as `f(prompts, completions, **columns)` and returns one number per completion, or None for a
completion that it does not score. Arguments named `prompts` and `completions` get these wherever they stand, as in TRL.
Models are wrapped into such functions.
"""

import inspect
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from grpo_lab.models.forward import evaluating
from grpo_lab.rewards.verifiable import RewardFunction
from grpo_lab.rollout.prompts import Prompt, chat_text, encode_prompt, encode_texts
from grpo_lab.rollout.sampling import context_of, left_pad, pad_token_id
from grpo_lab.rollout.scoring import completion_logprobs

LARGEST_REWARD = 1e15  # its square, in a standard deviation, still fits into float32
PATIENCE = 60.0  # seconds after which a running reward function is warned about

RewardModel = nn.Module | RewardFunction | Sequence[nn.Module | RewardFunction]


class SequenceClassifierReward:
    """Reward with the logit of an `AutoModelForSequenceClassification` that has `num_labels=1`.

    A chat is rendered with the tokenizer's chat template; a text prompt and its completion are concatenated.

    Args:
        model: the classifier.
        tokenizer: the classifier's tokenizer; it may differ from the policy's.
    Raises: ValueError if the model has more than one output.
    """

    def __init__(self, model: nn.Module, tokenizer):
        if model.config.num_labels != 1:
            raise ValueError(
                f"a reward model needs one output, {type(model).__name__} has {model.config.num_labels}. "
                "Load it with num_labels=1."
            )
        self.model, self.tokenizer, self.__name__ = model, tokenizer, "reward_model"
        pad = model.config.pad_token_id
        known = model.get_input_embeddings().weight.shape[0]
        self.pad_id = pad if pad is not None and 0 <= pad < known else None  # some configs say -1 for none

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """Return one logit per completion."""
        fill = pad_token_id(self.tokenizer, self.model)
        rows = [self._ids(p, c) or [fill] for p, c in zip(prompts, completions, strict=True)]
        _check_positions(self, rows)
        width = max(map(len, rows))
        pad = self.pad_id
        if pad is None:
            # The model takes the logit at the last token that is not padding, and its config names no padding token.
            # The tokenizer's is often <eos>, which may end a text and would move the logit one token back; so choose
            # an id that ends no text.
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
            return encode_texts(self.tokenizer, [prompt + completion])[0]
        if prompt[-1]["role"] == "assistant":  # the completion goes on with its words
            prompt, completion = prompt[:-1], prompt[-1]["content"] + completion
        chat = [*prompt, {"role": "assistant", "content": completion}]
        if self.tokenizer.chat_template is None:
            return self.tokenizer("\n".join(message["content"] for message in chat))["input_ids"]
        text = chat_text(self.tokenizer, chat)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # the template adds them

    def check_prompts(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Raise ValueError for a prompt that leaves the model no room for a completion."""
        _check_positions(self, [self._ids(prompt, "") or [0] for prompt in prompts], max_new_tokens)


class CausalLMReward:
    """Reward with a causal LM's mean log-probability per completion token, in nats.

    A demonstration that needs no trained reward model. It rewards likely text, not correct or useful text, so it warns
    when it is created.

    Args:
        model: the language model; it may be the policy itself.
        tokenizer: the model's tokenizer.
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
        """Return one mean log-probability per completion, in nats per token, at most 0."""
        heads = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]
        # an empty completion is scored by its <eos>
        end = self.tokenizer.eos_token_id
        ends = [pad_token_id(self.tokenizer, self.model) if end is None else end]
        tails = [self.tokenizer(c, add_special_tokens=False)["input_ids"] or ends for c in completions]
        _check_positions(self, [head + tail for head, tail in zip(heads, tails, strict=True)])
        device = next(self.model.parameters()).device
        pad, longest = pad_token_id(self.tokenizer, self.model), max(map(len, tails))
        head_ids, head_mask = left_pad(heads, pad)
        tail_ids = torch.tensor([tail + [pad] * (longest - len(tail)) for tail in tails])
        tail_mask = torch.tensor([[1] * len(tail) + [0] * (longest - len(tail)) for tail in tails])
        input_ids, mask = torch.cat([head_ids, tail_ids], 1), torch.cat([head_mask, tail_mask], 1)
        with evaluating(self.model):
            logprobs = completion_logprobs(self.model, input_ids.to(device), mask.to(device), longest).cpu()
        return ((logprobs * tail_mask).sum(1) / tail_mask.sum(1)).tolist()

    def check_prompts(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Raise ValueError for a prompt that leaves the model no room for a completion."""
        _check_positions(self, [encode_prompt(self.tokenizer, prompt) for prompt in prompts], max_new_tokens)


def _check_positions(reward, rows: Sequence[Sequence[int]], max_new_tokens: int = 0) -> None:
    """Raise ValueError if a text has more tokens than the reward's model has positions, or tokens unknown to it."""
    model = reward.model
    longest, highest, known = max(map(len, rows)), max(map(max, rows)), model.get_input_embeddings().weight.shape[0]
    positions = context_of(model)
    for module in model.modules():  # RoBERTa's positions are counted from behind its padding id
        if isinstance(module, nn.Embedding) and module.num_embeddings == positions != known and module.padding_idx:
            positions -= module.padding_idx + 1
            break
    if highest >= known:
        raise ValueError(
            f"the tokenizer gives token {highest}, but the reward model knows only {known}. Wrap it with its own "
            f"tokenizer: {type(reward).__name__}(model, tokenizer)."
        )
    if positions and longest + max_new_tokens > positions:
        more = f" and max_new_tokens {max_new_tokens}" if max_new_tokens else " with its completion"
        raise ValueError(
            f"a prompt of {longest} tokens{more} does not fit into the {positions} positions of the reward model. "
            "Shorten the prompts or lower --max-new-tokens, in a new run, or take another reward model."
        )


@dataclass(frozen=True)
class Scored:
    """The rewards of B completions."""

    total: Tensor
    """[B] float32, weighted sum over the functions; NaN where no function scored."""
    parts: dict[str, Tensor]
    """Function name -> [B] float32, unweighted; NaN where it did not score."""

    @property
    def first(self) -> Tensor:
        """[B] unweighted rewards of the first function, which decides what counts as right."""
        return next(iter(self.parts.values()))


class Rewards:
    """Call one or several reward functions, check what they return, and sum it with weights.

    Args:
        reward_model: a model, a callable, or a list of them.
        tokenizer: the policy's, used for models too. A model with another tokenizer must be wrapped:
            SequenceClassifierReward(model, its_tokenizer).
        weights: one per function; None means 1 each.
        timeout: seconds for one call of one function, which then runs in a thread; None: no limit, no thread.
    Raises: ValueError if weights and functions differ in number, TypeError if one is neither a model nor a callable.
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
            number of values, a value that is not a number, or an infinite one; TimeoutError after `timeout` seconds.
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


def _as_function(reward: nn.Module | RewardFunction, tokenizer) -> RewardFunction:
    if isinstance(reward, nn.Module):
        is_classifier = "SequenceClassification" in type(reward).__name__
        return (SequenceClassifierReward if is_classifier else CausalLMReward)(reward, tokenizer)
    if not callable(reward):
        raise TypeError(f"a reward model is a model or a callable f(prompts, completions, **columns), got {reward!r}.")
    return reward


def _call(function: Callable, name: str, prompts, completions, columns: dict[str, list], timeout) -> Tensor:
    size = len(completions)

    def evaluate() -> Any:
        positional, named = _arguments(function, prompts, completions, columns)
        values = function(*positional, **named)
        without_order = isinstance(values, Mapping | Set | str | bytes) or hasattr(values, "columns")
        return list(islice(values, size + 1)) if isinstance(values, Iterable) and not without_order else values

    try:
        values = _with_timeout(evaluate, f"the reward function {name!r} on {size} completions", timeout)
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
            too_large, value = True, math.inf  # an int too large for a float
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


def _with_timeout(work: Callable[[], Any], what: str, timeout: float | None) -> Any:
    """Return `work()`. With a timeout it runs in a daemon thread, because only a thread can be abandoned."""
    if timeout is None:
        message = f"{what} has run for {PATIENCE:g} s. Does it hang? --reward-timeout SECONDS would stop it."
        notice = threading.Timer(PATIENCE, warnings.warn, [message, RuntimeWarning])
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
                f"{what} did not return within {timeout:g} s (reward_timeout). Fix it or raise the "
                "limit, then continue with --resume (resume=True)."
            )
        thread.join(min(timeout, 0.2))  # in slices: on Windows, Ctrl-C is handled only between them
    return outcome.result()


def _arguments(function: Callable, prompts, completions, columns: dict[str, list]) -> tuple[list, dict[str, Any]]:
    """Return the positional and the keyword arguments of a reward function.

    A parameter `prompts` or `completions` gets these by name; else the first parameter is the prompts and the second
    the completions. The columns are all that there are if it has **columns, else those it names.
    Raises: LookupError for a parameter that is neither and has no default, or if it takes no completions.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some built-in functions have none
        return [prompts, completions], {}
    both = {"prompts": prompts, "completions": completions}
    has_dict = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {name: values for name, values in (both | columns).items() if has_dict or name in parameters}
    positional = []
    places = [
        p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)
    ]
    if places and places[0].kind is places[0].VAR_POSITIONAL:
        places *= 2  # f(*arguments)
    for place, wanted in zip(places[:2], both, strict=False):
        known = place.name in both or place.name in columns
        optional = place.default is not place.empty
        if place.name == wanted or not (known or optional or wanted in parameters):
            positional.append(both[wanted])
            named.pop(wanted, None)
            named.pop(place.name, None)
        else:
            break
    taken = [p.name for p in places[: len(positional)]]
    for name, parameter in parameters.items():
        variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if not variable and parameter.default is parameter.empty and name not in (*taken, *named):
            raise LookupError(f"it needs the column {name!r}, and the dataset has {', '.join(['prompt', *columns])}")
    guessed = len(positional) == 1 and taken[0] != "prompts" and "completions" not in parameters  # f(c, **columns)
    if len(positional) < 2 and (guessed or "completions" not in named):
        raise LookupError("it takes no completions: f(prompts, completions, **columns)")
    return positional, named
