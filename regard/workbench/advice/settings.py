"""The question that `regard advise` answers."""

from __future__ import annotations

from dataclasses import dataclass

from regard.contract import Pattern, Unsupported, one_of
from regard.workbench.advice.layer_work import WHAT, LayerSettings
from regard.workbench.advice.needs import parse_needs

USES = {"train": "training", "infer": "forward", "serve": "decode"}
"""Uses of a mechanism, each with the kind of work whose time decides."""

LONGEST = 1 << 20


@dataclass(frozen=True)
class AdviseSettings:
    """The question.

    Attributes:
        lengths: one or more, from 1 to 2^20; with several, the geometric mean of the times decides.
        use: ``train``, ``infer`` or ``serve`` (one token after another, from a state).
        needs: names from :data:`regard.workbench.advice.needs.NEEDS`.
        memory: most bytes that one layer may hold in addition to its weights and input, at every length; None for no
            limit. For serving: the state and the memory of a step.
        pattern, dim, heads, head_dim, batch, dtype, device, short_convolution: as in
            :class:`regard.workbench.advice.layer_work.LayerSettings`.
        mechanisms: the candidates; by default all that mix tokens and have the pattern.
        exclude: mechanisms that are not candidates.
        what: kinds of work to predict; that of `use` is always included.
        seconds: time for measurements. The deciding work is measured at 32 and 64 tokens however long it takes, since
            nothing can be predicted without.
    """

    lengths: tuple[int, ...] = (1024,)
    use: str = "infer"
    needs: tuple[str, ...] = ()
    memory: int | None = None
    pattern: Pattern = Pattern.CAUSAL_SELF
    dim: int = 512
    heads: int = 8
    head_dim: int | None = None
    batch: int = 1
    dtype: str = "float32"
    device: str = "cpu"
    mechanisms: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    what: tuple[str, ...] = WHAT
    seconds: float = 120.0
    short_convolution: int | None = None

    def __post_init__(self) -> None:
        one_of("use", self.use, USES)
        lengths = (self.lengths,) if isinstance(self.lengths, int) else tuple(sorted(set(self.lengths)))
        if not lengths or lengths[0] < 1 or lengths[-1] > LONGEST:
            raise Unsupported(f"lengths {self.lengths}", supported=f"lengths from 1 to {LONGEST}", nearest="1024,4096")
        if self.memory is not None and self.memory < 1:
            raise Unsupported(f"memory={self.memory}", supported="a positive number of bytes", nearest="512MiB")
        if not self.seconds > 0:
            raise Unsupported(f"seconds={self.seconds}", supported="a positive time", nearest="seconds=120")
        for item in self.what:
            one_of("what", item, WHAT)
        if self.use == "serve" and self.layer.pattern is Pattern.NONCAUSAL_SELF:
            raise Unsupported(
                "use='serve' in noncausal-self, where every token sees the later ones",
                supported="causal-self and cross patterns",
                nearest="--use infer",
            )
        what = tuple(w for w in WHAT if w in self.what or w == USES[self.use])
        for name, value in (
            ("lengths", lengths),
            ("needs", parse_needs(self.needs)),
            ("pattern", self.layer.pattern),
            ("what", what),
        ):
            object.__setattr__(self, name, value)

    @property
    def layer(self) -> LayerSettings:
        """Settings with which the measured layers are built and called."""
        sizes = (self.dim, self.heads, self.head_dim, self.batch)
        return LayerSettings(self.pattern, *sizes, self.dtype, self.device, self.short_convolution)

    @property
    def deciding(self) -> str:
        """The kind of work whose time decides."""
        return USES[self.use]
