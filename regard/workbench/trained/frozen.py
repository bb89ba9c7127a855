"""A trained model whose layers stay frozen while exits are trained on them (DeeBERT, Xin et al., arXiv 2004.12993)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from regard.contract import Unsupported
from regard.models import Encoder, EncoderDecoder, LanguageModel, StackConfig
from regard.models.variants import Variant
from regard.workbench.trained.folder import TrainedModel, open_trained

LEARNING = "exits."
"""Prefix of the names of the parameters that are trained."""


@dataclass(frozen=True)
class Frozen:
    """The model of an earlier run, to be frozen.

    Attributes:
        trained: the folder of the run.
        model: the model in that folder.
    """

    trained: TrainedModel
    model: Any

    @classmethod
    def read(cls, folder: Path | str, device: str = "cpu") -> Frozen:
        """Open a folder; raises Unsupported if it has no finished run, or a model without a place for exits."""
        trained = open_trained(folder)
        model = trained.model(device)
        if not isinstance(model, LanguageModel | Encoder | EncoderDecoder):
            raise Unsupported(
                f"exits of the {type(model).__name__} in {folder}", supported="LanguageModel, Encoder, EncoderDecoder"
            )
        return cls(trained, model)

    @property
    def sizes(self) -> dict[str, Any]:
        """The settings of a run that the frozen model determines."""
        record = self.trained.record
        layers: dict[str, Any] = {
            stack: tuple((name, options) for name, options in record.get(stack, ()))
            for stack in ("layers", "encoder", "decoder")
        }
        own = {name: record["settings"][name] for name in ("dim", "layers", "heads")}
        return {
            "mechanisms": (Variant(record["mechanism"], **layers, encoder_dim=record.get("encoder_dim")),),
            "frames": (record["settings"]["frame"],),
            **own,
        }

    def config(self, stack: StackConfig) -> Any:
        """The config of the frozen model with the exits of a stack."""
        own = dataclasses.replace(
            self.model.config.stack, exits=stack.exits, exit_rule=stack.exit_rule, exit_heads=stack.exit_heads
        )
        if own.halts:
            raise Unsupported(
                "halting units of layers that do not learn, whose output they would change",
                supported="exits that read classes",
                nearest="--exits all, or all:own",
            )
        return dataclasses.replace(self.model.config, stack=own)

    def take_over(self, model: nn.Module) -> nn.Module:
        """Load the frozen weights into a model of :meth:`config`, and leave only its exits trainable."""
        model.load_state_dict(
            {name: tensor for name, tensor in self.model.state_dict().items() if not name.startswith(LEARNING)},
            strict=False,
        )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(LEARNING))
        return model
