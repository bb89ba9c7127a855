"""Outliers in a model's activations: metrics that predict whether 8-bit activations suffice (arXiv 2306.12929).

Metrics are computed for one sequence at a time, over all tokens and features together, then averaged over sequences:

    infinity norm = max |x|,    kurtosis = mean (x - mean x)^4 / (s^4 + 1e-6)

with s the unbiased standard deviation. Normally distributed activations have a kurtosis near 3; if one entry of n
dominates all others, it is near n.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from regard.contract import Unsupported
from regard.core.precision import wide_dtype

if TYPE_CHECKING:
    from jaxtyping import Bool, Float

FEED_FORWARD = re.compile(r"(^|\.)(feed_forward|ffn|mlp|fc2|linear2)$|(?<!attention)\.output\.dense$")
"""Names of modules that return a feed-forward network's output in regard, torch, timm and transformers."""

EPS = 1e-6


def infinity_norm(x: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """Return the largest absolute value of each row."""
    return x.flatten(1).abs().amax(1)


def kurtosis(x: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """Return the kurtosis of each row's entries, in at least float32."""
    x = x.flatten(1).to(wide_dtype(x))
    fourth = (x - x.mean(1, keepdim=True)).pow(4).mean(1)
    return fourth / (x.std(1).pow(4) + EPS)


@dataclass(frozen=True)
class Outliers:
    """Mean metrics over the sequences seen at one place of a model."""

    infinity_norm: float
    kurtosis: float
    sequences: int


@dataclass
class OutlierMetrics:
    """The outlier metrics that :func:`watch_outliers` has measured so far.

    Attributes:
        valid: which tokens of the next batches count, (B, N) in the layout of the watched modules (inside regard's
            models valid tokens come first); all when None.
    """

    valid: Bool[Tensor, "b n"] | None = None
    _sums: dict[str, tuple[float, float, int]] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, Outliers]:
        """The metrics by module name; a name with ``.input`` appended is for a norm's input, the residual stream."""
        return {name: Outliers(a / n, b / n, n) for name, (a, b, n) in self._sums.items() if n}

    def summary(self, places: Callable[[str], bool] = lambda name: True) -> Mapping[str, float]:
        """Return ``max_infinity_norm``, ``mean_kurtosis`` and ``max_kurtosis`` over the places that `places` selects.

        Raises:
            Unsupported: if none of them has seen a batch.
        """
        found = [outliers for name, outliers in self.places.items() if places(name)]
        if not found:
            raise Unsupported(
                "outlier metrics of no activations", supported=", ".join(self.places) or "a call of the model first"
            )
        kurtoses = [one.kurtosis for one in found]
        return {
            "max_infinity_norm": max(one.infinity_norm for one in found),
            "mean_kurtosis": sum(kurtoses) / len(kurtoses),
            "max_kurtosis": max(kurtoses),
        }

    def add(self, place: str, x: Float[Tensor, "b n ..."]) -> None:
        """Add a batch at a place."""
        x = x.detach()
        rows = [x] if self.valid is None else [row[keep][None] for row, keep in zip(x, self.valid, strict=True)]
        for row in rows:
            if row.numel():
                a, b, n = self._sums.get(place, (0.0, 0.0, 0))
                more = float(infinity_norm(row).double().sum()), float(kurtosis(row).double().sum())
                self._sums[place] = (a + more[0], b + more[1], n + row.shape[0])


def is_norm(name: str, module: nn.Module) -> bool:
    """Return whether a module is a layer norm or an RMS norm, by the name of its class."""
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm"))


def is_feed_forward(name: str, module: nn.Module) -> bool:
    """Return whether a module returns a feed-forward network's output, by `FEED_FORWARD`."""
    return FEED_FORWARD.search(name) is not None


@contextmanager
def watch_outliers(
    model: nn.Module,
    *,
    outputs: Callable[[str, nn.Module], bool] = lambda n, m: is_norm(n, m) or is_feed_forward(n, m),
    inputs: Callable[[str, nn.Module], bool] = is_norm,
) -> Iterator[OutlierMetrics]:
    """Measure outliers in every call of `model` inside the block, by hooks that are removed after it.

    By default these are the paper's places: outputs of feed-forward networks, and inputs and outputs of every norm of
    tokens. The paper measures in evaluation mode, over the validation batches. The model is not changed; a compiled
    model must be compiled inside the block.

    Args:
        model: any module.
        outputs: called with a module's name and the module; returns whether to measure its output. Not called for
            modules inside a feed-forward network.
        inputs: likewise, whether to measure the module's first argument.

    Raises:
        Unsupported: if no module is selected.
    """
    metrics = OutlierMetrics()

    def hook(name: str, given: bool, returned: bool) -> Callable[..., None]:
        def see(module: nn.Module, arguments: tuple[Any, ...], result: Any) -> None:
            if given and arguments:
                _count(metrics, f"{name}.input", arguments[0])
            if returned:
                _count(metrics, name, result)

        return see

    handles: list[Any] = []
    whole: list[str] = []
    try:
        for name, module in model.named_modules():
            if any(name.startswith(f"{outer}.") for outer in whole):
                continue
            given, returned = inputs(name, module), outputs(name, module)
            if given or returned:
                handles.append(module.register_forward_hook(hook(name, given, returned)))
            if is_feed_forward(name, module):
                whole.append(name)
        if not handles:
            raise Unsupported(
                f"outlier metrics of {type(model).__name__}, without a norm or a feed-forward part",
                supported="outputs and inputs that choose modules by name",
                nearest="outputs=lambda name, module: True",
            )
        yield metrics
    finally:
        for handle in handles:
            handle.remove()


def _count(metrics: OutlierMetrics, place: str, value: Any) -> None:
    """Add (B, N, C) activations; others, such as those of head norms (B, N, H, D), are not on the residual stream."""
    x = value[0] if isinstance(value, tuple) and value else getattr(value, "output", value)
    if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3:
        metrics.add(place, x)
