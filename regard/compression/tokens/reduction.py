"""Vision transformers whose blocks output fewer tokens: those of this project, and timm's."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.compression.tokens.calls import PerThread
from regard.compression.tokens.hosts import HOSTS, attention_of
from regard.compression.tokens.reducers import METHODS, Evidence, Tokens
from regard.compression.tokens.schedules import Removal, removals
from regard.contract import Context, Mask, Result, Unsupported, an_instance, one_of
from regard.models.vision.vit import VisionBlock, VisionTransformer

if TYPE_CHECKING:
    from jaxtyping import Float

ATTENDED = ("evit", "attention")
"""Methods that need a class token."""
DROPPING = ("attention", "random", "stride")
"""Methods after which some patches are part of no token."""
METRICS = ("keys", "queries", "tokens")


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
    """

    def __init__(
        self,
        method: str,
        removed: Sequence[Removal],
        proportional: bool,
        metric: str,
        generator: torch.Generator | None,
        pooled: bool = False,
    ) -> None:
        self.method, self.removed, self.proportional = method, removed, proportional
        self.metric, self.generator, self.pooled = metric, generator, pooled
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
        self.removed = removals(len(self.removed), remove, keep, blocks)

    def undo(self) -> None:
        """Restore the model's own blocks."""
        while self._changed:
            block, before = self._changed.pop()
            block.__class__ = before
            del block.reduction, block.number, block.protected

    def enter(self, block: Any, number: int, protected: int) -> None:
        """Turn a block into one that outputs fewer tokens."""
        self._changed.append((block, type(block)))
        block.__class__ = ReducedBlock if isinstance(block, VisionBlock) else _reduced_timm_block()
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
            self._run.tokens, self._run.counts = Tokens.begin(x, protected), []
        return self._run.tokens

    def bias(self, tokens: Tokens) -> Float[Tensor, "b 1 1 n"] | None:
        """The bias on the scores of each key; None if all tokens stand for themselves."""
        same = tokens.x.shape[1] == tokens.places.shape[1]
        return None if same or not self.proportional else tokens.sizes.log()[:, None, None]

    def after(self, block: int, tokens: Tokens, x: Float[Tensor, "b n c"], evidence: Callable[[], Evidence]) -> Tokens:
        """The tokens `x` after a block's attention, possibly reduced."""
        moved = Tokens(x, tokens.sizes, tokens.places, tokens.protected)
        remove = self.removed[block](x.shape[1] - tokens.protected)
        if remove > 0:
            moved = METHODS[self.method](moved, evidence(), remove)
        self._run.tokens = moved
        self._run.counts.append(moved.x.shape[1])
        return moved

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
        proportional: see the module; when None, True for Token Merging, which is defined so, and False for the others.
        metric: what the similarity of merged tokens is computed from: ``keys``, ``queries``, or ``tokens``, the vectors
            themselves.
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
    schedule = removals(len(layers), remove, keep, blocks)
    counted = method.startswith("tome") if proportional is None else proportional
    pooled = model.global_pool not in ("token", "")
    reduction = Reduction(method, schedule, counted, metric, generator, pooled)
    for number, block in enumerate(layers):
        reduction.enter(block, number, protected)
    return reduction


def blocks_of(model: nn.Module, *, class_token: bool = True) -> tuple[list[Any], int]:
    """The blocks of a host, and its number of class tokens and registers; raises Unsupported for other models, and where
    a `class_token` is needed for models without one."""
    timm = sys.modules.get("timm.models.vision_transformer")
    if isinstance(model, VisionTransformer):
        blocks: list[Any] = list(model.blocks)
        protected = model.config.class_tokens
        has_class = protected > 0
        layers = map(attention_of, blocks)
        placeless = [
            layer is not None and layer.card.name == "softmax" and layer.positions.name == "none" for layer in layers
        ]
        wrong = [block for block, fits in zip(blocks, placeless, strict=True) if not fits]
    elif timm is not None and isinstance(model, timm.VisionTransformer):
        blocks, protected = list(model.blocks), model.num_prefix_tokens
        has_class = model.has_class_token
        wrong = [b for b in blocks if type(b) is not timm.Block and not isinstance(b, _reduced_timm_block())]
    else:
        raise Unsupported(f"fewer tokens in {an_instance(model)}", supported=HOSTS)
    if wrong:
        raise Unsupported(
            f"fewer tokens in {an_instance(model)} with {type(wrong[0]).__name__} of another kind of attention",
            supported="softmax attention, also in a mixture of heads, without positions of its own in every block",
        )
    if class_token and not has_class:
        raise Unsupported(
            f"fewer tokens in {an_instance(model)} without a class token",
            supported="vision transformers with a class token",
        )
    return blocks, protected


