"""Which of the four patterns a module has, detected by changing inputs that it must not see.

The patterns and the prefix test are those of the Comprehensive Attention Benchmark (Zhang et al., arXiv 2210.07661). A
module has *causal-self* if output i is the same whatever follows token i, and if the prefix alone gives it, so that
neither the values nor the number of later tokens matter; *noncausal-self* if outputs see later tokens;
*noncausal-cross* if they see the memory, and not through a triangular mask; *causal-cross* if, in addition, no query
sees a later one. Both values and gradients are checked, in float64 if the module accepts it.

A module whose outputs for a row of a batch change with the other rows has no pattern. What a module keeps out by a
padding mask, of keys or of queries, must not change its other outputs. A module that decodes token by token with a state
must give the outputs of the whole causal call.

This tests samples: a leak below the tolerance, or one that only certain inputs trigger, is not found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from regard.contract import Pattern, Unsupported, at_least

if TYPE_CHECKING:
    from jaxtyping import Float

TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-5}
"""Changes below this share of the largest output are rounding: some modules compute in float32 whatever the input."""
STEP_TOLERANCE = 1e-5
"""The same for decoding with a state, whose additions have another order."""
CUTS = 6
"""Number of places at which a sequence is cut."""
LENGTH, MEMORY_LENGTH = 24, 20
OTHER_LENGTHS = (32, 64, 128, 256, 16)
"""Lengths to try for a module that does not take these, as one that needs whole blocks."""
PADDED = 3
MIXED = "its output for a row changes with the other rows of a batch"
LAYOUT = ", and not with other tokens: tokens first? It is called with tokens (B, N, C), as with batch_first=True"


class Probe(Protocol):
    """A module in one pattern that behaves the same at every call.

    Attributes:
        dtype: dtype of its inputs.
        takes_padding: whether it accepts a mask of keys (of tokens, in self patterns).
        takes_query_padding: whether it accepts a mask of queries, in cross patterns.
        takes_state: whether it decodes token by token, in causal-self.
    """

    dtype: torch.dtype
    takes_padding: bool
    takes_query_padding: bool
    takes_state: bool

    def __call__(
        self,
        x: Float[Tensor, "b n c"],
        memory: Float[Tensor, "b m c"] | None = None,
        *,
        padded: int = 0,
        padded_queries: int = 0,
    ) -> Tensor:
        """The module's output. The last `padded` keys (those of `x` without a memory) are padding and, with a memory,
        the last `padded_queries` queries; a module without such a mask is not told."""
        ...

    def decoded(self, x: Float[Tensor, "b n c"]) -> Tensor | None:
        """The outputs for tokens given one at a time, each with the state that the one before it left; None if the
        module takes a state but returns none."""
        ...


@dataclass(frozen=True)
class Suspect:
    """A module to probe.

    Attributes:
        name: its name in reports.
        dim: width of its input and memory.
        make: makes the module in a pattern; raises Unsupported with the reason if it refuses the pattern.
        claims: the patterns that it claims to have; None if it makes no claims.
    """

    name: str
    dim: int
    make: Callable[[Pattern], Probe]
    claims: tuple[Pattern, ...] | None = None


@dataclass(frozen=True)
class Finding:
    """The result for a module in one pattern.

    Attributes:
        pattern: the pattern that was tried.
        has: whether the module has it.
        why: the reason, in words.
        claimed: whether the module claims to have it; None if it makes no claims.
        leak: the largest change in an output caused by what it must not see, as a share of the largest output; None if
            not tested.
        prefixes: number of prefixes that were tried alone, in causal patterns; 0 if the module takes none, so that a
            dependence on the number of tokens would not be found. None if not tested.
        rows: whether the outputs for a row of a batch are the same whatever the other rows hold, without which a module
            has no pattern; None if not tested.
        padding: whether the content of padded keys (tokens, in self patterns) leaves the other outputs unchanged; None
            if the module accepts no mask for them.
        query_padding: the same for padded queries in cross patterns. A module that keeps queries apart needs no mask
            for it. None in self patterns, and if the module mixes queries and accepts no padding mask at all.
        steps: whether decoding token by token gives the outputs of the whole call; None if it cannot, and in patterns
            other than causal-self.
        raised: for each of `padding`, `query_padding` and `steps` that is False because the module raised, what it did.
    """

    pattern: Pattern
    has: bool
    why: str
    claimed: bool | None = None
    leak: float | None = None
    prefixes: int | None = None
    rows: bool | None = None
    padding: bool | None = None
    query_padding: bool | None = None
    steps: bool | None = None
    raised: Mapping[str, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether the module does what it claims, and keeps the rows of a batch apart."""
        broken = False in (self.padding, self.query_padding, self.steps)
        return self.claimed in (None, self.has) and self.rows is not False and not (self.has and broken)


