"""Methods by name, with options, combined, and for a given compression."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from regard.compression.sparse.evicting import H2O, TOVA, AdaSnapKV, PyramidKV, SnapKV, StreamingLLM
from regard.compression.sparse.method import Combined, Method
from regard.compression.sparse.paging import Quest
from regard.compression.sparse.prefilling import BlockSparse, FlexPrefill, LocalSinks, VerticalSlash
from regard.compression.sparse.rounding import RoundedKeys
from regard.contract import Unsupported, closest, read_options

METHODS: dict[str, type[Method]] = {
    "dense": Method,
    "local_sinks": LocalSinks,
    "vertical_slash": VerticalSlash,
    "block_sparse": BlockSparse,
    "flex_prefill": FlexPrefill,
    "snapkv": SnapKV,
    "ada_snapkv": AdaSnapKV,
    "pyramidkv": PyramidKV,
    "streaming": StreamingLLM,
    "tova": TOVA,
    "h2o": H2O,
    "quest": Quest,
    "int8": RoundedKeys,
}
ALIASES = {"streamingllm": "streaming", "ada": "ada_snapkv", "flexprefill": "flex_prefill", "blocks": "block_sparse"}
ALWAYS = {"int8": 4}
"""Methods with a fixed compression; that of int8 is relative to float32."""
ACCEPTED = "NAME, NAME:option=value,option=value, or one that reads prompts + one that keeps the cache"


def method_name(text: str) -> str:
    """Normalise a method's name; raises Unsupported for an unknown one."""
    name = text.strip().lower().replace("-", "_")
    name = ALIASES.get(name, name)
    if name not in METHODS:
        raise Unsupported(f"sparse method {text!r}", supported=", ".join(METHODS), nearest=closest(name, METHODS))
    return name


def read_method(text: str) -> Method:
    """Parse a method: ``quest``, ``snapkv:capacity=256``, ``vertical_slash + quest``.

    Raises:
        Unsupported: for unknown names and options, and for two methods of the same phase.
    """
    parts = [_one(part) for part in text.split("+")]
    if len(parts) == 1:
        return parts[0]
    if len(parts) != 2 or parts[0].phases != ("prefill",) or parts[1].phases != ("decode",):
        raise Unsupported(f"sparse methods {text!r}", supported=ACCEPTED, nearest="vertical_slash + quest")
    return Combined(*parts)


def _one(text: str) -> Method:
    name, _, options = text.partition(":")
    kind = METHODS[method_name(name)]
    given = read_options(options, name.strip()) if options.strip() else {}
    return make(kind, given)


