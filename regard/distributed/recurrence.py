"""Recurrent mechanisms over a sequence split over several ranks: each passes its state on to the next.

In order, rank p computes once it has the state of rank p - 1: this is exact for every mechanism, but no faster than one
rank. Where a card says how states combine, the ranks find the states before their pieces by a prefix scan: each reads
its keys and values two or three times (the last rank once, the first twice), and ceil(log2 P) + 1 exchanges of a state
replace P - 1 turns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from regard.catalogue import resolve
from regard.contract import Pattern, State, Unsupported, one_of
from regard.distributed.communicators import Exchange, Program, Ranks, Traffic
from regard.distributed.layouts import Layout
from regard.distributed.states import Piece, token_axis

HAND_OVERS = ("scan", "order")


class DistributedRecurrence:
    """A causal-self recurrent mechanism on a split sequence, equal to that on the whole, forward and backward::

        mechanism = DistributedRecurrence("gated_linear", ranks=4)
        output = mechanism({"q": q, "k": k, "v": v, "log_decay": log_decay})

    Args:
        name: name or alias of the mechanism.
        ranks: number of virtual ranks.
        group: a process group, or a `DeviceMesh` with one axis; the default group if None.
        hand_over: ``scan``, for mechanisms whose states combine, or ``order``; the first available one if None.
        scale: as in the mechanism's function.
        backend: see :func:`regard.which_backend`.
        options: options of the mechanism.

    Attributes:
        forward_traffic, backward_traffic: traffic of the last call, one :class:`regard.distributed.Traffic` for each
            rank of this process.

    Inputs without tokens (`a`, a learned query) belong to each rank: their gradients cover its tokens only, and must be
    summed over ranks. On virtual ranks there is one such input, with the whole gradient.

    Raises:
        Unsupported: for mechanisms without a state of constant size, and for a scan where states do not combine.
    """

    def __init__(
        self,
        name: str,
        *,
        ranks: int | None = None,
        group: Any = None,
        hand_over: str | None = None,
        scale: float | None = None,
        backend: str | None = None,
        **options: Any,
    ) -> None:
        self.card, options = resolve(name, options)
        self.config = self.card.options(**options)
        self.card.require_pattern(Pattern.CAUSAL_SELF)
        if not self.card.is_recurrent(self.config):
            raise Unsupported(
                f"handing along the state of {self.card.name}, which is none or grows with the sequence",
                supported="recurrent mechanisms (regard list --recurrent)",
                nearest="DistributedAttention, for softmax",
            )
        self.ranks = Ranks.of(ranks, group)
        combines = self.card.combines_with(self.config)
        if hand_over is not None:
            one_of("hand_over", hand_over, HAND_OVERS)
        if hand_over == "scan" and not combines:
            raise Unsupported(
                f"a scan over states of {self.card.name} with these options, which do not combine",
                supported="hand_over='order'",
            )
        self.hand_over = hand_over or ("scan" if combines else "order")
        self.options = {"config": self.config, "scale": scale, "backend": backend}
        self.forward_traffic: list[Traffic] = []
        self.backward_traffic: list[Traffic] = []

    def layout(self, length: int) -> Layout:
        """The layout of a sequence: which tokens each rank has, in one piece each, in order."""
        return Layout(length, self.ranks.count)

    def shard(self, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """This process's share of the tokens, by input name; all of them on virtual ranks."""
        given = {name: x for name, x in tensors.items() if x is not None}
        return given if self.ranks.group is None else self._taken(given, self.ranks.local[0])

    def _taken(self, tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
        found = dict(tensors)
        for name, x in tensors.items():
            axis = token_axis(self.card, name)
            if axis is not None:
                found[name] = self.layout(x.shape[axis]).take(x, rank, axis)
        return found

    def __call__(self, tensors: Mapping[str, Tensor | None], *, length: int | None = None) -> Tensor:
        """Outputs of the given tokens.

        Args:
            tensors: inputs by their names on the card: this process's tokens; all of them on virtual ranks.
            length: tokens of all ranks together; if None, every rank has as many as this one.
        """
        given = {name: x for name, x in tensors.items() if x is not None}
        unknown = given.keys() - self.card.axes.keys()
        if unknown:
            raise Unsupported(f"{', '.join(sorted(unknown))} of {self.card.name}", supported=", ".join(self.card.axes))
        sizes = {x.shape[axis] for name, x in given.items() if (axis := token_axis(self.card, name)) is not None}
        if len(sizes) != 1:
            raise Unsupported(
                f"inputs of {sorted(sizes)} tokens", supported="as many queries as keys, 1 or more inputs"
            )
        (tokens,) = sizes
        if self.hand_over == "scan" and self.card.combines_with(self.config) == "matrix":
            wide = [name for name in given if name != "v" and self.card.axes[name].endswith("v")]
            if wide:
                raise Unsupported(
                    f"a scan over states of {self.card.name} with {', '.join(wide)}, whose columns differ",
                    supported="hand_over='order'",
                )
        virtual = self.ranks.group is None
        length = tokens * (1 if virtual else self.ranks.count) if length is None else length
        layout = self.layout(length)
        if tokens != (length if virtual else layout.size(self.ranks.local[0])):
            raise Unsupported(f"{tokens} tokens of {length}", supported="those of shard(...)")
        run = _Run(self, layout, list(given))
        local: list[Tensor] = []
        for rank in self.ranks.local:
            local += (self._taken(given, rank) if virtual else given).values()
        outputs = _Handed.apply(run, *local)
        return layout.join(outputs, self.card.output.index("n")) if virtual else outputs[0]


class _Run:
    """One call, on the ranks of this process."""

    def __init__(self, of: DistributedRecurrence, layout: Layout, names: list[str]) -> None:
        self.of, self.layout, self.names, self.ranks = of, layout, names, of.ranks
        self.recorded = torch.is_grad_enabled()
        self.forward, self.backward = (_scan, _scan_back) if of.hand_over == "scan" else (_turns, _turns_back)

    def leaves(self, tensors: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Each rank's inputs by name, detached from the graph that they come from."""
        each = len(self.names)
        found = [_leaf(x, x.requires_grad) for x in tensors]
        return [dict(zip(self.names, found[i : i + each], strict=True)) for i in range(0, len(found), each)]

    def place(self, rank: int) -> _Place:
        piece = Piece(self.of.card, self.layout.spans(rank)[0][0], self.of.options)
        return _Place(rank, self.ranks.count, piece)


@dataclass(frozen=True)
class _Place:
    index: int
    count: int
    piece: Piece


_Step = tuple[list[Tensor], list[Tensor], list[Tensor]]


@dataclass
class _Tape:
    """The computations of one rank, with the graph of each part; its `inputs` and what it `received` are leaves.

    Attributes:
        state: in turns, the state that it sent.
        summary, steps: in a scan, its own summary, and for each step its value, what it received and both combined;
            None if it received nothing.
    """

    inputs: dict[str, Tensor]
    received: list[Tensor]
    output: Tensor
    state: list[Tensor]
    summary: list[Tensor]
    steps: list[_Step | None]


def _leaf(x: Tensor, wanted: bool = True) -> Tensor:
    return x.detach().requires_grad_(wanted and x.is_floating_point())


def _gradients(outputs: Sequence[Tensor], leaves: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of leaves; 0 for leaves that no output depends on or that need none."""
    found = [(x, grad) for x, grad in zip(outputs, grads, strict=True) if x.requires_grad]
    wanted = [x for x in leaves if x.requires_grad]
    if not found or not wanted:
        return [torch.zeros_like(x) for x in leaves]
    ends, slopes_of_ends = zip(*found, strict=True)
    slopes = iter(torch.autograd.grad(ends, wanted, slopes_of_ends, allow_unused=True, materialize_grads=True))
    return [next(slopes) if x.requires_grad else torch.zeros_like(x) for x in leaves]


def _floats(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in tensors if x.is_floating_point()]


def _turns(place: _Place, inputs: dict[str, Tensor]) -> Program[_Tape]:
    here = place.index
    received: list[Tensor] = []
    state: State | None = None
    tape: _Tape | None = None
    for turn in range(place.count):
        if turn == here:
            output, after = place.piece.run(inputs, state)
            tape = _Tape(inputs, received, output, list(after.tensors().values()), [], [])
        if turn == place.count - 1:
            break
        sends = {turn + 1: [x.detach() for x in tape.state]} if turn == here and tape is not None else {}
        pending = yield Exchange(sends, {turn: None} if turn + 1 == here else {}, announced=True)
        if turn + 1 == here:
            received = [_leaf(x) for x in pending.wait()[turn]]
            empty = place.piece.empty(inputs)
            state = empty.with_tensors(dict(zip(empty.tensors(), received, strict=True)))
        elif turn == here:
            pending.wait()
    assert tape is not None  # each rank has its turn
    return tape


def _turns_back(place: _Place, tape: _Tape, grad: Tensor) -> Program[list[Tensor]]:
    here, leaves = place.index, list(tape.inputs.values())
    sent, received = _floats(tape.state), _floats(tape.received)
    behind = [torch.zeros_like(x) for x in sent]
    found: list[Tensor] = []
    for turn in reversed(range(place.count)):
        if turn == here:
            found = _gradients([tape.output, *sent], [*leaves, *received], [grad, *behind])
        if turn == 0:
            break
        sends = {turn - 1: found[len(leaves) :]} if turn == here else {}
        pending = yield Exchange(sends, {turn: [_like(x) for x in sent]} if turn - 1 == here else {})
        behind = list(pending.wait().get(turn, behind))
    return found[: len(leaves)]


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _scan(place: _Place, inputs: dict[str, Tensor]) -> Program[_Tape]:
    here, piece = place.index, place.piece
    # the last rank's effect on a state is never needed
    summary = piece.nothing(inputs) if here + 1 == place.count else piece.summary(inputs, first=here == 0)
    value, distance = [x.detach() for x in summary], 1
    steps: list[_Step | None] = []
    while distance < place.count:
        earlier, later = here - distance, here + distance
        pending = yield Exchange(
            {later: value} if later < place.count else {}, {earlier: [_like(x) for x in value]} if earlier >= 0 else {}
        )
        arrived = pending.wait()
        if earlier >= 0:
            own, received = [_leaf(x) for x in value], [_leaf(x) for x in arrived[earlier]]
            both = piece.combined(received, own)
            steps.append((own, received, both))
            value = [x.detach() for x in both]
        else:
            steps.append(None)
        distance *= 2
    prefix: list[Tensor] = []
    if place.count > 1:
        sends = {here + 1: value} if here + 1 < place.count else {}
        pending = yield Exchange(sends, {here - 1: [_like(x) for x in value]} if here else {})
        prefix = [_leaf(x) for x in pending.wait().get(here - 1, [])]
    output, _ = piece.run(inputs, piece.state(inputs, prefix) if here else None)
    return _Tape(inputs, prefix, output, [], summary, steps)


def _scan_back(place: _Place, tape: _Tape, grad: Tensor) -> Program[list[Tensor]]:
    here, leaves = place.index, list(tape.inputs.values())
    slopes = _gradients([tape.output], [*leaves, *tape.received], [grad])
    found, sent = slopes[: len(leaves)], slopes[len(leaves) :]
    value = [torch.zeros_like(x) for x in tape.summary]
    if place.count > 1:
        last = here + 1 == place.count
        pending = yield Exchange({here - 1: sent} if here else {}, {} if last else {here + 1: list(map(_like, value))})
        value = list(pending.wait().get(here + 1, value))
    for i, step in reversed(list(enumerate(tape.steps))):
        distance, sends = 2**i, {}
        if step is not None:
            own, received, both = step
            slopes = _gradients(both, [*own, *received], value)
            value, sends = slopes[: len(own)], {here - distance: slopes[len(own) :]}
        later = here + distance
        pending = yield Exchange(sends, {later: list(map(_like, value))} if later < place.count else {})
        arrived = pending.wait()
        if later < place.count:
            value = [a + b for a, b in zip(value, arrived[later], strict=True)]
    own = _gradients(tape.summary, leaves, value)
    return [a + b for a, b in zip(found, own, strict=True)]


class _Handed(torch.autograd.Function):
    """The programs of this process's ranks: takes the inputs of each rank, returns each rank's output."""

    @staticmethod
    def forward(ctx: Any, run: _Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        run.of.forward_traffic = traffic = [Traffic() for _ in run.ranks.local]
        with torch.set_grad_enabled(run.recorded):
            places = [run.place(rank) for rank in run.ranks.local]
            programs = [run.forward(p, inputs) for p, inputs in zip(places, run.leaves(tensors), strict=True)]
            tapes = run.ranks.run(programs, traffic)
        ctx.run, ctx.places, ctx.tapes = run, places, tapes
        return tuple(tape.output.detach() for tape in tapes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        run = ctx.run
        run.of.backward_traffic = traffic = [Traffic() for _ in run.ranks.local]
        given = zip(ctx.places, ctx.tapes, grads, strict=True)
        found = run.ranks.run([run.backward(*of) for of in given], traffic)
        return None, *(x for slopes in found for x in slopes)
