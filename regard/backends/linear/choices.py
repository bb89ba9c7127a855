"""The route of each class of products, and the file that stores choices between runs."""

from __future__ import annotations

import functools
import json
import platform
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from regard.backends.linear.measuring import SMALLEST_WORK, choice
from regard.backends.linear.product import Product
from regard.backends.linear.routes import LOCAL, ROUTES, available_routes, lasting
from regard.contract import Unsupported
from regard.core.files import user_cache, write_text_atomically

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Matrix = Float[Tensor, "n k"]


def cache_file() -> Path:
    """The file that stores choices between runs."""
    return user_cache() / "linear_routes.json"


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
    """The conditions under which stored choices are valid."""
    return f"{_machine()} | threads {threads} | {', '.join(available_routes())}"


def _machine() -> str:
    return f"{_processor()} | {torch.backends.cpu.get_cpu_capability()} | torch {torch.__version__}"


@dataclass
class Choices:
    """The route of each class, by number of threads and class.

    Attributes:
        torchs: shapes and strides of products that are known to go to torch, as most do: for a model's many small
            products, looking up the class each time would cost more than a hundredth of their time.
    """

    forced: str | None = None
    known: dict[tuple[int | str, ...], str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    torchs: set[tuple[Any, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.force(self.forced)

    def force(self, name: str | None) -> None:
        """Send every product to the route `name`; None restores each class's own route."""
        self.forced = name
        self.torchs = set()  # a new set: another thread may still add products to the old one
        self.smallest_work = SMALLEST_WORK if name is None else 1

    def as_record(self) -> dict[str, Any]:
        """The choices of this process, with the machine that they are for, as JSON data."""
        return {"machine": _machine(), "routes": [[*key, name] for key, name in self.known.items()]}

    def take(self, record: Mapping[str, Any]) -> None:
        """Adopt a record's choices for classes that have none yet; ignore records from another machine."""
        if record["machine"] == _machine():
            for *key, name in record["routes"]:
                if name in available_routes():
                    self.known.setdefault(tuple(key), name)

    def find(self, x: Matrix, weight: Matrix) -> str:
        """The name of the route for x W^T."""
        (m, k), n = x.shape, weight.shape[0]
        frozen = LOCAL.frozen is not None and lasting(weight)
        return self.route(Product(m, n, k, x.stride(), weight.stride(), frozen))

    def route(self, product: Product) -> str:
        """The name of the route for a product; measures if it is the first of its class."""
        if product.work < self.smallest_work and not product.reads_once:
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
        """The choice on which the last two processes agreed, or else a new one; torch's if that contradicts theirs."""
        stored = _read_cache()
        kept = stored.setdefault(machine(threads), {})
        before = kept.get(str(product), [])
        if len(before) == 2 and before[0] == before[1] and before[0] in available_routes():
            return before[0] if ROUTES[before[0]].applies(product) else "torch"
        name, certain = choice(product)
        if certain:
            kept[str(product)] = [*before, name][-2:]
            _write_cache(stored)
        return name if name in before or not before else "torch"


def _read_cache() -> dict[str, dict[str, list[str]]]:
    """The stored choices of the last one or two processes, by machine and class."""
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
    """Write atomically; if the file cannot be written, choices last as long as the process."""
    text = json.dumps(stored, indent=1, sort_keys=True)
    with suppress(Unsupported):
        write_text_atomically(cache_file(), text)
