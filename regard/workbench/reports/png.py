"""Pictures as PNG, for files and reports, without additional packages."""

from __future__ import annotations

import base64
import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from jaxtyping import UInt8


def png(pixels: UInt8[np.ndarray, "h w *c"], palette: UInt8[np.ndarray, "k 3"] | None = None) -> bytes:
    """Encode grey or RGB pixels, or indices into a palette, as PNG."""
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels.size // height), dtype=np.uint8)  # a 0 in front of each row: no filter
    rows[:, 1:] = pixels.reshape(height, -1)

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    kind = 3 if palette is not None else 2 if pixels.shape[2:] == (3,) else 0  # palette, RGB or grey, with 8 bits each
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, kind, 0, 0, 0]))
        + (b"" if palette is None else chunk(b"PLTE", palette.tobytes()))
        + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
        + chunk(b"IEND", b"")
    )


def address(
    pixels: UInt8[np.ndarray, "h w *c"], palette: UInt8[np.ndarray, "k 3"] | None = None, *, largest: int
) -> str:
    """A PNG as a data URI, downscaled if its longer side has more than `largest` pixels."""
    height, width = pixels.shape[:2]
    if max(height, width) > largest:
        sides = [max(1, round(side * largest / max(height, width))) for side in (height, width)]
        planes = torch.from_numpy(pixels.copy()).view(height, width, -1).permute(2, 0, 1)[None].float()
        if palette is None:
            small = F.interpolate(planes, sides, mode="bilinear", antialias=True).round().clamp(0, 255)
        else:
            small = F.interpolate(planes, sides, mode="nearest-exact")
        pixels = small[0].permute(1, 2, 0).to(torch.uint8).numpy()
    return "data:image/png;base64," + base64.b64encode(png(pixels, palette)).decode()
