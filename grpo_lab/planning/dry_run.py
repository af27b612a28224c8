"""Count the memory and the operations of a piece of code without running it: a dry run on fake tensors.

Weights, activations and logits are PyTorch's fake tensors, which have a shape and no storage. Token ids and masks are
real, because the code deduplicates rows and finds the padding by their values. The model's own forward and backward
pass runs, so its memory is counted and not estimated by a formula. What surrounds it in a step (the sampling loop, the
call of the loss, the preparation of the model) is repeated in phases.py and must be kept in line with the trainer.
"""

import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from grpo_lab.models.forward import rebuilt

aten = torch.ops.aten
TOP_P_TOKENS = 256  # tokens kept by top-p without top-k: an assumption, since the number depends on the values
PARTIAL_READS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default,
                 aten.slice_backward.default}  # fmt: skip


class OpCost(NamedTuple):
    """Arithmetic and memory traffic of one operation."""

    flops: int
    """Additions and multiplications of matrix products; 0 for all other operations."""
    bytes: int
    """Bytes read and written; 0 for views."""


_OUTPUTS: dict[Hashable, tuple] = {}  # (operation, arguments) -> size, strides and dtype of its output


def _signature(values: Iterable) -> tuple:
    """Return what determines the shape and dtype of an output; 1, 1.0 and True give different signatures."""
    return tuple(
        (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor)
        else _signature(x) if isinstance(x, list | tuple)
        else (type(x), x)
        for x in values
    )  # fmt: skip


def _tensors_in(values: Iterable) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


