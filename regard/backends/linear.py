"""x W^T + b in float32 on a CPU by the fastest of several libraries, as one differentiable operator.

A *route* computes the product; which one is fastest depends on the machine (MKL keeps part of its code from processors of
other makers), on the sizes and on how the operands lie in memory, so a route is chosen by measuring. Products of one
*class* have the same layouts, and sizes between the same powers of two; the first product of a class is measured, with
its own sizes and strides, twice (a tenth of a second together, at most a second). Another route than torch's is taken
only where both measurements say so. Within a process the choice for a class never changes. Weights that few rows meet are
measured out of the cache, as a model's are when decoding comes to them.

A choice on which both measurements agree is kept in ``$XDG_CACHE_HOME/regard/linear_routes.json`` (``~/.cache`` when the
variable is not set) for this processor, version of torch, number of threads and list of routes. It is believed once
another process has measured the same, so that what one process measured beside a busy neighbour does not last.

The environment variable ``REGARD_LINEAR_ROUTE``, or :func:`use_route`, forces a route by name: ``torch`` is then plain
``torch.nn.functional.linear``.

The operator is ``regard::linear(x, weight, bias)`` on matrices. Its gradients are products of the same kind,
dX = dY (W^T)^T and dW = dY^T (X^T)^T, with transposed views, so they take routes of their own and can be differentiated
again.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from regard.backends.native import library
from regard.backends.native.few_rows import few_rows
from regard.backends.operators import in_forward_mode, in_transform, operator, runs_plainly
from regard.contract import Unsupported, closest

if TYPE_CHECKING:
    from jaxtyping import Float

    Matrix = Float[Tensor, "n k"]

SMALLEST_WORK = 1 << 23
"""Products with fewer operations are torch's: the time they take is mostly that of a call."""

TRACED_WEIGHT = 1 << 16
"""Entries of the smallest weight for which a traced graph has the operator; row counts may be symbols there."""

CALL_OVERHEAD = 100e-6
FROZEN_CALL_OVERHEAD = 50e-6
"""Seconds that a product takes beyond its route when Python is not in the cache, because large products were there before;
half of it is the recording for gradients. A route has to make up for them."""

MARGIN = 0.95
"""A route is chosen when its time is below this fraction of torch's."""

PACKED_ROWS = 64
"""Rows of the largest product that takes a packed weight."""

FEW_ROWS = 16
"""Rows of the largest product for which reading the weight is what takes the time."""

FEW_ROWS_WEIGHT = 1 << 17
"""Entries of the smallest weight that few rows may take a route of their own to: smaller ones are soon read."""

COLD_BYTES = 1 << 26
"""Of weights, read in turn, when such a product is measured: a model's are in no cache when they are asked for."""

PROBED_WORK = 1 << 30
"""Operations of the largest product that is measured; of larger ones a smaller one speaks for."""


def _layout(rows: int, columns: int, strides: tuple[int, ...]) -> str:
    """How a matrix lies in memory: ``rows`` or ``columns`` one after another, with ``gaps`` between them, or ``scattered``."""
    down, along = strides
    if along == 1 or columns <= 1:
        return "rows" if down == columns or rows <= 1 else "rows with gaps"
    if down == 1 or rows <= 1:
        return "columns" if along == rows else "columns with gaps"
    return "scattered"


def _strides(layout: str, rows: int, columns: int, before: tuple[int, ...]) -> tuple[int, ...]:
    """The layout of a part of a matrix that lies as the whole does."""
    return {"rows": (columns, 1), "columns": (1, rows)}.get(layout, before)


