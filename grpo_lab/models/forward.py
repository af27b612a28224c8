"""One forward pass over prompts and completions: the hidden states that predict each completion token.

Each distinct prompt is computed once for all of its completions, and the head is left to the caller, because the
logits take the most memory. Both change the results only by rounding.
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
# transformers 5.24 renamed `past_key_values` to `cache` and warns about the older name
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
DIFFERENTIABLE = (DynamicLayer, DynamicSlidingWindowLayer)  # they concatenate and write nothing in place


def completion_states(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, num_tokens: int, *, dedup: bool = True
) -> tuple[Tensor, Head]:
    """Return the hidden states that predict each completion token, and the head that turns them into logits.

    Args: see `completion_logprobs`.
    Returns: [B, T, H] and a function [..., H] -> [..., V]; position t predicts completion token t. If the model's
        head cannot be called separately, the states are the logits and the head is the identity.
    Raises: ValueError if there is no prompt.
    """
    width = input_ids.shape[1] - num_tokens
    if not 0 < width < input_ids.shape[1]:
        raise ValueError(
            f"num_tokens must leave at least one column of prompt: got {num_tokens} of {input_ids.shape[1]} columns."
        )
    body, head = _body_and_head(model)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **position_ids(model, attention_mask)}
    # The shift by one is here and nowhere else: column s - 1 predicts the token at column s. The last column of the
    # prompt predicts the first completion token, and the last column of all predicts nothing that was sampled.
    inputs = {name: columns[:, :-1] for name, columns in inputs.items()}
    states = _states_with_shared_prompts(body, inputs, width) if dedup and not _is_checkpointing(model) else None
    if states is None:
        states = body(**inputs, use_cache=False, keep=num_tokens).states
    return states[:, -num_tokens:], head


def completion_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> Tensor:
    """Return [B, T, V] logits, position t predicting completion token t. All at once: for small models only."""
    states, head = completion_states(model, input_ids, attention_mask, num_tokens)
    return head(states)


def first_of_each(*columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return which rows are equal.

    Args:
        columns: integer tensors [B, ...]; two rows are equal if they are equal in all of these.
    Returns: [B] the index of each row among the D distinct rows, and [D] where each distinct row first occurs.

    >>> first_of_each(torch.tensor([[7, 7], [1, 2], [7, 7]]))
    (tensor([1, 0, 1]), tensor([1, 0]))
    """
    # on the CPU, since some devices lack these operations; callers wait for the result in any case
    rows = torch.cat([column.flatten(1).long() for column in columns], 1).cpu()
    _, number = rows.unique(dim=0, return_inverse=True)
    places = torch.arange(len(rows))
    first = places.new_full((int(number.max()) + 1,), len(rows)).scatter_reduce(0, number, places, "amin")
    return number.to(columns[0].device), first.to(columns[0].device)


def position_ids(model: nn.Module, attention_mask: Tensor) -> dict[str, Tensor]:
    """Return position ids that start at the first real token, as a keyword argument, if the model takes one.

    Without them, positions would also count the padding on the left, and a model with learned positions (GPT-2)
    would give other logits.
    """
    if not accepts(model, "position_ids"):
        return {}  # the model derives them from the mask, or has none (BLOOM)
    return {"position_ids": (attention_mask.long().cumsum(1) - 1).clamp(min=0)}


def accepts(model: nn.Module, argument: str) -> bool:
    """Return whether the model inside its wrappers takes this argument."""
    return argument in inspect.signature(_unwrapped(model).forward).parameters


def cache_argument(model: nn.Module, cache: object) -> dict[str, object]:
    """Return the KV cache as a keyword argument; models with code from the Hub may know only the older name."""
    return {"past_key_values" if accepts(model, "past_key_values") else CACHE: cache}


def cache_of(output: object) -> object | None:
    """Return the KV cache in a model's output; None if there is none."""
    return getattr(output, CACHE, None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode within the block: sampling and evaluation need dropout off."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Output(NamedTuple):
    states: Tensor
    cache: object


def _states_with_shared_prompts(body, inputs: dict[str, Tensor], width: int) -> Tensor | None:
    # Compute each distinct prompt once and repeat its KV cache for its completions: with short completions, prompts
    # are most of the work. None if all prompts differ, or if gradients do not flow through the model's cache.
    ids = inputs["input_ids"]
    prompt_of, first = first_of_each(ids[:, :width], inputs["attention_mask"][:, :width])
    if len(first) == len(ids):
        return None
    prompts = body(**{name: x[first, :width] for name, x in inputs.items()}, use_cache=True, keep=1)
    cache = prompts.cache
    if not isinstance(cache, DynamicCache) or not all(type(layer) in DIFFERENTIABLE for layer in cache.layers):
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
    # Some models do more than body and head (Gemma 2 caps its logits, Cohere scales them), so each is checked once.
    inner = _unwrapped(model)
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
            except (AttributeError, TypeError, ValueError, RuntimeError):  # the body has other inputs or outputs
                _separable[model] = False
    return (body, head) if _separable[model] else (None, nn.Identity())


def built_like(other: nn.Module, model: nn.Module) -> nn.Module:
    """Return `other`, a copy of the model, after giving it the cached check of the model's body and head."""
    if model in _separable:
        _separable[other] = _separable[model]
    return other


def rebuilt(model: nn.Module, change: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a copy of the model whose weights and buffers went through `change`; shared tensors stay shared."""
    memo: dict[int, object] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        new = change(tensor.detach())
        memo[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return built_like(copy.deepcopy(model, memo), model)


def _is_checkpointing(model: nn.Module) -> bool:
    # transformers then turns the KV cache off
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _unwrapped(model: nn.Module) -> nn.Module:
    # DDP keeps the model as .module, PEFT as its base model
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
