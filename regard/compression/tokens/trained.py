"""What DynamicViT and IA-RED² share: a vision transformer, and small networks that choose the patches it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from regard.compression.tokens.hosts import Host
from regard.contract import Unsupported
from regard.models.vision.released import weights_of


class ChoosingTransformer(nn.Module):
    """The base of both classes.

    Args:
        model: a vision transformer with a class token; shared, not copied.

    Attributes:
        choosers: name of the list of small networks.
        host: the model's parts, as this package sees them.

    Raises:
        Unsupported: for other models.
    """

    choosers: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.host = model, Host(model)

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

    def translate(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Official weights of the transformer under official names, and those of the small networks under the names
        here."""
        raise NotImplementedError
