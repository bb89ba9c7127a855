"""Codes of `regard compress` for transformers: its own ``from_pretrained`` reads them where this package was imported.

The folder's ``config.json`` names this method among transformers' quantizers, and which layers are quantized how. Without the
import transformers knows no such method and finds no weights under the name that it looks for, so that it loads nothing rather
than a model of random ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from regard.contract import Unsupported
from regard.integrations.transformers.fused import fuse_layers
from regard.layers.quantized import restore_layers

METHOD = "regard"


@register_quantization_config(METHOD)
class RegardQuantizationConfig(QuantizationConfigMixin):
    """What is quantized in a model.

    Args:
        weights: the file of the codes.
        layers: by name, as :func:`regard.layers.quantized.quantized_record` says.
    """

    def __init__(self, weights: str, layers: Mapping[str, Mapping[str, Any]], **_: Any) -> None:
        self.quant_method, self.weights, self.layers = METHOD, weights, layers


@register_quantizer(METHOD)
class RegardQuantizer(HfQuantizer):
    """Puts quantized layers where the record has them, before their codes are loaded."""

    requires_calibration = True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raise Unsupported for another place than the processor."""
        places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
        for place in places - {None, "cpu"}:
            if torch.device(place).type != "cpu":
                raise Unsupported(f"a compressed model on {place}", supported="the processor", nearest='"cpu"')

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype beside the codes, as asked; raises Unsupported for another than float32."""
        if dtype != torch.float32:
            raise Unsupported(
                f"a compressed model in {str(dtype)[6:]}", supported="float32", nearest="dtype=torch.float32"
            )
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the file of the weights: transformers asks here before it looks for them."""
        config.transformers_weights = self.quantization_config.weights
        return config

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        layers = self.quantization_config.layers
        restore_layers(model, layers, source="quantization_config")
        # a table that is looked up in the head's codes is one thing with it already
        tied = model.all_tied_weights_keys.items()
        model.all_tied_weights_keys = {
            to: of for to, of in tied if not {name.removesuffix(".weight") for name in (to, of)} & set(layers)
        }
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        del model.config.transformers_weights
        fuse_layers(model)
        return model

    def is_serializable(self) -> bool:
        """Not by transformers, which would write codes under the name of ordinary weights."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradients."""
        return False


__all__ = ["METHOD", "RegardQuantizationConfig", "RegardQuantizer"]
