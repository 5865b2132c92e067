"""Any causal language model through its own ``forward``, one request at a time: slow, and right for any model.

For models whose attention cannot be given the ragged store: sliding windows, soft caps, sinks, recurrent layers,
foreign attention code. Each slot keeps the cache object that the model itself makes. The invariant: a slot's cache is
used only where it holds exactly the tokens before the new ones; in any other case the slot's tokens are read in again
from the first.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from agents.engines.kv_cache import Segment, positions_of, to_device
from agents.logits import LogitHead


def cache_argument(module: Any) -> str:
    """What a module's ``forward`` calls its cache; transformers has renamed it."""
    names = inspect.signature(type(module).forward).parameters
    return next((name for name in ("cache", "past_key_values", "cache_params") if name in names), "past_key_values")


class OwnStore:
    """The tokens and the cache of every slot, with the verbs of the ragged :class:`~agents.engines.kv_cache.Store`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ids: dict[int, list[int]] = {}
        self.caches: dict[int, Any] = {}
        self.segments: list[Segment] = []
        self.new: list[list[int]] = []

    @property
    def length(self) -> int:
        """Positions of the longest slot."""
        return max((len(ids) for ids in self.ids.values()), default=0)

    def grow(self, length: int, rows: int) -> None:
        """Nothing to do: caches grow by themselves."""

    def clear(self) -> None:
        """Give the memory back."""
        self.ids, self.caches, self.segments, self.new = {}, {}, [], []

    def copy_prefix(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` tokens of one row to others; their cache only where it is the whole row's."""
        whole = length == len(self.ids.get(source, ())) and source in self.caches
        for row in targets:
            self.ids[row] = self.ids[source][:length]
            self.caches.pop(row, None)
            if whole:
                self.caches[row] = copy.deepcopy(self.caches[source])

    def begin(self, segments: Sequence[Segment], ids_T: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Prepare a pass over the new tokens of some slots, laid end to end in this order.

        Returns:
            What the ragged store returns: ids, positions, and the place of each slot's last token.
        """
        ends = np.cumsum([s.width for s in segments])
        self.segments = list(segments)
        self.new = [part.tolist() for part in np.split(ids_T, ends[:-1])]
        ids, positions, last = to_device([ids_T, positions_of(segments), ends - 1], self._device)
        return ids, positions, last


class OwnDecoder:
    """The model's own forward pass for each slot by itself.

    Args:
        model: a causal language model.
        head: its output head, which knows the ids without a token.
        caches: whether the model's caches are used; otherwise every token reads in all that went before.
    """

    def __init__(self, model: Any, head: LogitHead, *, caches: bool) -> None:
        self._model, self._head, self.caches = model, head, caches
        names = inspect.signature(type(model).forward).parameters
        self._cache_name = cache_argument(model)
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in names else {}

    def rebind(self) -> None:
        """Nothing was remembered."""

    def next_logits(
        self, ids_T: torch.Tensor, positions_T: torch.Tensor, store: OwnStore, last_S: torch.Tensor
    ) -> torch.Tensor:
        """Logits [S, V] of the token that follows each slot."""
        found, begin = [], 0
        for segment, known in zip(store.segments, store.new, strict=True):
            new = ids_T[begin : begin + segment.width]
            begin += segment.width
            before = store.ids.get(segment.row, [])[: segment.start]
            cache = store.caches.pop(segment.row, None)
            if len(store.ids.get(segment.row, ())) != segment.start:
                cache = None
            if cache is None and before:
                new = torch.cat([new.new_tensor(before), new])
            store.ids[segment.row] = [*before, *known]
            logits, cache = self._forward(new, cache)
            if cache is not None:
                store.caches[segment.row] = cache
            found.append(logits)
        return torch.stack(found)

    def _forward(self, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
        options: dict[str, Any] = {"use_cache": self.caches} | self._last
        if cache is not None:
            options[self._cache_name] = cache
        output = self._model(input_ids=ids[None], **options)
        kept = getattr(output, self._cache_name, None) if self.caches else None
        return cast("torch.Tensor", output.logits[0, -1]), kept
