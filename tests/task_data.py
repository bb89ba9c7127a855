"""Synthetic data for the tests of tasks, and views of a task's items."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import write_recordings

from regard.contract import Unsupported
from regard.tasks import Batch, create_task


def words(count: int, seed: int) -> str:
    letters = np.random.default_rng(seed).integers(97, 123, (count, 4))
    return " ".join("".join(map(chr, word)) for word in letters)


def save(path: Path, rows: Iterable[Sequence[str]], header: Sequence[str] = (), delimiter: str = "\t") -> Path:
    path.write_text("".join(delimiter.join(row) + "\n" for row in ([header] if header else []) + list(rows)))
    return path


def save_json(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def for_any_task(text: str, i: int) -> dict[str, Any]:
    """A record that serves as a labelled document, as a pair of passages, and as a source with its target."""
    target = f"{i} of its kind"
    return {"text": text, "label": i % 2, "first": text, "second": target, "source": text, "target": target}


def hours(count: int, *, seed: int = 0, step: timedelta = timedelta(hours=1), name: str = "") -> list[list[str]]:
    """Rows with a time, a load with a daily rhythm, a wind, whether a shop is open and, if given, the name of a place."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        load = 5 * np.sin(2 * np.pi * i / 24) + generator.normal()
        numbers = [f"{load:.6f}", f"{generator.normal():.6f}", str(generator.integers(2))]
        rows.append([str(datetime(2024, 1, 1) + step * i), *numbers, *([name] if name else [])])
    return rows


HOURS = ("time", "load", "wind", "open")


def photo(path: Path, seed: int, size: tuple[int, int] = (12, 9), mode: str = "RGB") -> Path:
    image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    depth = len(image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], depth), dtype=np.uint8)
    image.fromarray(pixels.squeeze()).save(path)
    return path


def photos(folder: Path) -> Path:
    for i in range(30):
        photo(folder / ("cat", "dog", "newt")[i % 3] / f"{i}.png", i)
    return folder


def masked(
    folder: Path,
    *,
    count: int = 12,
    seed: int = 0,
    values: Sequence[int] = (0, 1, 2),
    shares: Sequence[float] | None = None,
    palette: bool = False,
) -> Path:
    """Save images of 24 x 16 pixels with masks of these values."""
    image = pytest.importorskip("PIL.Image")
    (folder / "masks").mkdir(parents=True)
    for i in range(count):
        photo(folder / "images" / f"{i}.png", seed + i, (24, 16))
        drawn = np.random.default_rng(seed + i).choice(values, (16, 24), p=shares).astype(np.uint8)
        mask = image.fromarray(drawn)
        if palette:
            mask.putpalette([each for v in range(256) for each in (v, (v + 100) % 256, (v + 200) % 256)])
        mask.save(folder / "masks" / f"{i}.png")
    return folder


def save_scan(path: Path, voxels: Any, affine: Any = None) -> Path:
    """Save a NIfTI file, with voxels of 1 mm unless an affine is given."""
    nibabel = pytest.importorskip("nibabel", reason="writes and reads volumes")
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = voxels.astype(np.float32) if voxels.dtype == np.float64 else voxels
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine), path)
    return path


def scans(
    folder: Path,
    *,
    count: int = 4,
    seed: int = 0,
    sides: Sequence[tuple[int, ...]] = ((10, 10, 10),),
    values: Sequence[int] = (0, 1),
) -> Path:
    """Save volumes with these sides in turn and masks of these values; voxels of the last value are bright."""
    for i in range(count):
        rng = np.random.default_rng(seed + i)
        mask = rng.choice(values, sides[i % len(sides)]).astype(np.uint8)
        voxels = np.where(mask == values[-1], 10, -10) + rng.normal(size=mask.shape)
        save_scan(folder / "images" / f"{i}.nii.gz", voxels)
        save_scan(folder / "masks" / f"{i}.nii.gz", mask)
    return folder


def save_series(path: Path, count: int, *, seed: int = 0, equal: bool = False) -> Path:
    """Save two-channel series of 5 to 9 steps, whose three classes have different means, in the UEA archive's format."""
    generator = np.random.default_rng(seed)
    lines = ["@problemName Made", "@timeStamps false", "@classLabel true a b c", "@data"]
    for i in range(count):
        steps = 7 if equal else generator.integers(5, 10)
        channels = generator.normal(size=(2, steps)) + np.array([i % 3, 0])[:, None]
        lines.append(":".join([*(",".join(f"{x:.6f}" for x in channel) for channel in channels), "abc"[i % 3]]))
    path.write_text("\n".join(lines) + "\n")
    return path


SMALL = {
    "recall": {"length": 24, "pairs": 4, "queries": 4, "vocab_size": 17, "evaluation_items": 64},
    "copying": {"length": 24, "tokens": 4, "alphabet": 5, "evaluation_items": 64},
    "listops": {"length": 24, "evaluation_items": 64},
    "pathfinder": {"size": 16, "distractors": 0, "evaluation_items": 16},
    "long_range": {"which": "listops", "length": 64, "evaluation_items": 64},
    "algorithmic": {"length": 6, "samples": 100, "evaluation_items": 64},
    "events": {"length": 16, "evaluation_items": 64},
    "upscale": {"size": 12, "factor": 2, "evaluation_items": 64},
    "completion": {"length": 16, "seen": 8, "evaluation_items": 64},
    "in_context_functions": {"length": 16, "dimensions": 6, "evaluation_items": 64},
    "segmentation": {"size": 16, "evaluation_items": 64, "data": "near-cue"},
    "segmentation_3d": {"size": 16, "evaluation_items": 8, "data": "near-cue"},
}


def made(name: str, folder: Path, **options: Any) -> Any:
    """A small task by name, on synthetic data if it reads any."""
    if name in SMALL:
        given = SMALL[name]
    elif name in ("images", "pixels"):
        given = {"data": photos(folder / "pets"), "size": 8}
    elif name == "speech":
        (folder / "digits").mkdir(exist_ok=True)
        write_recordings(folder / "digits")
        given = {"data": folder / "digits", "length": 32, "digits": 2, "evaluation_items": 8}
    elif name == "time_series":
        given = {"data": save_series(folder / "series.ts", 60)}
    elif name == "forecast":
        path = save(folder / "load.csv", hours(400), HOURS, ",")
        given = {"data": path, "target": "load", "covariates": "open", "past_covariates": "wind"}
        given |= {"length": 12, "history": 36}
    else:
        records = [for_any_task(f"{i} {words(20, i)}", i) for i in range(40)]
        given = {"data": save_json(folder / "made.jsonl", records), "length": 32}
    return create_task(name, **(given | options))


def items(batches: Iterable[Batch]) -> list[bytes]:
    """A key for each item: the bytes of its input and its memory."""
    found = []
    for batch in batches:
        parts = [x for x in (batch.inputs, batch.memory) if x is not None]
        found += [b"".join(x[i].numpy().tobytes() for x in parts) for i in range(batch.size)]
    return found


def refused(call: Callable[[], Any], *told: str) -> None:
    with pytest.raises(Unsupported) as error:
        call()
    assert all(part in str(error.value) for part in told), str(error.value)
