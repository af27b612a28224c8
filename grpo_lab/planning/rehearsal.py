"""A run of real code on tensors without contents: which bytes would live at once, and what work would be done?

Weights, states and logits are PyTorch's fake tensors, which have shapes and no memory. Token ids and masks are real
ones, because the code asks them which rows are the same and where the padding is. So nothing about a model or about
the trainer is written down a second time: what the code would allocate is what is counted.
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
NUCLEUS = 256  # tokens that top-p alone is taken to keep at most: assumed, since only contents could tell
READ_IN_PART = {aten.embedding.default, aten.index.Tensor, aten.index_select.default, aten.gather.default,
                aten.slice_backward.default}  # fmt: skip


class Work(NamedTuple):
    """One operation."""

    flops: int
    """Additions and multiplications of matrix products; 0 for everything else."""
    bytes: int
    """Read and written; 0 for views."""


_SEEN: dict[Hashable, tuple] = {}  # what an operation makes of such arguments: size, strides, dtype


def _described(values: Iterable) -> tuple:
    """What decides what an operation makes of them; 1, 1.0 and True are not the same."""
    return tuple(
        (x.shape, x.stride(), x.dtype) if isinstance(x, Tensor)
        else _described(x) if isinstance(x, list | tuple)
        else (type(x), x)
        for x in values
    )  # fmt: skip


def _tensors_in(values: Iterable) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)


class Rehearsal(TorchDispatchMode):
    """Within it, what is made of fake tensors is fake, and the bytes of all that is made are counted while they live.

    Args:
        pretend: False makes nothing fake, and counts what a run on real tensors makes.
    """

    def __init__(self, *, pretend: bool = True):
        super().__init__()
        self.pretend = pretend
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.work: list[Work] = []
        self.backward = False
        """Set it before the backward pass: what is shaped like a weight is then a gradient."""
        self.live = dict.fromkeys(("weights", "gradients", "logits", "activations"), 0)
        self.moments: dict[Hashable, dict[str, int]] = {"at first": dict(self.live)}
        """When something is made, by which operation and of which shape -> what lives, where that is most."""
        self._known: dict[int, tuple[weakref.ref, object]] = {}
        self._shapes: set[tuple[int, ...]] = set()
        self._vocabulary = -1

    def watch(self, model: nn.Module) -> None:
        """The model's weights and gradients were there before, and are not counted; their shapes tell what is made."""
        for weight in model.parameters():
            if weight.dim() == 2:
                self._shapes |= {tuple(weight.shape), tuple(weight.shape)[::-1]}
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        gradients = (weight.grad for weight in model.parameters() if weight.grad is not None)
        for tensor in [*model.parameters(), *model.buffers(), *gradients]:
            self._note(tensor, None, "")

    def reset(self) -> None:
        """Forget the work done and the highest point; what lives is counted on."""
        self.work, self.moments = [], {"at first": dict(self.live)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else func(*args)
        tensors = [*_tensors_in(args), *_tensors_in(kwargs.values())]
        # Ids, masks and what was kept have at most three dimensions. With four begin the masks of attention and caches
        # of fixed size: what is in them is never asked, and they are large.
        large = not tensors and bool(args) and isinstance(args[0], list | tuple) and len(args[0]) > 3
        if self.pretend and (large or any(isinstance(t, FakeTensor) or t.dim() > 3 for t in tensors)):
            result = self._without_contents(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        made = 0
        for tensor in _tensors_in((result,)):
            if self._note(tensor, func, self._kind(tensor)):
                made += tensor.numel() * tensor.element_size()
        moved = 0
        if made or func._schema.is_mutable:
            read = made if func in READ_IN_PART else sum(t.numel() * t.element_size() for t in tensors)
            moved = made + read
        flops = flop_registry.get(func._overloadpacket)
        self.work.append(Work(flops(*args, **kwargs, out_val=result) if flops else 0, moved))
        return result

    def _without_contents(self, func, args, kwargs):
        if func is aten._local_scalar_dense.default:  # .item() and int(): a loss, or how many tokens were kept
            return 1.0 if args[0].is_floating_point() else NUCLEUS
        if func is aten.equal.default:  # forward.py asks whether logits are what the head gives: made the same way?
            return self._maker(args[0]) is self._maker(args[1])
        if func is aten.index.Tensor:  # by a mask: of as many rows as it has, which is known, since masks are real
            where = [x.nonzero(as_tuple=True) if x is not None and x.dtype == torch.bool else (x,) for x in args[1]]
            args = (args[0], [x for several in where for x in several])
        how = (func, _described(args), _described(kwargs.items()))
        if how in _SEEN:  # many layers do the same, and asking PyTorch again takes three times as long
            size, stride, dtype = _SEEN[how]
            empty = torch.empty_strided(size, stride, dtype=dtype, device="meta")
            return FakeTensor(self.fake, empty, torch.device("cpu"))
        with self.fake:
            result = func(*args, **kwargs)
        # a number may be one that leaves the precision of others alone, or not
        simple = not func._schema.is_mutable and all(x.dim() for x in _tensors_in((*args, *kwargs.values())))
        if isinstance(result, FakeTensor) and simple:
            storage = result.untyped_storage()
            if storage._cdata not in self._known and storage.nbytes() == result.numel() * result.element_size():
                _SEEN[how] = (result.shape, result.stride(), result.dtype)
        return result

    def _kind(self, tensor: Tensor) -> str:
        shape = tuple(tensor.shape)
        if shape in self._shapes:
            return "gradients" if self.backward else "weights"  # those of autocast, in half precision
        return "logits" if len(shape) > 1 and shape[-1] == self._vocabulary else "activations"

    def _note(self, tensor: Tensor, maker, kind: str) -> bool:
        """Count the tensor's storage, if it has a kind, while it lives; False if it was there."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if kind else 0
        if key in self._known:
            return False

        def gone(_) -> None:
            del self._known[key]
            if size:
                self.live[kind] -= size

        self._known[key] = (weakref.ref(storage, gone), maker)
        if size:
            self.live[kind] += size
            moment = (maker, tensor.shape, self.backward)
            if sum(self.live.values()) > sum(self.moments.get(moment, {}).values()):
                self.moments[moment] = dict(self.live)
        return True

    def _maker(self, tensor: Tensor):
        return self._known[tensor.untyped_storage()._cdata][1]


class Count(NamedTuple):
    """What a piece of code would take."""

    moments: dict[Hashable, dict[str, int]]
    """As of the rehearsal."""
    work: list[tuple[float, list[Work]]]
    """How many times which operations."""
    cache: int = 0
    """Bytes of the activations that a cache holds at the end."""

    @property
    def peak(self) -> dict[str, int]:
        """What lives at the highest point, the cache told apart."""
        highest = max(self.moments.values(), key=lambda parts: sum(parts.values()))
        held = min(self.cache, highest["activations"])
        return highest | {"cache": held, "activations": highest["activations"] - held}


FEW = 2  # layers: a first and a last


class LayerExtrapolation:
    """A model without contents; if its layers are alike, two short ones, from which follows what the long one takes.

    What lives at a moment grows evenly with the number of layers. Which moment is the highest may change on the way
    from few layers to many, so all are followed: a moment is known by the operation and the shape of what it makes.
    Of those of one kind the highest is in the first layer or in the last, whatever their number.

    Args:
        prepare: changes each of these models before it is rehearsed, in place or not.
    """

    def __init__(self, model: nn.Module, prepare: Callable[[nn.Module], nn.Module] = lambda copy: copy):
        self._whole = lambda: prepare(emptied(model))
        layers = _layers_alike(model)
        self.more = len(layers) - FEW
        self.models = []
        if self.more > 1:
            four = _shortened(model, FEW + 1)
            self.models = [prepare(short) for short in (_shortened(four, FEW), four)]

    def each(self, run: Callable[[nn.Module], Any]) -> Any:
        """What `run` gives for the model: numbers and `Count`s, or a dict or list of these."""
        if len(self.models) == 2:
            try:
                return _further(*map(run, self.models), self.more)
            except ValueError:  # it does not do the same things with one layer more
                self.models = []
        self.models = self.models or [self._whole()]
        return run(self.models[0])


def _further(few, more, steps: int):
    if type(few) is not type(more):
        raise ValueError("the two differ")
    if isinstance(few, Count):
        work = [*((times * (1 - steps), w) for times, w in few.work), *((times * steps, w) for times, w in more.work)]
        return Count(_further(few.moments, more.moments, steps), work, _further(few.cache, more.cache, steps))
    if isinstance(few, dict):
        if few.keys() != more.keys():
            raise ValueError("the two differ")
        return {key: _further(few[key], more[key], steps) for key in few}
    if isinstance(few, list):
        return [_further(a, b, steps) for a, b in zip(few, more, strict=True)]
    return few + steps * (more - few)


def _layers_alike(model: nn.Module) -> nn.ModuleList | tuple[()]:
    """The model's layers, if they are built alike and it is known how to leave some away."""
    number = getattr(getattr(model, "config", None), "num_hidden_layers", 0)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    return lists[0] if len(lists) == 1 and len({tuple(_how_built(layer)) for layer in lists[0]}) == 1 else ()


def _how_built(layer: nn.Module) -> Iterator[Hashable]:
    for name, module in layer.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k != "layer_idx"}
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        tensors = {key: (tensor.shape, tensor.dtype, tensor.requires_grad) for key, tensor in own}
        yield name, type(module), *sorted(plain.items()), *sorted(tensors.items())


def _shortened(model: nn.Module, number: int) -> nn.Module:
    """`emptied`, with its first layers alone."""
    short = emptied(model)
    del _layers_alike(short)[number:]
    short.config.num_hidden_layers = number
    if kinds := getattr(short.config, "layer_types", None):
        short.config.layer_types = kinds[:number]
    return short


def emptied(model: nn.Module, fake: FakeTensorMode | None = None) -> nn.Module:
    """The same model without the contents of its weights, which stay shared where they are shared.

    Args:
        fake: whose tensors the weights become, on the CPU in name; None puts them on the meta device.
    """
    device = "cpu" if fake else "meta"

    def empty(tensor: Tensor) -> Tensor:
        with fake or nullcontext():
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    return rebuilt(model, empty)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, what they share counted once."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