def make(kind: type[Method], options: dict[str, Any]) -> Method:
    """Build a method after checking its options."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for name, value in options.items():
        if name not in fields:
            raise Unsupported(
                f"option {name!r} of {name_of(kind)}",
                supported=", ".join(fields) or "no options",
                nearest=closest(name, fields),
            )
        wanted = type(fields[name].default)
        if not isinstance(value, wanted) and not (wanted is float and type(value) is int):
            raise Unsupported(
                f"{name}={value!r} of {name_of(kind)}", supported=f"a value like {fields[name].default!r}"
            )
    return kind(**options)


def name_of(kind: type[Method]) -> str:
    """The catalogue name of a method."""
    return next(name for name, known in METHODS.items() if known is kind)


def written(method: Method) -> str:
    """Format a method for :func:`read_method`, with the options that are not defaults."""
    if isinstance(method, Combined):
        return f"{written(method.first)} + {written(method.second)}"
    told = [f"{f.name}={value}" for f in dataclasses.fields(method) if (value := getattr(method, f.name)) != f.default]
    name = name_of(type(method))
    return f"{name}:{','.join(told)}" if told else name


def read_names(text: str) -> list[str]:
    """Parse names separated by commas, ``all`` for every one, without duplicates; ``a + b`` for two phases."""
    if text.strip() == "all":
        return [name for name in METHODS if name != "dense" and name not in ALWAYS]
    found = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        pair = [method_name(name) for name in re.split(r"\s*\+\s*", part)]
        found.append(" + ".join(pair))
    if not found:
        raise Unsupported(f"sparse methods {text!r}", supported=f"all, or {', '.join(METHODS)}")
    return list(dict.fromkeys(found))


def compresses(name: str, ratio: float) -> bool:
    """Return whether a method can be used at a ratio: those in :data:`ALWAYS` have one of their own."""
    return all(ALWAYS.get(method_name(part), ratio) == ratio for part in name.split(" + "))


def at_compression(name: str, ratio: float, n: int) -> Method:
    """A method that computes about one pair in `ratio` of a prompt of n tokens, or keeps or reads n / ratio tokens.

    For short prompts the fixed parts (observation window, always-kept tokens, block size) shrink, so that they do not
    fill the budget: at their usual sizes they would, below a few thousand tokens.

    Args:
        name: a name in :data:`METHODS`, or two joined by `` + ``, each at the ratio.

    Raises:
        Unsupported: for a ratio below 1, and for a ratio that leaves fewer than two tokens.
    """
    if not ratio >= 1:
        raise Unsupported(f"a compression of {ratio}", supported="1 or more", nearest="2")
    if " + " in name:
        return Combined(*(at_compression(part, ratio, n) for part in name.split(" + ")))
    kind = METHODS[method_name(name)]
    always = ALWAYS.get(name_of(kind), ratio)
    if ratio not in (1, always):
        raise Unsupported(
            f"a compression of {ratio:g} by {name}", supported=f"{always}, which it always is", nearest=f"{always}"
        )
    if ratio > 1 and kind is RoundedKeys:
        return RoundedKeys()
    kept = round(n / ratio)
    if kept < 2:
        raise Unsupported(f"a compression of {ratio:g} of {n} tokens", supported="two tokens or more that are kept")
    if ratio == 1 or kind is Method:
        return Method()
    if issubclass(kind, SnapKV):
        local, prefix = min(128, kept // 4), min(4, kept // 8)
        kernel = min(21, 2 * (n // 128) + 1)
        return kind(capacity=kept, window=min(256, max(n // 8, 1)), kernel=kernel, local=local, prefix=prefix)
    if kind is StreamingLLM:
        return StreamingLLM(capacity=kept, sinks=min(4, kept // 2))
    if kind is TOVA or kind is H2O:
        return kind(capacity=kept)
    if kind is Quest:
        page = next((size for size in (16, 8, 4, 2) if size <= kept // 4), 1)
        return Quest(budget=max(kept // page, 1) * page, page=page)
    if kind is LocalSinks:
        return _searched(lambda window: LocalSinks(window=window, sinks=min(4, n // 16)), _window_pairs, ratio, n, 1, n)
    if kind is BlockSparse:
        size = next((size for size in (16, 8, 4, 2) if n // size >= 8 * ratio), 1)
        blocks = -(-n // size)
        return _searched(
            lambda count: BlockSparse(size=size, blocks=count), _block_pairs, ratio, n, min(3, blocks), blocks
        )
    # the always-kept part, two blocks per query, may take half of the budget
    size = next((size for size in (64, 32, 16, 8, 4, 2) if 8 * ratio * size <= n), 1)
    shared: dict[str, Any] = {
        "window": max(min(256, n // 8), 1),
        "columns": min(4, max(n // 64, 1)),
        "diagonals": size,
        "size": size,
    }
    if kind is FlexPrefill:
        # its cost depends on the heads: these options approximate the ratio, and the measured cost is reported
        return FlexPrefill(alpha=round(ratio**-0.25, 3), least=max(round(kept / 4), size), **shared)
    return VerticalSlash(vertical=n, slash=n, ratio=float(ratio), **shared)


def _window_pairs(method: LocalSinks, n: int) -> float:
    window, sinks = min(method.window, n), method.sinks
    far = max(n - window, 0)
    sunk = sum(min(sinks, beyond) for beyond in range(1, min(far, sinks) + 1)) + max(far - sinks, 0) * sinks
    return window * (window + 1) / 2 + far * window + sunk


def _block_pairs(method: BlockSparse, n: int) -> float:
    return block_share(method.blocks, -(-n // method.size)) * n * (n + 1) / 2


def block_share(k: int, blocks: int) -> float:
    """The share of the causal block pairs that `k` key blocks per query block cover."""
    k = min(k, blocks)
    return (k * (k + 1) / 2 + (blocks - k) * k) / (blocks * (blocks + 1) / 2) if blocks else 1.0


def _searched(made: Any, pairs: Any, ratio: float, n: int, low: int, high: int) -> Method:
    """Search low ... high for the number whose method computes closest to one pair in `ratio`; it must be monotonic."""
    wanted = n * (n + 1) / 2 / ratio
    while low < high:
        middle = (low + high) // 2
        if pairs(made(middle), n) < wanted:
            low = middle + 1
        else:
            high = middle
    around = [number for number in (low - 1, low) if number >= 1 and _possible(made, number)]
    return min((made(number) for number in around), key=lambda method: abs(pairs(method, n) - wanted))


def _possible(made: Any, number: int) -> bool:
    try:
        made(number)
    except Unsupported:
        return False
    return True
