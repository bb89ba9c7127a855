r"""What gradient flow conserves in attention layers, and how far a run drifts from it.

The scores of a head are x_i^T W_Q^T W_K x_j. They stay the same when W_Q becomes g W_Q and W_K becomes g^-T W_K, for
any invertible g (d, d). So does the loss L, and with G = dL/dW its derivative along g = 1 + e A is 0 for every A:

    G_Q W_Q^T = W_K G_K^T,   hence under gradient flow, dW/dt = -G,

    D = W_Q W_Q^T - W_K W_K^T   (d, d)   is constant,

and likewise D = W_V W_V^T - W_O^T W_O of values and output (arXiv 1806.00900; arXiv 2012.04728 for symmetries in
general).

- Biases of queries, keys and values are one more column of their weights.
- Heads that share keys and values share g: their W_Q W_Q^T (and W_O^T W_O) are added up.
- Where only diagonal g keep the output the same, as with gates on features, the diagonal of D is constant; where only
  multiples of 1 do, its trace, |W_Q|^2 - |W_K|^2: rotary positions turn planes of two features (for each plane such a
  number is constant; the trace is their sum).
- With a convolution, a feature map or a norm of heads in between, nothing of D is. What is constant then is the
  diagonal of the difference to what comes next: W_Q W_Q^T - F F^T for the filters F (d, taps) of a short convolution, and
  w w^T - W_O^T W_O for the gains w of a norm of output heads.

Which of these holds is found out, not looked up: g is applied to a copy of the layer in float64, and its output on
random tokens compared, as many as the items of the run have (at most 512): a layer whose window reaches over all of
them obeys the laws of softmax, whatever it does beyond. :class:`Laws` follows what holds.

A step of gradient descent at rate r changes D by r^2 (G_Q G_Q^T - G_K G_K^T), so that the drift over a given time goes
with r; momentum does not change that. Weight decay shrinks D, and Adam, which scales each entry of G by itself, moves
it at once. The one-layer model of arXiv 2305.16380 has another law, of its scores: see
:mod:`regard.studies.training_dynamics`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from regard.contract import Context, Unsupported
from regard.layers.attention import AttentionLayer
from regard.layers.base import Layer
from regard.layers.convolution import ShortConvolution
from regard.layers.linear import Linear
from regard.tasks import Task
from regard.workbench.reports.sections import Curves, Section
from regard.workbench.trained.monitoring import RunMonitor

if TYPE_CHECKING:
    from jaxtyping import Float

FORMULAS = {
    "queries and keys": "W_Q W_Qᵀ − W_K W_Kᵀ",
    "values and output": "W_V W_Vᵀ − W_Oᵀ W_O",
    "queries and filters": "W_Q W_Qᵀ − F Fᵀ",
    "keys and filters": "W_K W_Kᵀ − F Fᵀ",
    "values and filters": "W_V W_Vᵀ − F Fᵀ",
    "norm and output": "w wᵀ − W_Oᵀ W_O",
}
"""D, for each pair of parameters that may have a law."""
FORMS = ("matrix", "diagonal", "trace")
"""What of D may be constant, the most first."""
MOST_TOKENS, GRID = 512, (4, 4)
"""Most random tokens on which the outputs of a layer are compared, and their grid for layers of images."""
SAME = 1e-9
"""Largest difference of equal outputs, relative to the largest output."""
MOST_CURVES = 12
"""Most laws in a picture."""

Side = list[Tensor]
"""The parameters on one side of a pair as views (heads, d, columns), with a row for each feature of a head."""


def attention_layers(model: nn.Module) -> dict[int, AttentionLayer]:
    """The attention layers of a model, by their number among the layers of all mechanisms, in its order; what is inside
    another mechanism's layer is numbered in its place."""
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    single = [
        one
        for one in layers
        if isinstance(one, AttentionLayer) or sum(isinstance(inside, Layer) for inside in one.modules()) == 1
    ]
    return {number: layer for number, layer in enumerate(single) if isinstance(layer, AttentionLayer)}


