"""Retrieval by one hand-made attention layer: compares larger and sparse with smaller and dense, in seconds.

N keys in pages of 16, key = 0.8 topic(page) + 0.6 noise, with variance 1 / d in each feature; a value is one of 64
labels; a query is a key + 0.5 noise, and the answer is the label with the largest weight at logits 2 sqrt(d) q . k.
Attention reads all keys or, like Quest, the pages with the largest bounds: the same code that runs in models. The size
is d, the cost of a query

    2 N d f + [f < 1] 2 d N / 16 + 12 d^2   multiplications and additions,  f the share of the keys that is read.

Without topics the keys of a page have nothing in common, its bounds say little, and Quest fails: no method suits
everything.
"""

from __future__ import annotations

import math

import torch

from regard.compression.sparse.method import Place
from regard.compression.sparse.paging import Quest
from regard.contract import Unsupported, at_least

PAGE, LABELS = 16, 64
TOPIC, OWN, BLUR = 0.8, 0.6, 0.5


def cost(n: int, width: int, ratio: float) -> float:
    """Multiplications and additions for one query."""
    index = 2 * width * n / PAGE if ratio > 1 else 0.0
    return 2 * n * width / ratio + index + 12 * width**2


@torch.no_grad()
def retrieval(n: int, width: int, ratio: float, trials: int, seed: int, *, topics: bool = True) -> tuple[float, ...]:
    """Return, for each trial, whether the right label has the largest weight (1 or 0).

    Args:
        n: number of keys, a multiple of 16 times the ratio.
        topics: whether the keys of a page have a common topic.
    """
    at_least("trials", trials, 1)
    if n % PAGE or round(n / ratio) % PAGE:
        raise Unsupported(f"{n} keys at a compression of {ratio:g}", supported=f"multiples of {PAGE} that are read")
    found = []
    for trial in range(trials):
        generator = torch.Generator().manual_seed(seed * 100003 + trial)

        def noise(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) / math.sqrt(width)

        topic = noise(n // PAGE, width).repeat_interleave(PAGE, 0)
        own = noise(n, width)
        keys = TOPIC * topic + OWN * own if topics else own * math.hypot(TOPIC, OWN)
        labels = torch.randint(LABELS, (n,), generator=generator)
        asked = int(torch.randint(n, (1,), generator=generator))
        query = keys[asked] + BLUR * noise(width)
        k, v = keys[None, None], torch.nn.functional.one_hot(labels, LABELS).float()[None, None]
        q = query.view(1, 1, 1, width)
        place = Place(scale=2 * math.sqrt(width))
        # the page of the newest token, which is always read, holds only one irrelevant key
        method = Quest(budget=max(round(n / ratio), PAGE), page=PAGE)
        cache = method.compress(k, k, v, place)
        output, _ = method.decode(q, cache.appended(-q, torch.zeros(1, 1, 1, LABELS)), place)
        found.append(float(output.flatten().argmax() == labels[asked]))
    return tuple(found)
