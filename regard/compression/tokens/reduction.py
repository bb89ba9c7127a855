"""Vision transformers whose blocks output fewer tokens: those of this project, and timm's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from regard.compression.tokens import timm_blocks
from regard.compression.tokens.calls import PerThread
from regard.compression.tokens.hosts import attention_of, card_of, placed, reads_grid
from regard.compression.tokens.reducers import METHODS, Evidence, Heads, Tokens
from regard.compression.tokens.schedules import Removal, removals
from regard.contract import Context, Mask, Result, Unsupported, an_instance, one_of
from regard.layers.attention import AttentionLayer
from regard.layers.residual import add_feed_forward
from regard.models.vision import tnt
from regard.models.vision.vit import VisionBlock, VisionTransformer

if TYPE_CHECKING:
    from jaxtyping import Float

HOSTS = "regard's VisionTransformer and TNT, timm's VisionTransformer of plain blocks, Eva and Beit"
ATTENDED = ("evit", "attention")
"""Methods that need a class token."""
MERGING = ("tome", "tome_stride", "tome_random")
"""Methods that compare tokens."""
DROPPING = ("attention", "random", "stride")
"""Methods after which some patches are part of no token."""
METRICS = {"keys": "k", "queries": "q", "tokens": ""}
"""What tokens are compared by, and its name among the heads of a layer."""
OwnBlock = VisionBlock | tnt.Block


class Reduction(PerThread):
    """A method that is active in a model; created by :func:`reduce_tokens`.

    Args:
        method: one of `METHODS`.
        removed: for each block, a function from the number of patches to how many of them to remove.
        proportional: whether a token that stands for several counts that many times in attention.
        metric: one of `METRICS`.
        generator: source of a method's random draws.
        pooled: whether the model averages patches in the end: then the last block passes on each merged token as often
            as it stands for a patch.
        grid: the last block that reads the grid of all patches, if there is one.

    Raises:
        Unsupported: for a schedule that removes patches before that block.
    """

    def __init__(
        self,
        method: str,
        removed: Sequence[Removal],
        proportional: bool,
        metric: str,
        generator: torch.Generator | None,
        pooled: bool = False,
        grid: GridReader | None = None,
    ) -> None:
        self.method, self.removed, self.proportional = method, removed, proportional
        self.metric, self.generator, self.pooled, self.grid = metric, generator, pooled, grid
        if grid is not None:
            grid.check(removed)
        super().__init__()
        self._changed: list[tuple[Any, type]] = []

    @property
    def tokens(self) -> Tokens:
        """The tokens after the last block of this thread's last call: their sizes, and each initial token's place."""
        return self._run.tokens

    @property
    def counts(self) -> list[int]:
        """Number of tokens after each block of this thread's last call, including class tokens."""
        return list(self._run.counts)

    def change(
        self,
        *,
        remove: int | Sequence[int] | tuple[int, float] = 0,
        keep: float | None = None,
        blocks: Sequence[int] | None = None,
    ) -> None:
        """Change the schedule from the next call on, as when a share falls in training; see :func:`reduce_tokens`."""
        removed = removals(len(self.removed), remove, keep, blocks)
        if self.grid is not None:
            self.grid.check(removed)
        self.removed = removed

    def undo(self) -> None:
        """Restore the model's own blocks."""
        while self._changed:
            block, before = self._changed.pop()
            block.__class__ = before
            del block.reduction, block.number, block.protected

    def enter(self, block: Any, number: int, protected: int) -> None:
        """Turn a block into one that outputs fewer tokens."""
        self._changed.append((block, type(block)))
        own = OWN.get(type(block))
        block.__class__ = timm_blocks.reduced(type(block)) if own is None else own
        block.reduction, block.number, block.protected = self, number, protected

    def begin(self, block: int, x: Float[Tensor, "b n c"], protected: int) -> Tokens:
        """The tokens that enter a block; raises Unsupported in a backward pass, which does not know them."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise Unsupported(
                "gradient checkpointing in a model with fewer tokens, whose blocks would be computed again",
                supported="blocks that are computed once in training",
                nearest="set_grad_checkpointing(False)",
            )
        if block == 0:
            self._run.tokens, self._run.counts, self._run.whole = Tokens.begin(x, protected), [], True
        return self._run.tokens

    @property
    def whole(self) -> bool:
        """Whether no token has been removed so far in this thread's call."""
        return self._run.whole

    def bias(self, tokens: Tokens) -> Float[Tensor, "b 1 1 n"] | None:
        """The bias on the scores of each key; None if all tokens stand for themselves."""
        return tokens.sizes.log()[:, None, None] if self.proportional and not self.whole else None

    def after(self, block: int, tokens: Tokens, x: Float[Tensor, "b n c"], evidence: Callable[[], Evidence]) -> Tokens:
        """The tokens `x` after a block's attention, possibly reduced."""
        moved = replace(tokens, x=x)
        remove = self.removed[block](x.shape[1] - tokens.protected)
        if remove > 0:
            moved, self._run.whole = METHODS[self.method](moved, evidence(), remove), False
        self._run.tokens = moved
        self._run.counts.append(moved.x.shape[1])
        return moved

    def evidence(self, heads: Heads, x: Float[Tensor, "b n c"], bias: Float[Tensor, "#b #h #n n"] | None) -> Evidence:
        """What the method reads of a layer, given the bias of its scores; of the attention, only the class token's row is
        computed."""
        metric, scores = x, None
        if self.method in MERGING and self.metric != "tokens":
            metric = heads.mean(METRICS[self.metric])
        if self.method in ATTENDED:
            scores = heads.from_first()
            scores = (scores if bias is None else scores + bias[:, :, :1]).softmax(-1).mean(1)[:, 0]
        return Evidence(metric, scores, self.generator)

    def passed_on(self, block: int, x: Float[Tensor, "b n c"]) -> Float[Tensor, "b m c"]:
        """What a block outputs of its tokens; see `pooled`. Where some were dropped, the others count once."""
        last = block + 1 == len(self.removed)
        return self._run.tokens.spread(x) if last and self.pooled and self.method not in DROPPING else x