def detect(
    suspect: Suspect,
    patterns: Sequence[Pattern] = tuple(Pattern),
    *,
    length: int = LENGTH,
    memory_length: int = MEMORY_LENGTH,
    seed: int = 0,
) -> list[Finding]:
    """Return a finding for each pattern.

    Args:
        length, memory_length: tokens of the inputs; lengths beyond the module's windows and chunks reveal more.
        seed: seed of the inputs.

    Raises:
        Unsupported: for a module that runs in no pattern, returns another shape, changes its input, gives different
            outputs for the same input, or keeps state between calls.
    """
    at_least("length", length, 4)
    at_least("memory_length", memory_length, 4)
    found, raised, ran = [], "", False
    for pattern in patterns:
        claimed = None if suspect.claims is None else pattern in suspect.claims
        try:
            probe = suspect.make(pattern)
            trial = _Trial(suspect.name, probe, pattern, suspect.dim, length, memory_length, seed)
        except _Raised as error:
            raised = raised or f"in {pattern.value} it {error.why}"
            found.append(Finding(pattern, False, error.why, claimed))
            continue
        except Unsupported as refusal:
            if isinstance(refusal, Unfit):
                raise
            found.append(Finding(pattern, False, f"refused: {refusal.asked}", claimed))
            continue
        ran = True
        found.append(dataclasses.replace(trial.finding(), claimed=claimed))
    if not ran:
        n = _length_taken(suspect, patterns, seed)
        raise Unfit(
            f"{suspect.name}, which runs in no pattern ({raised or found[0].why})",
            supported="a module called with tokens (B, N, C), alone or with a memory (B, M, C)",
            nearest="" if n is None else f"regard detect-patterns --length {n} --memory-length {n}",
        )
    return found


def _length_taken(suspect: Suspect, patterns: Sequence[Pattern], seed: int) -> int | None:
    """One of :data:`OTHER_LENGTHS` at which the module runs in one of the patterns; None if there is none."""
    for pattern in patterns:
        with contextlib.suppress(Unsupported):
            probe = suspect.make(pattern)
            for n in OTHER_LENGTHS:
                with contextlib.suppress(_Raised):
                    _Trial(suspect.name, probe, pattern, suspect.dim, n, n, seed)
                    return n
    return None


class Unfit(Unsupported):
    """A module that cannot be tested."""


