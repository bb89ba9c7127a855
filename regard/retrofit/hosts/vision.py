"""Vision transformers of timm."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from regard.compression.folders import is_compressed
from regard.contract import Pattern, Unsupported, an_instance
from regard.integrations.encoders import UNASKED
from regard.integrations.swap import swap
from regard.integrations.timm_places import load_timm, name_of, timm_folders
from regard.layers.quantized import quantized_record
from regard.models.weights import weights_digest
from regard.retrofit.hosts.base import Batch, Host, layers_of
from regard.retrofit.pictures import Pictures, Some, View, read_pictures
from regard.retrofit.settings import RetrofitSettings

if TYPE_CHECKING:
    from jaxtyping import Float

    from regard.tasks.documents import Paths

TIMED = 30
"""Number of batches read for timing."""
BATCH = 32
"""Default number of images in a training step."""
SUPPORTED = "timm's ViT and DeiT: a folder of timm (config.json and model.safetensors), timm:NAME, or such a model"


@dataclass(frozen=True)
class VisionHost(Host):
    """A vision transformer of timm, which classifies images, or outputs their features."""

    kind: ClassVar[str] = "vision"
    pattern: ClassVar[Pattern] = Pattern.NONCAUSAL_SELF
    counts: ClassVar[str] = "images"
    rows: ClassVar[int | None] = None

    @property
    def distributes(self) -> bool:
        """Whether it has classes."""
        return bool(self.model.num_classes)

    @property
    def unit(self) -> str:
        return "nats an image" if self.distributes else super().unit

    @property
    def view(self) -> View:
        """Its preprocessing of images."""
        return View.of(self.model)

    def settled(self, settings: RetrofitSettings) -> RetrofitSettings:
        for name in ("length", "lengths"):
            if getattr(settings, name):
                raise Unsupported(
                    f"{name}={getattr(settings, name)} of {an_instance(self.model)}, whose images have one size",
                    supported=f"no {name}",
                )
        if settings.budget.unit == "tokens":
            raise Unsupported(f"a budget of {settings.budget} for images", supported="a time or steps", nearest="60m")
        if settings.distil != 1 and not self.distributes:
            raise Unsupported(
                f"distil={settings.distil} of {an_instance(self.model)} without classes",
                supported="distil=1",
                nearest="distil=1",
            )
        return replace(settings, length=None, lengths=(), batch_size=settings.batch_size or BATCH)

    def check_longest(self, data: Pictures, settings: RetrofitSettings, numbers: Sequence[int]) -> float:
        """Nothing to check: images have one size."""
        return 0.0

    def timed(self, settings: RetrofitSettings) -> float:
        return TIMED

    def reads(self, settings: RetrofitSettings) -> int:
        return self.tokens(1)

    def tokens(self, larger: int) -> int:
        """Tokens of an image that is `larger` times as high and as wide."""
        patches = int(self.model.patch_embed.num_patches)
        return larger**2 * patches + int(getattr(self.model, "num_prefix_tokens", 0))

    @contextmanager
    def watched(self, model: Any) -> Iterator[dict[int, Tensor]]:
        """Within the context, collect the latest outputs of a model's blocks, by the number of their attention."""
        given: dict[int, Tensor] = {}

        def keep(number: int) -> Any:
            return lambda _, args, output: given.update({number: output.detach()})

        blocks = {layer.number: model.get_submodule(layer.path.rpartition(".")[0]) for layer in self.layers}
        hooks = [block.register_forward_hook(keep(number)) for number, block in blocks.items()]
        try:
            yield given
        finally:
            for hook in hooks:
                hook.remove()

    def work(self, settings: RetrofitSettings) -> int:
        return settings.rows

    def read(
        self, data: Paths | Tensor | None, validation: Paths | Tensor | None, settings: RetrofitSettings
    ) -> Pictures:
        if data is None:
            raise Unsupported(f"{an_instance(self.model)} without images", supported="a folder of images")
        found = read_pictures(data, validation, self.view, batch=settings.rows, seed=settings.seed)
        if settings.distil != 1 and not found.labelled:
            raise Unsupported(
                f"distil={settings.distil} with images whose classes are not the model's {self.model.num_classes}",
                supported="a sub-folder for each class of the model, or distil=1",
                nearest="distil=1",
            )
        return found

    def batch(self, data: Pictures, step: int, seed: int, settings: RetrofitSettings, rows: int | None = None) -> Batch:
        return self.of_images(data.drawn(step, seed, rows or settings.rows))

    def held_out(self, data: Pictures, most: int, settings: RetrofitSettings) -> Batch:
        return self.of_images(data.held_out.spread(most * settings.rows))

    def of_images(self, images: Some) -> Batch:
        """The images as a batch of model inputs."""
        return Batch(self.view.normal(images.pixels), images.labels)

    def answers(self, model: Any, batch: Batch) -> Float[Tensor, "b v"]:
        found = model(batch.inputs).float()
        return found.log_softmax(-1) if self.distributes else found

    def own_loss(self, found: Float[Tensor, "b v"], batch: Batch) -> Tensor:
        assert batch.targets is not None
        return F.nll_loss(found, batch.targets, ignore_index=UNASKED)

    def knows_answers(self, data: Pictures) -> bool:
        return super().knows_answers(data) and data.labelled

    def body(self, inputs: Float[Tensor, "b c h w"]) -> None:
        self.model.forward_features(inputs)

    def save(self, folder: str | os.PathLike[str]) -> None:
        from regard.integrations.timm_folders import save

        save(self.model, folder)

    def load(self, folder: str | os.PathLike[str]) -> Any:
        return load_timm(folder, supported=SUPPORTED)

    def fingerprint(self) -> str:
        from regard.integrations.timm_folders import recipe

        described = json.dumps(recipe(self.model), sort_keys=True) + weights_digest(self.model)
        return hashlib.sha256(described.encode()).hexdigest()[:12]

    def heads(self, number: int) -> tuple[int, int, int, int]:
        module: Any = self.attention(number)
        return module.num_heads, module.num_heads, module.head_dim, module.head_dim


def open_vision(model: Any) -> VisionHost:
    """The host of a model for which :func:`is_of_timm` is true.

    Raises:
        Unsupported: if it cannot be loaded or rebuilt, for quantized weights, and for models that were swapped before.
    """
    recipe = timm_folders().recipe
    if isinstance(model, (str, os.PathLike)):
        if is_compressed(model):
            raise Unsupported(f"{model}, which is compressed", supported="a model in floating point")
        name, opened = name_of(model), load_timm(model, supported=SUPPORTED)
    else:
        name, opened = type(model).__name__, copy.deepcopy(model)
    what = f"a retrofit of {an_instance(opened)}"
    if quantized_record(opened):
        raise Unsupported(f"{what} with quantized weights", supported="weights in floating point")
    layers = layers_of(opened, what, SUPPORTED)
    swap(copy.deepcopy(opened), "softmax")  # raises with the reason if attention is more than softmax
    host = VisionHost(opened.eval().requires_grad_(False), name, layers)
    if any(host.placed(opened, layer.number) is not None for layer in layers):
        raise Unsupported(
            f"{what} whose attention was swapped before", supported="the original", nearest="regard.unswap(model)"
        )
    recipe(opened)
    return host
