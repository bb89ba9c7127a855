"""Formatting and parsing of numbers with units: the one place for sizes, counts and times."""

from __future__ import annotations

import math
import re

from regard.contract import Unsupported


def number(value: float) -> str:
    """Format with three significant digits, or as an integer from 1,000 on: 0.0123, 1.84, 12.3, 1,234."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-4:
        return f"{value:.2e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def with_error(value: float, error: float) -> tuple[str, str]:
    """Format a value and its standard error, both to the second digit of the error."""
    if error <= 0 or not 1e-6 < error < 1e3 or abs(value) >= 1e7:
        return number(value), number(error)
    digits = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{digits}f}", f"{error:,.{digits}f}"


def told(value: float, error: float) -> str:
    """Format a value and its standard error as one string; the value alone if the error is not finite."""
    return " ± ".join(with_error(value, error)) if math.isfinite(error) else number(value)


def tick(value: float) -> str:
    """Format a value for an axis tick, as short as possible."""
    if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-3):
        digits, power = f"{value:.2e}".split("e")
        return f"{float(digits):g}e{int(power)}"
    return f"{value:,.10g}"


def count(value: float) -> str:
    """Format a rate or a count: 950, 12.3k, 4.56M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def counted(number: int, what: str) -> str:
    """Format a number of things, given the word for one of them: 1 image, 2 classes, 2 series, 1,000 files."""
    ending = "" if number == 1 else "es" if what.endswith("ss") else "" if what.endswith("s") else "s"
    return f"{number:,} {what}{ending}"


def tokens(value: float) -> str:
    """Format a number of tokens, in units of 1024 if it is a multiple: 512, 1k, 1,000."""
    if value >= 1024 and value % 1024 == 0:
        return f"{value / 1024:,.0f}k"
    return f"{value:,.0f}"


def size(value: float) -> str:
    """Format a number of bytes: 12 B, 1.5 KiB, 3 GiB."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 0.9995 * 1024**power:
            return f"{value / 1024**power:.3g} {unit}"
    return f"{value:.3g} B"


def milliseconds(value: float) -> str:
    """Format a short time, given in milliseconds, in a suitable unit: 250 µs, 12.3 ms, 1.5 s."""
    if value >= 1000:
        return f"{value / 1000:.3g} s"
    if value >= 1:
        return f"{value:.3g} ms"
    return f"{value * 1000:.3g} µs"


def duration(seconds: float) -> str:
    """Format a duration: 12 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.3g} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def clock(seconds: float) -> str:
    """Format elapsed time as minutes and seconds, with hours if there are any: 0:07, 1:23:20."""
    minutes, rest = divmod(round(seconds), 60)
    hours, within = divmod(minutes, 60)
    return f"{hours}:{within:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30, "": 1}


def parse_size(text: str, what: str = "memory") -> int:
    """Parse a number of bytes such as ``512MiB``, ``2 GB`` or a plain number.

    Args:
        what: the quantity's name, for the error.

    Raises:
        Unsupported: for anything else.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _BYTES or float(match[1]) <= 0:
        raise Unsupported(f"{what} {text!r}", supported="a size such as 512MiB, 2GB or 300000", nearest="512MiB")
    return max(1, round(float(match[1]) * _BYTES[match[2].lower()]))