def laws_of(layer: AttentionLayer, tokens: int) -> dict[str, str]:
    """What gradient flow on items of so many tokens conserves of each pair of a layer's parameters: ``matrix``,
    ``diagonal`` or ``trace``, or why it conserves nothing."""
    with torch.enable_grad():
        pairs = pairs_of(layer)
    found = dict.fromkeys(pairs, "the output depends on more than their product")
    try:
        held = _symmetries(layer, min(tokens, MOST_TOKENS))
    except Unsupported as error:
        return dict.fromkeys(pairs, str(error))
    for pair, sides in pairs.items():
        if not all(sides):
            found[pair] = "they are not two plain matrices with the same features in every head"
        elif not all(one.requires_grad for side in sides for one in side):
            found[pair] = "not both are trained"
        elif pair in held:
            found[pair] = held[pair]
    return found


def pairs_of(layer: AttentionLayer) -> dict[str, tuple[Side, Side]]:
    """The pairs of parameters that a layer has; sides are empty where they are not such matrices."""
    projections = {
        "queries": (layer.query, layer.num_heads),
        "keys": (layer.key, layer.kv_heads),
        "values": (layer.value, layer.kv_heads),
    }
    rows = {name: _rows(*one) for name, one in projections.items()}
    output = _plain(layer.output)
    columns = [] if output is None else _by_head([output.weight.mT], layer.num_heads)
    found = {"queries and keys": (rows["queries"], rows["keys"]), "values and output": (rows["values"], columns)}
    convolved = [name for name, (module, _) in projections.items() if module is not None]
    for name, convolution in zip(convolved, layer.convolutions, strict=False):
        if isinstance(convolution, ShortConvolution):
            filters: Tensor = convolution.weight
            found[f"{name} and filters"] = (rows[name], _by_head([filters], projections[name][1]))
    gains = [] if layer.output_norm is None else [one[None, :, None] for one in layer.output_norm.parameters()]
    if gains:
        found["norm and output"] = (gains, columns)
    return {
        pair: sides if all(sides) and sides[0][0].shape[1] == sides[1][0].shape[1] else ([], [])
        for pair, sides in found.items()
    }


def _rows(module: nn.Module | None, heads: int) -> Side:
    """The rows of a projection by head: its weight, and its bias as a column."""
    linear = _plain(module)
    if linear is None:
        return []
    return _by_head([linear.weight] if linear.bias is None else [linear.weight, linear.bias[:, None]], heads)


def _plain(module: nn.Module | None) -> nn.Linear | None:
    """The module if it is a linear layer, but not a subclass, which may compute something else."""
    return module if isinstance(module, nn.Linear) and type(module) in (nn.Linear, Linear) else None


def _by_head(matrices: Side, heads: int) -> Side:
    if any(one.shape[0] % heads for one in matrices):
        return []
    return [one.unflatten(0, (heads, -1)) for one in matrices]


