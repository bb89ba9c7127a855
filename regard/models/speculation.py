"""Speculative decoding: a cheap draft proposes tokens and the model verifies them in one pass.

The output has the same distribution as the model's own samples. A token x proposed with the draft's probability q(x) is
kept with probability min(1, p(x) / q(x)), where p is the model's probability. At the first rejection a token is drawn
from the positive part of p - q; if all are kept, one more is drawn from p (Leviathan et al., arXiv 2211.17192; spec of
the survey arXiv 2307.07982, section 3.5b). So the model reads several tokens in one pass, which takes hardly longer
than reading one as long as loading the weights is the bottleneck.

A draft is another model with the same vocabulary (:class:`ModelDraft`), or a lookup of what followed the last
occurrence of the current tokens in the text (:class:`PromptLookup`), which costs nothing and helps where a text repeats
itself: summaries, edits, code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from regard.contract import Context, Unsupported, at_least
from regard.models.evaluating import evaluation_mode
from regard.models.generation import check_sampling, distribution
from regard.models.inputs import check_ids
from regard.models.language_model import LanguageModel

if TYPE_CHECKING:
    from jaxtyping import Float, Int

COUNT = 4
"""Default number of tokens that a draft proposes at once."""
LONGEST = 3
"""Default maximum number of consecutive tokens that a lookup searches for."""


class Reads(Protocol):
    """A model that continues from states.

    Attributes:
        vocabulary: size of its vocabulary.
    """

    vocabulary: int

    def __call__(
        self, ids: Int[Tensor, "1 n"], state: Any, last: int | None = None
    ) -> tuple[Float[Tensor, "m vocab"], Any]:
        """Return the logits after each token, or after the `last` ones alone, and the new state.

        The old `state` (None at the beginning) remains valid.
        """
        ...

    def cut(self, state: Any, read: int, kept: int) -> Any:
        """Return the state after the first `kept` of the last `read` tokens; None if the tokens must be read again."""
        ...


class ReadLanguageModel:
    """A :class:`regard.models.LanguageModel` as :class:`Reads`, without dropout."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.modules, self.vocabulary = model, list(model.modules()), model.config.vocab_size

    def __call__(
        self, ids: Int[Tensor, "1 n"], state: Any, last: int | None = None
    ) -> tuple[Float[Tensor, "m vocab"], Any]:
        with evaluation_mode(self.model, self.modules):
            result = self.model(ids, context=Context(want=frozenset({"state"})), state=state)
        return result.output[0, -(last or 0) :], result.state

    def cut(self, state: Any, read: int, kept: int) -> Any:
        return state if kept == read else None


class Draft(Protocol):
    """A proposer of tokens."""

    def propose(
        self, text: Int[Tensor, " n"], count: int, pick: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Int[Tensor, " g"], Float[Tensor, "g vocab"] | None]:
        """Propose at most `count` tokens to follow a text.

        Args:
            text: all tokens so far; each call extends the text of the call before.
            pick: draws a token from logits (vocab); returns the token and the probabilities (vocab) that it was drawn
                from.

        Returns:
            The tokens, possibly none, and the probabilities that each was drawn from; None if nothing was drawn.
        """
        ...


@dataclass
class PromptLookup:
    """Proposes the tokens that followed the latest earlier occurrence of the text's last tokens (transformers: the first).

    Attributes:
        longest: number of last tokens to search for; if they are not found, fewer are tried.
    """

    longest: int = LONGEST

    def __post_init__(self) -> None:
        at_least("longest", self.longest, 1)

    def propose(
        self, text: Int[Tensor, " n"], count: int, pick: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Int[Tensor, " g"], Float[Tensor, "g vocab"] | None]:
        for n in range(min(self.longest, len(text) - 1), 0, -1):
            windows = text[:-1].unfold(0, n, 1)
            found = (windows == text[-n:]).all(1).nonzero()
            if len(found):
                after = int(found[-1]) + n
                return text[after : after + count], None
        return text[:0], None


class ModelDraft:
    """Proposes tokens drawn from a smaller model with the same vocabulary.

    Args:
        reads: the model.
    """

    def __init__(self, reads: Reads) -> None:
        self.reads, self.state, self.done = reads, None, 0

    def propose(
        self, text: Int[Tensor, " n"], count: int, pick: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Int[Tensor, " g"], Float[Tensor, "g vocab"] | None]:
        logits, self.state = self.reads(text[None, self.done :], self.state, last=1)
        self.done, state = len(text), self.state
        tokens, shares = [], []
        for i in range(count):
            token, share = pick(logits[-1])
            tokens.append(token)
            shares.append(share)
            if i + 1 < count:
                logits, state = self.reads(token.view(1, 1), state)
        return torch.stack(tokens), torch.stack(shares)


