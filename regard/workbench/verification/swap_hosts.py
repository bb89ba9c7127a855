"""Small models of other libraries in which attention is swapped: how to build and run them, and where attention is."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.contract import Context, Mask, Pattern, Role

DIM, HEADS, GROUPS, TOKENS, SIDE = 64, 8, 2, 21, 4

SIZES = {"vocab_size": 64, "hidden_size": DIM, "intermediate_size": 48, "num_hidden_layers": 2}
"""Sizes for the configs of transformers."""

Map = tuple[Tensor, Tensor | None]
"""Weight and bias of a linear map."""


class Host(ABC):
    """A small model of another library.

    Attributes:
        title: description of the model.
        package: the library it needs.
        pattern: pattern of its attention modules.
        only: glob for the paths of the modules that are swapped; None for all.
        rotates: whether it has rotary positions.
        groups: number of key/value heads.
        pads: whether its tokens can be padded.
        generates: whether it can continue from a cache.
    """

    title: ClassVar[str]
    package: ClassVar[str] = "torch"
    pattern: ClassVar[Pattern] = Pattern.NONCAUSAL_SELF
    only: ClassVar[str | None] = None
    rotates: ClassVar[bool] = False
    groups: ClassVar[int] = HEADS
    pads: ClassVar[bool] = True
    generates: ClassVar[bool] = False

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the model with random weights."""

    @abstractmethod
    def run(self, model: Any, x: Tensor, valid: Tensor | None = None, **options: Any) -> Tensor:
        """Hidden states (B, N, C) for the inputs `x`; tokens that are not `valid` are padding."""

    @abstractmethod
    def attention(self, model: Any) -> dict[str, Any]:
        """The attention modules by path."""

    @abstractmethod
    def maps(self, module: Any) -> list[Map]:
        """Weights (out, in) and biases for queries, keys, values and output."""

    @abstractmethod
    def placed(self, module: Any) -> nn.Module:
        """The module with the mechanism inside a swapped module."""

    @abstractmethod
    def call_own(self, layer: Callable[..., Tensor], args: tuple[Any, ...], given: Mapping[str, Any]) -> Any:
        """Answer an attention module's call with one of regard's layers, a function of (x, memory), in its format."""

    def inputs(self) -> Tensor:
        """Random float64 inputs; embedded tokens unless overridden."""
        return torch.randn(3, TOKENS, DIM, dtype=torch.float64)

    def context(self, valid: Tensor | None, x: Tensor) -> Context:
        """The context for one of regard's layers."""
        mask = None if valid is None else Mask(valid=valid)
        return Context(memory_mask=mask) if self.pattern.cross else Context(mask=mask)


class Transformers(Host):
    """A model of Hugging Face transformers."""

    package = "transformers"

    def run(self, model: Any, x: Tensor, valid: Tensor | None = None, **options: Any) -> Tensor:
        if valid is not None:
            options["attention_mask"] = valid.long()
            if self.pattern.causal:
                options["position_ids"] = (valid.cumsum(-1) - 1).clamp(min=0)
        if self.generates:
            options.setdefault("use_cache", False)
        return model(inputs_embeds=x, **options).last_hidden_state

    def placed(self, module: Any) -> nn.Module:
        return module.regard

    def call_own(self, layer: Callable[..., Tensor], args: tuple[Any, ...], given: Mapping[str, Any]) -> Any:
        return layer(args[0] if args else given["hidden_states"]), None


