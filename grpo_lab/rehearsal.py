"""A run of real code on tensors without contents: which bytes would live at once, and what work would be done?

Weights, states and logits are PyTorch's fake tensors, which have shapes and no memory. Token ids and masks are real
ones, because the code asks them which rows are the same and where the padding is. So nothing about a model or about
the trainer is written down a second time: what the code would allocate is what is counted.
"""

import copy
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from grpo_lab.forward import built_like

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
        self.peak = dict(self.live)
        self._highest = 0
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
        self.work, self.peak, self._highest = [], dict(self.live), sum(self.live.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        # Ids, masks and what was kept have at most three dimensions. With four begin the masks of attention and caches
        # of fixed size: what is in them is never asked, and they are large.
        large = not tensors and bool(args) and isinstance(args[0], list | tuple) and len(args[0]) > 3
        if self.pretend and (large or any(isinstance(t, FakeTensor) or t.dim() > 3 for t in tensors)):
            result = self._without_contents(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        made = 0
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._note(tensor, func, self._kind(tensor)):
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
        with self.fake:
            return func(*args, **kwargs)

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
            if (total := sum(self.live.values())) > self._highest:
                self._highest, self.peak = total, dict(self.live)
        return True

    def _maker(self, tensor: Tensor):
        return self._known[tensor.untyped_storage()._cdata][1]


def emptied(model: nn.Module, fake: FakeTensorMode | None = None) -> nn.Module:
    """The same model without the contents of its weights, which stay shared where they are shared.

    Args:
        fake: whose tensors the weights become, on the CPU in name; None puts them on the meta device.
    """
    memo: dict[int, object] = {}
    device = "cpu" if fake else "meta"
    with fake or nullcontext():
        for tensor in [*model.parameters(), *model.buffers()]:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            is_weight = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
    return built_like(copy.deepcopy(model, memo), model)


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors, what they share counted once."""
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
