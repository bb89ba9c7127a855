"""Exact softmax attention over a sequence whose tokens are split over several ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.contract import Unsupported, one_of
from regard.distributed.communicators import Program, Ranks, Traffic
from regard.distributed.layouts import Layout
from regard.distributed.plans import SCHEMES, grid_shape
from regard.distributed.schemes import Grid, Heads, Rank, Ring, Scheme

if TYPE_CHECKING:
    from jaxtyping import Float


class DistributedAttention:
    """Softmax attention over a sequence in pieces, equal to attention over the whole, forward and backward.

    On the ranks of a process group, each process passes its own tokens (:meth:`shard`) and gets their outputs. On
    virtual ranks, one process passes all tokens and gets all outputs, by the same schedule, exchange by exchange: for
    tests, and to count what would be sent::

        attention = DistributedAttention("ring", ranks=4)
        output = attention(q, k, v)
        print(attention.forward_traffic[0].bytes)

    Args:
        scheme: ``ring``, ``head`` (each rank computes some of the heads: key/value heads must be a multiple of the
            ranks), ``grid`` or ``gather``; see :mod:`regard.distributed.schemes` and :func:`regard.distributed.plan`.
        ranks: number of virtual ranks.
        group: a process group or `DeviceMesh` with one axis, or two for a grid; the default group if None.
        causal: whether query i sees only keys 0 to i.
        scale: scale of the scores; 1 / sqrt(d) if None.
        zigzag: whether rank p has chunks p and 2 P - 1 - p of 2 P, which gives all ranks the same causal work; the
            value of `causal` if None.
        grid: Pq and Pk of the grid; if None, the sizes that send least for equal widths.
        backend: see :func:`regard.which_backend`.

    Attributes:
        forward_traffic, backward_traffic: traffic of the last call, one :class:`regard.distributed.Traffic` for each
            rank of this process.

    Raises:
        Unsupported: for combinations of arguments that are not supported.
    """

    def __init__(
        self,
        scheme: str = "ring",
        *,
        ranks: int | None = None,
        group: Any = None,
        causal: bool = True,
        scale: float | None = None,
        zigzag: bool | None = None,
        grid: tuple[int, int] | None = None,
        backend: str | None = None,
    ) -> None:
        one_of("scheme", scheme, SCHEMES)
        if grid is not None and scheme != "grid":
            raise Unsupported(f"scheme={scheme!r} with a grid", supported="scheme='grid'", nearest="grid=None")
        if isinstance(group, dist.DeviceMesh) and group.ndim > 1:
            group, grid = _of_mesh(group, scheme, grid)
        self.ranks = Ranks.of(ranks, group)
        self.scheme, self.causal, self.scale, self.backend = scheme, causal, scale, backend
        self.zigzag = causal if zigzag is None else zigzag
        self.grid = grid_shape(scheme, self.ranks.count, None, grid)
        self.forward_traffic: list[Traffic] = []
        self.backward_traffic: list[Traffic] = []

    def layout(self, length: int) -> Layout:
        """The layout of a sequence: which tokens each rank has."""
        return Layout(length, self.ranks.count, self.zigzag)

    def shard(self, x: Tensor, dim: int = -2) -> Tensor:
        """This process's share of the tokens; all of them on virtual ranks."""
        return x if self.ranks.group is None else self.layout(x.shape[dim]).take(x, self.ranks.local[0], dim)

    def __call__(
        self,
        q: Float[Tensor, "b h n d"],
        k: Float[Tensor, "b g n d"],
        v: Float[Tensor, "b g n v"],
        *,
        length: int | None = None,
    ) -> Float[Tensor, "b h n v"]:
        """Outputs of the given tokens.

        Args:
            q, k, v: this process's tokens; all of them on virtual ranks.
            length: tokens of all ranks together; if None, every rank has as many as this one.

        Raises:
            Unsupported: for shapes that do not fit, and tokens that are not this rank's :meth:`shard`.
        """
        _check_shapes(q, k, v)
        virtual = self.ranks.group is None
        if length is None:
            length = q.shape[2] * (1 if virtual else self.ranks.count)
        layout = self.layout(length)
        expected = length if virtual else layout.size(self.ranks.local[0])
        if q.shape[2] != expected:
            raise Unsupported(
                f"{q.shape[2]} tokens of {length}" + ("" if virtual else f" on rank {self.ranks.local[0]}"),
                supported=f"{expected}",
                nearest="attention(shard(q), shard(k), shard(v), length=all tokens)",
            )
        if self.scheme == "head" and k.shape[1] % self.ranks.count:
            raise Unsupported(
                f"scheme='head' with {k.shape[1]} key/value heads on {self.ranks.count} ranks",
                supported="a multiple of the ranks",
                nearest="scheme='ring'",
            )
        run = _Run(self, layout, q.shape[-1] ** -0.5 if self.scale is None else self.scale)
        if not virtual:
            return _Attention.apply(run, q, k, v)[0]
        local = [layout.take(x, rank) for rank in self.ranks.local for x in (q, k, v)]
        return layout.join(_Attention.apply(run, *local))


