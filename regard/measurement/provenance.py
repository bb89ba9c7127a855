"""The provenance of a measurement: the machine, software versions, code revision and time.

No person or path is recorded, so a store or report can be shared as it is.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy
import torch

from regard.version import VERSION

CHECKOUT = Path(__file__).resolve().parents[2]

HARDWARE = ("cpu", "physical_cores", "logical_cores", "memory_bytes", "gpus", "architecture")


def now() -> str:
    """Return the time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def fingerprint() -> dict[str, Any]:
    """Collect the facts about the machine and software that a measurement depends on.

    Returns:
        ``cpu``, ``physical_cores``, ``logical_cores``, ``usable_cores``, ``threads`` (of torch), ``memory_bytes``,
        ``gpus`` (names), ``architecture``, ``os``, ``python``, ``torch``, ``numpy``, ``regard`` and ``machine_id``, a
        short hash of the hardware alone. A fact that the platform does not provide is None.
    """
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "physical_cores": _physical_cores(),
        "logical_cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "architecture": platform.machine(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "regard": VERSION,
    }
    return {"machine_id": machine_id(facts), **facts}


def machine_id(facts: dict[str, Any]) -> str:
    """Return twelve hexadecimal digits that identify the hardware in `facts`, independent of the software."""
    hardware = {name: facts[name] for name in HARDWARE}
    if hardware["memory_bytes"]:
        # Kernels reserve slightly different amounts at each boot.
        hardware["memory_bytes"] = round(hardware["memory_bytes"] / 2**30)
    return hashlib.sha256(json.dumps(hardware, sort_keys=True).encode()).hexdigest()[:12]


def git_revision() -> str | None:
    """Return the commit of the checkout that regard runs from, with ``+changes`` if tracked files differ from it.

    The result of the first call is cached, since later changes do not affect the running process. None for an installed
    package, even if it is installed inside another project's repository.
    """
    return _revision(CHECKOUT)


@functools.cache
def _revision(checkout: Path) -> str | None:
    root = _git(checkout, "rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() != checkout:
        return None
    commit = _git(checkout, "rev-parse", "HEAD")
    changes = _git(checkout, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit


def _git(checkout: Path, *arguments: str) -> str | None:
    return _output("git", "-C", str(checkout), *arguments)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


@functools.cache
def _cpu_records() -> list[dict[str, str]]:
    """Return a record for each logical processor of a Linux machine; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return []
    records = []
    for block in text.strip().split("\n\n"):
        pairs = (line.split(":", 1) for line in block.splitlines() if ":" in line)
        records.append({name.strip(): value.strip() for name, value in pairs})
    return records


def _cpu_model() -> str | None:
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    record = next((r for r in _cpu_records() if "model name" in r), None)
    if record is None:
        return platform.processor() or None
    # cloud machines often name only the vendor, while generations differ in speed by half
    number = [f"{part} {record[key]}" for part, key in (("family", "cpu family"), ("model", "model")) if key in record]
    return record["model name"] + (f" ({', '.join(number)})" if number else "")


def _physical_cores() -> int | None:
    if sys.platform == "darwin":
        count = _output("sysctl", "-n", "hw.physicalcpu")
        return int(count) if count else None
    cores = {(r["physical id"], r["core id"]) for r in _cpu_records() if "physical id" in r and "core id" in r}
    return len(cores) or None


def _memory_bytes() -> int | None:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