def reduce_tokens(
    model: nn.Module,
    method: str,
    *,
    remove: int | Sequence[int] | tuple[int, float] = 0,
    keep: float | None = None,
    blocks: Sequence[int] | None = None,
    proportional: bool | None = None,
    metric: str = "keys",
    generator: torch.Generator | None = None,
) -> Reduction:
    """Make a model's blocks output fewer tokens, in place and without training.

    Args:
        model: one of `HOSTS`; it must not be running in another thread.
        method: one of :data:`regard.compression.tokens.reducers.METHODS`.
        remove: patches to remove after the attention of each block; a list has one number per block. A pair of a number
            r and an inflection i in [-1, 1] (a float) is a line from r (1 - i) in the first block to r (1 + i) in the
            last.
        keep: instead of `remove`, the share of patches to keep at each of `blocks`, rounded up.
        blocks: numbers of the blocks, from 0, at which `keep` applies; at a quarter, half and three quarters of the
            depth when None.
        proportional: see the module; when None, True for Token Merging, which is defined so, if all layers are softmax
            attention, and False otherwise.
        metric: what the similarity of merged tokens is computed from: ``keys`` or ``queries``, without positions, or
            ``tokens``, the vectors themselves.
        generator: source of a method's random draws.

    Raises:
        Unsupported: for an unsupported model, method or schedule, and a model that is reduced already; nothing is
            changed then.
    """
    one_of("method", method, METHODS)
    one_of("metric", metric, METRICS)
    one_of("proportional", proportional, (None, True, False))
    layers, protected = blocks_of(model, class_token=method in ATTENDED)
    if any(hasattr(block, "reduction") for block in layers):
        raise Unsupported("a second reduction of a model", supported="one at a time", nearest="undo() of the first")
    own: list[OwnBlock] = layers if isinstance(model, VisionTransformer | tnt.TNT) else []
    _check_softmax(model, own, f"{method}, which reads the attention of the class token," if method in ATTENDED else "")
    _check_softmax(model, own, "proportional=True" if proportional else "")
    if method in MERGING:
        _check_heads(own, method, metric)
    schedule = removals(len(layers), remove, keep, blocks)
    counted = method in MERGING and not any(map(_without_softmax, own)) if proportional is None else proportional
    pooled = model.global_pool not in ("token", "")
    grid = GridReader.among(model) if isinstance(model, VisionTransformer | tnt.TNT) else None
    reduction = Reduction(method, schedule, counted, metric, generator, pooled, grid)
    for number, block in enumerate(layers):
        reduction.enter(block, number, protected)
    return reduction