@torch.no_grad()
def _symmetries(layer: AttentionLayer, tokens: int) -> dict[str, str]:
    """For each pair the largest group of g that keeps the layer's output and losses as they are, with g on one side and
    g^-T on the other and another g for each group of heads; named by what it conserves."""
    draws = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64, device="cpu")

    trial = copy.deepcopy(layer).cpu().double().eval()
    for parameter in trial.parameters():
        parameter.add_(0.1 * normal(*parameter.shape))  # so that zeros at the start hide nothing
    on_grid = layer.card.keeps_places and not layer.pattern.cross
    x = normal(1, math.prod(GRID) if on_grid else tokens, layer.dim)
    memory = normal(1, tokens + 1, layer.spec.memory_dim) if layer.pattern.cross else None
    context = Context(grid=GRID if on_grid else None)

    def outputs() -> list[Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            result = trial(x, memory, context=context)
        return [result.output, *(total for total, _ in result.losses.values())]

    def kept(sides: tuple[Side, Side], form: str) -> bool:
        groups, width = min(len(side[0]) for side in sides), sides[0][0].shape[1]
        exponent = normal(groups, width, width) * width**-0.5
        if form != "matrix":
            numbers = exponent.diagonal(dim1=1, dim2=2) if form == "diagonal" else exponent[:, :1, 0].expand(-1, width)
            exponent = (numbers.sign() * (0.3 + numbers.abs())).diag_embed()
        whole = [[one.clone() for one in side] for side in sides]
        for side, g in zip(sides, (exponent.matrix_exp(), (-exponent).matrix_exp().mT), strict=True):
            for one in side:
                one.copy_(g.repeat_interleave(len(one) // groups, 0) @ one)
        after = outputs()
        for side, old in zip(sides, whole, strict=True):
            for one, other in zip(side, old, strict=True):
                one.copy_(other)
        return all(
            float((a - b).abs().max()) <= SAME * float(b.abs().max()) for a, b in zip(after, before, strict=True)
        )

    before, found = outputs(), {}
    for pair, sides in pairs_of(trial).items():
        form = next((form for form in FORMS if all(sides) and kept(sides, form)), None)
        if form is not None:
            found[pair] = form
    return found


def parts(layer: AttentionLayer, pair: str, form: str) -> tuple[Float[Tensor, "g x"], Float[Tensor, "g x"]]:
    """Both parts of what is conserved, whose difference it is, for each group of heads that share parameters, in float64:
    d^2 numbers for ``matrix``, d for ``diagonal``, one for ``trace``."""
    sides = pairs_of(layer)[pair]
    groups = min(len(side[0]) for side in sides)
    first, second = (_of_form(_products(side, groups), form) for side in sides)
    return first, second


def _products(side: Side, groups: int) -> Float[Tensor, "g d d"]:
    """W W^T, summed over the heads of each group."""
    w = torch.cat([one.detach().cpu().double() for one in side], 2)
    return (w @ w.mT).unflatten(0, (groups, -1)).sum(1)


def _of_form(products: Float[Tensor, "g d d"], form: str) -> Float[Tensor, "g x"]:
    diagonal = products.diagonal(dim1=1, dim2=2)
    return {"matrix": products.flatten(1), "diagonal": diagonal, "trace": diagonal.sum(1, keepdim=True)}[form]


class Laws:
    """What gradient flow conserves in attention layers, and its values at the start of a run.

    Args:
        layers: the layers with their weights at the start, by number.
        tokens: the length of the run's items.

    Attributes:
        forms: what is conserved, one of `FORMS`, by number of the layer and pair.
        without: why nothing is, by number of the layer and pair.
    """

    def __init__(self, layers: Mapping[int, AttentionLayer], tokens: int) -> None:
        self.forms: dict[tuple[int, str], str] = {}
        self.without: dict[tuple[int, str], str] = {}
        for number, layer in layers.items():
            for pair, told in laws_of(layer, tokens).items():
                (self.forms if told in FORMS else self.without)[number, pair] = told
        self._start = {(at, pair): parts(layers[at], pair, form) for (at, pair), form in self.forms.items()}

    def drifts(self, layers: Mapping[int, AttentionLayer]) -> dict[str, dict[str, list[float]]]:
        """By law, and for each group of heads: the ``drift``, how far what is conserved is from its start, and how far
        its two parts together have ``moved``; relative to the size of the parts at the start. A drift of 0 is gradient
        flow; it can be at most what the parts have moved."""
        found = {}
        for (number, pair), form in self.forms.items():
            (one, other), (first, second) = self._start[number, pair], parts(layers[number], pair, form)
            size = (one.norm(dim=1) + other.norm(dim=1)).clamp(min=1e-300)
            moved = (first - one).norm(dim=1) + (second - other).norm(dim=1)
            drift = (first - one - second + other).norm(dim=1)
            found[_name(number, pair)] = {"drift": (drift / size).tolist(), "moved": (moved / size).tolist()}
        return found

    def rows(self, looks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """A row for each layer and pair, by the last look."""
        last = looks[-1].get("laws", {}) if looks else {}
        keys = sorted({**self.forms, **self.without}, key=lambda key: (key[0], list(FORMULAS).index(key[1])))
        return [
            {
                "layer": number,
                "of": pair,
                "conserved": self._conserved(number, pair),
                **dict.fromkeys(("drift", "largest of a head", "parts moved", "drift over that")),
                **_measured(last.get(_name(number, pair))),
            }
            for number, pair in keys
        ]

    def _conserved(self, number: int, pair: str) -> str:
        if (number, pair) in self.without:
            return f"nothing: {self.without[number, pair]}"
        form = self.forms[number, pair]
        return FORMULAS[pair] if form == "matrix" else f"{form} of {FORMULAS[pair]}"

    def says(self, looks: Sequence[Mapping[str, Any]]) -> str:
        """How far the laws have drifted by the last look, in a sentence; "" if there is none."""
        known = [row for row in self.rows(looks) if row["drift"] is not None]
        if not known:
            return ""
        drift, moved = (sum(row[name] for row in known) / len(known) for name in ("drift", "parts moved"))
        most = max(known, key=lambda row: row["largest of a head"])
        return (
            f"By step {looks[-1]['step']} what gradient flow would conserve has drifted by {_percent(drift)} of the size of its "
            f"two parts (at most {_percent(most['largest of a head'])}, {most['of']} of layer {most['layer']}), which moved by "
            f"{_percent(moved)} themselves: finite learning rates, weight decay and Adam break the law, so what is shown is the drift."
        )

    def section(self, looks: Sequence[Mapping[str, Any]]) -> Section:
        """The report section: drift over the run, beside what the weights moved, and a row for each layer and pair."""
        names = [_name(*key) for key in self.forms]
        over = "" if len(names) <= MOST_CURVES else f" The pictures have the first {MOST_CURVES} of {len(names)}."
        drift, share = (
            {name: list(_course(looks, name, column)) for name in names[:MOST_CURVES]}
            for column in ("drift", "drift over that")
        )
        pictures = (
            Curves("Drift of what gradient flow conserves", "step", "of its size", drift, log_x=True, log_y=True),
            Curves("Drift over what its parts moved", "step", "share", share, log_x=True),
        )
        says = (
            f"{self.says(looks)} Means over the heads of a layer; heads that share keys count as one. Biases count as columns of their "
            "weights; F are the filters of a short convolution, w the gains of a norm. With gates on features the diagonal alone is "
            f"conserved, with rotary positions the trace. In the second picture 0 is gradient flow, and at 1 nothing of the law is left.{over}"
        )
        return Section("What gradient flow would conserve", says, pictures if names else (), self.rows(looks))


def _name(number: int, pair: str) -> str:
    return f"{number} {pair}"


def _measured(law: Mapping[str, Sequence[float]] | None) -> dict[str, float | None]:
    """The columns of a law at a look; none if it was not measured."""
    if law is None:
        return {}
    drift, moved = (sum(law[name]) / len(law[name]) for name in ("drift", "moved"))
    over = drift / moved if moved > 0 else None
    return {"drift": drift, "largest of a head": max(law["drift"]), "parts moved": moved, "drift over that": over}


def _course(looks: Sequence[Mapping[str, Any]], name: str, column: str) -> Iterator[tuple[float, float | None]]:
    for look in looks:
        value = _measured(look.get("laws", {}).get(name)).get(column)
        if look["step"] > 0:
            yield float(look["step"]), value if value is None or value > 0 else None


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


class ConservationMonitor(RunMonitor):
    """Records during a run how far what gradient flow would conserve drifts, in all attention layers of a model.

    Args:
        task: the task of the run.
        path: file for the records, with which a resumed run continues; None to write none.
    """

    name = "conservation"
    lede = "What gradient flow would conserve in the attention layers, and how far training drifts from it."

    def __init__(self, task: Task, *, path: Path | None = None) -> None:
        super().__init__(path)
        self.tokens = task.length
        self.laws: Laws | None = None
        self.restore()

    def check(self, model: nn.Module) -> None:
        """Find the laws of a model at the start of its training. Raise Unsupported if there are none."""
        self.laws = Laws(attention_layers(model), self.tokens)
        if not self.laws.forms:
            reasons = dict.fromkeys(self.laws.without.values())
            why = f" ({'; '.join(reasons)})" if reasons else ""
            raise Unsupported(
                f"--monitor conservation of a model in whose layers gradient flow conserves nothing{why}",
                supported="attention layers with queries, keys and values",
                nearest="softmax",
            )

    def look(self, model: nn.Module, step: int) -> None:
        """Measure the drift after `step` steps, since the check or, without one, since the first look."""
        layers = attention_layers(model)
        self.laws = self.laws or Laws(layers, self.tokens)
        self.keep(step, {"laws": self.laws.drifts(layers)})

    def summary(self) -> dict[str, Any]:
        return {"laws": self.laws.rows(self.as_record()["looks"]) if self.laws else []}

    def says(self) -> str:
        return self.laws.says(self.as_record()["looks"]) if self.laws else ""

    def sections(self) -> list[Section]:
        return [self.laws.section(self.as_record()["looks"])] if self.laws else []
