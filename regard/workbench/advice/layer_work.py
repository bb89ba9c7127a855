"""The work of a layer that can be timed at any length: a forward call, a training step, a decoding step.

The layer is the one that a user runs, including its projections, so attention, mixers and wrappers can be compared. It
is built as a model builds it: with rotary positions where the mechanism accepts them (self patterns), with the tokens
that the mechanism inserts, and on a grid where it needs one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from regard.contract import Context, Kind, Mechanism, Pattern, Shape, Unsupported, at_least, one_of
from regard.create import build_layer
from regard.models.layer_plan import layer_accepts
from regard.models.placing import layer_positions
from regard.workbench.verification.subjects import Subject

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
WHAT = ("forward", "training", "decode")
MIXING = (Kind.ATTENTION, Kind.MIXER, Kind.WRAPPER)
"""Kinds whose layers mix tokens; poolings and projections replace something else."""


@dataclass(frozen=True)
class LayerSettings:
    """Sizes of a layer and of its input.

    Attributes:
        pattern: the layer's pattern; in cross patterns the memory has the length and width of the queries.
        dim: width of the input and output.
        heads: number of heads, for mechanisms that have heads.
        head_dim: width of a head; when None, or equal to dim / heads, the layer's own choice for `dim` and `heads`.
        batch: number of sequences.
        dtype: ``float32``, ``bfloat16`` or ``float64``, for weights and input.
        device: a torch device.
        short_convolution: width of the short convolutions in every layer that accepts them, 0 for none; each
            mechanism's own default when None.
    """

    pattern: Pattern = Pattern.CAUSAL_SELF
    dim: int = 512
    heads: int = 8
    head_dim: int | None = None
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    short_convolution: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", Pattern.parse(self.pattern))
        for name in ("dim", "heads", "batch"):
            at_least(name, getattr(self, name), 1)
        one_of("dtype", self.dtype, DTYPES)
        check_device(self.device)
        if self.short_convolution is not None:
            at_least("short_convolution", self.short_convolution, 0)
        if self.head_dim is not None:
            at_least("head_dim", self.head_dim, 1)
            if self.head_dim * self.heads == self.dim:
                object.__setattr__(self, "head_dim", None)
        elif self.dim % self.heads:
            raise Unsupported(
                f"dim={self.dim} for heads={self.heads}",
                supported="a multiple of heads, or a head_dim",
                nearest=f"dim={max(1, round(self.dim / self.heads)) * self.heads}",
            )

    def options(self, card: Mechanism) -> dict[str, Any]:
        """Arguments for :func:`regard.create_layer` in addition to the pattern."""
        options: dict[str, Any] = {}
        if not self.pattern.cross and layer_accepts(card, "positions"):
            scheme = layer_positions(card, "auto")
            options |= {} if scheme == "none" else {"positions": scheme}
        if self.short_convolution is not None and layer_accepts(card, "short_convolution"):
            options["short_convolution"] = self.short_convolution
        in_config = "head_dim" in card.config.__dataclass_fields__  # type: ignore[attr-defined]
        if self.head_dim is not None and (in_config or layer_accepts(card, "head_dim")):
            options["head_dim"] = self.head_dim
        return options

    def shape(self, length: int) -> Shape:
        """The shape of one call, for the cost function of a card."""
        width = self.dim // self.heads if self.head_dim is None else self.head_dim
        return Shape(self.batch, self.heads, length, length, width, width)


def check_device(device: str) -> None:
    """Raise Unsupported if torch does not know the device, this machine lacks it, or it holds no data (meta)."""
    try:
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        found = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        raise Unsupported(f"device {device!r}", supported=", ".join(found), nearest="cpu") from error


ROOM = 1 << 14
"""Tokens that can be decoded after the prompt when a layer has a maximum length and is built for that prompt."""


class LayerWork:
    """The layer of a mechanism, and the actions that are timed.

    Raises:
        Unsupported: if the mechanism lacks the pattern or its layer cannot have these sizes.
    """

    def __init__(self, card: Mechanism, settings: LayerSettings) -> None:
        self.card, self.settings = card, settings
        self.subject = Subject(card, card.require_pattern(settings.pattern))
        self.device, self.dtype = torch.device(settings.device), DTYPES[settings.dtype]
        self.longest: int | None = getattr(self.subject.config, "length", None) if card.length == "max" else None
        self.layer = self._built()

    def _built(self, **options: Any) -> nn.Module:
        settings, options = self.settings, {**self.settings.options(self.card), **options}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = build_layer(self.card, settings.dim, settings.heads, pattern=settings.pattern, **options)
        return layer.to(self.device, self.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the layer's parameters."""
        return sum(p.numel() * p.element_size() for p in self.layer.parameters())

    @property
    def decodes(self) -> bool:
        """Whether the layer can decode one token at a time from a state."""
        return self.subject.layer_decodes and (not self.settings.pattern.cross or hasattr(self.layer, "encode_memory"))

    def inputs(self, length: int) -> tuple[Tensor, Tensor | None, Context]:
        """Input, memory and context for a call with `length` tokens; inserted tokens are added to those."""
        settings, roles = self.settings, None
        n = m = length
        if self.card.prepare is not None:
            ids = torch.zeros(settings.batch, length, dtype=torch.long)
            roles = self.card.prepare(ids, self.subject.config)[1].expand(settings.batch, -1).to(self.device)
            m = roles.shape[1]
            n = n if settings.pattern.cross else m
        generator = torch.Generator().manual_seed(0)

        def tokens(count: int) -> Tensor:
            x = torch.randn(settings.batch, count, settings.dim, generator=generator)
            return x.to(self.device, self.dtype)

        x, memory = tokens(n), tokens(m) if settings.pattern.cross else None
        return x, memory, Context(grid=self.subject.grid(n), roles=roles)

    def action(self, what: str, length: int) -> Callable[[], Any]:
        """Work to be timed: a forward call, a training step (without optimizer), or decoding one more token after
        `length`.

        A layer with a maximum length, which may affect its cost, is built for the length asked for.
        """
        most = length + ROOM if what == "decode" else length
        if self.longest is not None and most != self.longest:
            self.longest, self.layer = most, self._built(length=most)
        x, memory, context = self.inputs(length)
        self.layer.train(what == "training")
        if what == "decode":
            return Decoding(functools.partial(self._step, x[:, :1]), self._prefill(x, memory, context))
        if what == "forward":
            return functools.partial(self._forward, x, memory, context)
        leaves = [t.requires_grad_() for t in (x, memory) if t is not None]
        wanted = [*leaves, *(p for p in self.layer.parameters() if p.requires_grad)]

        def training() -> None:
            result = self.layer(x, memory, context=context)
            loss = result.output.float().sum()
            for total, count in result.losses.values():
                loss = loss + total / count
            torch.autograd.grad(loss, wanted, allow_unused=True)

        return training

    @torch.no_grad()
    def _forward(self, x: Tensor, memory: Tensor | None, context: Context) -> Tensor:
        return self.layer(x, memory, context=context).output

    @torch.no_grad()
    def _prefill(self, x: Tensor, memory: Tensor | None, context: Context) -> Any:
        if memory is not None:
            return self.layer.encode_memory(memory, context=Context(roles=context.roles))  # type: ignore[operator]
        return self.layer(x, context=context.replace(want=frozenset({"state"}))).state

    @torch.no_grad()
    def _step(self, token: Tensor, state: Any) -> Any:
        return self.layer(token, state=state).state


class Decoding:
    """An action that decodes one token after another.

    Each call continues from the state that the last one returned, as in real decoding: continuing twice from the same
    state would copy the cache each time. The first token, after which the prompt's cache has room to grow, is decoded
    at construction.

    Attributes:
        state_bytes: size of the state after the prompt.
    """

    def __init__(self, step: Callable[[Any], Any], state: Any) -> None:
        self.step = step
        self.state_bytes: int = state.nbytes
        self.state = step(state)

    def __call__(self) -> None:
        self.state = self.step(self.state)