class ReducedBlock(VisionBlock):
    """A block of :class:`regard.models.vision.vit.VisionTransformer` that outputs fewer tokens."""

    reduction: Reduction
    number: int
    protected: int

    def forward(self, x: Tensor, memory: Tensor | None = None, *, context: Context, state: Any = None) -> Result:
        tokens = self.reduction.begin(self.number, x, self.protected)
        bias, seen = self.reduction.bias(tokens), dict[str, Tensor]()
        taken = context if x.shape[1] == tokens.places.shape[1] else Context(generator=context.generator)
        if bias is not None:
            taken = taken.replace(mask=Mask(bias=bias.to(x.dtype)))
        layer: Any = attention_of(self)
        hooks = [
            part.register_forward_hook(lambda _, __, output, name=name: seen.__setitem__(name, output))
            for name, part in (("query", layer.query), ("key", layer.key))
        ]
        try:
            mixed = self.mix(x, memory, context=taken, state=state)
        finally:
            for hook in hooks:
                hook.remove()
        x = x + self.drop_path(mixed.output)

        def evidence() -> Evidence:
            query, key = (seen[name].unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for name in ("query", "key"))
            query, key = (
                part if norm is None else norm(part)
                for part, norm in ((query, layer.query_norm), (key, layer.key_norm))
            )
            return _evidence(
                self.reduction, query, key.repeat_interleave(layer.num_heads // layer.kv_heads, 1), x, bias
            )

        x = self.reduction.after(self.number, tokens, x, evidence).x
        if self.feed_forward is not None:
            x = x + self.drop_path(self.feed(x, context=Context(generator=context.generator)))
        x = self.reduction.passed_on(self.number, x)
        return Result(x, mixed.state, mixed.losses, mixed.extras)


@functools.cache
def _reduced_timm_block() -> type[nn.Module]:
    """A subclass of timm's `Block` that outputs fewer tokens."""
    block_class: Any = importlib.import_module("timm.models.vision_transformer").Block

    class ReducedTimmBlock(block_class):
        """A block of timm's `VisionTransformer` that outputs fewer tokens."""

        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            if attn_mask is not None:
                raise Unsupported("attn_mask in a model with fewer tokens", supported="no mask")
            tokens = self.reduction.begin(self.number, x, self.protected)
            bias, seen = self.reduction.bias(tokens), []
            hook = self.attn.qkv.register_forward_hook(lambda _, __, output: seen.append(output))
            try:
                mixed = self.attn(self.norm1(x), attn_mask=None if bias is None else bias.to(x.dtype))
            finally:
                hook.remove()
            x = x + self.drop_path1(self.ls1(mixed))

            def evidence() -> Evidence:
                query, key, _ = seen[0].unflatten(-1, (3, self.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
                return _evidence(self.reduction, self.attn.q_norm(query), self.attn.k_norm(key), x, bias)

            x = self.reduction.after(self.number, tokens, x, evidence).x
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
            return self.reduction.passed_on(self.number, x)

    ReducedTimmBlock.__qualname__ = "ReducedTimmBlock"  # by which a saved model finds it, see __getattr__
    return ReducedTimmBlock


def __getattr__(name: str) -> Any:
    if name == "ReducedTimmBlock":
        return _reduced_timm_block()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _evidence(
    reduction: Reduction,
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    x: Float[Tensor, "b n c"],
    bias: Float[Tensor, "b 1 1 n"] | None,
) -> Evidence:
    """The evidence of a layer; of the attention, only the class token's row is computed, for methods that read it."""
    metric = x if reduction.metric == "tokens" else (key if reduction.metric == "keys" else query).mean(1)
    if reduction.method not in ATTENDED:
        return Evidence(metric, None, reduction.generator)
    scores = query[:, :, :1] @ key.mT * query.shape[-1] ** -0.5
    scores = scores if bias is None else scores + bias
    return Evidence(metric, scores.softmax(-1).mean(1)[:, 0], reduction.generator)
