"""A digit somewhere on a canvas with noise and blobs: a task in which most patches of an image are uninformative."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from regard.compression.tokens import DynamicTransformer, InterpretedTransformer, train_dynamic, train_interpreters
from regard.contract import Pattern
from regard.models.image_model import ImageModel, ImageModelConfig
from regard.models.vision.vit import VisionTransformer, VisionTransformerConfig
from regard.reproductions.framework.training import DIGIT_SIDE, digit_pixels, fit
from regard.tasks import Batch, Task, counter_generator

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int

SIDE, PATCH, NOISE, INK = 32, 4, 0.1, 0.25
"""Sides of canvas and patch in pixels, standard deviation of the noise, and grey level above which a pixel is ink."""
AT_ONCE = 100
"""Canvases per batch in evaluation."""
SCENES = 9
"""Number of the random stream for canvases."""


@dataclass(frozen=True)
class Scene:
    """A batch of canvases.

    Attributes:
        images: (B, 1, H, W), from about 0 (dark) to 1.
        labels: classes of the digits.
        ink: whether each patch has a pixel of the digit (B, rows, columns).
    """

    images: Float[Tensor, "b 1 h w"]
    labels: Int[Tensor, " b"]
    ink: Bool[Tensor, "b rows columns"]


class Canvas(Task):
    """Scikit-learn's digits of 8 x 8 pixels, half of them held out, on canvases of 32 x 32 in patches of 4 x 4.

    The digit covers four patches at a random place, among round blobs of the same brightness, with weak noise. Where
    digit and blob overlap, the brighter pixel counts. Held-out canvases are the same in every call.

    Args:
        items: number of held-out canvases.
        blobs: number of blobs on each canvas.
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
        """Return the canvases of :meth:`training_batch`."""
        draws = counter_generator(seed, step, stream=SCENES)
        return self._scene(self.digits.training_batch(step, seed, batch_size), draws)

    def evaluation_scenes(self, batch_size: int) -> Iterator[Scene]:
        """Yield the canvases of :meth:`evaluation_batches`."""
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
        corners = PATCH * torch.from_numpy(draws.integers(0, (SIDE - DIGIT_SIDE) // PATCH + 1, (2, batch.size, 1)))
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
    """Return a :class:`Canvas`, made once per process."""
    return Canvas(items, blobs)


TRAINED = ("dim", "layers", "heads", "items", "steps", "batch_size", "learning_rate")
"""Options of a setting that a trained transformer depends on, in addition to its seed."""
CURRICULUM = ("policy_steps", "block_steps", "policy_rate", "block_rate", "error_penalty")
DYNAMIC = ("keep", "dynamic_steps", "predictor_rate", "block_rate")
SMOKE: Mapping[str, Any] = {
    "dim": 16,
    "layers": 3,
    "items": 20,
    "steps": 2,
    "batch_size": 4,
    "policy_steps": 1,
    "block_steps": 1,
    "seconds": 0.01,
}
"""Small sizes for tests of reproductions on canvases."""
TUNING = 1 << 20
"""First batch number for training that follows the transformer's own."""


def trained_transformer(setting: Mapping[str, Any], seed: int) -> VisionTransformer:
    """Return a copy of a vision transformer trained with the setting's `TRAINED` options, in evaluation mode."""
    model = _transformer(setting)
    model.load_state_dict(_trained(_part(setting, TRAINED), seed))
    return model.eval()


def interpreted_transformer(setting: Mapping[str, Any], seed: int) -> InterpretedTransformer:
    """Return IA-RED² with three groups around :func:`trained_transformer`, trained with the `CURRICULUM` options."""
    torch.manual_seed(seed)
    model = InterpretedTransformer(_transformer(setting), 3)
    model.load_state_dict(_curriculum(_part(setting, (*TRAINED, *CURRICULUM)), seed))
    return model.eval()


def dynamic_transformer(setting: Mapping[str, Any], seed: int) -> DynamicTransformer:
    """Return DynamicViT around :func:`trained_transformer`, trained with the `DYNAMIC` options."""
    torch.manual_seed(seed)
    model = DynamicTransformer(trained_transformer(setting, seed), setting["keep"])
    train_dynamic(
        model,
        tuning_batches(setting, seed),
        steps=setting["dynamic_steps"],
        predictor_rate=setting["predictor_rate"],
        block_rate=setting["block_rate"],
        seed=seed,
    )
    return model.eval()


def accuracy(model: nn.Module, items: int, blobs: int = 3) -> float:
    """Return an image model's accuracy on the held-out canvases."""
    right = 0
    with torch.inference_mode():
        for scene in canvas(items, blobs).evaluation_scenes(AT_ONCE):
            right += int((model(scene.images).argmax(-1) == scene.labels).sum())
    return right / items


def tuning_batches(setting: Mapping[str, Any], seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return the batches of canvases for training that follows the transformer's own."""
    task = canvas(setting["items"])

    def batches(step: int) -> tuple[Tensor, Tensor]:
        scene = task.training_scene(TUNING + step, seed, setting["batch_size"])
        return scene.images, scene.labels

    return batches


def _part(setting: Mapping[str, Any], names: tuple[str, ...]) -> tuple[tuple[str, Any], ...]:
    return tuple((name, setting[name]) for name in names)


@functools.lru_cache(maxsize=1)
def _trained(part: tuple[tuple[str, Any], ...], seed: int) -> dict[str, Tensor]:
    setting = dict(part)
    torch.manual_seed(seed)
    model = ImageModel(ImageModelConfig("vit_nano", 10, (SIDE // PATCH,) * 2, PATCH, 1, _options(setting)))
    fit(model, canvas(setting["items"]), setting, seed)  # a diverged run shows in the score
    return model.backbone.state_dict()


@functools.lru_cache(maxsize=1)
def _curriculum(part: tuple[tuple[str, Any], ...], seed: int) -> dict[str, Tensor]:
    setting = dict(part)
    torch.manual_seed(seed)
    model = InterpretedTransformer(trained_transformer(setting, seed), 3)
    options = {name: setting[name] for name in CURRICULUM}
    train_interpreters(model, tuning_batches(setting, seed), seed=seed, **options)
    return model.state_dict()


def _transformer(setting: Mapping[str, Any]) -> VisionTransformer:
    return VisionTransformer(VisionTransformerConfig(image_size=SIDE, channels=1, num_classes=10, **_options(setting)))


def _options(setting: Mapping[str, Any]) -> dict[str, Any]:
    return {"dim": setting["dim"], "num_layers": setting["layers"], "num_heads": setting["heads"], "patch": PATCH}
