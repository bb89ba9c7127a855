"""Measurement of the fastest route for a product."""

from __future__ import annotations

import itertools
import threading
import time

import torch

from regard.backends.linear.product import Product
from regard.backends.linear.routes import ROUTES, FrozenWeights, available_routes

SMALLEST_WORK = 1 << 23
"""Products with fewer operations go to torch: most of their time is call overhead."""

CALL_OVERHEAD = 100e-6
FROZEN_CALL_OVERHEAD = 50e-6
"""Seconds of overhead of a call by a route other than torch's if Python's code is not cached, because large products
ran before; half of it is autograd recording. A route must be faster by more than this."""

MARGIN = 0.95
"""A route is chosen if its time is below this fraction of torch's."""

COLD_BYTES = 1 << 26
"""Bytes of weights to cycle through when measuring few rows: in decoding, a model's weights are not cached."""


def fastest(seconds: dict[str, float], overhead: float = CALL_OVERHEAD) -> str:
    """The route to take, given the time of each route and the overhead of not using torch's."""
    needed = {name: spent if name == "torch" else spent + overhead for name, spent in seconds.items()}
    best = min(needed, key=needed.__getitem__)
    return best if needed[best] < MARGIN * needed["torch"] else "torch"


def choice(product: Product) -> tuple[str, bool]:
    """The route for the class of a product, and whether two measurements agree on it; torch's if they do not.

    The overhead of a call is counted as for the smallest product of the class, where it weighs most.
    """
    measured = product.measured()
    least = max(SMALLEST_WORK, 2 << sum(size.bit_length() - 1 for size in (product.m, product.n, product.k)))
    overhead = (FROZEN_CALL_OVERHEAD if product.frozen else CALL_OVERHEAD) * measured.work / least
    first, second = (fastest(probe(measured), overhead) for _ in range(2))
    return (first, True) if first == second else ("torch", False)


def probe(product: Product) -> dict[str, float]:
    """Seconds that each route takes for a product: the least of several interleaved runs.

    Measured in a separate thread, which the caller's modes (tracing, counting, transforms, autocast) do not affect.
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
    copies = COLD_BYTES // (4 * weight.numel()) if product.reads_once else 0
    weights = itertools.cycle([weight, *(weight.clone() for _ in range(copies))])
    # thread_time excludes interruptions, but only covers one thread
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    names = [name for name in available_routes() if ROUTES[name].applies(product)]
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
