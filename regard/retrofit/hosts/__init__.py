"""Models that can be retrofitted, checked before anything is trained: causal language models and encoders of
transformers, and timm's vision transformers. The stages use them through :class:`regard.retrofit.hosts.base.Host`."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from regard.contract import Unsupported, an_instance
from regard.integrations.encoders import is_masked_lm
from regard.integrations.timm_places import is_of_timm
from regard.layers.linear import accelerate
from regard.retrofit.hosts.base import Batch, Host, Layer, layers_of
from regard.retrofit.hosts.encoder import SUPPORTED, EncoderHost
from regard.retrofit.hosts.language import LanguageHost
from regard.retrofit.hosts.text import check_whole, open_folder
from regard.retrofit.hosts.vision import VisionHost, open_vision

NARROW = (torch.bfloat16, torch.float16)
"""Types of weights that are too coarse to train in."""


def open_host(model: Any, tokenizer: Any = None, say: Callable[[str], None] = lambda sentence: None) -> Host:
    """Open the host of a model, or of a place that holds one, checking for likely problems.

    Args:
        model: a causal language model or encoder of transformers, or a vision transformer of timm, which is copied; a
            folder that transformers or timm saved; a GGUF file; ``timm:NAME`` for pretrained weights of timm; or a
            host.
        tokenizer: a tokenizer of transformers; the folder's when None.
        say: called with a sentence if the weights are read as float32, as they are from folders.

    Raises:
        Unsupported: for other models, for quantized or shared weights, adapters, and models that were swapped before.
    """
    if isinstance(model, Host):
        return model
    if is_of_timm(model):
        return _prepared(open_vision(model), say)
    if isinstance(model, (str, os.PathLike)):
        name = Path(model).name or str(model)
        opened, tokenizer = open_folder(Path(model), tokenizer)
    else:
        name, opened = type(model).__name__, model
    kind = _kind_of(opened)
    check_whole(opened)
    layers = layers_of(
        opened,
        f"a retrofit of {an_instance(opened)}",
        "models of transformers that dispatch through its attention interface",
    )
    if kind is EncoderHost and any(getattr(opened.get_submodule(layer.path), "is_causal", False) for layer in layers):
        raise Unsupported(
            f"a retrofit of {an_instance(opened)}, which is causal but has no language-model head",
            supported=SUPPORTED,
        )
    own = copy.deepcopy(opened) if opened is model else opened
    return _prepared(kind(own.eval().requires_grad_(False), name, layers, tokenizer), say)


def _prepared(host: Host, say: Callable[[str], None]) -> Host:
    """The host with the linear layers of :func:`regard.accelerate`, and with weights in float32 if they are in half
    precision; its model is a copy, and is changed in place."""
    narrow = {str(p.dtype).removeprefix("torch.") for p in host.model.parameters() if p.dtype in NARROW}
    if narrow:
        say(f"weights in {' and '.join(sorted(narrow))} are read as float32, in which the retrofit trains and is saved")
        host.model.float()
    accelerate(host.model)
    return host


def _kind_of(model: Any) -> type[LanguageHost] | type[EncoderHost]:
    from transformers import PreTrainedModel

    what = f"a retrofit of {an_instance(model)}"
    if not isinstance(model, PreTrainedModel):
        raise Unsupported(what, supported=f"of transformers: {SUPPORTED}; of timm: ViT and DeiT; or a folder of one")
    if getattr(model.config, "is_encoder_decoder", False):
        raise Unsupported(f"{what}, which has an encoder and a decoder", supported=SUPPORTED)
    if model.main_input_name != "input_ids":
        raise Unsupported(f"{what}, which reads {model.main_input_name}", supported="models of text, and timm's ViT")
    if is_masked_lm(model) or type(model) is type(model.base_model):
        return EncoderHost
    if model.get_output_embeddings() is None or not model.can_generate():
        raise Unsupported(f"{what}, which is neither a language model nor an encoder", supported=SUPPORTED)
    return LanguageHost


__all__ = ["Batch", "EncoderHost", "Host", "LanguageHost", "Layer", "VisionHost", "open_host"]