class _Run:
    """One call: its schedule, and the ranks of it that run in this process."""

    def __init__(self, attention: DistributedAttention, layout: Layout, scale: float) -> None:
        self.ranks, self.attention = attention.ranks, attention
        self.schedule: Scheme = Ring()
        if attention.scheme == "head":
            self.schedule = Heads()
        elif attention.grid is not None:
            self.schedule = Grid(attention.grid[1])
        self.layout, self.scale = layout, scale

    def __call__(
        self, program: Callable[..., Program], given: Sequence[tuple[Any, ...]], traffic: list[Traffic]
    ) -> list:
        causal, backend = self.attention.causal, self.attention.backend
        programs = [
            program(Rank(r, self.layout, causal, self.scale, counted, backend), *tensors)
            for r, tensors, counted in zip(self.ranks.local, given, traffic, strict=True)
        ]
        return self.ranks.run(programs, traffic)


class _Attention(torch.autograd.Function):
    """The schedules of this process's ranks: takes q, k and v of each rank, returns each rank's output."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        run.attention.forward_traffic = traffic = [Traffic() for _ in run.ranks.local]
        given = [tensors[i : i + 3] for i in range(0, len(tensors), 3)]
        outputs, saved = zip(*run(run.schedule.forward, given, traffic), strict=True)
        ctx.run, ctx.each = run, len(saved[0])
        ctx.save_for_backward(*(x for tensors in saved for x in tensors))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run = ctx.run
        run.attention.backward_traffic = traffic = [Traffic() for _ in run.ranks.local]
        kept = ctx.saved_tensors
        saved = [kept[i : i + ctx.each] for i in range(0, len(kept), ctx.each)]
        found = run(run.schedule.backward, list(zip(saved, grads, strict=True)), traffic)
        return None, *(x.to(grads[0].dtype) for slopes in found for x in slopes)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in {"q": q, "k": k, "v": v}.items())
    if not (
        q.ndim == k.ndim == v.ndim == 4
        and q.shape[0] == k.shape[0] == v.shape[0]
        and q.shape[2] == k.shape[2] == v.shape[2]
        and q.shape[3] == k.shape[3]
        and k.shape[1] == v.shape[1] > 0
        and q.shape[1] % k.shape[1] == 0
        and q.dtype == k.dtype == v.dtype
        and q.is_floating_point()
    ):
        raise Unsupported(
            f"{shapes} of {q.dtype}, {k.dtype}, {v.dtype}",
            supported="q (B, H, N, D), k (B, G, N, D) and v (B, G, N, E) of one dtype, G a divisor of H",
        )


def _of_mesh(mesh: dist.DeviceMesh, scheme: str, grid: tuple[int, int] | None) -> tuple[Any, tuple[int, int] | None]:
    """The process group of a mesh, and the grid that the mesh forms."""
    everyone = torch.arange(dist.get_world_size())
    if mesh.ndim == 2 and scheme == "grid" and grid is None and torch.equal(mesh.mesh.flatten().cpu(), everyone):
        return dist.group.WORLD, (mesh.shape[0], mesh.shape[1])
    raise Unsupported(
        f"a mesh of {mesh.ndim} axes for scheme={scheme!r}",
        supported="one axis; two of all ranks in order, queries first, for scheme='grid'",
        nearest="mesh['name of an axis']",
    )