class MemoryTracker(TorchDispatchMode):
    """Run operations on fake tensors without computing them, and count the bytes of all tensors while they live.

    Args:
        fake: False computes everything on real tensors, and only counts.
    """

    def __init__(self, *, fake: bool = True):
        super().__init__()
        self.fake = fake
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.operations: list[OpCost] = []
        self.is_backward = False
        """Set it before the backward pass: a tensor with the shape of a weight then counts as a gradient."""
        self.live = dict.fromkeys(("weights", "gradients", "logits", "activations"), 0)
        self.peaks: dict[Hashable, dict[str, int]] = {"start": dict(self.live)}
        """Peak live bytes by category, keyed by (operation, output shape, is_backward)."""
        self._storages: dict[int, tuple[weakref.ref, object]] = {}
        self._weight_shapes: set[tuple[int, ...]] = set()
        self._vocab_size = -1

    def exclude(self, model: nn.Module) -> None:
        """Leave the model's own tensors out of the count, and use its shapes to find the category of new tensors."""
        for weight in model.parameters():
            if weight.dim() == 2:
                self._weight_shapes |= {tuple(weight.shape), tuple(weight.shape)[::-1]}
        self._vocab_size = model.get_input_embeddings().weight.shape[0]
        gradients = (weight.grad for weight in model.parameters() if weight.grad is not None)
        for tensor in [*model.parameters(), *model.buffers(), *gradients]:
            self._record(tensor, None, "")

    def reset(self) -> None:
        """Clear the operations and the peaks; tensors that live stay counted."""
        self.operations, self.peaks = [], {"start": dict(self.live)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        tensors = [*_tensors_in(args), *_tensors_in(kwargs.values())]
        # Token ids, their masks and `kept` have at most three dimensions, and their values are needed. Tensors of four
        # (attention masks, static caches) are large, and no code branches on their values.
        large = not tensors and bool(args) and isinstance(args[0], list | tuple) and len(args[0]) > 3
        if self.fake and (large or any(isinstance(t, FakeTensor) or t.dim() > 3 for t in tensors)):
            result = self._run_fake(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        written = 0
        for tensor in _tensors_in((result,)):
            if self._record(tensor, func, self._category(tensor)):
                written += tensor.numel() * tensor.element_size()
        traffic = 0
        if written or func._schema.is_mutable:
            read = written if func in PARTIAL_READS else sum(t.numel() * t.element_size() for t in tensors)
            traffic = written + read
        flops = flop_registry.get(func._overloadpacket)
        self.operations.append(OpCost(flops(*args, **kwargs, out_val=result) if flops else 0, traffic))
        return result

    def _run_fake(self, func, args, kwargs):
        if func is aten._local_scalar_dense.default:  # .item() and int(): a loss, or the number of tokens kept
            return 1.0 if args[0].is_floating_point() else TOP_P_TOKENS
        if func is aten.equal.default:  # forward.py compares logits and head(hidden): equal if the same op made both
            return self._producer(args[0]) is self._producer(args[1])
        if func is aten.index.Tensor:  # by a boolean mask, which is real, so the number of rows is known
            where = [x.nonzero(as_tuple=True) if x is not None and x.dtype == torch.bool else (x,) for x in args[1]]
            args = (args[0], [x for several in where for x in several])
        call = (func, _signature(args), _signature(kwargs.items()))
        if call in _OUTPUTS:  # identical layers repeat the same calls, and asking PyTorch takes three times as long
            size, stride, dtype = _OUTPUTS[call]
            empty = torch.empty_strided(size, stride, dtype=dtype, device="meta")
            return FakeTensor(self.fake_mode, empty, torch.device("cpu"))
        with self.fake_mode:
            result = func(*args, **kwargs)
        # Not for 0-dimensional tensors: whether they take part in type promotion is not part of the signature.
        simple = not func._schema.is_mutable and all(x.dim() for x in _tensors_in((*args, *kwargs.values())))
        if isinstance(result, FakeTensor) and simple:
            storage = result.untyped_storage()
            if storage._cdata not in self._storages and storage.nbytes() == result.numel() * result.element_size():
                _OUTPUTS[call] = (result.shape, result.stride(), result.dtype)
        return result

    def _category(self, tensor: Tensor) -> str:
        shape = tuple(tensor.shape)
        if shape in self._weight_shapes:
            return "gradients" if self.is_backward else "weights"  # new weights: autocast's copies in half precision
        return "logits" if len(shape) > 1 and shape[-1] == self._vocab_size else "activations"

    def _record(self, tensor: Tensor, producer, category: str) -> bool:
        """Count the tensor's storage while it lives, unless category is ""; return False if it was known before."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if category else 0
        if key in self._storages:
            return False

        def on_free(_) -> None:
            del self._storages[key]
            if size:
                self.live[category] -= size

        self._storages[key] = (weakref.ref(storage, on_free), producer)
        if size:
            self.live[category] += size
            moment = (producer, tensor.shape, self.is_backward)
            if sum(self.live.values()) > sum(self.peaks.get(moment, {}).values()):
                self.peaks[moment] = dict(self.live)
        return True

    def _producer(self, tensor: Tensor):
        return self._storages[tensor.untyped_storage()._cdata][1]


class RunCost(NamedTuple):
    """Memory and operations of one dry run."""

    peaks: dict[Hashable, dict[str, int]]
    """See `MemoryTracker.peaks`."""
    operations: list[tuple[float, list[OpCost]]]
    """Pairs of (repetitions, operations)."""
    cache: int = 0
    """Bytes of the KV cache at the end, which are among the activations."""

    @property
    def peak(self) -> dict[str, int]:
        """Live bytes by category at the highest peak, with the KV cache separate from the activations."""
        highest = max(self.peaks.values(), key=lambda live: sum(live.values()))
        cache = min(self.cache, highest["activations"])
        return highest | {"cache": cache, "activations": highest["activations"] - cache}


SHORT_LAYERS = 2  # the first layer and the last


class LayerExtrapolation:
    """Extrapolate the cost of a model with identical layers from dry runs with two and with three of them.

    The live bytes at each key of `MemoryTracker.peaks` grow linearly with the number of layers. Which key has the
    highest peak may change with the number of layers, so all keys are extrapolated. Of the operations with one key, the
    highest peak is in the first or in the last layer, for any number of layers. A model with different layers is run
    whole.

    Args:
        prepare: function applied to each model before its dry run, in place or not; returns the model.
    """

    def __init__(self, model: nn.Module, prepare: Callable[[nn.Module], nn.Module] = lambda copy: copy):
        self._whole_model = lambda: prepare(empty_copy(model))
        layers = _identical_layers(model)
        self.extra_layers = len(layers) - SHORT_LAYERS
        self.models = []
        if self.extra_layers > 1:
            longer = _with_layers(model, SHORT_LAYERS + 1)
            self.models = [prepare(short) for short in (_with_layers(longer, SHORT_LAYERS), longer)]

    def evaluate(self, run: Callable[[nn.Module], Any]) -> Any:
        """Return what `run` gives for the whole model: numbers and `RunCost`s, or a dict or list of these."""
        if len(self.models) == 2:
            try:
                return _extrapolate(*map(run, self.models), self.extra_layers)
            except ValueError:  # the two dry runs do not match
                self.models = []
        self.models = self.models or [self._whole_model()]
        return run(self.models[0])


def _extrapolate(short, longer, steps: int):
    if type(short) is not type(longer):
        raise ValueError("the dry runs differ in type")
    if isinstance(short, RunCost):
        operations = [
            *((times * (1 - steps), ops) for times, ops in short.operations),
            *((times * steps, ops) for times, ops in longer.operations),
        ]
        peaks, cache = (_extrapolate(getattr(short, k), getattr(longer, k), steps) for k in ("peaks", "cache"))
        return RunCost(peaks, operations, cache)
    if isinstance(short, dict):
        if short.keys() != longer.keys():
            raise ValueError("the dry runs differ in keys")
        return {key: _extrapolate(short[key], longer[key], steps) for key in short}
    if isinstance(short, list):
        return [_extrapolate(a, b, steps) for a, b in zip(short, longer, strict=True)]
    return short + steps * (longer - short)


def _identical_layers(model: nn.Module) -> nn.ModuleList | tuple[()]:
    """Return the model's layers if they are all built alike and form one ModuleList, else ()."""
    number = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    return lists[0] if len(lists) == 1 and len({tuple(_structure(layer)) for layer in lists[0]}) == 1 else ()


def _structure(layer: nn.Module) -> Iterator[Hashable]:
    for name, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k != "layer_idx"}
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        tensors = {key: (tensor.shape, tensor.dtype, tensor.requires_grad) for key, tensor in own}
        yield name, type(module), *sorted(plain.items()), *sorted(tensors.items())


def _with_layers(model: nn.Module, number: int) -> nn.Module:
    """Return `empty_copy(model)` with only its first `number` layers."""
    short = empty_copy(model)
    del _identical_layers(short)[number:]
    short.config.num_hidden_layers = number
    if kinds := getattr(short.config, "layer_types", None):
        short.config.layer_types = kinds[:number]
    return short


def empty_copy(model: nn.Module, fake_mode: FakeTensorMode | None = None) -> nn.Module:
    """Return a copy of the model whose weights have shapes and no values; tied weights stay tied.

    Args:
        fake_mode: makes the weights fake tensors of this mode, on the CPU; None puts them on the meta device.
    """
    device = "cpu" if fake_mode else "meta"

    def empty(tensor: Tensor) -> Tensor:
        with fake_mode or nullcontext():
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    return rebuilt(model, empty)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors; a shared storage counts once."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
