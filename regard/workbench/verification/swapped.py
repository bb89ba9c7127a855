"""Every mechanism in the modules of other libraries: is a swapped model what the project's own layers make of its weights?

:func:`check_swap` fills one cell of that table: a small model of another library is swapped, a copy of it gets layers of
:func:`regard.create_layer` in the place of its attention modules, with the same weights, and both are run.
"""

from __future__ import annotations

import copy
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Context, Kind, Loss, Mask, Mechanism, Pattern, Role, Unsupported
from regard.create import create_layer
from regard.integrations import collect_losses, swap
from regard.models.losses import add_losses, auxiliary_loss

DIM, HEADS, GROUPS, TOKENS, SIDE = 64, 8, 2, 21, 4
PROGRESS = 10.0
"""Steps of training, for schedules."""
SPREAD = 0.15
"""Standard deviation of all weights: scores of a few units, and states that stay finite in float32."""
TOLERANCES = {
    "float64": 1e-10,
    "float32": 1e-5,
    "padding": 1e-10,
    "training": 1e-8,
    "cache": 1e-10,
}
"""Largest difference allowed, as a fraction of the largest number there."""

MEANINGS = {
    "float64": "the hidden states in float64",
    "float32": "and in float32",
    "padding": "with padding, at the tokens that exist",
    "training": "the gradient of the input in training mode, through auxiliary losses too",
    "cache": "the hidden states of pieces that follow one another in a cache, beside those of the whole",
}
SHELL = {
    "output_norm": None,
    "output_gate": None,
    "short_convolution": 0,
    "query_key_norm": None,
    "key_expand": 1.0,
    "value_expand": None,
    "bias": True,
}
"""What own layers have beside their mechanism and other libraries' modules have not."""

Map = tuple[Tensor, Tensor | None]
Losses = dict[str, Loss]


@dataclass
class SwapCell:
    """A mechanism in a model.

    Attributes:
        model: name of the model, of :func:`hosts`.
        mechanism, variant: name, and set of options; "" for the default ones.
        refused: why it is not swapped; "" where it is.
        errors: the largest difference of each check, as a fraction of the largest number there.
        withheld: why a check was refused, by its name.
        cache: what generation goes on from: ``state``, ``keys`` or "" where it reads whole sequences.
    """

    model: str
    mechanism: str
    variant: str = ""
    refused: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    withheld: dict[str, str] = field(default_factory=dict)
    cache: str = ""

    @property
    def failures(self) -> list[str]:
        """Checks whose difference is too large."""
        return [name for name, error in self.errors.items() if not error <= TOLERANCES[name]]

    def row(self) -> dict[str, Any]:
        """As JSON has it: what there is."""
        return {name: value for name, value in asdict(self).items() if value or name in ("model", "mechanism")}


class Host(ABC):
    """A small model of another library.

    Attributes:
        title: what it is.
        package: the library it needs.
        pattern: of its attention modules.
        only: paths of those that are swapped; None for all.
        rotates: whether it has rotary positions.
        groups: key/value heads.
        pads: whether its tokens may be padded.
        generates: whether it goes on from a cache.
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
        """The model, with random weights."""

    @abstractmethod
    def run(self, model: Any, x: Tensor, valid: Tensor | None = None, **options: Any) -> Tensor:
        """Hidden states (B, N, C) of the inputs `x`, of which those not `valid` are padding."""

    @abstractmethod
    def attention(self, model: Any) -> dict[str, Any]:
        """The attention modules by path."""

    @abstractmethod
    def maps(self, module: Any) -> list[Map]:
        """Weights (out, in) and biases of queries, keys, values and output."""

    @abstractmethod
    def placed(self, module: Any) -> nn.Module:
        """The mechanism in a swapped module."""

    @abstractmethod
    def call_own(self, layer: Callable[..., Tensor], args: tuple[Any, ...], given: Mapping[str, Any]) -> Any:
        """A call of an attention module by an own layer of (x, memory), with what the module returns."""

    def inputs(self) -> Tensor:
        """Random inputs in float64: embedded tokens, where a model does not say otherwise."""
        return torch.randn(3, TOKENS, DIM, dtype=torch.float64)

    def context(self, valid: Tensor | None, x: Tensor) -> Context:
        """The context of an own layer."""
        mask = None if valid is None else Mask(valid=valid)
        return Context(memory_mask=mask) if self.pattern.cross else Context(mask=mask)


class _Own(nn.Module):
    """An own layer, called as the module in whose place it is."""

    batch_first = True
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(self, host: Host, layer: Any, told: dict[str, Any]) -> None:
        super().__init__()
        self.host, self.layer, self.told, self.num_heads = host, layer, told, HEADS

    def forward(self, *args: Any, **given: Any) -> Any:
        def run(x: Tensor, memory: Tensor | None = None) -> Tensor:
            context = self.told["context"](x)
            result = self.layer(x, memory, context=context.replace(progress=PROGRESS if self.training else None))
            add_losses(self.told["losses"], result.losses)
            return result.output

        return self.host.call_own(run, args, given)


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


SIZES = {"vocab_size": 64, "hidden_size": DIM, "intermediate_size": 48, "num_hidden_layers": 2}
"""Of transformers' configs."""


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
    """Causal, with learned positions and one map for queries, keys and values."""

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
    """Noncausal; the output map stands outside the attention module."""

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
    """Noncausal on patches, with a class token before them."""

    title = "ViT (timm)"
    package, pads = "timm", False
    before: ClassVar[int] = 1
    """Tokens before the patches."""

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
    """The same without a class token."""

    title = "ViT without a class token (timm)"
    before = 0


