"""One pass of the model over prompts and completions: what its last layer says before each completion token.

Completions of the same prompt share one pass over it, and the head, whose logits are what takes the memory, is
left to the caller. Neither changes a number beyond rounding.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

Head = Callable[[Tensor], Tensor]
# transformers 5.24 renamed `past_key_values` to `cache`, and warns where it meets the older name
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
GROWING = (DynamicLayer, DynamicSlidingWindowLayer)  # caches that copy, so that a gradient flows through them


def completion_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, num_tokens: int, *, dedup: bool = True
) -> tuple[Tensor, Head]:
    """The states from which each completion token is predicted, and the head that turns them into logits.

    Args: as `completion_logprobs`.
    Returns: [B, T, H] and a function [..., H] -> [..., V]; position t predicts completion token t. Where a model
        does not let its head be told apart, the states are the logits and the head is the identity.
    """
    width = input_ids.shape[1] - num_tokens
    if not 0 < width < input_ids.shape[1]:
        raise ValueError(
            f"num_tokens must leave at least one column of prompt: got {num_tokens} of {input_ids.shape[1]} columns."
        )
    body, head = _body_and_head(model)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **position_ids(model, attention_mask)}
    # The shift by one, here and nowhere else: the token at column s is predicted at column s - 1, so the first is
    # predicted by the end of the prompt, and what the last column predicts was never sampled.
    inputs = {name: columns[:, :-1] for name, columns in inputs.items()}
    states = _after_shared_prompts(body, inputs, width) if dedup and not _recomputes(model) else None
    if states is None:
        states = body(**inputs, use_cache=False, keep=num_tokens).states
    return states[:, -num_tokens:], head


def completion_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> Tensor:
    """[B, T, V] logits, position t predicting completion token t: all at once, for a closer look at a small model."""
    states, head = completion_states(model, input_ids, attention_mask, num_tokens)
    return head(states)


def first_of_each(*columns: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows are the same?

    Args:
        columns: integers [B, ...]; two rows are the same if they are in all of them.
    Returns: [B] the number of each row among those that differ, and [D] where the first of each stands.

    >>> first_of_each(torch.tensor([[7, 7], [1, 2], [7, 7]]))
    (tensor([1, 0, 1]), tensor([1, 0]))
    """
    # on the CPU, where every device can: whoever asks waits for the answer in any case
    rows = torch.cat([column.flatten(1).long() for column in columns], 1).cpu()
    _, number = rows.unique(dim=0, return_inverse=True)
    places = torch.arange(len(rows))
    first = places.new_full((int(number.max()) + 1,), len(rows)).scatter_reduce(0, number, places, "amin")
    return number.to(columns[0].device), first.to(columns[0].device)


def position_ids(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """Positions that start at the first real token, as a keyword for the model, if it takes one.

    Without them a left-padded prompt would start at the position of its padding, and a model with
    learned positions (GPT-2) would read another prompt.
    """
    if not accepts(model, "position_ids"):
        return {}  # the model derives them from the mask, or has none (BLOOM)
    return {"position_ids": (attention_mask.long().cumsum(1) - 1).clamp(min=0)}


def accepts(model: nn.Module, argument: str) -> bool:
    """Does the model underneath its wrappers take this keyword?"""
    return argument in inspect.signature(_underneath(model).forward).parameters


def cache_argument(model: nn.Module, cache: object) -> dict[str, object]:
    """Return the KV cache as a keyword argument for the model; the code of a Hub model may know only the older name."""
    return {"past_key_values" if accepts(model, "past_key_values") else CACHE: cache}


def cache_of(output: object) -> object | None:
    """Return the KV cache in a model's output, None if there is none."""
    return getattr(output, CACHE, None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode for a while: dropout is neither for sampling nor for judging."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Output(NamedTuple):
    states: Tensor
    cache: object


def _after_shared_prompts(body, inputs: dict[str, Tensor], width: int) -> Tensor | None:
    # Each prompt is read once, and its keys and values stand beside all of its completions. Where completions are
    # short, prompts are most of the work. None if all prompts differ, or if there is no cache through which a gradient
    # flows: in recurrent models, and where activations are recomputed in backward.
    ids = inputs["input_ids"]
    prompt_of, first = first_of_each(ids[:, :width], inputs["attention_mask"][:, :width])
    if len(first) == len(ids):
        return None
    prompts = body(**{name: x[first, :width] for name, x in inputs.items()}, use_cache=True, keep=1)
    cache = prompts.cache
    if not isinstance(cache, DynamicCache) or not all(type(layer) in GROWING for layer in cache.layers):
        return None
    states = prompts.states[:, -1:].index_select(0, prompt_of)
    if ids.shape[1] == width:
        return states
    cache.reorder_cache(prompt_of)
    rest = {name: x if name == "attention_mask" else x[:, width:] for name, x in inputs.items()}
    return torch.cat([states, body(**rest, use_cache=True, cache=cache, keep=0).states], 1)


def _body_and_head(model: nn.Module) -> tuple[Callable[..., _Output], Head]:
    body, head = _parts(model)

    def call(*, keep: int, cache: object = None, **inputs) -> _Output:
        if cache is not None:
            inputs |= cache_argument(model if body is None else body, cache)
        if body is not None:
            output = body(**inputs)
            return _Output(output.last_hidden_state, cache_of(output))
        last = {"logits_to_keep": keep} if accepts(model, "logits_to_keep") else {}  # 0 keeps all
        output = model(**inputs, **last)
        return _Output(output.logits, cache_of(output))

    return call, head


_separable: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _parts(model: nn.Module) -> tuple[nn.Module | None, nn.Module]:
    # Some models do more than body and head (Gemma 2 caps its logits, Cohere scales them), so each is asked once.
    inner = _underneath(model)
    body = getattr(inner, getattr(inner, "base_model_prefix", ""), None)
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if body is None or not hasattr(head, "out_features"):
        return None, nn.Identity()
    if model not in _separable:
        ids = torch.tensor([[0, 1, 0]], device=head.weight.device)
        probe = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with torch.no_grad(), evaluating(model):
            try:
                _separable[model] = torch.equal(head(body(**probe).last_hidden_state), model(**probe).logits)
            except (
                AttributeError,
                TypeError,
                ValueError,
                RuntimeError,
            ):  # its body wants other inputs, or gives others
                _separable[model] = False
    return (body, head) if _separable[model] else (None, nn.Identity())


def built_like(other: nn.Module, model: nn.Module) -> nn.Module:
    """The other, a copy of the model: what has been found out about the model's head holds of it too."""
    if model in _separable:
        _separable[other] = _separable[model]
    return other


def rebuilt(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the model with what `change` makes of its weights and buffers; what they share stays shared."""
    memo: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        new = change(tensor.detach())
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return built_like(copy.deepcopy(model, memo), model)


def _recomputes(model: nn.Module) -> bool:
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _underneath(model: nn.Module) -> nn.Module:
    # DDP and PEFT wrap
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
