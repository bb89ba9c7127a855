"""The route of each class of products, and the file in which choices are kept between runs."""

from __future__ import annotations

import functools
import json
import os
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
from regard.core.files import write_text_atomically

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    Matrix = Float[Tensor, "n k"]


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
    return f"{_machine()} | threads {threads} | {', '.join(available_routes())}"


def _machine() -> str:
    return f"{_processor()} | {torch.backends.cpu.get_cpu_capability()} | torch {torch.__version__}"


@dataclass
class Choices:
    """The route of each class, by number of threads and class.

    Attributes:
        torchs: products, by shapes and strides, that are known to go to torch, as most do: of a model's many small products
            each costs more than a hundredth of its time to be classed again.
    """

    forced: str | None = None
    known: dict[tuple[int | str, ...], str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    torchs: set[tuple[Any, ...]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.force(self.forced)

    def force(self, name: str | None) -> None:
        """Send every product to the route `name`; None lets each class have its own again."""
        self.forced = name
        self.torchs = set()  # and not cleared: what is asked for by another thread now is remembered in the old one
        self.smallest_work = SMALLEST_WORK if name is None else 1

    def as_record(self) -> dict[str, Any]:
        """The choices of this process for JSON, and the machine that they hold for."""
        return {"machine": _machine(), "routes": [[*key, name] for key, name in self.known.items()]}

    def take(self, record: Mapping[str, Any]) -> None:
        """Choose as a record says, where nothing is chosen yet; nothing of one of another machine."""
        if record["machine"] == _machine():
            for *key, name in record["routes"]:
                if name in available_routes():
                    self.known.setdefault(tuple(key), name)

    def find(self, x: Matrix, weight: Matrix) -> str:
        """The name of the route that x W^T takes."""
        (m, k), n = x.shape, weight.shape[0]
        frozen = LOCAL.frozen is not None and lasting(weight)
        return self.route(Product(m, n, k, x.stride(), weight.stride(), frozen))

    def route(self, product: Product) -> str:
        """The name of the route that a product takes; measures when it is the first of its class."""
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
        """The choice on which two processes agreed one after the other, or else the one that this process finds."""
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
    text = json.dumps(stored, indent=1, sort_keys=True)
    with suppress(Unsupported):
        write_text_atomically(cache_file(), text)