class _ExactAngles(nn.Module):
    """transformers' rotary embedding without its rounding of angles to float32."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        half = DIM // HEADS // 2
        frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = position_ids[..., None] * frequencies
        return tuple(torch.cat([t, t], -1).to(x.dtype) for t in (angles.cos(), angles.sin()))  # type: ignore[return-value]


class Llama(Transformers):
    """Causal, with rotary positions and grouped heads; angles are not rounded to float32."""

    title = "Llama (transformers)"
    pattern, rotates, groups, generates = Pattern.CAUSAL_SELF, True, GROUPS, True

    def build(self) -> nn.Module:
        import transformers

        config = transformers.LlamaConfig(**SIZES, num_attention_heads=HEADS, num_key_value_heads=GROUPS)
        model = transformers.LlamaModel(config)
        model.rotary_emb = _ExactAngles()
        return model

    def attention(self, model: Any) -> dict[str, Any]:
        return {f"layers.{i}.self_attn": layer.self_attn for i, layer in enumerate(model.layers)}

    def maps(self, module: Any) -> list[Map]:
        return [(m.weight, m.bias) for m in (module.q_proj, module.k_proj, module.v_proj, module.o_proj)]


class GPT2(Transformers):
    """Causal, with learned positions and a single map for queries, keys and values."""

    title = "GPT-2 (transformers)"
    pattern, generates = Pattern.CAUSAL_SELF, True

    def build(self) -> nn.Module:
        import transformers

        dropouts = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        config = transformers.GPT2Config(
            vocab_size=64,
            n_embd=DIM,
            n_layer=2,
            n_head=HEADS,
            n_inner=48,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
            **dropouts,
        )
        return transformers.GPT2Model(config)

    def attention(self, model: Any) -> dict[str, Any]:
        return {f"h.{i}.attn": block.attn for i, block in enumerate(model.h)}

    def maps(self, module: Any) -> list[Map]:
        parts = zip(module.c_attn.weight.T.chunk(3), module.c_attn.bias.chunk(3), strict=True)
        return [*parts, (module.c_proj.weight.T, module.c_proj.bias)]


class Bert(Transformers):
    """Noncausal; the output map is outside the attention module."""

    title = "BERT (transformers)"

    def build(self) -> nn.Module:
        import transformers

        dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        return transformers.BertModel(transformers.BertConfig(**SIZES, num_attention_heads=HEADS, **dropouts))

    def attention(self, model: Any) -> dict[str, Any]:
        return {f"encoder.layer.{i}.attention.self": b.attention.self for i, b in enumerate(model.encoder.layer)}

    def maps(self, module: Any) -> list[Map]:
        own = [(m.weight, m.bias) for m in (module.query, module.key, module.value)]
        return [*own, (torch.eye(DIM, dtype=module.query.weight.dtype), None)]


class ViT(Host):
    """Noncausal on image patches, with a class token before them."""

    title = "ViT (timm)"
    package, pads = "timm", False
    before: ClassVar[int] = 1
    """Number of tokens before the patches."""

    def build(self) -> nn.Module:
        import timm

        options: dict[str, Any] = {"img_size": 4 * SIDE, "patch_size": 4, "embed_dim": DIM, "depth": 2}
        options |= {} if self.before else {"class_token": False, "global_pool": "avg"}
        return timm.create_model("vit_tiny_patch16_224", num_heads=HEADS, num_classes=0, **options)

    def inputs(self) -> Tensor:
        return torch.randn(3, 3, 4 * SIDE, 4 * SIDE, dtype=torch.float64)

    def run(self, model: Any, x: Tensor, valid: Tensor | None = None, **options: Any) -> Tensor:
        return model.forward_features(x)

    def attention(self, model: Any) -> dict[str, Any]:
        return {f"blocks.{i}.attn": block.attn for i, block in enumerate(model.blocks)}

    def maps(self, module: Any) -> list[Map]:
        parts = zip(module.qkv.weight.chunk(3), module.qkv.bias.chunk(3), strict=True)
        return [*parts, (module.proj.weight, module.proj.bias)]

    def placed(self, module: Any) -> nn.Module:
        return module.attend

    def call_own(self, layer: Callable[..., Tensor], args: tuple[Any, ...], given: Mapping[str, Any]) -> Any:
        return layer(args[0])

    def context(self, valid: Tensor | None, x: Tensor) -> Context:
        roles = torch.zeros(x.shape[:2], dtype=torch.long)
        roles[:, : self.before] = int(Role.CLS)
        return Context(grid=(SIDE, SIDE), roles=roles if self.before else None)


class ViTWithoutClass(ViT):
    """The same ViT without a class token."""

    title = "ViT without a class token (timm)"
    before = 0


class TorchEncoder(Host):
    """Noncausal; a single map in torch's attention holds queries, keys and values."""

    title = "nn.TransformerEncoder"

    def build(self) -> nn.Module:
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 48, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def run(self, model: Any, x: Tensor, valid: Tensor | None = None, **options: Any) -> Tensor:
        return model(x, src_key_padding_mask=None if valid is None else ~valid)

    def attention(self, model: Any) -> dict[str, Any]:
        return {f"layers.{i}.self_attn": layer.self_attn for i, layer in enumerate(model.layers)}

    def maps(self, module: Any) -> list[Map]:
        parts = zip(module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3), strict=True)
        return [*parts, (module.out_proj.weight, module.out_proj.bias)]

    def placed(self, module: Any) -> nn.Module:
        return module.attend

    def call_own(self, layer: Callable[..., Tensor], args: tuple[Any, ...], given: Mapping[str, Any]) -> Any:
        return layer(args[0], args[1] if self.pattern.cross else None), None


class TorchDecoder(TorchEncoder):
    """The causal self attention of a decoder; its cross attention is not swapped."""

    title = "nn.TransformerDecoder, its self attention"
    pattern, only = Pattern.CAUSAL_SELF, "*.self_attn"
    PART: ClassVar[str] = "self_attn"

    def build(self) -> nn.Module:
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(DIM, HEADS, 48, dropout=0.0, batch_first=True), 2)

    def run(self, model: Any, x: Tensor, valid: Tensor | None = None, **options: Any) -> Tensor:
        n = x.shape[1]
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        memory = x.flip(1)[:, : n - 4] * 0.5
        return model(x, memory, tgt_mask=hidden, tgt_key_padding_mask=None if valid is None else ~valid)

    def attention(self, model: Any) -> dict[str, Any]:
        return {f"layers.{i}.{self.PART}": getattr(layer, self.PART) for i, layer in enumerate(model.layers)}


class TorchCross(TorchDecoder):
    """The cross attention of a decoder; its self attention is not swapped."""

    title = "nn.TransformerDecoder, its cross attention"
    pattern, only, PART = Pattern.NONCAUSAL_CROSS, "*.multihead_attn", "multihead_attn"

    def run(self, model: Any, x: Tensor, valid: Tensor | None = None, **options: Any) -> Tensor:
        queries = x.flip(1)[:, : TOKENS - 4] * 0.5
        return model(queries, x, memory_key_padding_mask=None if valid is None else ~valid)


HOSTS: dict[str, Host] = {
    "llama": Llama(),
    "gpt2": GPT2(),
    "bert": Bert(),
    "vit": ViT(),
    "vit_patches": ViTWithoutClass(),
    "encoder": TorchEncoder(),
    "decoder": TorchDecoder(),
    "cross": TorchCross(),
}
"""The models by name."""


def hosts() -> dict[str, Host]:
    """The models whose libraries are installed, by name."""
    return {name: host for name, host in HOSTS.items() if importlib.util.find_spec(host.package)}
