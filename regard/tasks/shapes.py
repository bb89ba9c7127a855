"""Solid shapes from which points are sampled: combined superquadrics, and meshes from files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regard.contract import Unsupported

if TYPE_CHECKING:
    from jaxtyping import Float

MESHES = (".obj", ".stl")
MOST_PARTS = 4


def superquadrics(rng: np.random.Generator, points: int) -> Float[np.ndarray, "n 3"]:
    """Points on the surface of two to four superquadrics (Barr, 1981) at random positions, rotated as one shape.

    A point is where a random direction leaves a part; points inside another part are left out.
    """
    parts = int(rng.integers(2, MOST_PARTS + 1))
    size = rng.uniform(0.15, 0.6, (parts, 3))
    squareness = rng.uniform(0.2, 1.4, (parts, 2))
    middle = rng.uniform(-0.5, 0.5, (parts, 3))
    middle[0] = 0
    found = np.zeros((0, 3))
    while len(found) < points:
        which = rng.integers(0, parts, 2 * points)
        way = rng.normal(size=(2 * points, 3))
        way /= np.linalg.norm(way, axis=1, keepdims=True)
        radius = 1 / _inside(way, size[which], squareness[which]) ** (squareness[which, 0] / 2)
        surface = way * radius[:, None] + middle[which]
        hidden = np.zeros(len(surface), dtype=bool)
        for part in range(parts):
            own = _inside(surface - middle[part], size[part], squareness[part]) < 1
            hidden |= own & (which != part)
        found = np.concatenate([found, surface[~hidden]])
    turn, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    return found[:points] @ turn


def _inside(
    x: Float[np.ndarray, "n 3"], size: Float[np.ndarray, "*n 3"], squareness: Float[np.ndarray, "*n 2"]
) -> Float[np.ndarray, " n"]:
    """Below 1 inside a superquadric, above 1 outside."""
    e1, e2 = squareness[..., 0], squareness[..., 1]
    a = np.abs(x / size) + 1e-9
    flat = (a[:, 0] ** (2 / e2) + a[:, 1] ** (2 / e2)) ** (e2 / e1)
    result: np.ndarray = flat + a[:, 2] ** (2 / e1)
    return result


def read_mesh(path: Path) -> Float[np.ndarray, "f 3 3"]:
    """Read the triangles of an OBJ or binary STL file.

    Raises:
        Unsupported: for other files, and files without triangles.
    """
    try:
        triangles = _read_obj(path) if path.suffix.lower() == ".obj" else _read_stl(path)
    except (OSError, ValueError, IndexError) as error:
        raise Unsupported(f"{path}, which cannot be read as a mesh ({error})", supported="OBJ or binary STL") from None
    if not len(triangles) or not np.isfinite(triangles).all():
        raise Unsupported(f"{path}, which has no triangles", supported="OBJ or binary STL files with faces")
    return triangles


def _read_obj(path: Path) -> np.ndarray:
    corners: list[list[float]] = []
    faces: list[tuple[int, int, int]] = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        words = line.split()
        if words[:1] == ["v"]:
            corners.append([float(word) for word in words[1:4]])
        elif words[:1] == ["f"]:
            at = [int(word.partition("/")[0]) for word in words[1:]]
            at = [i - 1 if i > 0 else len(corners) + i for i in at]
            faces += [(at[0], at[i], at[i + 1]) for i in range(1, len(at) - 1)]
    if not faces:
        return np.zeros((0, 3, 3))
    found: np.ndarray = np.array(corners)[np.array(faces)]
    return found


def _read_stl(path: Path) -> np.ndarray:
    data = path.read_bytes()
    count = int.from_bytes(data[80:84], "little")
    if len(data) < 84 + 50 * count:
        raise ValueError("not a binary STL of its own length")
    rows = np.frombuffer(data, np.dtype([("numbers", "<f4", 12), ("more", "<u2")]), count, 84)
    found: np.ndarray = rows["numbers"][:, 3:].reshape(-1, 3, 3).astype(np.float64)
    return found


def on_mesh(triangles: Float[np.ndarray, "f 3 3"], rng: np.random.Generator, points: int) -> Float[np.ndarray, "n 3"]:
    """Sample points on triangles, uniformly by area."""
    a, b, c = triangles[:, 0], triangles[:, 1], triangles[:, 2]
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not area.sum() > 0:
        raise Unsupported("a mesh without area", supported="meshes with faces")
    chosen = rng.choice(len(triangles), points, p=area / area.sum())
    u, v = rng.random((2, points, 1))
    over = u + v > 1
    u, v = np.where(over, 1 - u, u), np.where(over, 1 - v, v)
    result: np.ndarray = a[chosen] + u * (b - a)[chosen] + v * (c - a)[chosen]
    return result