class TorchEncoder(Host):
    """Noncausal; the one map of torch's attention holds queries, keys and values."""

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
    """The causal self attention of a decoder, whose cross attention stays."""

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
    """The cross attention of a decoder, whose self attention stays."""

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
    """The models whose libraries are installed."""
    return {name: host for name, host in HOSTS.items() if importlib.util.find_spec(host.package)}


def check_swap(model: str, mechanism: str, variant: str = "", *, checks: Sequence[str] = tuple(TOLERANCES)) -> SwapCell:
    """Measure one cell.

    Args:
        model: of :func:`hosts`.
        mechanism: name.
        variant: of the mechanism's variants; "" for the default options.
        checks: some of `MEANINGS`; those that the model has are made.
    """
    host, card = HOSTS[model], get_mechanism(mechanism)
    if host.package == "transformers":
        import regard.integrations.transformers  # noqa: F401
    cell = SwapCell(model, mechanism, variant)
    options = {n: x for n, x in card.variants[variant].items() if n != "num_heads"} if variant else {}
    torch.manual_seed(0)
    swapped = host.build().double().eval()
    try:
        report = swap(swapped, mechanism, pattern=host.pattern, only=host.only, **options)
    except Unsupported as error:
        cell.refused = _reason(error)
        return cell
    for parameter in swapped.parameters():
        nn.init.normal_(parameter, std=SPREAD)
    told: dict[str, Any] = {}
    try:
        own = _with_own_layers(host, swapped, card, options, told)
    except Unsupported as error:
        raise AssertionError(f"{mechanism} is swapped into a {host.title} but has no layer there: {error}") from error
    cell.cache = _cache_of(host, report.notes)
    x = host.inputs()
    valid = torch.ones(3, TOKENS, dtype=torch.bool)
    valid[1, :3] = False
    valid[2, [0, 7] if host.pattern is not Pattern.CAUSAL_SELF else slice(0, 1)] = False
    made: dict[str, Callable[[], float]] = {
        "float64": lambda: _compare_outputs(host, swapped, own, told, x),
        "float32": lambda: _compare_outputs(host, _single(swapped), _single(own), told, x.float()),
        "padding": lambda: _compare_outputs(host, swapped, own, told, x, valid),
        "training": lambda: _compare_gradients(host, swapped, own, told, x),
        "cache": lambda: _compare_pieces(host, swapped, x, valid),
    }
    for name, check in made.items():
        if name not in checks or (name == "padding" and not host.pads) or (name == "cache" and not cell.cache):
            continue
        try:
            cell.errors[name] = check()
        except Unsupported as error:
            cell.withheld[name] = _reason(error)
    if "float64" in cell.withheld:
        cell.refused, cell.withheld = cell.withheld["float64"], {}
    return cell


def _with_own_layers(
    host: Host, swapped: nn.Module, card: Mechanism, options: Mapping[str, Any], told: dict[str, Any]
) -> nn.Module:
    """A copy of a swapped model with own layers in the place of its attention modules."""
    inner = get_mechanism("softmax") if card.kind is Kind.WRAPPER else card
    shell: dict[str, Any] = {n: x for n, x in SHELL.items() if n not in inner.config.__dataclass_fields__}  # type: ignore[attr-defined]
    shell["num_kv_heads"] = host.groups
    shell["positions"] = "rotary" if host.rotates and "rotary" in inner.accepts_positions else "none"
    if card.kind is Kind.WRAPPER:
        beside = ("num_kv_heads", "positions")
        outer = {n: shell.pop(n) for n in beside}
        shell = {**outer, "mechanism_options": shell}
    own = copy.deepcopy(swapped)
    knows_tokens = "roles" in inner.honours or (inner.keeps_places and not getattr(host, "before", 0))
    told["knows_grid"] = knows_tokens
    for path, module in host.attention(own).items():
        layer: Any = create_layer(card.name, DIM, HEADS, pattern=host.pattern, **shell, **options).double()
        attention = layer.attention if card.kind is Kind.WRAPPER else layer
        with torch.no_grad():
            linears = (attention.query, attention.key, attention.value, attention.output)
            for linear, (weight, bias) in zip(linears, host.maps(module), strict=True):
                linear.weight.copy_(weight)
                linear.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
        for part in ("projection", "merge"):
            made, learned = getattr(attention, part), getattr(host.placed(module), part)
            if made is not None:  # biases that follow the shell's are those of its own projections
                for name in made.load_state_dict(learned.state_dict(), strict=False).missing_keys:
                    nn.init.zeros_(made.get_parameter(name))
        parent, _, name = path.rpartition(".")
        setattr(own.get_submodule(parent), name, _Own(host, layer, told))
    return own.eval()


