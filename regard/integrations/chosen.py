"""The mechanism that replaces another library's attention, with its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regard.catalogue import get_mechanism
from regard.contract import Kind, Mechanism, Pattern, Unsupported
from regard.mechanisms.mixture_of_heads import cannot_gather


@dataclass(frozen=True)
class Chosen:
    """A mechanism with its options, optionally inside a wrapper with options of its own.

    Attributes:
        card, config: the mechanism of the heads, and its options.
        wrapper, wrapper_config: a mechanism that changes the output of those heads, and its options; None without one.
    """

    card: Mechanism
    config: Any
    wrapper: Mechanism | None = None
    wrapper_config: Any = None

    @classmethod
    def of(cls, card: Mechanism, **options: Any) -> Chosen:
        """Choose a mechanism that takes another module's queries, keys and values, or a wrapper (options `mechanism`,
        by default ``softmax``, and `mechanism_options`).

        Raises:
            Unsupported: for other mechanisms and options, with the reason.
        """
        if card.kind is not Kind.WRAPPER:
            check_swappable(card)
            return cls(card, card.options(**options))
        inner = get_mechanism(options.pop("mechanism", "softmax"))
        check_swappable(inner)
        config = inner.options(**options.pop("mechanism_options", {}))
        own = card.options(**options)
        if getattr(own, "compute", None) == "gather" and "chosen" not in inner.axes:
            raise cannot_gather(inner.name)
        return cls(inner, config, card, own)

    @property
    def name(self) -> str:
        """The name of the mechanism, or of the wrapper around it."""
        return self.card.name if self.wrapper is None else self.wrapper.name

    @property
    def plain(self) -> bool:
        """Whether this is softmax attention and nothing else."""
        return self.wrapper is None and self.card.name == "softmax" and self.config == self.card.options()

    def require_pattern(self, pattern: str | Pattern) -> Pattern:
        """See :meth:`regard.contract.Mechanism.require_pattern`."""
        if self.wrapper is not None:
            self.wrapper.require_pattern(pattern)
        return self.card.require_pattern(pattern)


def check_swappable(card: Mechanism) -> None:
    """Raise Unsupported, with the reason, for a mechanism that cannot take other modules' queries, keys and values."""
    reason = None
    if card.kind is not Kind.ATTENTION:
        reason = f"is a {card.kind.value}, which has no queries, keys and values of a head"
    elif card.prepare is not None:
        reason = "inserts tokens into its input"
    elif lacking := [
        what for name, what in (("q", "queries"), ("k", "keys"), ("v", "values")) if name not in card.inputs
    ]:
        reason = f"takes no {' and no '.join(lacking)} and would drop the model's"
    elif "n" not in card.inputs["q"]:
        reason = "learns its own query and would drop the model's"
    elif card.module is not None:
        reason = "is a layer of its own, which makes keys of its earlier inputs"
    if reason is not None:
        raise Unsupported(
            f"swapping to {card.name}, which {reason}",
            supported="attention mechanisms of queries, keys and values",
            nearest="softmax, linear, gated_linear, delta_rule, sigmoid, local",
        )