class Product(NamedTuple):
    """(m, k) times the transpose of (n, k), with the strides of both: what a choice depends on."""

    m: int
    n: int
    k: int
    x_strides: tuple[int, ...]
    weight_strides: tuple[int, ...]
    frozen: bool

    @classmethod
    def plain(cls, m: int, n: int, k: int, *, frozen: bool = False) -> Product:
        """The layouts of contiguous operands."""
        return cls(m, n, k, (k, 1), (k, 1), frozen)

    @property
    def work(self) -> int:
        """Multiply-adds, counted twice."""
        return 2 * self.m * self.n * self.k

    @property
    def x_layout(self) -> str:
        """How the left operand lies in memory, as far as choices tell layouts apart."""
        return _layout(self.m, self.k, self.x_strides)

    @property
    def weight_layout(self) -> str:
        """How the right operand lies in memory."""
        return _layout(self.n, self.k, self.weight_strides)

    def size_class(self) -> tuple[int | str, ...]:
        """The class of products that share a choice: sizes up to a power of two, both layouts, and whether the weight
        lasts."""
        sizes = (self.m.bit_length(), self.n.bit_length(), self.k.bit_length())
        return (*sizes, self.x_layout, self.weight_layout, self.frozen)

    def measured(self) -> Product:
        """The product that is measured for it: a smaller one of the same layouts where it is large."""
        m, n, k = self.m, self.n, self.k
        while 2 * m * n * k > PROBED_WORK:
            m, n, k = (size // 2 if size == max(m, n, k) else size for size in (m, n, k))
        x_strides = _strides(self.x_layout, m, k, self.x_strides)
        weight_strides = _strides(self.weight_layout, n, k, self.weight_strides)
        return Product(m, n, k, x_strides, weight_strides, self.frozen)

    def operands(self) -> tuple[Tensor, Tensor]:
        """Tensors of such a product."""

        def made(shape: tuple[int, int], strides: tuple[int, ...]) -> Tensor:
            last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            return torch.full((last + 1,), 0.5, dtype=torch.float32, device="cpu").as_strided(shape, strides)

        return made((self.m, self.k), self.x_strides), made((self.n, self.k), self.weight_strides)

    def __str__(self) -> str:
        """Its class, in words."""
        m, n, k = (f"2^{size.bit_length() - 1}" for size in (self.m, self.n, self.k))
        return f"{m}x{k} {self.x_layout}, {n}x{k} {self.weight_layout}{', frozen' if self.frozen else ''}"


@dataclass(frozen=True)
class Route:
    """A way to compute the product.

    Attributes:
        run: (x (m, k), weight (n, k), bias (n,) or None) -> (m, n) row by row, a new tensor; any strides.
        available: whether this build of torch and this processor have it.
        applies: whether it computes a product.
    """

    run: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    available: Callable[[], bool] = lambda: True
    applies: Callable[[Product], bool] = lambda product: True


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN has only a plain loop for a weight with gaps, thousands of times slower than its kernels: it is copied first."""
    n, k = weight.shape
    if _layout(n, k, weight.stride()) not in ("rows", "columns"):
        weight = weight.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")


def _onednn_packed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    packs = _LOCAL.frozen
    if packs is None:
        return _onednn(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise.default(x, packs.packed(weight), bias, "none", [], "")


def _few_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return few_rows(x.contiguous(), weight, None if bias is None else bias.contiguous())


def _reads_once(product: Product) -> bool:
    """Whether few rows meet a weight that lies as the kernel reads it."""
    return product.m <= FEW_ROWS and product.weight_layout == "rows" and product.n * product.k >= FEW_ROWS_WEIGHT


def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


ROUTES: dict[str, Route] = {
    "torch": Route(F.linear),
    "onednn": Route(_onednn, _has_onednn),
    # Packing pays where few rows meet a large weight again and again, in decoding: up to twice as fast at 8 rows,
    # 5% at 1024.
    "onednn_packed": Route(
        _onednn_packed,
        _has_onednn,
        lambda product: product.frozen and product.m <= PACKED_ROWS and product.weight_layout.startswith("rows"),
    ),
    "native": Route(_few_rows, lambda: library.why_missing() is None, _reads_once),
}
"""By name, torch first: it is what the others have to beat."""


class FrozenWeights:
    """Keeps copies of weights in the layout that a library wants, while the weights do not change.

    ``with packs:`` lets products inside take packed routes, in this thread. The copies live as long as this object,
    and cost the memory of the weights once more; a weight that was changed by an operation of torch is packed again. What
    torch does not see (``weight.data`` and shared memory written to) must not happen while it is in use.
    """

    def __init__(self) -> None:
        self._packs: dict[tuple[Any, ...], tuple[int, Tensor, Tensor]] = {}
        self._outer: list[FrozenWeights | None] = []

    def __enter__(self) -> FrozenWeights:
        self._outer.append(_LOCAL.frozen)
        _LOCAL.frozen = self
        return self

    def __exit__(self, *_: object) -> None:
        _LOCAL.frozen = self._outer.pop()

    def packed(self, weight: Tensor) -> Tensor:
        """The packed copy of a weight that :func:`_lasting` is true of."""
        where = (weight.data_ptr(), tuple(weight.shape), weight.stride())
        # the weight is kept beside its copy, so that its address stays its own
        known = self._packs.get(where)
        if known is not None and known[0] == weight._version:
            return known[2]
        copy = torch.ops.mkldnn._reorder_linear_weight.default(weight.detach().contiguous(), PACKED_ROWS)
        self._packs[where] = (weight._version, weight, copy)
        return copy


class _Local(threading.local):
    frozen: FrozenWeights | None = None


_LOCAL = _Local()


def _lasting(weight: Tensor) -> bool:
    """Whether it is a parameter or a part of one, whose changes torch counts: what is computed anew is not worth a copy."""
    owner = weight._base if weight._is_view() else weight
    return isinstance(owner, nn.Parameter) and not weight.is_inference()


def _checked(name: str | None) -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in ROUTES:
        raise Unsupported(
            f"linear route {name!r}",
            supported="auto, " + ", ".join(ROUTES),
            nearest=closest(str(name), ROUTES) or "auto",
        )
    if not ROUTES[name].available():
        raise Unsupported(f"linear route {name!r} on this machine", supported=", ".join(_available()), nearest="torch")
    return name


def _available() -> tuple[str, ...]:
    return tuple(name for name, route in ROUTES.items() if route.available())


@contextmanager
def use_route(name: str | None) -> Iterator[None]:
    """Force a route in all threads, wherever it applies, whatever the size; ``auto`` or None to choose by measuring.

    Raises:
        Unsupported: for an unknown route, or one that this machine lacks.
    """
    choices, before = CHOICES, CHOICES.forced
    choices.force(_checked(name))
    try:
        yield
    finally:
        choices.force(before)


def cache_file() -> Path:
    """Where choices are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "regard" / "linear_routes.json"


@functools.cache
def _processor() -> str:
    described = {}
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            described[name.strip()] = value.strip()
    parts = [described.get(name, "") for name in ("model name", "cpu family", "model", "stepping")]
    return " ".join(filter(None, parts)) or platform.processor() or platform.machine()


def machine(threads: int) -> str:
    """The conditions that choices hold for."""
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{_processor()} | {capability} | torch {torch.__version__} | threads {threads} | {', '.join(_available())}"


@dataclass
class Choices:
    """The route of each class, by number of threads and class."""

    forced: str | None = None
    known: dict[tuple[int | str, ...], str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.force(self.forced)

    def force(self, name: str | None) -> None:
        """Send every product to the route `name`; None lets each class have its own again."""
        self.forced = name
        self.smallest_work = SMALLEST_WORK if name is None else 1

    def find(self, x: Matrix, weight: Matrix) -> str:
        """The name of the route that x W^T takes."""
        (m, k), n = x.shape, weight.shape[0]
        frozen = _LOCAL.frozen is not None and _lasting(weight)
        return self.route(Product(m, n, k, x.stride(), weight.stride(), frozen))

    def route(self, product: Product) -> str:
        """The name of the route that a product takes; measures when it is the first of its class."""
        if product.work < self.smallest_work and not _reads_once(product):
            return "torch"
        if self.forced is not None:
            return self.forced if ROUTES[self.forced].applies(product) else "torch"
        threads = torch.get_num_threads()
        key = threads, *product.size_class()
        if key not in self.known:
            with self.lock:
                if key not in self.known:
                    self.known[key] = self._found(threads, product)
        return self.known[key]

    def _found(self, threads: int, product: Product) -> str:
        """The choice on which two processes agreed one after the other, or else the one that this process finds."""
        stored = _read_cache()
        kept = stored.setdefault(machine(threads), {})
        before = kept.get(str(product), [])
        if len(before) == 2 and before[0] == before[1] and before[0] in _available():
            return before[0] if ROUTES[before[0]].applies(product) else "torch"
        name, certain = choice(product)
        if certain:
            kept[str(product)] = [*before, name][-2:]
            _write_cache(stored)
        return name if name in before or not before else "torch"


def _read_cache() -> dict[str, dict[str, list[str]]]:
    """By machine and class: the last choices of one or two processes."""
    try:
        stored = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict) or not all(isinstance(choices, dict) for choices in stored.values()):
        return {}
    return {
        where: {product: names for product, names in choices.items() if isinstance(names, list)}
        for where, choices in stored.items()
    }


def _write_cache(stored: dict[str, dict[str, list[str]]]) -> None:
    """Whole or not at all; where nothing can be written, choices last as long as the process."""
    with suppress(OSError):
        file = cache_file()
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as made:
            made.write(json.dumps(stored, indent=1, sort_keys=True))
        os.replace(made.name, file)


CHOICES = Choices(_checked(os.environ.get("REGARD_LINEAR_ROUTE")))


def fastest(seconds: dict[str, float], overhead: float = CALL_OVERHEAD) -> str:
    """The route to take, given the time of each, and what taking another than torch's costs."""
    needed = {name: spent if name == "torch" else spent + overhead for name, spent in seconds.items()}
    best = min(needed, key=needed.__getitem__)
    return best if needed[best] < MARGIN * needed["torch"] else "torch"


def choice(product: Product) -> tuple[str, bool]:
    """The route for the class of a product, and whether two measurements agree on it; torch's where they do not.

    The smallest product of the class decides, in which the overhead of a call weighs most.
    """
    measured = product.measured()
    least = max(SMALLEST_WORK, 2 << sum(size.bit_length() - 1 for size in (product.m, product.n, product.k)))
    overhead = (FROZEN_CALL_OVERHEAD if product.frozen else CALL_OVERHEAD) * measured.work / least
    first, second = (fastest(probe(measured), overhead) for _ in range(2))
    return (first, True) if first == second else ("torch", False)


def probe(product: Product) -> dict[str, float]:
    """Seconds that each route takes for a product: the least of several interleaved runs.

    It is measured in a thread of its own, which no mode of the caller (tracing, counting, transforms, autocast) reaches.
    """
    measured: dict[str, float] = {}
    errors: list[BaseException] = []

    def measure() -> None:
        try:
            measured.update(_time_routes(product))
        except BaseException as error:
            errors.append(error)

    worker = threading.Thread(target=measure, name="regard linear probe")
    worker.start()
    worker.join()
    if errors:
        raise errors[0]
    return measured


def _time_routes(product: Product) -> dict[str, float]:
    x, weight = product.operands()
    copies = COLD_BYTES // (4 * weight.numel()) if _reads_once(product) else 0
    weights = itertools.cycle([weight, *(weight.clone() for _ in range(copies))])
    # Time of the thread does not count interruptions, but counts one thread only.
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    names = [name for name in _available() if ROUTES[name].applies(product)]
    least = dict.fromkeys(names, float("inf"))
    with torch.no_grad(), FrozenWeights():
        for name in names:
            ROUTES[name].run(x, next(weights), None)
        begin = time.perf_counter()
        rounds = 0
        while rounds < 5 or (rounds < 50 and time.perf_counter() - begin < 0.04):
            for name in names:
                w, start = next(weights), clock()
                ROUTES[name].run(x, w, None)
                least[name] = min(least[name], clock() - start)
            rounds += 1
            if time.perf_counter() - begin > 0.5:
                break
    return least


@operator("linear")
def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layouts of matrices."""
    return ROUTES[CHOICES.find(x, weight)].run(x, weight, bias)


@_product.register_fake
def _(x: Matrix, weight: Matrix, bias: Tensor | None) -> Matrix:
    return x.new_empty(x.shape[0], weight.shape[0])


@register_flop_formula(torch.ops.regard.linear)
def _flops(x_shape: tuple[int, int], weight_shape: tuple[int, int], *_: Any, **__: Any) -> int:
    return 2 * x_shape[0] * x_shape[1] * weight_shape[0]


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    x_needed, weight_needed = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if weight_needed else None, weight if x_needed else None)


def _gradients(ctx: Any, grad: Matrix) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    x_needed, weight_needed, bias_needed = ctx.needs_input_grad[:3]
    return (
        _product(grad, weight.t(), None) if x_needed else None,
        _product(grad.t(), x.t(), None) if weight_needed else None,
        grad.sum(0) if bias_needed else None,
    )


_product.register_autograd(_gradients, setup_context=_save)


PLAIN = (Tensor, nn.Parameter)


def linear(
    x: Float[Tensor, "*b k"], weight: Float[Tensor, "n k"], bias: Float[Tensor, " n"] | None = None
) -> Float[Tensor, "*b n"]:
    """`torch.nn.functional.linear`, by a route of its own where that is faster: plain float32 tensors on a CPU."""
    if torch.compiler.is_compiling():  # how many rows there are may not be known
        large = weight.numel() >= TRACED_WEIGHT
    else:  # asked first, because most layers of small models end here
        large = type(x) in PLAIN and 2 * x.numel() * weight.shape[0] >= CHOICES.smallest_work
        if _are_few(x, weight) and _fits(x, weight, bias) and _takes_native(x, weight, bias):
            return few_rows(x, weight, bias)
    if large and _fits(x, weight, bias) and _has_own_route(x, weight) and _unmodified():
        return _product(x.reshape(-1, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], weight.shape[0])
    return F.linear(x, weight, bias)


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether routes are for such tensors; also False for what `F.linear` refuses, so that it says why."""
    if type(x) not in PLAIN or type(weight) not in PLAIN:
        return False
    return (
        x.dtype is weight.dtype is torch.float32
        and x.is_cpu
        and weight.is_cpu
        and x.layout is weight.layout is torch.strided
        and x.dim() > 0
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and (
            bias is None
            or (type(bias) in PLAIN and bias.dtype is torch.float32 and bias.is_cpu and bias.shape == weight.shape[:1])
        )
    )


def _are_few(x: Tensor, weight: Tensor) -> bool:
    """Whether a product is one of few rows and a weight that is worth reading fast."""
    if x.dim() == 0 or weight.dim() != 2 or weight.numel() < FEW_ROWS_WEIGHT:
        return False
    return 0 < x.numel() <= FEW_ROWS * x.shape[-1]


def _takes_native(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether few rows go to the kernel by the shortest way: nobody watches, and it is the fastest."""
    given = (x, weight) if bias is None else (x, weight, bias)
    if not runs_plainly(*given) or not all(t.is_contiguous() for t in given) or not _unmodified():
        return False
    return CHOICES.find(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), weight) == "native"


def _has_own_route(x: Tensor, weight: Tensor) -> bool:
    """Whether another route than torch's computes the product."""
    if torch.compiler.is_compiling():  # nothing is measured here: the operator does that when it runs
        return True
    return CHOICES.find(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), weight) != "torch"


def _unmodified() -> bool:
    """Whether nothing (autocast, export, transforms of functions, forward derivatives) changes what operators do."""
    return not (
        torch.is_autocast_enabled("cpu") or torch.compiler.is_exporting() or in_transform() or in_forward_mode()
    )


def which_route(rows: int, in_features: int, out_features: int) -> str:
    """The name of the route that a linear layer's forward takes for so many rows; measures if that is not known yet."""
    return CHOICES.route(Product.plain(rows, out_features, in_features))