def _tell(host: Host, told: dict[str, Any], valid: Tensor | None) -> None:
    def context(x: Tensor) -> Context:
        found = host.context(valid, x)
        return found if told["knows_grid"] else found.replace(grid=None, roles=None)

    told["context"], told["losses"] = context, {}


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _single(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).float()


def _run(host: Host, model: nn.Module, x: Tensor, valid: Tensor | None) -> Tensor:
    torch.manual_seed(1)  # some draw in evaluation too
    return host.run(model, x, valid)


def _compare_outputs(
    host: Host, swapped: nn.Module, own: nn.Module, told: dict[str, Any], x: Tensor, valid: Tensor | None = None
) -> float:
    _tell(host, told, valid)
    with torch.no_grad():
        found, expected = (_run(host, model, x, valid) for model in (swapped, own))
    if valid is not None and not host.pattern.cross:
        found, expected = found[valid], expected[valid]
    return _difference(found, expected)


def _compare_gradients(host: Host, swapped: nn.Module, own: nn.Module, told: dict[str, Any], x: Tensor) -> float:
    _tell(host, told, None)
    gradients: list[Tensor] = []
    for model in (swapped, own):
        model.train()
        torch.manual_seed(1)
        given = x.clone().requires_grad_()
        try:
            with collect_losses(model, progress=PROGRESS) as collected:
                output = host.run(model, given)
        finally:
            model.eval()
        losses: Losses = collected.losses if model is swapped else told["losses"]
        loss = output.square().mean() + auxiliary_loss(losses, dict.fromkeys(losses, 1.0))
        gradients += torch.autograd.grad(loss, given)
    return _difference(*gradients)


def _compare_pieces(host: Host, swapped: nn.Module, x: Tensor, valid: Tensor) -> float:
    from regard.integrations.transformers import CACHE

    with torch.no_grad():
        whole = _run(host, swapped, x, valid)
        if not torch.equal(whole, host.run(swapped, x, valid)):
            raise Unsupported("a comparison of pieces with the whole, where each draws for itself")
        cache, found = None, []
        start = 0
        positions = (valid.cumsum(-1) - 1).clamp(min=0)
        for size in (8, 1, 1, 1, 1, 5, 1, TOKENS - 18):
            piece = slice(start, start + size)
            result: Any = swapped(
                inputs_embeds=x[:, piece],
                attention_mask=valid[:, : start + size].long(),
                position_ids=positions[:, piece],
                use_cache=True,
                **{CACHE: cache},
            )
            cache, start = getattr(result, CACHE), start + size
            found.append(result.last_hidden_state)
    return _difference(torch.cat(found, 1)[valid], whole[valid])


def _cache_of(host: Host, notes: Sequence[str]) -> str:
    if not host.generates or any("use_cache is off" in note for note in notes):
        return ""
    return "state" if any("from the state of" in note for note in notes) else "keys"


def _reason(error: Unsupported) -> str:
    """What was asked, without the path of the module that was first asked for it."""
    text = str(error)
    if text.count("not supported: ") > 1:
        text = text.split("not supported: ")[2]
    return text.removeprefix("not supported: ").split("; ")[0]


def swap_cells(
    models: Sequence[str] | None = None, mechanisms: Sequence[str] | None = None, *, variants: bool = True
) -> Iterator[SwapCell]:
    """All cells, one after the other.

    Args:
        models, mechanisms: names; all when None.
        variants: whether each set of options of a mechanism has a cell of its own.
    """
    for mechanism in list_mechanisms() if mechanisms is None else mechanisms:
        for model in hosts() if models is None else models:
            for variant in ("", *(swap_variants(mechanism) if variants else ())):
                cell = check_swap(model, mechanism, variant)
                if not variant or not cell.refused:
                    yield cell


def swap_variants(mechanism: str) -> list[str]:
    """Variants of a mechanism whose options are its own, so that they can be given to :func:`regard.swap`."""
    card = get_mechanism(mechanism)
    own = {*card.config.__dataclass_fields__, "num_heads"}  # type: ignore[attr-defined]
    return [name for name, options in card.variants.items() if options.keys() <= own]


__all__ = ["HOSTS", "MEANINGS", "TOLERANCES", "SwapCell", "check_swap", "hosts", "swap_cells", "swap_variants"]
