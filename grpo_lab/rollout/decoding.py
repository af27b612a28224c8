"""Decode token by token: with a KV cache that grows, or, on CUDA, by replaying one captured step.

Both decoders have `.logits` [D, V] of the next token, and `.row_index` [rows], the index into them of each unfinished
row; `step` decodes one token.
"""

import warnings
from weakref import WeakSet

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticCache, StaticLayer

from grpo_lab.models.forward import accepts, cache_argument, cache_of, position_ids

MIN_TOKENS = 32  # to capture a step, which takes three more steps (assumed, not measured yet)


class DynamicCacheDecoder:
    """Decode with a KV cache that grows; rows that are equal so far are computed once.

    These are the K rows of a prompt at first, and later the rows with the same answer. Of the pocket model's 256 rows,
    141 are distinct at the start of training, 40 after twenty steps.
    """

    def __init__(self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor, num_generations: int):
        self.model, self.mask = model, attention_mask
        self.last = {"logits_to_keep": 1} if accepts(model, "logits_to_keep") else {}
        positions = position_ids(model, attention_mask)
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **positions, **self.last)
        self.cache = cache_of(output)
        # Mamba would multiply one token's state by the mask of all tokens; broadcasting would repeat that token.
        if not any(isinstance(layer, CacheLayerMixin) for layer in getattr(self.cache, "layers", ())):
            raise ValueError(f"{type(model).__name__} keeps no KV cache, so it cannot be sampled from. "
                             "Use a model with attention layers.")  # fmt: skip
        self.logits = output.logits[:, -1]
        self.row_index = torch.arange(len(input_ids), device=input_ids.device).repeat_interleave(num_generations)

    def step(self, going: Tensor, chosen: Tensor) -> None:
        """Decode the next token of the rows that go on.

        Args:
            going: [rows] bool, in the order of `row_index`; finished rows are dropped.
            chosen: [rows] the ids that were sampled.
        """
        vocabulary = self.logits.shape[1]
        extended, self.row_index = torch.unique(self.row_index[going] * vocabulary + chosen[going], return_inverse=True)
        parents, ids = extended // vocabulary, extended % vocabulary
        if not torch.equal(parents, torch.arange(len(self.mask), device=parents.device)):
            self.cache.reorder_cache(parents)  # a method that hybrid caches support too
            self.mask = self.mask[parents]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], 1)
        positions = {name: p[:, -1:] for name, p in position_ids(self.model, self.mask).items()}
        output = self.model(
            input_ids=ids[:, None], attention_mask=self.mask, use_cache=True,
            **cache_argument(self.model, self.cache), **positions, **self.last,
        )  # fmt: skip
        self.logits = output.logits[:, -1]


class _CastingLayer(StaticLayer):
    """A static layer that casts to its dtype: under autocast, some models compute keys or values in float32."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return super().update(key_states.to(self.keys.dtype), value_states.to(self.values.dtype), *args, **kwargs)


class CudaGraphDecoder:
    """Decode all rows with a static KV cache by replaying one step, captured as a CUDA graph.

    A decode step of a small model launches hundreds of kernels that run for microseconds each, and launching them one
    by one takes longer than running them. The graph lasts for one rollout: its memory is free for the update, and under
    autocast it reads the half-precision weights that were cast for the prompts, instead of casting them for each token.
    On other devices the step runs without a graph, which is how it is tested. Not measured yet.

    Args:
        rows, columns: the number of completions, and the maximum number of tokens of prompt and completion.
    Raises: ValueError if the model does not take our mask and positions, or caches more than keys and values.
    """

    def __init__(self, model: nn.Module, rows: int, columns: int, device: torch.device):
        if model.config._attn_implementation != "sdpa" or not accepts(model, "position_ids"):
            raise ValueError("it does not take our attention mask or position ids")
        self.model, self.cache = model, StaticCache(model.config, max_cache_len=columns)
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.mask = torch.zeros(rows, 1, 1, columns, dtype=torch.bool, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def start(self, grown: DynamicCacheDecoder, num_generations: int) -> None:
        """Copy the KV cache of the prompts, each repeated for its completions, and capture the step."""
        width = self.column = grown.mask.shape[1]
        device = self.ids.device
        half = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        for i, (fixed, layer) in enumerate(zip(self.cache.layers, grown.cache.layers, strict=True)):
            if type(fixed) is not StaticLayer or type(layer) is not DynamicLayer:
                raise ValueError("it has layers that cache something other than the keys and values of all tokens")
            keys, values = (
                x.repeat_interleave(num_generations, 0).to(half or x.dtype) for x in (layer.keys, layer.values)
            )
            self.cache.layers[i] = fixed = _CastingLayer(fixed.max_cache_len)
            fixed.lazy_initialization(keys, values)
            fixed.keys[:, :, :width], fixed.values[:, :, :width] = keys, values
        mask = grown.mask.repeat_interleave(num_generations, 0)
        self.mask[:, 0, 0, :width] = mask.bool()
        self.positions.copy_(mask.sum(1, keepdim=True) - 1)
        self.row_index = torch.arange(len(self.ids), device=device)
        if self.ids.is_cuda:
            self._capture()
        self.logits = grown.logits.repeat_interleave(num_generations, 0)

    def step(self, going: Tensor, chosen: Tensor) -> None:
        """See `DynamicCacheDecoder.step`. Finished rows are still decoded; their output is ignored."""
        self.row_index = self.row_index[going]
        self.ids[self.row_index, 0] = chosen[going]
        self.positions += 1
        self.mask[..., self.column] = True
        self._set_column()
        self.column += 1
        if self.graph is None:
            self.logits = self._step()
        else:
            self.graph.replay()
            self.logits = self.written

    def _set_column(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.column)

    def _step(self) -> Tensor:
        output = self.model(
            input_ids=self.ids, attention_mask=self.mask, position_ids=self.positions,
            use_cache=True, **cache_argument(self.model, self.cache),
        )  # fmt: skip
        return output.logits[:, -1]

    def _capture(self) -> None:
        # what these steps write into the next column is overwritten by the first real step
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # warm-up: kernels are chosen and memory is allocated before the capture
            for _ in range(2):
                self._set_column()
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._set_column()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.written = self._step()
        self.graph = graph


_refused: WeakSet[nn.Module] = WeakSet()


def decoder(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, num_generations: int, longest: int
) -> DynamicCacheDecoder | CudaGraphDecoder:
    """Compute the prompts and return a decoder: on CUDA with a captured step, if the model allows it (else warn once).

    Args:
        longest: the maximum number of tokens of a completion.
    """
    grown = DynamicCacheDecoder(model, input_ids, attention_mask, num_generations)
    if not can_capture(input_ids.device, longest) or model in _refused:
        return grown
    try:
        captured = CudaGraphDecoder(model, len(grown.row_index), input_ids.shape[1] + longest, input_ids.device)
        captured.start(grown, num_generations)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        _refused.add(model)
        warnings.warn(f"{type(model).__name__} is sampled without a CUDA graph, which is slower: {error}.",
                      stacklevel=2)  # fmt: skip
        return grown
    return captured


def can_capture(device: torch.device, longest: int) -> bool:
    """Return whether to capture: on CUDA, for enough tokens. Without a graph, a static cache gains nothing."""
    return device.type == "cuda" and longest >= MIN_TOKENS
