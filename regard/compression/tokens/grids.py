r"""Token merging for diffusion: grid tokens are merged before a module, and its output is spread to all tokens again.

::

    merged = match_on_grid(x, (32, 32), ratio=0.5)               # where each token of x (B, 1024, C) goes
    y = merged.unmerge(attention(merged.merge(x)))               # attention over 512 tokens

    with merge_on_grid(model, (32, 32), ratio=0.5) as merging:   # the same around the attention of every block of a model
        y = model(x)
    merging.undo()                                               # also done at the end of the with block

Bolya & Hoffman, arXiv 2303.17604. In each cell of 2 x 2 tokens one is a destination, chosen at random; of all other
tokens, the r = ratio N that are most similar to a destination, by the cosine of the hidden states x, are averaged into
it. The module then reads N - r tokens, and every token gets the output of the merged token that it is part of; the
residual branch keeps all N. At most, all tokens that are not destinations are merged. The destinations are the same for
all rows of a batch, so that both halves of classifier-free guidance share them; in a batch with an odd number of rows,
and with `random` False, the destination is the upper left token of each cell.

A merged token counts once in attention, as published; with `proportional=True` in :func:`merge_on_grid` it counts as
often as the tokens that it stands for, by adding log(size) to the scores of its key (arXiv 2210.09461, section 3.2), if
the module is a layer of this project with softmax attention or torch's `MultiheadAttention`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.compression.tokens.calls import PerThread
from regard.contract import Context, Mask, Result, Unsupported, an_instance, at_least
from regard.core.precision import wide

if TYPE_CHECKING:
    from jaxtyping import Float, Int

PARTS: dict[str, tuple[str, ...]] = {
    "attention": ("mixer", "self_attn", "attn1", "attn"),
    "cross": ("multihead_attn", "attn2"),
    "feed_forward": ("feed_forward", "ff", "mlp"),
}
"""Names of parts of blocks here, in torch, timm, diffusers and latent-diffusion. Only blocks have an ``attention``."""


@dataclass(frozen=True)
class GridMerge:
    """A merge of the tokens of a grid.

    Attributes:
        places: the merged token that each token is part of (B, N); merged tokens stay in order.
        sizes: number of tokens that each merged one stands for (B, M).
    """

    places: Int[Tensor, "b n"]
    sizes: Int[Tensor, "b m"]

    def merge(self, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        """Average the tokens of each group."""
        batch, _, width = x.shape
        total = torch.zeros(batch, self.sizes.shape[1], width, dtype=wide(x).dtype, device=x.device)
        total = total.scatter_add(1, self.places[..., None].expand(-1, -1, width), wide(x))
        return (total / self.sizes[..., None]).to(x.dtype)

    def unmerge(self, y: Float[Tensor, "b m c"]) -> Float[Tensor, "b n c"]:
        """Give every token the output of its merged token."""
        return y.gather(1, self.places[..., None].expand(-1, -1, y.shape[2]))


@torch.no_grad()
def match_on_grid(
    x: Float[Tensor, "b n c"],
    grid: tuple[int, int],
    *,
    ratio: float = 0.5,
    cell: tuple[int, int] = (2, 2),
    random: bool = True,
    generator: torch.Generator | None = None,
) -> GridMerge | None:
    """Choose the tokens to merge; None if none are merged.

    Args:
        x: hidden states of a grid, in row-major order.
        grid: rows and columns.
        ratio: share of all tokens to remove.
        cell: rows and columns of a cell; where cells do not cover the grid, the remainder has no destination.
        random: see the module.
        generator: source of random draws, on any device.

    Raises:
        Unsupported: for tokens that do not form such a grid, and for invalid ratios or cells.
    """
    _check(ratio, cell, grid)
    batch, n, _ = x.shape
    rows, columns = grid
    if rows * columns != n:
        raise Unsupported(f"{n} tokens on a grid of {rows} x {columns}", supported=f"{rows * columns} tokens")
    down, across = rows // cell[0], columns // cell[1]
    count = min(int(ratio * n), n - down * across)
    if count <= 0 or not down * across:
        return None
    chosen = torch.zeros(down, across, dtype=torch.long)
    if random and batch % 2 == 0:
        device = None if generator is None else generator.device
        chosen = torch.randint(cell[0] * cell[1], (down, across), generator=generator, device=device).cpu()
    row = torch.arange(down)[:, None] * cell[0] + chosen // cell[1]
    column = torch.arange(across) * cell[1] + chosen % cell[1]
    is_destination = torch.zeros(n, dtype=torch.bool)
    is_destination[(row * columns + column).flatten()] = True
    destinations, sources = (mask.nonzero()[:, 0].to(x.device) for mask in (is_destination, ~is_destination))
    metric = F.normalize(wide(x), dim=-1)
    best, partner = (metric[:, sources] @ metric[:, destinations].mT).max(-1)
    leaving = best.argsort(dim=-1, descending=True, stable=True)[:, :count]
    stays = torch.ones(batch, n, dtype=torch.bool, device=x.device)
    stays = stays.scatter(1, sources[leaving], False)
    places = stays.long().cumsum(1) - 1
    joined = places.gather(1, destinations[partner.gather(1, leaving)])
    places = places.scatter(1, sources[leaving], joined)
    sizes = torch.zeros(batch, n - count, dtype=torch.long, device=x.device)
    return GridMerge(places, sizes.scatter_add(1, places, torch.ones_like(places)))


def _check(ratio: float, cell: tuple[int, int], grid: tuple[int, int]) -> None:
    if not isinstance(ratio, int | float) or not 0 <= ratio <= 1:
        raise Unsupported(f"ratio={ratio!r}", supported="0 to 1, the share of tokens that go", nearest="ratio=0.5")
    for name, sides in (("cell", cell), ("grid", grid)):
        whole = isinstance(sides, tuple | list) and len(sides) == 2 and all(isinstance(side, int) for side in sides)
        if not whole or min(sides) < 1:
            raise Unsupported(f"{name}={sides!r}", supported="rows and columns, 1 or more", nearest=f"{name}=(2, 2)")


class GridMerging(PerThread):
    """Merging that is active in a model; created by :func:`merge_on_grid`, with its arguments."""

    def __init__(self, grid: tuple[int, int], levels: int, proportional: bool, options: dict[str, Any]) -> None:
        self.grid, self.levels, self.proportional, self.options = grid, levels, proportional, options
        super().__init__()
        self._undo: list[Callable[[], None]] = []

    @property
    def merges(self) -> list[GridMerge | None]:
        """The merge of each block in this thread's calls, since the first block last ran; None where nothing was
        merged."""
        return list(getattr(self._run, "merges", []))

    def undo(self) -> None:
        """Restore the model."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> GridMerging:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def enter(self, block: nn.Module, number: int, parts: Sequence[tuple[str, nn.Module, nn.Module]]) -> None:
        """Merge around parts of a block, each given by the module that reads tokens and the one that returns them."""
        transposed = not getattr(getattr(block, "self_attn", None), "batch_first", True)
        match = partial(self._match_input, number, transposed)
        self._keep(block.register_forward_pre_hook(match, with_kwargs=True))
        for kind, reads, gives in parts:
            around = _Around(self, kind, transposed)
            self._keep(reads.register_forward_pre_hook(around.before, with_kwargs=True))
            self._keep(gives.register_forward_hook(around.after))

    def now(self) -> GridMerge | None:
        """The merge of the block that is running in this thread."""
        return (self.merges or [None])[-1]

    def _keep(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _match_input(
        self, number: int, transposed: bool, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> None:
        x = given[0] if given else next(named[k] for k in ("x", "src", "tgt", "hidden_states") if k in named)
        self._match(number, x.transpose(0, 1) if transposed else x)

    def _match(self, number: int, x: Float[Tensor, "b n c"]) -> None:
        if number == 0 or not hasattr(self._run, "merges"):
            self._run.merges = []
        rows, columns = self.grid
        level = max(1, math.isqrt(rows * columns // max(x.shape[1], 1)))
        shrunk = (-(-rows // level), -(-columns // level))
        if shrunk[0] * shrunk[1] != x.shape[1]:
            raise Unsupported(
                f"{x.shape[1]} tokens in a block of a grid of {rows} x {columns}",
                supported=f"{rows * columns}, or as many as of the grid made smaller by a whole number",
            )
        found = match_on_grid(x, shrunk, **self.options) if level <= self.levels else None
        self._run.merges.append(found)


@dataclass(frozen=True)
class _Around:
    """Hooks for a part of a block."""

    merging: GridMerging
    kind: str
    transposed: bool

    def before(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        found = self.merging.now()
        if found is None:
            return None
        for name in ("attn_mask", "key_padding_mask", "attention_mask", "is_causal"):
            value = named.get(name)
            if self.kind == "attention" and value is not None and value is not False:
                raise Unsupported(f"{name} in a model that merges tokens of a grid", supported="whole grids")
        x, *others = given
        smaller = self._merge(found, x)
        # torch's own attention gets its queries as keys and values too
        given = (smaller, *(smaller if other is x else other for other in others))
        named = {name: smaller if value is x else value for name, value in named.items()}
        context = named.get("context")
        if isinstance(context, Context):
            named["context"] = self._context(found, context)
        if self.merging.proportional and self.kind == "attention":
            named = self._proportional(module, found, smaller, named)
        return given, named

    def after(self, _: nn.Module, __: Any, output: Any) -> Any:
        found = self.merging.now()
        if found is None:
            return None
        if isinstance(output, Result):
            return dataclasses.replace(output, output=self._unmerge(found, output.output))
        if isinstance(output, tuple):
            return self._unmerge(found, output[0]), *output[1:]
        return self._unmerge(found, output)

    def _merge(self, found: GridMerge, x: Tensor) -> Tensor:
        return found.merge(x.transpose(0, 1)).transpose(0, 1) if self.transposed else found.merge(x)

    def _unmerge(self, found: GridMerge, y: Tensor) -> Tensor:
        return found.unmerge(y.transpose(0, 1)).transpose(0, 1) if self.transposed else found.unmerge(y)

    def _context(self, found: GridMerge, context: Context) -> Context:
        """Drop the grid from the context, since merged tokens no longer form one."""
        for name in ("mask", "positions", "roles"):
            if getattr(context, name) is not None:
                raise Unsupported(f"{name} in a model that merges tokens of a grid", supported="whole grids")
        return context.replace(grid=None)

    def _proportional(self, module: nn.Module, found: GridMerge, x: Tensor, named: dict[str, Any]) -> dict[str, Any]:
        bias = found.sizes.to(wide(x).dtype).log().to(x.dtype)
        if isinstance(module, nn.MultiheadAttention):
            rows = bias.repeat_interleave(module.num_heads, 0)[:, None]
            return named | {"attn_mask": rows.expand(-1, bias.shape[1], -1)}
        context = named.get("context") or Context()
        if not _is_softmax(module):
            raise Unsupported(
                f"proportional=True in {an_instance(module)}",
                supported="softmax attention of this project, and torch's MultiheadAttention",
                nearest="proportional=False",
            )
        return named | {"context": context.replace(mask=Mask(bias=bias[:, None, None]))}


def merge_on_grid(
    model: nn.Module,
    grid: tuple[int, int],
    *,
    ratio: float = 0.5,
    parts: Sequence[str] = ("attention",),
    levels: int = 1,
    cell: tuple[int, int] = (2, 2),
    random: bool = True,
    proportional: bool = False,
    generator: torch.Generator | None = None,
) -> GridMerging:
    """Merge tokens around parts of every block, in place, until :meth:`GridMerging.undo` or the end of a with block.

    Args:
        model: a block, or a module that contains blocks: of this project, torch's `TransformerEncoderLayer` and
            `TransformerDecoderLayer`, and others whose modules are named as in `PARTS`. All tokens of their first input
            must form the grid.
        grid: rows and columns at the first level.
        ratio: share of the tokens to remove.
        parts: parts of each block: ``attention`` (self-attention), ``cross`` (the queries of cross-attention), and
            ``feed_forward``.
        levels: merge where the grid has been downsampled at most by this factor; 1 is only the full grid.
        cell, random, generator: as in :func:`match_on_grid`.
        proportional: see the module.

    Raises:
        Unsupported: for a model without blocks, a model that merges already, and layers that need each token in its
            place; nothing is changed then.
    """
    _check(ratio, cell, grid)
    at_least("levels", levels, 1)
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise Unsupported(f"parts={list(parts)}", supported=", ".join(PARTS), nearest="parts=['attention']")
    found = [block for block in model.modules() if _part(block, "attention") is not None]
    inner = {id(m) for block in found for kind in PARTS if (part := _part(block, kind)) for m in part.modules()}
    found = [block for block in found if id(block) not in inner]  # a wrapped layer is not a block of its own
    if not found:
        names = ", ".join(PARTS["attention"])
        raise Unsupported(
            f"merging in {an_instance(model)} without a block", supported=f"modules with a part called {names}"
        )
    for block in found:
        if getattr(block, "_merges_on_grid", False):
            raise Unsupported("a second merging in a model", supported="one at a time", nearest="undo() of the first")
        _check_mixes(_part(block, "attention"))
    options = {"ratio": ratio, "cell": cell, "random": random, "generator": generator}
    merging = GridMerging(grid, levels, proportional, options)
    for number, block in enumerate(found):
        block._merges_on_grid = True  # type: ignore[assignment]
        merging._undo.append(partial(delattr, block, "_merges_on_grid"))
        merging.enter(block, number, [each for part in parts for each in _ends(block, part)])
    return merging


def _part(block: nn.Module, kind: str) -> nn.Module | None:
    children = dict(block.named_children())
    return next((children[name] for name in PARTS[kind] if children.get(name) is not None), None)


def _ends(block: nn.Module, kind: str) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """The modules of a part that read tokens and return them."""
    if kind == "feed_forward" and isinstance(block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        yield kind, block.linear1, block.linear2
        return
    part = _part(block, kind)
    if part is not None:
        yield kind, part, part


def _is_softmax(module: nn.Module | None) -> bool:
    return getattr(getattr(module, "card", None), "name", None) == "softmax"


def _check_mixes(module: nn.Module | None) -> None:
    """Raise Unsupported for a layer of this project that needs each token in its place."""
    card = getattr(module, "card", None)
    scheme = getattr(getattr(module, "positions", None), "name", "none")
    placed = (
        scheme != "none" or getattr(module, "grid_axes", None) is not None or bool(getattr(module, "convolutions", ()))
    )
    if card is not None and placed:
        raise Unsupported(
            f"merging of tokens around {card.name}, which needs each in its place",
            supported="layers without positions, grid and convolutions of their own",
        )
