"""regard's language models for the scheduler: keys and values of softmax layers in pages, the states of all other
layers as they are. With a sparse method (:mod:`regard.compression.sparse`) each sequence is read alone, its prompt in one
call."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.compression.sparse import is_sparse
from regard.contract import Mask, Mechanism, State, Unsupported
from regard.engines.cache import KeyValueState
from regard.layers.attention import LayerState
from regard.models import LanguageModel, ModelState
from regard.positions.learned import Learned
from regard.positions.seqpe import SequentialEncoding
from regard.serving.engine import Row
from regard.serving.pools import PAGE_SIZE, Pools, padded
from regard.serving.states import Held

ENDLESS = 1 << 15
"""Default for the context of models that read sequences of any length; a limit of memory alone."""


class LanguageReader:
    """A :class:`regard.models.LanguageModel` as :class:`regard.serving.engine.Reader`.

    Args:
        model: the model, in evaluation mode.
        rows: maximum sequences in the batch.
        context: maximum tokens of a sequence; see :func:`context_of` for None.
        cache_tokens, page_size: as for :class:`regard.serving.pools.Pools`.

    Raises:
        Unsupported: for a context beyond a layer's positions, and a pool that does not fit in memory.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        rows: int = 16,
        context: int | None = None,
        cache_tokens: int | None = None,
        page_size: int = PAGE_SIZE,
    ) -> None:
        self.model, self.page_size = model, page_size
        self.vocab_size, self.device = model.config.vocab_size, model.embedding.weight.device
        self.context = context_of(model, context)
        self.whole = not all(block.continues for block in model.blocks)
        self.alone = is_sparse(model)
        self.at_once = self.whole or self.alone
        self._read = model.reader(not self.whole)
        self._held = Held()
        self._texts: dict[int, list[int]] = {}  # tokens read so far, for models that run on whole sequences
        self._pools: Pools | None = None
        self.holds, self.pages, self.page_bytes = False, 0, 0
        if self.whole:
            return
        with torch.no_grad():
            ids = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
            _, state = self._read(ids, ids[0], None, None)
        # where tokens are inserted, a softmax layer sees more tokens than the row has
        inserts = model.insertion.prepare is not None
        paged = {} if inserts else {i: s.mechanism for i, s in enumerate(state.layers) if _is_plain_cache(s)}
        self.holds = any(name.rpartition(".")[2] != "length" for name in without(state, paged).tensors())
        if paged:
            samples = {i: (mechanism.k, mechanism.v) for i, mechanism in paged.items()}
            self._pools = Pools(
                samples, rows=rows, context=self.context, cache_tokens=cache_tokens, page_size=page_size
            )
            self.pages, self.page_bytes = self._pools.pages, self._pools.token_bytes * page_size

    @torch.no_grad()
    def read(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> Tensor:
        if self.alone and len(rows) > 1:
            return torch.cat([self.read([row], [new]) for row, new in zip(rows, tokens, strict=True)])
        if self.whole:
            for row, new in zip(rows, tokens, strict=True):
                self._texts.setdefault(row.number, []).extend(new)
            tokens = [self._texts[row.number] for row in rows]
        ids, lengths = padded(tokens, self.device)
        mask = None if int(lengths.min()) == ids.shape[1] else Mask(lengths=lengths)
        logits, after = self._read(ids, lengths - 1, mask, None if self.whole else self._state(rows))
        if self.holds:
            paged = () if self._pools is None else self._pools.layers
            self._held.put([row.number for row in rows], without(after, paged))
        return logits

    def save(self, row: Row) -> tuple[State, int]:
        state = self._held.get([row.number])
        return state, state.nbytes

    def restore(self, row: Row, saved: State) -> None:
        self._held.put([row.number], saved)

    def forget(self, row: Row) -> None:
        self._held.drop(row.number)
        self._texts.pop(row.number, None)

    @property
    def held_bytes(self) -> int:
        """Bytes of the states that are not in pages."""
        return self._held.nbytes

    def _state(self, rows: Sequence[Row]) -> ModelState | None:
        """Return the joint state of rows that have all read something or all nothing; None to start without a state."""
        fresh = rows[0].length == 0
        if fresh and self._pools is None:
            return None
        length = torch.tensor([row.length for row in rows], device=self.device)
        layers: list[Any] = [None] * len(self.model.blocks)
        if self.holds and not fresh:
            held = self._held.get([row.number for row in rows])
            assert isinstance(held, ModelState)
            layers, length = list(held.layers), held.length
        for i, pages in ({} if self._pools is None else self._pools.states(rows)).items():
            begun = LayerState(None, length) if layers[i] is None else layers[i]
            layers[i] = dataclasses.replace(begun, mechanism=pages)
        return ModelState(tuple(layers), length)


def _is_plain_cache(state: Any) -> bool:
    """Return whether a layer's mechanism keeps every key and value and nothing else."""
    return isinstance(state, LayerState) and type(state.mechanism) is KeyValueState


def without(state: ModelState, layers: Iterable[int]) -> ModelState:
    """Return the state without the caches of these layers."""
    kept = list(state.layers)
    for i in layers:
        kept[i] = dataclasses.replace(kept[i], mechanism=None)
    return ModelState(tuple(kept), state.length)


def context_of(model: LanguageModel, asked: int | None) -> int:
    """Return the maximum tokens of a sequence: the given number, or the config's as far as all layers have positions; at
    least :data:`ENDLESS` if the layers read sequences of any length.

    Raises:
        Unsupported: if more tokens are asked for than the layers have positions.
    """
    reach = min(_reaches(model), default=None)
    if asked is not None and reach is not None and asked > reach:
        raise Unsupported(f"context={asked} of a model whose layers reach {reach} tokens", nearest=f"{reach}")
    usual = model.config.max_length
    if _has_no_end(model):
        usual = max(usual, ENDLESS)
    return asked or min(usual, reach or usual)


def _has_no_end(model: LanguageModel) -> bool:
    """Return whether every layer stays within the config's `max_length` positions, however long a sequence is."""

    def stays(mixer: Any) -> bool:
        card = getattr(mixer, "card", None)
        used = None if card is None or card.most_positions is None else card.most_positions(mixer.config)
        return used is not None and used <= model.config.max_length

    return model.positions is None and all(stays(block.mixer) for block in model.blocks)


def _reaches(model: LanguageModel) -> Iterable[int]:
    """Yield the maximum length of each module that has one."""
    for module in model.modules():
        if isinstance(module, Learned):
            yield module.max_length
        if isinstance(module, SequentialEncoding):
            yield module.bound**module.axes
        card, config = getattr(module, "card", None), getattr(module, "config", None)
        if isinstance(card, Mechanism) and card.length == "max":
            yield config.length  # type: ignore[union-attr]