def blocks_of(model: Any, *, class_token: bool = True) -> tuple[list[Any], int]:
    """The blocks of a host, and its number of class tokens and registers; raises Unsupported for other models, and where
    a `class_token` is needed for models without one."""
    if isinstance(model, VisionTransformer | tnt.TNT):
        blocks: list[Any] = list(model.blocks)
        protected = model.prefix if isinstance(model, tnt.TNT) else model.config.class_tokens
        has_class = protected > 0
        reason = next((why for block in blocks if (why := _why_not(block))), "")
    elif timm_blocks.is_host(model):
        blocks, protected = list(model.blocks), model.num_prefix_tokens
        has_class = model.cls_token is not None
        unchanged = (block for block in blocks if not hasattr(block, "reduction"))
        reason = next((why for block in unchanged if (why := timm_blocks.why_not(block))), "")
    else:
        raise Unsupported(f"fewer tokens in {an_instance(model)}", supported=HOSTS)
    if reason:
        raise Unsupported(
            f"fewer tokens in {an_instance(model)} with {reason}",
            supported="layers for sequences of any length, with no positions, rotary, lrpe or SeqPE's, and timm's pre-norm blocks",
        )
    if class_token and not has_class:
        raise Unsupported(
            f"fewer tokens in {an_instance(model)} without a class token",
            supported="vision transformers with a class token",
        )
    return blocks, protected


@dataclass(frozen=True)
class GridReader:
    """The last block whose layer reads the grid of all patches, which must all be there.

    Attributes:
        number: its number.
        name: the mechanism of its layer.
        patches: number of patches.
    """

    number: int
    name: str
    patches: int

    @classmethod
    def among(cls, model: VisionTransformer | tnt.TNT) -> GridReader | None:
        """The last reader among the blocks of a model; None if there is none."""
        blocks: list[Any] = list(model.blocks)
        readers = [(number, _name(block)) for number, block in enumerate(blocks) if reads_grid(block)]
        return cls(*readers[-1], math.prod(model.config.grid)) if readers else None

    def check(self, removed: Sequence[Removal]) -> None:
        """Raise Unsupported if a schedule removes patches before this block."""
        for block, removal in enumerate(removed[: self.number]):
            if removal(self.patches) > 0:
                raise Unsupported(
                    f"fewer tokens after block {block}, before block {self.number} of {self.name}, which reads the grid of "
                    "all patches",
                    supported=f"fewer tokens after block {self.number} or later",
                )


def _name(block: OwnBlock) -> str:
    card = card_of(block)
    return "no mixer" if card is None else card.name


def _why_not(block: OwnBlock) -> str:
    """What stands against fewer tokens in a block, in words that follow "with"; empty if nothing does."""
    layer, card = attention_of(block), card_of(block)
    if layer is not None:
        scheme = layer.positions
        if scheme.bias is not None or (scheme.rotate is not None and layer.places_keys):
            return f"{scheme.name} positions in a layer of {layer.card.name}, which count the tokens that are left"
    if card is not None and card.knows_positions:
        return f"a layer of {card.name}, whose own positions count the tokens that are left"
    if card is not None and card.length not in ("any", "grid"):
        return f"a layer of {card.name}, whose weights belong to the places of all tokens"
    return ""


