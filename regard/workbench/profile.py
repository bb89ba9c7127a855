"""`regard profile`: time and memory of mechanisms as functions of the length, interleaved with softmax in one run.

By default the mechanism's function is timed (no projections), on random inputs with the same batch size, heads and
widths; on request its layer, which attention and mixers have in common.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from regard.backends.native import library, machine
from regard.catalogue import get_mechanism
from regard.contract import Kind, Pattern, Shape, Unsupported, at_least, one_of
from regard.measurement.statistics import growth_exponent
from regard.measurement.timing import Timing, calm_clock, efficiency_length, interleaved, rounds
from regard.models.variants import known_name
from regard.workbench.advice.layer_work import DTYPES, WHAT, Decoding, LayerSettings, LayerWork, check_device
from regard.workbench.comparison.cost import REFERENCE
from regard.workbench.memory import if_it_fits, peak_and_backends
from regard.workbench.verification.subjects import Subject

LENGTHS = (256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class ProfileSettings:
    """Mechanisms to profile, and how.

    Attributes:
        mechanisms: names; `softmax` is added, since everything is compared with it.
        pattern: a pattern that all of them have.
        lengths: number of queries and of keys.
        what: any of ``forward``, ``training`` (forward + backward) and ``decode`` (one more token after a sequence).
        batch, heads: sizes of the inputs.
        head_dim: width of a head; dim / heads when None, or 64 without `dim`.
        dtype: ``float32``, ``bfloat16`` or ``float64``.
        seconds: timing budget for each length.
        layer: measure layers (:func:`regard.create_layer`) rather than functions.
        dim: width of the layers; heads * head_dim when None.
        device: a torch device.
        short_convolution: for the layers, as in :class:`regard.workbench.advice.layer_work.LayerSettings`.
    """

    mechanisms: tuple[str, ...]
    pattern: Pattern = Pattern.CAUSAL_SELF
    lengths: tuple[int, ...] = LENGTHS
    what: tuple[str, ...] = WHAT
    batch: int = 1
    heads: int = 8
    head_dim: int | None = None
    dtype: str = "float32"
    seconds: float = 1.0
    layer: bool = False
    dim: int | None = None
    device: str = "cpu"
    short_convolution: int | None = None

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.dim is not None and not self.layer:
            raise Unsupported(f"dim={self.dim} for functions, which have heads", supported="layer=True, or no dim")
        for name in ("batch", "heads", "head_width"):
            at_least(name.replace("width", "dim"), getattr(self, name), 1)
        at_least("seconds", self.seconds, 0.0)
        one_of("dtype", self.dtype, DTYPES)
        for item in self.what:
            one_of("what", item, WHAT)
        if not self.lengths or min(self.lengths) < 1:
            raise Unsupported(f"lengths {self.lengths}", supported="positive lengths", nearest="256,1024,4096")

    @property
    def head_width(self) -> int:
        """Width of a head in the inputs of functions, and for the cards' costs."""
        if self.head_dim is not None:
            return self.head_dim
        return 64 if self.dim is None else max(1, self.dim // max(1, self.heads))


@dataclass(frozen=True)
class Measurement:
    """One mechanism at one length. Times are medians in milliseconds; `low` and `high` are quartiles of the repeats."""

    mechanism: str
    what: str
    length: int
    milliseconds: float
    low: float
    high: float
    repeats: int
    memory_bytes: int | None
    """Peak bytes of tensors plus those of kernels' workspaces: an upper bound for both together."""
    gflops: float | None
    """GFLOP/s, by the operations that the card's cost counts; forward only."""
    peak_share: float | None
    """That rate as a share of `Profile.peak_gflops`."""
    backend: str
    """The backend that ran its engines; ``"torch"`` if it has none."""
    state_bytes: int | None = None
    """Size of the state that decoding continues from, which `memory_bytes` does not include."""


@dataclass(frozen=True)
class Profile:
    """All measurements, and for each mechanism and kind of work the length beyond which it beats softmax."""

    settings: ProfileSettings
    measurements: list[Measurement]
    efficiency: dict[str, dict[str, int | None]]
    skipped: dict[str, str]
    peak_gflops: float | None
    """Fused multiply-adds in registers on the current number of threads, float32; None without the native library."""

    def as_dict(self) -> dict[str, Any]:
        """The measurements as plain data, for JSON."""
        return {
            "settings": {**asdict(self.settings), "pattern": self.settings.pattern.value},
            "measurements": [asdict(m) for m in self.measurements],
            "efficiency_length": self.efficiency,
            "skipped": self.skipped,
            "peak_gflops": self.peak_gflops,
        }


def profile(settings: ProfileSettings, *, on_length: Callable[[str, int], None] | None = None) -> Profile:
    """Run all measurements.

    Kinds of work that a mechanism lacks (no state to decode with), and lengths for which memory is insufficient, are
    listed in `skipped`, with the reason.

    Raises:
        Unsupported: for an unknown mechanism, one without the pattern, or the function of a wrapper; and if nothing
            could be measured.
    """
    if not isinstance(settings, ProfileSettings):
        raise Unsupported(
            f"a profile of {settings!r}", supported="ProfileSettings", nearest='ProfileSettings(("linear", "local"))'
        )
    names = [known_name(n) for n in settings.mechanisms]
    subjects = {name: _subject(name, settings) for name in dict.fromkeys((REFERENCE, *names))}
    measurements: list[Measurement] = []
    peak = None if library.why_missing() else _peak(torch.get_num_threads())
    skipped: dict[str, str] = {}
    for what in settings.what:
        able = {n: s for n, s in subjects.items() if what != "decode" or _decodes(s)}
        for name in subjects.keys() - able.keys():
            skipped[f"{name} {what}"] = f"{name} has no state that decodes in {settings.pattern.value}"
        for length in settings.lengths:
            found, too_large = _at(what, length, able, settings, peak)
            measurements += found
            for name in too_large:
                reason = f"{what} at {length:,} tokens needs more memory than there is"
                skipped[f"{name} {what} at {length}"] = f"{name}: {reason}"
            if on_length is not None:
                on_length(what, length)
    if not measurements:
        raise Unsupported("; ".join(skipped.values()), supported="shorter lengths, fewer heads or a smaller batch")
    return Profile(settings, measurements, _efficiency(measurements, list(subjects)), skipped, peak)


@functools.cache
def _peak(threads: int) -> float:
    """Peak GFLOP/s; cached, since a process may profile many lengths one by one."""
    return machine.fma_peak()


@dataclass(frozen=True)
class Growth:
    """Growth of a forward pass with the length: exponents p in cost ~ length^p.

    Attributes:
        time: measured time: the median over rounds...
        low, high: ...and its quartiles.
        time_by_cost: the operations that the card counts.
        memory: measured peak memory of tensors and kernels' workspaces.
        memory_by_cost: the temporary numbers that the card counts, plus the output, which the card does not count.
    """

    time: float
    low: float
    high: float
    time_by_cost: float
    memory: float
    memory_by_cost: float


def growth(settings: ProfileSettings) -> dict[str, Growth]:
    """Measure the growth of each mechanism, fitted over `settings.lengths`.

    Runs on one thread and its own clock, with all lengths in turn in each round, so that neither drift in the machine's
    speed nor the start of threads is mistaken for growth.

    Raises:
        Unsupported: as for :func:`profile`; for layers, whose projections the cards do not count; and for a single
            length.
    """
    if settings.layer:
        raise Unsupported("growth of layers", supported="growth of functions", nearest="layer=False")
    lengths = settings.lengths
    if len(set(lengths)) < 2:
        raise Unsupported(f"growth over lengths {lengths}", supported="two lengths or more", nearest="1024,4096,16384")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        names = dict.fromkeys(known_name(name) for name in settings.mechanisms)
        return {name: _growth(_functions(name, settings), settings) for name in names}
    finally:
        torch.set_num_threads(threads)


def _growth(subject: Subject, settings: ProfileSettings) -> Growth:
    lengths = settings.lengths
    actions = {str(n): _action("forward", n, subject, settings) for n in lengths}
    memory = [float(measure_memory(action, settings.device)[0]) for action in actions.values()]
    times = rounds(actions, seconds=settings.seconds, least=5, clock=time.thread_time)
    exponents = Timing.of([growth_exponent(lengths, row) for row in zip(*times.values(), strict=True)])
    costs = [subject.card.cost(_shape(n, settings), subject.config) for n in lengths]
    outputs = [settings.batch * settings.heads * n * settings.head_width for n in lengths]
    return Growth(
        exponents.median,
        exponents.low,
        exponents.high,
        growth_exponent(lengths, [cost.flops for cost in costs]),
        growth_exponent(lengths, memory),
        growth_exponent(lengths, [cost.memory + size for cost, size in zip(costs, outputs, strict=True)]),
    )


def _subject(name: str, settings: ProfileSettings) -> Subject | LayerWork:
    if not settings.layer:
        return _functions(name, settings)
    card = get_mechanism(name)
    dim = settings.heads * settings.head_width if settings.dim is None else settings.dim
    sizes = (dim, settings.heads, settings.head_dim, settings.batch)
    rest = (settings.dtype, settings.device, settings.short_convolution)
    return LayerWork(card, LayerSettings(settings.pattern, *sizes, *rest))


def _functions(name: str, settings: ProfileSettings) -> Subject:
    card = get_mechanism(name)
    if card.kind is Kind.WRAPPER:
        raise Unsupported(
            f"the function of {name}, which is given what another mechanism has computed",
            supported="its layer, which computes both",
            nearest="--layer",
        )
    return Subject(card, card.require_pattern(settings.pattern))


def _shape(n: int, settings: ProfileSettings) -> Shape:
    return Shape(settings.batch, settings.heads, n, n, settings.head_width, settings.head_width)


def _decodes(subject: Subject | LayerWork) -> bool:
    return subject.decodes if isinstance(subject, LayerWork) else subject.stateful


def _at(
    what: str, length: int, subjects: Mapping[str, Subject | LayerWork], settings: ProfileSettings, peak: float | None
) -> tuple[list[Measurement], list[str]]:
    """The measurements at one length, and the names of mechanisms that need too much memory."""
    actions, measured, too_large = dict[str, Callable[[], Any]](), dict[str, tuple[int, str]](), list[str]()
    for name, subject in subjects.items():
        fitting = if_it_fits(functools.partial(_measured, what, length, subject, settings))
        if fitting is None:
            too_large.append(name)
        else:
            actions[name], measured[name] = fitting
    device = torch.device(settings.device)
    clock = calm_clock(device)
    timings = interleaved(actions, seconds=settings.seconds, device=device, clock=clock) if actions else {}
    found = []
    for name, timing in timings.items():
        subject, (memory, backend) = subjects[name], measured[name]
        rate = None
        if what == "forward" and isinstance(subject, Subject):
            rate = _rate(subject, length, settings, timing)
        share = None if rate is None or peak is None else rate / peak
        action = actions[name]
        state = action.state_bytes if isinstance(action, Decoding) else None
        found.append(
            Measurement(name, what, length, *_milliseconds(timing), timing.repeats, memory, rate, share, backend, state)
        )
    return found, too_large


def _measured(
    what: str, length: int, subject: Subject | LayerWork, settings: ProfileSettings
) -> tuple[Callable[[], Any], tuple[int, str]]:
    """An action, and the result of :func:`measure_memory` on it."""
    action = _action(what, length, subject, settings)
    return action, measure_memory(action, settings.device)


def measure_memory(action: Callable[[], Any], device: str = "cpu") -> tuple[int, str]:
    """Peak bytes of a second call of an action, and the backends that ran its engines."""
    memory, backends = peak_and_backends(action, device)
    return memory, "+".join(backends) or "torch"


def _inputs(subject: Subject, n: int, settings: ProfileSettings) -> dict[str, torch.Tensor]:
    width = settings.head_width
    sizes = {
        "h": settings.heads,
        "g": settings.heads,
        "d": width,
        "k": width,
        "v": width,
        "e": width,
        "c": settings.heads * width,
    }
    if subject.card.kind is Kind.POOLING:
        sizes["d"] = settings.heads * width
    if subject.card.axis_sizes is not None:
        sizes |= subject.card.axis_sizes(_shape(n, settings), subject.config)
    dtype = DTYPES[settings.dtype]
    found = subject.inputs(n, n, batch=settings.batch, dtype=dtype, **sizes)
    return {name: tensor.to(settings.device) for name, tensor in found.items()}


def _action(what: str, length: int, subject: Subject | LayerWork, settings: ProfileSettings) -> Callable[[], Any]:
    if isinstance(subject, LayerWork):
        return subject.action(what, length)
    inputs = _inputs(subject, length, settings)
    if what == "forward":
        return functools.partial(_without_gradients, subject, inputs)
    if what == "decode":
        with torch.no_grad():
            state = subject.run(inputs, return_state=True).state
        return Decoding(functools.partial(_next_state, subject, _inputs(subject, 1, settings)), state)
    leaves = {n: t.requires_grad_() if t.is_floating_point() else t for n, t in inputs.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]

    def training() -> None:
        result = subject.run(leaves, training=True)
        loss = result.output.float().sum()
        for total, count in result.losses.values():
            loss = loss + total / count
        torch.autograd.grad(loss, wanted, allow_unused=True)

    return training


@torch.no_grad()
def _without_gradients(subject: Subject, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return subject.run(inputs).output


@torch.no_grad()
def _next_state(subject: Subject, inputs: dict[str, torch.Tensor], state: Any) -> Any:
    return subject.run(inputs, state=state, return_state=True).state


def _milliseconds(timing: Timing) -> tuple[float, float, float]:
    return timing.median * 1e3, timing.low * 1e3, timing.high * 1e3


def _rate(subject: Subject, n: int, settings: ProfileSettings, timing: Timing) -> float:
    return subject.card.cost(_shape(n, settings), subject.config).flops / timing.median / 1e9


def _efficiency(measurements: Sequence[Measurement], names: Sequence[str]) -> dict[str, dict[str, int | None]]:
    """Efficiency lengths by mechanism: for the time of each kind of work, and for memory (forward and training)."""
    found: dict[str, dict[str, int | None]] = {}
    kinds = dict.fromkeys(m.what for m in measurements)
    for name in names:
        if name == REFERENCE:
            continue
        found[name] = {}
        for what in kinds:
            own, reference = (
                {m.length: m for m in measurements if (m.mechanism, m.what) == (n, what)} for n in (name, REFERENCE)
            )
            if not own:
                continue
            found[name][f"{what} time"] = efficiency_length(
                {n: m.milliseconds for n, m in own.items()}, {n: m.milliseconds for n, m in reference.items()}
            )
            if what != "decode":
                found[name][f"{what} memory"] = efficiency_length(
                    {n: float(m.memory_bytes or 0) for n, m in own.items()},
                    {n: float(m.memory_bytes or 0) for n, m in reference.items()},
                )
    return found
