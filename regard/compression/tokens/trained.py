"""What DynamicViT and IA-RED² share: a vision transformer, and small networks that choose the patches it keeps.

::

    model = open_trained("my_model").model()                       # of `regard train --task images --model deit_t`
    model.backbone = DynamicTransformer(model.backbone)            # and train it; see train_dynamic
    save_pretrained(model, "my_dynamic")

Alone, around a transformer of regard or timm, they are saved by :meth:`ChoosingTransformer.save`. Either folder is read by
:func:`regard.compression.load_compressed`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from regard.compression.tokens.calls import PerThread
from regard.compression.tokens.hosts import host_of
from regard.compression.tokens.reducers import DROPPED, Tokens
from regard.contract import Result, Unsupported
from regard.models.vision.released import weights_of

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int


class _LastCall(PerThread):
    """The tokens that a thread's last call left."""

    @property
    def tokens(self) -> Tokens:
        return self._run.tokens

    @tokens.setter
    def tokens(self, left: Tokens) -> None:
        self._run.tokens = left


class ChoosingTransformer(nn.Module, ABC):
    """The base of both classes.

    Args:
        model: a vision transformer of regard or timm, or a TNT of regard, whose head reads a class token or averages the
            patches; shared, not copied.

    Attributes:
        method: name of the method in records.
        choosers: name of the list of small networks.
        host: the model's parts, as this package sees them.

    Raises:
        Unsupported: for other models.
    """

    method: ClassVar[str]
    choosers: ClassVar[str]
    model: Any

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.host = model, host_of(model)
        self._last = _LastCall()

    @property
    @abstractmethod
    def options(self) -> dict[str, Any]:
        """The arguments, besides the model, that make such a module, as JSON values."""

    @property
    def tokens_record(self) -> dict[str, Any]:
        """The method and its options, as folders hold them (:mod:`regard.compression.tokens.applied`)."""
        return {"method": self.method, "options": self.options}

    @property
    def tokens(self) -> Tokens:
        """The tokens after the last block of this thread's last call, and the place of each initial token among them.

        Padding of rows with fewer tokens than others has a size of 0.
        """
        return self._last.tokens

    @property
    def num_classes(self) -> int:
        """Number of the model's classes."""
        return self.model.num_classes

    @property
    def pretrained_cfg(self) -> Any:
        """timm's description of its model and of that model's images; an AttributeError around a model of regard."""
        return self.model.pretrained_cfg

    @abstractmethod
    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """Logits of images, named as timm's models name them; patches that are not kept are removed on the way."""

    def forward_with_losses(self, images: Float[Tensor, "b c h w"]) -> Result:
        """The logits, as a backbone of :class:`regard.models.image_model.ImageModel` returns them."""
        return Result(self(images))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the model with its small networks to a folder, for :func:`regard.compression.load_compressed`.

        Around a transformer of regard, the folder has an :class:`regard.models.image_model.ImageModel` with the
        transformer's own patches and this module as the backbone. A model of timm that cannot be built again from a
        name and arguments is only loaded ``into`` such a model.
        """
        from regard.compression.folders import save_choosing

        save_choosing(self, folder)

    def load_released(self, checkpoint: Mapping[str, Any]) -> None:
        """Load weights of the official repository, all of them and nothing else; see :meth:`translate`.

        Raises:
            Unsupported: if names or shapes do not fit; nothing is changed then.
        """
        backbone, found = self.translate(weights_of(checkpoint))
        choosers: nn.Module = getattr(self, self.choosers)
        own = {name: tuple(value.shape) for name, value in choosers.state_dict().items()}
        given = {name: tuple(value.shape) for name, value in found.items()}
        wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
        if wrong:
            name = wrong[0]
            raise Unsupported(
                f"weights of {self.choosers} with {given.get(name)} for {name}, which is {own.get(name)} here",
                supported=f"the weights of a model of the same width and number of {self.choosers}",
            )
        self.host.load_released(backbone)
        choosers.load_state_dict(found)

    @abstractmethod
    def translate(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Official weights of the transformer under official names, and those of the small networks under the names
        here."""

    def keep(
        self, x: Float[Tensor, "b n c"], alive: Bool[Tensor, "b n"], places: Int[Tensor, "b n"], count: int
    ) -> None:
        """Keep what a call has left of `count` initial tokens for :attr:`tokens`."""
        rank = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        found = torch.full((len(x), count + 1), DROPPED, device=x.device)
        found = found.scatter(1, torch.where(alive, places, count), rank)[:, :count]
        left = self.host.vectors(x).detach()
        self._last.tokens = Tokens(left, alive.to(x.dtype), found, places, self.host.protected)