class _Raised(Exception):
    """A call of the module raised."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class _Trial:
    """A module in one pattern, checked to be testable, and its inputs."""

    def __init__(self, name: str, probe: Probe, pattern: Pattern, dim: int, n: int, m: int, seed: int) -> None:
        self.name, self.probe, self.pattern, self.n, self.m = name, probe, pattern, n, m
        self.generator = torch.Generator().manual_seed(seed)
        self.x = self.random(1, n, dim)
        self.memory = self.random(1, m, dim) if pattern.cross else None
        self.y = self.fit()
        self.scale = max(float(self.y.abs().max()), torch.finfo(torch.float32).tiny)
        self.tolerance = TOLERANCES.get(probe.dtype, max(TOLERANCES.values()))

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.probe.dtype)

    def call(self, x: Tensor, memory: Tensor | None, padded: int = 0, padded_queries: int = 0) -> Tensor:
        with _raising():
            return self.probe(x, memory, padded=padded, padded_queries=padded_queries)

    def fit(self) -> Tensor:
        """The output, checked to be as long and wide as the input, finite, and reproducible."""
        given = [one for one in (self.x, self.memory) if one is not None]
        copies = [one.clone() for one in given]
        y = self._shaped(self.call(self.x, self.memory), self.x)
        if not all(map(torch.equal, given, copies)):
            raise Unfit(
                f"{self.name}, which changes its input in place",
                supported="a module that leaves its input as it is, which others read too",
            )
        if not bool(y.isfinite().all()):
            raise Unfit(f"{self.name}, whose output is not finite", supported="finite outputs for normal inputs")
        other = self.random(2, *self.x.shape[1:])
        others = None if self.memory is None else self.random(2, *self.memory.shape[1:])
        self._shaped(self.call(other, others), other)
        self.call(other[:1], None if others is None else others[:1])  # a state may be kept for its own shape alone
        again = self.call(self.x, self.memory)
        if again.shape != y.shape or not torch.equal(again, y):
            seeded = [self._seeded(self.x, self.memory)]
            self.call(other[:1], None if others is None else others[:1])
            seeded.append(self._seeded(self.x, self.memory))
            draws = seeded[0].shape == seeded[1].shape and torch.equal(*seeded)
            why = "draws random numbers in evaluation mode" if draws else "keeps something from call to call"
            raise Unfit(
                f"{self.name}, which {why}: two calls with the same tokens differ",
                supported="a module that gives the same answer to the same question",
                nearest="regard detect-patterns --seeded" if draws else "",
            )
        return y

    def _shaped(self, y: Tensor, x: Tensor) -> Tensor:
        if not isinstance(y, Tensor) or y.shape != x.shape:
            shape = f"shape {tuple(y.shape)}" if isinstance(y, Tensor) else f"type {type(y).__name__}"
            raise Unfit(
                f"{self.name}, whose output for tokens of shape {tuple(x.shape)} has {shape}",
                supported="an output of the same shape, alone, first in a tuple, or as .output",
            )
        return y

    def _seeded(self, x: Tensor, memory: Tensor | None) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.call(x, memory)

    def finding(self) -> Finding:
        """The result of the probes."""
        found = self._own() if self.memory is None else self._cross()
        if self.mixes_rows():
            more = f"; {found.why}" if self.mixes_tokens() else LAYOUT
            found = dataclasses.replace(found, has=False, rows=False, why=f"{MIXED}{more}")
        else:
            found = dataclasses.replace(found, rows=True)
        probes: dict[str, tuple[Callable[[], tuple[bool | None, str]], str]] = {
            "padding": (self.padding, "with a padding mask"),
            "query_padding": (self.query_padding, "with padded queries"),
        }
        if found.has and self.pattern is Pattern.CAUSAL_SELF:
            probes["steps"] = (self.steps, "with a state")
        results, raised, notes = dict[str, Any](), dict[str, str](), [found.why]
        for name, (probe, what) in probes.items():
            try:
                results[name], note = probe()
            except _Raised as error:
                results[name] = False
                note = raised[name] = f"{what} it {error.why}"
            notes += [note] if note else []
        return dataclasses.replace(found, why="; ".join(notes), raised=raised, **results)

    def mixes_rows(self) -> bool:
        """Whether the outputs for a row of a batch of two change when the other row does."""
        x = self.random(3, *self.x.shape[1:])
        memory = None if self.memory is None else self.random(3, *self.memory.shape[1:])

        def pair(*rows: int) -> Tensor:
            return self.call(x[list(rows)], None if memory is None else memory[list(rows)])

        first, second = pair(0, 1)
        change = max(self.changed(pair(0, 2)[0], first), self.changed(pair(2, 1)[1], second))
        return change > self.tolerance

    def mixes_tokens(self) -> bool:
        """Whether an output changes with another token, or with another place of the memory."""
        for begin, end, others in ((0, 1, slice(1, None)), (-1, None, slice(-1))):
            if self.memory is None:
                y = self.call(self._replaced(self.x, begin, end), None)
            else:
                y = self.call(self.x, self._replaced(self.memory, begin, end))
            if self.changed(y[:, others], self.y[:, others]) > self.tolerance:
                return True
        return False

    def _own(self) -> Finding:
        ahead = self.ahead()
        if not self.pattern.causal:
            mixes = self.changed(self.call(self._replaced(self.x, 0, self.n - 1), None)[:, -1], self.y[:, -1])
            if ahead.leak <= self.tolerance < mixes:
                return Finding(self.pattern, False, "no output sees a later token", None, ahead.leak)
            sees = "outputs see what follows" if ahead.leak > self.tolerance else "no output sees another token"
            return Finding(self.pattern, True, sees)
        return Finding(self.pattern, ahead.holds, ahead.why, None, ahead.leak, ahead.prefixes)

    def _cross(self) -> Finding:
        assert self.memory is not None
        seen = self.changed(self.call(self.x, self.random(*self.memory.shape)), self.y)
        if seen <= self.tolerance:
            return Finding(self.pattern, False, "no output depends on the memory")
        if self.triangular():
            why = "early queries do not see late memory: a triangular mask over the memory, which all should see"
            return Finding(self.pattern, False, why)
        if self.pattern.causal:
            ahead = self.ahead()
            why = f"outputs see the memory, and {ahead.why}" if ahead.holds else ahead.why
            return Finding(self.pattern, ahead.holds, why, None, ahead.leak, ahead.prefixes)
        return Finding(self.pattern, True, "outputs see the memory")

    def changed(self, found: Tensor, expected: Tensor) -> float:
        """The largest difference, as a share of the largest output; infinite if an output is not finite."""
        if not expected.numel():
            return 0.0
        largest = float((found - expected).abs().max())
        return largest / self.scale if math.isfinite(largest) else math.inf

    def cuts(self, n: int) -> list[int]:
        """Prefix lengths, shorter than n and spread over it."""
        return sorted({1 + round(i * (n - 2) / (CUTS - 1)) for i in range(CUTS)})

    def _replaced(self, x: Tensor, begin: int, end: int | None = None) -> Tensor:
        changed = x.clone()
        changed[:, begin:end] = self.random(*changed[:, begin:end].shape)
        return changed

    def ahead(self) -> _Ahead:
        """Whether outputs depend on later tokens (queries, in cross patterns): on value, number, or by gradient."""
        worst, why = 0.0, ""
        for cut in self.cuts(self.n):
            change = self.changed(self.call(self._replaced(self.x, cut), self.memory)[:, :cut], self.y[:, :cut])
            if change > worst:
                worst = change
                why = f"outputs up to token {cut - 1} change when later {self._tokens} do (by {change:.1e})"
        prefixes, untried = self.prefixes()
        for cut, prefix in prefixes.items():
            change = self.changed(prefix, self.y[:, :cut]) if prefix.shape[1] == cut else math.inf
            if change > worst:
                worst, why = change, f"outputs change with the number of later {self._tokens} (by {change:.1e})"
        slope = self.slope()
        if slope > self.tolerance and worst <= self.tolerance:
            worst, why = slope, f"the gradient of an output reaches later {self._tokens} ({slope:.1e})"
        if worst <= self.tolerance:
            why = f"no output depends on later {self._tokens}"
            if untried and prefixes:
                why += (
                    f"; of prefixes alone, it takes those of {', '.join(map(str, sorted(prefixes)))} tokens ({untried})"
                )
            elif untried:
                why += f", if not on their number: it takes no prefix of {self.n} tokens alone ({untried})"
        return _Ahead(worst <= self.tolerance, worst, why, len(prefixes))

    def prefixes(self) -> tuple[dict[int, Tensor], str]:
        """The outputs for prefixes alone, by length, and why others could not be tried.

        A module that takes none of :meth:`cuts` may need whole blocks: then the lengths that have most in common with
        the whole one are tried.
        """
        blocks = sorted(range(1, self.n), key=lambda cut: -math.gcd(cut, self.n))[: 4 * CUTS]
        outputs, untried = dict[int, Tensor](), ""
        for lengths in (self.cuts(self.n), blocks):
            for cut in lengths:
                try:
                    outputs[cut] = self.call(self.x[:, :cut], self.memory)
                except _Raised as error:
                    untried = untried or error.why
            if outputs:
                break
        return outputs, untried

    @property
    def _tokens(self) -> str:
        return "queries" if self.pattern.cross else "tokens"

    def slope(self) -> float:
        """Largest gradient of a middle output by a later token, as a share of that by any; 0 without gradients."""
        x = self.x.clone().requires_grad_()
        middle = self.n // 2
        try:
            y = self.probe(x, self.memory)[:, middle].sum()
            (gradient,) = torch.autograd.grad(y, x) if y.requires_grad else (None,)
        except Exception:
            return 0.0  # an inference-only module
        largest = 0.0 if gradient is None else float(gradient.abs().max())
        if gradient is None or not largest:
            return 0.0
        if not math.isfinite(largest):
            raise Unfit(f"{self.name}, whose gradient is not finite", supported="finite gradients for normal inputs")
        return float(gradient[:, middle + 1 :].abs().max()) / largest

    def triangular(self) -> bool:
        """Whether late memory is hidden from early queries only, and from more of them the later it is."""
        assert self.memory is not None
        first = []  # the first output that sees the memory after each cut
        for cut in self.cuts(self.m):
            y = self.call(self.x, self._replaced(self.memory, cut))
            sees = (y - self.y).abs().amax((0, 2)) > self.tolerance * self.scale
            at = int(sees.int().argmax()) if bool(sees.any()) else self.n
            if not bool(sees[at:].all()):
                return False
            first.append(at)
        return first == sorted(first) and any(0 < at < self.n for at in first)

    def padding(self) -> tuple[bool | None, str]:
        """Whether the content of padded keys leaves the other outputs unchanged, and a note."""
        if not self.probe.takes_padding:
            return None, ""
        keys = self.x if self.memory is None else self.memory
        first, second = (self._replaced(keys, keys.shape[1] - PADDED) for _ in range(2))
        kept = self.n if self.memory is not None else self.n - PADDED
        found = [
            (self.call(k, None, PADDED) if self.memory is None else self.call(self.x, k, PADDED))[:, :kept]
            for k in (first, second)
        ]
        return self.changed(*found) <= self.tolerance, ""

    def query_padding(self) -> tuple[bool | None, str]:
        """Whether the content of padded queries leaves the other outputs unchanged, and a note."""
        if self.memory is None:
            return None, ""
        kept = self.n - PADDED
        first, second = (
            self.call(self._replaced(self.x, kept), self.memory, padded_queries=PADDED)[:, :kept] for _ in range(2)
        )
        change = self.changed(first, second)
        if change <= self.tolerance:
            return True, ""
        if not (self.probe.takes_padding or self.probe.takes_query_padding):
            return None, ""
        masked = "" if self.probe.takes_query_padding else ", for which it takes no query_padding_mask,"
        return False, f"padded queries{masked} change the outputs of others (by {change:.1e})"

    def steps(self) -> tuple[bool | None, str]:
        """Whether the tokens one by one, with a state, give the outputs of the whole call, and a note."""
        if not self.probe.takes_state:
            return None, ""
        with _raising():
            found = self.probe.decoded(self.x)
        if found is None:
            return None, "it takes a state, and returns none"
        if found.shape != self.y.shape:
            return False, f"token by token it gives outputs of shape {tuple(found.shape)}"
        change = self.changed(found, self.y)
        if change <= STEP_TOLERANCE:
            return True, ""
        return False, f"token by token, with its state, it gives other outputs than the whole call (by {change:.1e})"


@contextlib.contextmanager
def _raising() -> Iterator[None]:
    """Calls of a module, without gradients, whose errors are raised as :class:`_Raised`."""
    try:
        with torch.no_grad():
            yield
    except Exception as error:
        raise _Raised(f"raises {type(error).__name__}: {first_line(error)}") from error


@dataclass(frozen=True)
class _Ahead:
    holds: bool
    leak: float
    why: str
    prefixes: int


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "without a word"
