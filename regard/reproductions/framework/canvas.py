"""A digit somewhere on a canvas of noise and blobs: a task in which most patches of an image say nothing."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from regard.contract import Pattern
from regard.models.image_model import ImageModel, ImageModelConfig
from regard.models.vision.vit import VisionTransformer
from regard.reproductions.framework.training import DIGIT_SIDE, digit_pixels, fit
from regard.tasks import Batch, Task, counter_generator

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

SIDE, PATCH, NOISE, INK = 32, 4, 0.1, 0.25
"""Pixels of a side and of a patch's, deviation of the noise, and the grey from which on a pixel is one of the digit."""
SCENES = 9
"""The stream of the canvases' draws."""


@dataclass(frozen=True)
class Scene:
    """Canvases.

    Attributes:
        images: (B, 1, H, W), about 0 (dark) to 1.
        labels: which digits.
        ink: patches with a pixel of the digit (B, rows, columns).
    """

    images: Float[Tensor, "b 1 h w"]
    labels: Int[Tensor, " b"]
    ink: Bool[Tensor, "b rows columns"]


class Canvas(Task):
    """Scikit-learn's digits of 8 x 8 pixels, half of them held out, on canvases of 32 x 32 in patches of 4 x 4.

    The digit lies anywhere, between round blobs as bright as it is, under weak noise; where it meets a blob, the brighter one is
    seen. Held-out canvases are the same in every call.

    Args:
        items: canvases that are scored.
        blobs: on each.
    """

    name, pattern, objective = "canvas", Pattern.NONCAUSAL_SELF, "classification"
    grid: tuple[int, ...] | None = (SIDE // PATCH, SIDE // PATCH)
    length, features, num_classes = (SIDE // PATCH) ** 2, PATCH**2, 10

    def __init__(self, items: int, blobs: int = 3) -> None:
        self.digits, self.blobs = digit_pixels(items), blobs

    def describe(self) -> str:
        return f"a digit and {self.blobs} blobs on {SIDE} x {SIDE} pixels, of {self.digits.describe()}"

    def training_batch(self, step: int, seed: int, batch_size: int) -> Batch:
        return self._batch(self.training_scene(step, seed, batch_size))

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        for scene in self.evaluation_scenes(batch_size):
            yield self._batch(scene)

    def training_scene(self, step: int, seed: int, batch_size: int) -> Scene:
        """The canvases of :meth:`training_batch`."""
        draws = counter_generator(seed, step, stream=SCENES)
        return self._scene(self.digits.training_batch(step, seed, batch_size), draws)

    def evaluation_scenes(self, batch_size: int) -> Iterator[Scene]:
        """The canvases of :meth:`evaluation_batches`."""
        for number, batch in enumerate(self.digits.evaluation_batches(batch_size)):
            yield self._scene(batch, counter_generator(0, number, stream=SCENES + 1))

    def _scene(self, batch: Batch, draws: np.random.Generator) -> Scene:
        reader = self.digits.reader  # type: ignore[attr-defined]
        ink = (batch.inputs[..., 0] * reader.deviation[0] + reader.mean[0]).view(-1, DIGIT_SIDE, DIGIT_SIDE) / 255
        place = torch.arange(SIDE, dtype=torch.float32)
        centres = torch.from_numpy(draws.uniform(0, SIDE, (2, batch.size, self.blobs, 1))).float()
        width = torch.from_numpy(draws.uniform(1.0, 2.0, (batch.size, self.blobs, 1))).float()
        along = [torch.exp(-(((place - centre) / width) ** 2) / 2) for centre in centres]  # (B, blobs, side)
        blobs = (
            (along[0][..., :, None] * along[1][..., None, :]).amax(1) if self.blobs else ink.new_zeros(1, SIDE, SIDE)
        )
        corners = torch.from_numpy(draws.integers(0, SIDE - DIGIT_SIDE + 1, (2, batch.size, 1)))
        rows, columns = (corner + torch.arange(DIGIT_SIDE) for corner in corners)  # (B, 8)
        digit = ink.new_zeros(batch.size, SIDE, SIDE)
        digit[torch.arange(batch.size)[:, None, None], rows[:, :, None], columns[:, None]] = ink
        noise = NOISE * torch.from_numpy(draws.standard_normal((batch.size, SIDE, SIDE))).float()
        cut = (digit > INK).unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH))
        return Scene((torch.maximum(digit, blobs) + noise)[:, None], batch.targets, cut.any(4).any(2))

    def _batch(self, scene: Scene) -> Batch:
        cut = scene.images[:, 0].unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH)).transpose(2, 3)
        return Batch(cut.flatten(3).flatten(1, 2), scene.labels, grid=self.grid)


@functools.lru_cache(maxsize=2)
def canvas(items: int, blobs: int = 3) -> Canvas:
    """A :class:`Canvas`, made once a process."""
    return Canvas(items, blobs)


def trained_transformer(setting: Mapping[str, Any], seed: int) -> VisionTransformer | None:
    """A vision transformer trained on canvases by the setting's steps; None where it diverged. The caller may change it.

    The setting has ``dim``, ``layers``, ``heads``, ``items``, and what :func:`fit` reads.
    """
    names = ("dim", "layers", "heads", "items", "steps", "batch_size", "learning_rate")
    return _trained(tuple((name, setting[name]) for name in names), seed)


@functools.lru_cache(maxsize=1)
def _weights(setting: tuple[tuple[str, Any], ...], seed: int) -> dict[str, Tensor] | None:
    given = dict(setting)
    torch.manual_seed(seed)
    model = _model(given)
    return model.state_dict() if fit(model, canvas(given["items"]), given, seed) else None


def _trained(setting: tuple[tuple[str, Any], ...], seed: int) -> VisionTransformer | None:
    state = _weights(setting, seed)
    if state is None:
        return None
    model = _model(dict(setting))
    model.load_state_dict(state)
    assert isinstance(model.backbone, VisionTransformer)
    return model.backbone.eval()


def _model(given: Mapping[str, Any]) -> ImageModel:
    options = {"dim": given["dim"], "num_layers": given["layers"], "num_heads": given["heads"]}
    rows = columns = SIDE // PATCH
    return ImageModel(ImageModelConfig("vit_nano", 10, (rows, columns), PATCH, 1, options | {"patch": PATCH}))
