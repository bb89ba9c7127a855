"""Linear layers that store their weights in 8 or 4 bits and compute with them in that form.

:mod:`regard.compression` makes them from trained layers; this module runs them and restores them in saved models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from regard.contract import Unsupported, check_options, one_of
from regard.engines.quantized_linear import (
    MIDDLE,
    dequantize,
    dynamic_linear,
    pack,
    quantized_linear,
)

if TYPE_CHECKING:
    from jaxtyping import Float, Int

BITS = (8, 4, 3, 2)
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class Format:
    """The number format of a quantized weight.

    Attributes:
        bits: bits per code: 8, 4, 3 or 2. Codes of 3 and 2 bits are stored in 4.
        group: columns of a row that share one scale: 32, 64 or 128; None for whole rows, as with 8 bits.
        symmetric: whether 0 is in the middle of each grid; otherwise each group has an offset as well.
        dynamic: whether each row of the inputs is rounded to 8 bits too; for 8-bit weights.
    """

    bits: int = 8
    group: int | None = None
    symmetric: bool = True
    dynamic: bool = False

    def __post_init__(self) -> None:
        one_of("bits", self.bits, BITS)
        if self.bits == 8 and (self.group is not None or not self.symmetric):
            raise Unsupported(
                "8 bits in groups or with offsets", supported="one scale for each row", nearest="bits=4, or no group"
            )
        if self.bits < 8:
            one_of("group", self.group, GROUPS)
            if self.dynamic:
                raise Unsupported(f"inputs in 8 bits with weights in {self.bits}", supported="weights in 8 bits")

    @property
    def codes(self) -> tuple[int, int]:
        """Smallest and largest code, counted from the middle."""
        half = 2 ** (self.bits - 1)
        return -half, half - 1

    def columns(self, given: int) -> int:
        """Number of code columns for a weight with that many columns: the last group is padded to full size."""
        return given if self.group is None else -(-given // self.group) * self.group

    def __str__(self) -> str:
        where = "" if self.group is None else f", groups of {self.group}" + ("" if self.symmetric else " with offsets")
        return f"int{self.bits}{where}" + (", inputs int8" if self.dynamic else "")


@dataclass(frozen=True)
class Codes:
    """The quantized values of a weight, which are ``values * scale + offset`` in each group.

    Attributes:
        values: (N, K) int8 counted from the middle, with K from :meth:`Format.columns`.
        scale: (N, groups) bfloat16.
        offset: (N, groups) bfloat16; None for symmetric grids.
    """

    values: Int[Tensor, "n k"]
    scale: Float[Tensor, "n g"]
    offset: Float[Tensor, "n g"] | None

    def weight(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n k"]:
        """The weight in floating point, including the columns that pad the last group."""
        grouped = self.values.to(dtype).unflatten(1, (self.scale.shape[1], -1)) * self.scale.to(dtype)[..., None]
        return (grouped if self.offset is None else grouped + self.offset.to(dtype)[..., None]).flatten(1)


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W stored as a :class:`Format` says.

    Args:
        in_features, out_features, bias: as in `torch.nn.Linear`.
        format: number format of the weight.
        scaled_inputs: whether column j of x is first multiplied by ``input_scale[j]``, with W adjusted to match.
        float_columns: input columns whose weights are kept in floating point in addition to the quantized ones.

    A new layer holds no weight: call :meth:`fill`, or load one.
    """

    scale: Tensor
    codes: Tensor
    offset: Tensor | None
    input_scale: Tensor | None
    kept_columns: Tensor | None
    kept_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        format: Format,
        scaled_inputs: bool = False,
        float_columns: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.format = in_features, out_features, format
        self.scaled_inputs, self.float_columns = scaled_inputs, float_columns
        columns = format.columns(in_features)
        groups = 1 if format.group is None else columns // format.group
        wide = format.bits == 8
        shape = (out_features, columns if wide else columns // 2)
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int8 if wide else torch.uint8))
        self.register_buffer("scale", torch.zeros((out_features, groups), dtype=torch.bfloat16))
        offset = None if format.symmetric else torch.zeros((out_features, groups), dtype=torch.bfloat16)
        self.register_buffer("offset", offset)
        self.register_buffer("input_scale", torch.ones(in_features) if scaled_inputs else None)
        kept = float_columns or None
        self.register_buffer("kept_columns", kept and torch.zeros(float_columns, dtype=torch.int64))
        self.register_buffer("kept_weight", kept and torch.zeros(out_features, float_columns))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    @classmethod
    def of(
        cls,
        linear: nn.Linear,
        codes: Codes,
        format: Format,
        *,
        input_scale: Float[Tensor, " k"] | None = None,
        float_columns: Int[Tensor, " c"] | None = None,
    ) -> QuantizedLinear:
        """A quantized version of a linear layer, with `codes` as its weight.

        Args:
            input_scale: see the class; the codes then represent ``weight / input_scale``.
            float_columns: columns whose weights are kept in floating point; their codes must be 0.
        """
        count = 0 if float_columns is None else len(float_columns)
        made = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            format=format,
            scaled_inputs=input_scale is not None,
            float_columns=count,
        ).to(linear.weight.device)
        made.fill(codes)
        with torch.no_grad():
            if input_scale is not None:
                made.input_scale = input_scale.to(linear.weight)
            if float_columns is not None and count:
                made.kept_columns = float_columns.to(linear.weight.device)
                made.kept_weight = linear.weight.detach()[:, float_columns].clone()
            if made.bias is not None:
                made.bias.data = linear.bias.detach().clone()
        return made.train(linear.training)

    def fill(self, codes: Codes) -> None:
        """Copy codes into this layer."""
        if self.format.bits == 8:
            self.codes.copy_(codes.values)
        else:
            self.codes.copy_(pack((codes.values + MIDDLE).to(torch.uint8)))
        self.scale.copy_(codes.scale)
        if self.offset is not None:
            assert codes.offset is not None
            self.offset.copy_(codes.offset)

    def forward(self, x: Float[Tensor, "*b k"]) -> Float[Tensor, "*b n"]:
        beside = None
        if self.kept_columns is not None:
            assert self.kept_weight is not None
            beside = x[..., self.kept_columns] @ self.kept_weight.to(x.dtype).T
            x = x.index_fill(-1, self.kept_columns, 0.0)
        if self.input_scale is not None:
            x = x * self.input_scale.to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if self.format.dynamic:
            y = dynamic_linear(x, self.codes, self.scale, bias)
        else:
            y = quantized_linear(x, self.codes, self.scale, self.offset, bias)
        return y if beside is None else y + beside

    @property
    def weight(self) -> Float[Tensor, "n k"]:
        """W in floating point, as applied to x, for code that reads weights. Computed on each access."""
        return self.dequantized()

    def dequantized(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n k"]:
        """:attr:`weight` in a dtype."""
        weight = dequantize(self.codes, self.scale, self.offset, dtype)[:, : self.in_features]
        if self.input_scale is not None:
            weight = weight * self.input_scale.to(dtype)
        if self.kept_columns is not None:
            assert self.kept_weight is not None
            weight = weight.index_copy(1, self.kept_columns, self.kept_weight.to(dtype))
        return weight

    def record(self) -> dict[str, Any]:
        """The arguments from which :func:`restore_layers` builds such a layer, for JSON."""
        return {
            **asdict(self.format),
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias is not None,
            "scaled_inputs": self.scaled_inputs,
            "float_columns": self.float_columns,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As for any module, but scales and offsets stay in bfloat16: the codes were chosen for these, and kernels read
        nothing else."""
        kept = {name: getattr(self, name) for name in ("scale", "offset")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if before is not None and getattr(self, name).dtype != before.dtype:
                setattr(self, name, before.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}"


class QuantizedEmbedding(nn.Module):
    """An embedding table tied to a quantized output head: looks up rows in the head's codes.

    The head is not registered as a submodule, so that its codes are stored and saved only once.

    Args:
        factor: the rows that are looked up are multiplied by it.
    """

    def __init__(self, head: QuantizedLinear, factor: float = 1.0) -> None:
        super().__init__()
        self._head, self.factor = (head,), factor

    @property
    def head(self) -> QuantizedLinear:
        """The linear layer that holds the codes."""
        return self._head[0]

    @property
    def num_embeddings(self) -> int:
        """Number of rows of the table."""
        return self.head.out_features

    @property
    def embedding_dim(self) -> int:
        """Number of columns of the table."""
        return self.head.in_features

    @property
    def weight(self) -> Float[Tensor, "n k"]:
        """The table in floating point. Computed on each access."""
        return self.head.weight

    def forward(self, ids: Int[Tensor, "*b"]) -> Float[Tensor, "*b k"]:
        rows = ids.flatten()
        found = dequantize(self.head.codes[rows], self.head.scale[rows], None, torch.float32).view(*ids.shape, -1)
        return found if self.factor == 1 else found * self.factor


def quantized_record(model: nn.Module) -> dict[str, dict[str, Any]]:
    """The quantized layers of a model by name, in the form that :func:`restore_layers` takes."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, dict[str, Any]] = {}
    for module, name in names.items():
        if isinstance(module, QuantizedLinear):
            found[name] = module.record()
        elif isinstance(module, QuantizedEmbedding):
            found[name] = {"head": names[module.head]} | ({} if module.factor == 1 else {"factor": module.factor})
    return found


def restore_layers(model: nn.Module, record: Mapping[str, Mapping[str, Any]], *, source: str) -> None:
    """Put empty quantized layers where a model had them when `record` was made; load its weights afterwards.

    Args:
        source: where the record comes from, for errors.

    Raises:
        Unsupported: for a record that does not fit the model.
    """
    linears = {name: entry for name, entry in record.items() if "head" not in entry}
    for name, entry in linears.items():
        old = _submodule(model, name, source)
        sizes = {"in_features", "out_features", "bias", "scaled_inputs", "float_columns"}
        if not isinstance(old, nn.Linear) or not sizes <= set(entry):
            raise Unsupported(
                f"{source}, in which {name} is not a linear layer", supported="the model that was compressed"
            )
        format = {key: value for key, value in entry.items() if key not in sizes}
        check_options(Format, format, f"the format of {name} in {source}")
        if (old.in_features, old.out_features) != (entry["in_features"], entry["out_features"]):
            raise Unsupported(
                f"{source}, in which {name} is {entry['out_features']} x {entry['in_features']}",
                supported=f"{old.out_features} x {old.in_features}, as the model has it",
            )
        made = QuantizedLinear(**{key: entry[key] for key in sizes}, format=Format(**format))
        replace_module(model, old, made.to(old.weight.device).train(old.training))
    for name, entry in record.items():
        if "head" in entry:
            head = _submodule(model, str(entry["head"]), source)
            if not isinstance(head, QuantizedLinear):
                raise Unsupported(f"{source}, in which {entry['head']} is not quantized", supported="a quantized head")
            replace_module(model, _submodule(model, name, source), QuantizedEmbedding(head, entry.get("factor", 1.0)))


def _submodule(model: nn.Module, name: str, source: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise Unsupported(
            f"{source}, whose layer {name} the model lacks", supported="the model that was compressed"
        ) from None


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace `old` by `new` wherever it occurs in a model; raise Unsupported if `old` is the model itself."""
    places = [(parent, name) for parent in model.modules() for name, child in parent._modules.items() if child is old]
    if not places:
        raise Unsupported("a model that is one layer itself", supported="a model that has layers in it")
    for parent, name in places:
        parent._modules[name] = new