@dataclass
class Counts:
    """Statistics of speculative decoding.

    Attributes:
        tokens: number of new tokens.
        passes: number of passes of the model, including the prompt's.
        proposed, kept: number of draft tokens that were proposed and kept.
    """

    tokens: int = 0
    passes: int = 0
    proposed: int = 0
    kept: int = 0


@dataclass
class Speculation:
    """Generates text from a model with a draft.

    Attributes:
        reads: the model.
        draft: the proposer of tokens.
        count: number of tokens proposed at once.
        counts: statistics so far.

    Raises:
        Unsupported: for a draft with another vocabulary.
    """

    reads: Reads
    draft: Draft
    count: int = COUNT
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        at_least("count", self.count, 1)
        if isinstance(self.draft, ModelDraft) and self.draft.reads.vocabulary != self.reads.vocabulary:
            raise Unsupported(
                f"a draft of {self.draft.reads.vocabulary} tokens with a model of {self.reads.vocabulary}",
                supported="a draft with the model's own vocabulary",
            )

    @torch.no_grad()
    def stream(
        self,
        ids: Int[Tensor, "1 n"],
        max_new_tokens: int,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_tokens: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> Iterator[Int[Tensor, " 1"]]:
        """Yield new tokens one at a time, with the distribution of :func:`regard.models.generation.generate_stream`.

        Args:
            ids: one prompt of at least one token, without padding.
            temperature, top_k, top_p, stop_tokens, generator: as in :func:`regard.models.generation.generate_stream`;
                the draft uses them too. With temperature 0 the tokens are the same.

        Raises:
            Unsupported: for several prompts, or ``max_new_tokens < 0``.
        """
        at_least("max_new_tokens", max_new_tokens, 0)
        check_sampling(temperature, top_k, top_p)
        check_ids(ids)
        if ids.shape[0] != 1 or ids.shape[1] < 1:
            raise Unsupported(f"speculation on ids of shape {tuple(ids.shape)}", supported="one prompt (1, N)")
        shares: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        stop = set(stop_tokens)

        def pick(logits: Tensor) -> tuple[Tensor, Tensor]:
            share = distribution(logits, **shares)
            return torch.multinomial(share, 1, generator=generator)[0], share

        text, state, seen = ids[0], None, 0  # `state` is the state after the first `seen` tokens of the text
        left = max_new_tokens
        while left > 0:
            proposed, drawn = (
                self.draft.propose(text, min(self.count, left - 1), pick) if left > 1 else (text[:0], None)
            )
            block = torch.cat([text[seen:], proposed])
            logits, after = self.reads(block[None], state, last=len(proposed) + 1)
            p = distribution(logits, **shares)
            kept, token = _judge(p, proposed, drawn, generator)
            self.counts.passes += 1
            self.counts.proposed += len(proposed)
            self.counts.kept += kept
            known = len(block) - len(proposed) + kept
            whole = self.reads.cut(after, len(block), known)
            if whole is None and known > 2 * self.count:  # bounds the number of tokens that are read again
                _, whole = self.reads(block[None, :known], state, last=1)
                self.counts.passes += 1
            if whole is not None:
                state, seen = whole, seen + known
            new = torch.cat([proposed[:kept], token[None]])
            text = torch.cat([text, new])
            for one in new:
                self.counts.tokens += 1
                left -= 1
                yield one[None]
                if int(one) in stop:
                    return


def _judge(
    p: Float[Tensor, "g1 vocab"],
    proposed: Int[Tensor, " g"],
    drawn: Float[Tensor, "g vocab"] | None,
    generator: torch.Generator | None,
) -> tuple[int, Int[Tensor, ""]]:
    """Return how many proposed tokens are kept, and the token after them.

    Args:
        p: the model's probabilities at the proposed tokens and after the last one.
        drawn: the probabilities that the tokens were drawn from; None if each was certain.
    """
    for i, token in enumerate(proposed):
        mine = p[i, token]
        if drawn is None:
            rest = p[i].clone()
            rest[token] = 0
            theirs = torch.ones_like(mine)
        else:
            theirs = drawn[i, token]
            rest = (p[i] - drawn[i]).clamp(min=0)
        chance = torch.rand((), generator=generator, dtype=p.dtype, device=p.device)
        # if nothing is left over, the two distributions agree up to rounding
        if chance * theirs >= mine and float(rest.sum()) > 0:
            return i, torch.multinomial(rest, 1, generator=generator)[0]
    return len(proposed), torch.multinomial(p[-1], 1, generator=generator)[0]
