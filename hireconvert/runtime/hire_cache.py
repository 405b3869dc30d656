"""Room to write keys and values in place, for caches that transformers made and goes on to use.

A `DynamicCache` grows by copying everything at every token. While the native step serves it, its
layers hold views of a buffer with spare room instead, and a step writes behind them. What somebody
else may hold is never written to: a layer whose tensors are not the very views that were put there
(after a crop, a reorder, a step of PyTorch's) is copied into a fresh buffer.

Shape suffixes: S sequences, J key/value heads, E head size, P positions, B decoder layers.
"""

import operator
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

MOST_NEW = 32  # positions of a step, as MOST_ROWS of hire_native.py
_SPARE = 256  # positions; a longer cache gets half its length
_SLACK = 64  # bytes that may be read behind the last number


@dataclass
class _Group:
    """Layers whose keys and values have one shape, in one buffer."""

    layers: list[int]
    buffer: torch.Tensor  # [2 * layers, S, J, room, E]
    first: int
    length: int

    def views(self) -> Sequence[torch.Tensor]:
        """[S, J, P, E] keys and values of each layer in turn."""
        return self.buffer.narrow(3, self.first, self.length).unbind(0)

    def has_room(self) -> bool:
        """Whether as many positions as a step may add fit behind what is there."""
        return self.first + self.length + MOST_NEW <= self.buffer.shape[3]


def served(cache: Any) -> bool:
    """Whether it is a kind of cache whose layers can be given buffers."""
    return type(cache) is DynamicCache and not cache.offloading


def _key(layer: Any) -> tuple[Any, ...] | None:
    """What layers of one group have in common; None for a layer that cannot be served."""
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or not layer.is_initialized:
        return None
    keys, values = layer.keys, layer.values
    if keys.dim() != 4 or values.shape != keys.shape:
        return None
    if keys.dtype != values.dtype or keys.device.type != "cpu" or values.device.type != "cpu":
        return None
    sliding = (layer.sliding_window, layer.record_past) if layer.is_sliding else None
    return (keys.shape, keys.dtype, sliding)


def _copied(cache: Any, layers: list[int]) -> _Group:
    like = cache.layers[layers[0]].keys
    length = like.shape[2]
    room = length + MOST_NEW + max(_SPARE, length // 2)
    shape = (2 * len(layers), *like.shape[:2], room, like.shape[3])
    numel = torch.Size(shape).numel()
    flat = torch.zeros(numel + _SLACK // like.element_size(), dtype=like.dtype)
    buffer = flat[:numel].view(shape)
    for place, index in enumerate(layers):
        buffer[2 * place, :, :, :length] = cache.layers[index].keys
        buffer[2 * place + 1, :, :, :length] = cache.layers[index].values
    return _Group(layers, buffer, 0, length)


class Held:
    """The buffers of one cache. `past_B5` is what the library is told about them."""

    def __init__(self, cache: Any, groups: list[list[int]], past_B5: torch.Tensor) -> None:
        self.past_B5 = past_B5
        self.num_sequences = cache.layers[0].keys.shape[0]
        self._groups = [_copied(cache, layers) for layers in groups]
        self._keys: list[Any] = [None] * len(cache.layers)
        self._values: list[Any] = [None] * len(cache.layers)
        for group in self._groups:
            self._tell(group)
            self._give(cache, group)

    def _tell(self, group: _Group) -> None:
        buffer = group.buffer
        step = buffer.stride(0) * buffer.element_size()
        for place, index in enumerate(group.layers):
            keys = buffer.data_ptr() + 2 * place * step
            row = [keys, keys + step, buffer.stride(2), group.first, group.length]
            self.past_B5[index] = torch.tensor(row, dtype=torch.int64)

    def _give(self, cache: Any, group: _Group) -> None:
        views, layers = group.views(), cache.layers
        for place, index in enumerate(group.layers):
            layer = layers[index]
            layer.keys = self._keys[index] = views[2 * place]
            layer.values = self._values[index] = views[2 * place + 1]

    def fits(self, cache: Any) -> bool:
        """Whether the cache still holds exactly our views, and there is room behind them."""
        layers = cache.layers
        return (
            len(layers) == len(self._keys)
            and all(map(_same, layers, self._keys, self._values))
            and all(group.has_room() for group in self._groups)
        )

    def room(self) -> int:
        """How many steps of one position fit behind what is there."""
        ends = [group.first + group.length for group in self._groups]
        rooms = [group.buffer.shape[3] - MOST_NEW + 1 for group in self._groups]
        return min(map(operator.sub, rooms, ends))

    def kept(self, cache: Any) -> list[int]:
        """How many positions each layer keeps; 0: all."""
        return [
            layer.sliding_window - 1 if layer.is_sliding and not layer.record_past else 0
            for layer in cache.layers
        ]

    def longest(self) -> int:
        """Positions of the longest layer."""
        return max(group.length for group in self._groups)

    def advance(self, cache: Any, num: int) -> None:
        """The step has written `num` positions behind what was there: they count from now on."""
        for group in self._groups:
            group.length += num
            layer = cache.layers[group.layers[0]]
            if layer.is_sliding:
                for index in group.layers:
                    cache.layers[index].cumulative_length += num
                if not layer.record_past:
                    kept = min(group.length, layer.sliding_window - 1)
                    group.first, group.length = group.first + group.length - kept, kept
            if len(self._groups) == 1:
                self.past_B5[:, 3], self.past_B5[:, 4] = group.first, group.length
            else:
                self.past_B5[group.layers, 3] = group.first
                self.past_B5[group.layers, 4] = group.length
            self._give(cache, group)


def _same(layer: Any, keys: Any, values: Any) -> bool:
    return layer.keys is keys and layer.values is values


class Caches:
    """The caches that are served at present; forgotten when nobody else holds them."""

    def __init__(self) -> None:
        self._held: weakref.WeakKeyDictionary[Any, Held] = weakref.WeakKeyDictionary()

    def __deepcopy__(self, memo: Any) -> "Caches":
        return Caches()

    def __reduce__(self) -> Any:
        return Caches, ()

    def claim(
        self, cache: Any, step: Any, windows: Iterable[int], *, num_sequences: int = 1
    ) -> Held | None:
        """Buffers behind the cache that a step may write to; None where it cannot be served.

        `step` is a native Step, `windows` what its layers see (0: everything).
        """
        held = self._held.get(cache)
        if held is not None and held.num_sequences == num_sequences and held.fits(cache):
            return held
        groups = _groups(cache, step, windows, num_sequences)
        if groups is None:
            return None
        self._held[cache] = held = Held(cache, groups, step.past())
        return held


def _groups(
    cache: Any, step: Any, windows: Iterable[int], num_sequences: int
) -> list[list[int]] | None:
    layers: list[Any] = cache.layers
    if len(layers) != len(step.heads) or not served(cache):
        return None
    found: dict[Any, list[int]] = {}
    total = layers[0].get_seq_length()
    for index, (layer, window) in enumerate(zip(layers, windows, strict=True)):
        key = _key(layer)
        if key is None or layer.get_seq_length() != total:
            return None
        shape, dtype, sliding = key
        if shape[0] != num_sequences:
            return None
        if (shape[1], shape[3]) != step.heads[index] or dtype != step.blocks[index].cache_type:
            return None
        if sliding is not None:
            # It must keep at least what the layer sees.
            if not 1 < window <= sliding[0] or shape[2] < min(total, sliding[0] - 1):
                return None
        elif shape[2] != total:
            return None
        found.setdefault(key, []).append(index)
    return list(found.values())
