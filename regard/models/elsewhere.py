"""Folders of transformers and timm, such as those of a retrofit, which only those libraries can load."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

CLASSES = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "Model": "AutoModel",
}
"""The class of transformers that loads an architecture, by how its name ends."""


def call_that_loads(config: Mapping[str, Any], folder: str | os.PathLike[str]) -> str:
    """The call that loads a folder with this ``config.json``, swapped or not; ``""`` if neither library wrote it."""
    named = config.get("architectures")
    for architecture in named if isinstance(named, list) else ():
        loader = next((name for ending, name in CLASSES.items() if str(architecture).endswith(ending)), architecture)
        return f'transformers.{loader}.from_pretrained("{folder}") after import regard.integrations.transformers'
    if "pretrained_cfg" in config:
        return f'timm.create_model("local-dir:{folder}", pretrained=True) after import regard.integrations.timm'
    return ""
