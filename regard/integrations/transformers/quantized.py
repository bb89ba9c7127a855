"""Lets transformers' own ``from_pretrained`` read the codes of `regard compress`, once this package is imported.

The folder's ``config.json`` names this method among transformers' quantizers and says how each layer is quantized.
Without the import, transformers does not know the method and finds no weights under the name that it looks for: it
fails to load, rather than loading a model with random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from regard.contract import Unsupported
from regard.integrations.conv1d import conv1d_as_linear
from regard.integrations.transformers.fused import fuse_layers
from regard.layers.quantized import restore_layers

METHOD = "regard"


@register_quantization_config(METHOD)
class RegardQuantizationConfig(QuantizationConfigMixin):
    """The quantized layers of a model, and how each is quantized.

    Args:
        weights: the file with the codes.
        layers: record of each layer by name, in the form of :func:`regard.layers.quantized.quantized_record`.
    """

    def __init__(self, weights: str, layers: Mapping[str, Mapping[str, Any]], **_: Any) -> None:
        self.quant_method, self.weights, self.layers = METHOD, weights, layers


@register_quantizer(METHOD)
class RegardQuantizer(HfQuantizer):
    """Replaces the recorded layers by quantized ones before their codes are loaded."""

    requires_calibration = True

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raise Unsupported for any device but the CPU."""
        places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
        for place in places - {None, "cpu"}:
            if torch.device(place).type != "cpu":
                raise Unsupported(f"a compressed model on {place}", supported="the processor", nearest='"cpu"')

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype of everything that is not quantized; raises Unsupported for any but float32."""
        if dtype != torch.float32:
            raise Unsupported(
                f"a compressed model in {str(dtype)[6:]}", supported="float32", nearest="dtype=torch.float32"
            )
        return dtype

    def update_attn_implementation(self, config: Any) -> Any:
        """Name the weights file: transformers calls this method before it looks for the file."""
        config.transformers_weights = self.quantization_config.weights
        return config

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        layers = self.quantization_config.layers
        with conv1d_as_linear(model):
            restore_layers(model, layers, source="quantization_config")
        # an embedding that reads the head's codes is already tied to it
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
        """Return False: transformers would write codes under the name of ordinary weights."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Return False: codes have no gradients."""
        return False


__all__ = ["METHOD", "RegardQuantizationConfig", "RegardQuantizer"]