def _without_softmax(block: OwnBlock) -> bool:
    layer = attention_of(block)
    return layer is None or layer.card.name != "softmax" or layer.config != layer.card.options()


def _check_softmax(model: nn.Module, blocks: Sequence[OwnBlock], asked: str) -> None:
    """Raise Unsupported if something is asked for that needs plain softmax weights, and a block has none."""
    other = next((block for block in blocks if _without_softmax(block)), None)
    if asked and other is not None:
        raise Unsupported(
            f"{asked} in {an_instance(model)} with a layer of {_name(other)}, which has no plain softmax weights",
            supported="softmax attention, also in a mixture of heads, without options of its own",
            nearest="stride, or tome with proportional=False",
        )


def _check_heads(blocks: Sequence[OwnBlock], method: str, metric: str) -> None:
    """Raise Unsupported for a layer without the keys or queries that tokens are compared by."""
    for block in blocks:
        layer = attention_of(block)
        part = None
        if layer is not None and type(layer).forward is AttentionLayer.forward:
            part = layer.key if metric == "keys" else layer.query
        if metric != "tokens" and part is None:
            raise Unsupported(
                f"{method} by the {metric} of a layer of {_name(block)}",
                supported="layers that make queries and keys of their tokens",
                nearest="metric='tokens'",
            )


class ReducedBlock(VisionBlock):
    """A block of :class:`regard.models.vision.vit.VisionTransformer` that outputs fewer tokens."""

    reduction: Reduction
    number: int
    protected: int

    def forward(self, x: Tensor, memory: Tensor | None = None, *, context: Context, state: Any = None) -> Result:
        reduction = self.reduction
        tokens = reduction.begin(self.number, x, self.protected)
        bias = reduction.bias(tokens)
        seen = self.seen(x, context if reduction.whole else _placed(self, context, tokens))
        if bias is not None:
            seen = seen.replace(mask=Mask(bias=bias.to(x.dtype)))
        with watched(attention_of(self)) as heads:
            mixed = self.add_mixed(x, memory, self.drop_path, context=seen, state=state)
        before, x = x, mixed.output

        def evidence() -> Evidence:
            return reduction.evidence(_told(heads, attention_of(self), self.mixer_norm, before), x, bias)

        x = reduction.after(self.number, tokens, x, evidence).x
        if self.feed_forward is not None:
            x = self.add_fed(x, self.drop_path, context=Context(generator=context.generator), losses=mixed.losses)
        return Result(reduction.passed_on(self.number, x), mixed.state, mixed.losses, mixed.extras)


