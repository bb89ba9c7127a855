"""The papers' own image backbones as contestants of `vision.py`, on plain PyTorch.

    git clone https://github.com/Visual-Attention-Network/VAN-Classification official/VAN       # and the others of SOURCES
    python benchmarks/vision.py --beside benchmarks/official.py --names van_b0 biformer_t agent_deit_t
    REGARD_OFFICIAL=elsewhere python benchmarks/vision.py --beside benchmarks/official.py ...

The repositories lie in the folder ``official``, or in that of the environment variable ``REGARD_OFFICIAL``, under the names
in ``SOURCES``. Replaced are scans in CUDA, by the repository's own scan in PyTorch; RMSNorm in Triton, by PyTorch's; and
imports that inference does not use. ``einops`` and ``timm`` must be installed.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from torch import Tensor, nn
from torch.nn import functional as F

PLACE = Path(os.environ.get("REGARD_OFFICIAL", "official")).resolve()
SOURCES = {
    "VAN": "Visual-Attention-Network/VAN-Classification at e19779b",
    "BiFormer": "rayleizhu/BiFormer at 1697bbb",
    "Agent": "LeapLabTHU/Agent-Attention at 207ce3e",
    "Vim": "hustvl/Vim at dd0358a",
    "VMamba": "MzeroMiko/VMamba at 2ed52ea",
}


def load(folder: str, module: str) -> Any:
    """Import a module below a folder of `PLACE`."""
    place = PLACE / folder
    if not place.is_dir():
        repository = folder.split("/")[0]
        raise SystemExit(f"{place} is missing; {PLACE / repository} should hold github.com/{SOURCES[repository]}")
    sys.path.insert(0, str(place))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(place))


def stand_in(name: str, **contents: Any) -> None:
    """Put a module in the place of one that inference does not need."""
    module = MagicMock(__path__=[])
    module.configure_mock(**contents)
    sys.modules[name] = module


def package(name: str, folder: str) -> None:
    """Let modules of a package be imported without running the package's own file."""
    for known in [each for each in sys.modules if each.split(".")[0] == name]:
        del sys.modules[known]  # several repositories have a package of this name
    sys.modules[name] = ModuleType(name)
    sys.modules[name].__path__ = [str(PLACE / folder)]


def van_b0() -> nn.Module:
    package("models", "VAN/models")
    return load("VAN", "models.van").van_b0()


def biformer_t() -> nn.Module:
    stand_in("fairscale.nn.checkpoint")
    package("models", "BiFormer/models")
    return load("BiFormer", "models.biformer").biformer_tiny()


def agent_deit_t() -> nn.Module:
    stand_in("timm.models.registry", register_model=lambda function: function)  # timm refuses an entry of its settings
    package("models", "Agent/agent_transformer/models")
    whole = load("Agent", "models.agent_deit").VisionTransformer
    return whole(patch_size=16, embed_dim=192, depth=12, num_heads=3)


def agent_pvt_t() -> nn.Module:
    package("models", "Agent/agent_transformer/models")
    return load("Agent", "models.agent_pvt").agent_pvt_tiny()


def vim_t() -> nn.Module:
    package("mamba_ssm", "Vim/mamba-1p1p1/mamba_ssm")
    for missing in ("selective_scan_cuda", "causal_conv1d", "mamba_ssm.ops.triton.selective_state_update"):
        stand_in(missing)
    stand_in("mamba_ssm.utils.hf")
    stand_in("mamba_ssm.ops.triton.layer_norm", RMSNorm=nn.RMSNorm)
    stand_in("mamba_ssm.utils.generation", GenerationMixin=object)
    models = load("Vim/vim", "models_mamba")
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_ref
    del sys.modules["selective_scan_cuda"]  # which others would take for real

    def mixed(
        xz: Tensor,
        kernel: Tensor,
        bias: Tensor,
        projection: Tensor,
        delta_projection: Tensor,
        rates: Tensor,
        _b: None,
        _c: None,
        skip: Tensor,
        delta_bias: Tensor,
        delta_softplus: bool,
    ) -> Tensor:
        x, z = xz.chunk(2, dim=1)
        length, width = x.shape[-1], kernel.shape[-1]
        x = F.silu(F.conv1d(x, kernel, bias, padding=width - 1, groups=x.shape[1])[..., :length])
        states, rank = rates.shape[1], delta_projection.shape[1]
        delta, b, c = F.linear(x.mT, projection).split([rank, states, states], dim=-1)
        delta = F.linear(delta, delta_projection).mT
        return scan(x, delta, rates, b.mT, c.mT, skip, z, delta_bias, delta_softplus)

    importlib.import_module("mamba_ssm.modules.mamba_simple").mamba_inner_fn_no_out_proj = mixed
    make = models.vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2
    whole = models.VisionMamba.__init__

    def unfused(self: nn.Module, *args: Any, **options: Any) -> None:
        whole(self, *args, **options | {"fused_add_norm": False})

    models.VisionMamba.__init__ = unfused
    try:
        return make()
    finally:
        models.VisionMamba.__init__ = whole


def vmamba_t_v0() -> nn.Module:
    package("models", "VMamba/classification/models")
    for missing in ("triton", "triton.language", "fvcore.nn", "models.mamba2.ssd_minimal"):
        stand_in(missing)
    return load("VMamba", "models.vmamba").vanilla_vmamba_tiny()


MODELS = {each.__name__: each for each in (van_b0, biformer_t, agent_deit_t, agent_pvt_t, vim_t, vmamba_t_v0)}