class ReducedTNTBlock(tnt.Block):
    """A block of :class:`regard.models.vision.tnt.TNT` that outputs fewer sentences, each with its words.

    The words of a patch go where its sentence goes: they are dropped with it, or merged to the same mean.
    """

    reduction: Reduction
    number: int
    protected: int

    def forward(self, words: Tensor, sentences: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        reduction = self.reduction
        outer: Any = self.outer
        tokens = reduction.begin(self.number, sentences, self.protected)
        bias = reduction.bias(tokens)
        words, sentences = self.read(words, sentences)
        seen = context if reduction.whole else _placed(self, context, tokens)
        if bias is not None:
            seen = seen.replace(mask=Mask(bias=bias.to(sentences.dtype)))
        with watched(attention_of(self)) as heads:
            before, sentences = sentences, outer.add_attended(sentences, seen)

        def evidence() -> Evidence:
            return reduction.evidence(_told(heads, attention_of(self), outer.norm1, before), sentences, bias)

        each = words.flatten(1).unflatten(0, (len(sentences), sentences.shape[1] - self.prefix))
        own = F.pad(each, (0, 0, self.prefix, 0))
        joined = torch.cat([sentences, own], -1)  # (B, prefix + n, C + m * c)
        moved = reduction.after(self.number, tokens, joined, evidence).x
        sentences, own = moved.split([sentences.shape[2], own.shape[2]], -1)
        words = own[:, self.prefix :].flatten(0, 1).unflatten(1, words.shape[1:])
        end = outer.dropout, outer.excitation, outer.drop_path
        sentences = add_feed_forward(sentences, outer.norm2, outer.mlp, *end)
        return words, reduction.passed_on(self.number, sentences)


OWN: dict[type, type] = {VisionBlock: ReducedBlock, tnt.Block: ReducedTNTBlock}
"""Blocks of this project, and those that output fewer tokens."""


def _placed(block: OwnBlock, context: Context, tokens: Tokens) -> Context:
    """A block's context for the tokens that are left."""
    roles = context.roles
    here = context.replace(roles=None if roles is None else roles.gather(1, tokens.origins))
    return placed(block, here, tokens.origins)


class Projected(Heads):
    """What is read of the queries and keys of plain attention without positions, from its weights: a native call keeps
    them to itself.

    Args:
        layer: the attention.
        norm: the norm before it.
        x: the tokens before both.
    """

    def __init__(self, layer: AttentionLayer, norm: nn.Module, x: Float[Tensor, "b n c"]) -> None:
        super().__init__()
        self._layer, self._norm, self._x = layer, norm, x

    @cached_property
    def _normed(self) -> Tensor:
        return self._norm(self._x)

    def mean(self, name: str) -> Float[Tensor, "b n d"]:
        weight, bias = self._part(name)
        return F.linear(self._normed, weight.mean(0), None if bias is None else bias.mean(0))

    def from_first(self) -> Float[Tensor, "b h 1 n"]:
        (query_weight, query_bias), (weight, bias) = self._part("q"), self._part("k")
        first = self._normed[:, 0]
        shared = len(query_weight) // len(weight)
        query = F.linear(first, query_weight.flatten(0, 1), None if query_bias is None else query_bias.flatten())
        query = query.unflatten(-1, query_weight.shape[:2]).transpose(0, 1)  # (H, B, D)
        read = query @ weight.repeat_interleave(shared, 0)  # q_h W_k, so that scores are its products with the tokens
        scores = read.transpose(0, 1) @ self._normed.mT
        if bias is not None:
            scores = scores + (query * bias.repeat_interleave(shared, 0)[:, None]).sum(-1).T[..., None]
        return scores[:, :, None] * query.shape[-1] ** -0.5

    def _part(self, name: str) -> tuple[Float[Tensor, "h d c"], Float[Tensor, "h d"] | None]:
        """Weight and bias of the queries or the keys by head."""
        layer = self._layer
        part: Any = layer.query if name == "q" else layer.key
        heads = layer.num_heads if name == "q" else layer.kv_heads
        bias = part.bias
        return part.weight.unflatten(0, (heads, -1)), None if bias is None else bias.unflatten(0, (heads, -1))


def _told(heads: Heads, layer: AttentionLayer | None, norm: nn.Module, x: Float[Tensor, "b n c"]) -> Heads:
    """What a layer's call has told of its queries and keys, or what can be read of them where the call was native."""
    return heads if heads.given or layer is None else Projected(layer, norm, x)


@contextmanager
def watched(layer: AttentionLayer | None) -> Iterator[Heads]:
    """The queries and keys of a layer's next call; none without a layer, and of a native call."""
    heads = Heads()
    if layer is None:
        yield heads
        return

    def place(given: dict[str, Tensor], queries: Tensor | None, keys: Tensor | None) -> dict[str, Tensor]:
        made = AttentionLayer.place(layer, given, queries, keys)
        heads.given, heads.placed = given, made
        return made

    vars(layer)["place"] = place  # as torch.compile can follow it
    try:
        yield heads
    finally:
        del vars(layer)["place"]
