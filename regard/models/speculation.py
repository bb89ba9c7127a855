"""Speculative decoding: a cheap draft proposes tokens, the model reads them at once, and what comes out is distributed as
the model's own samples are.

A proposed token x with the draft's probability q(x) is kept with probability min(1, p(x) / q(x)), where p is the model's;
at the first one that is not, a token is drawn from the positive part of p - q, and where all are kept one more from p
(Leviathan et al., arXiv 2211.17192; spec of the survey arXiv 2307.07982, section 3.5b). So the model reads several tokens in
one pass, which on a processor takes hardly longer than one, as long as reading the weights is what takes the time.

A draft is another model with the same tokens (:class:`ModelDraft`) or what followed the last time that the text went as it
does now (:class:`PromptLookup`), which costs nothing and helps where a text repeats itself: summaries, edits, code.
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
"""Tokens that a draft proposes at once."""
LONGEST = 3
"""Tokens in a row that a lookup wants to find again, at most."""


class Reads(Protocol):
    """A model that goes on from states.

    Attributes:
        vocabulary: how many tokens it knows.
    """

    vocabulary: int

    def __call__(self, ids: Int[Tensor, "1 n"], state: Any) -> tuple[Float[Tensor, "n vocab"], Any]:
        """Logits behind each token, and the state after them; `state` (None at the beginning) stays good."""
        ...

    def cut(self, state: Any, read: int, kept: int) -> Any:
        """The state after the first `kept` of the last `read` tokens; None where only the model can tell."""
        ...


class ReadLanguageModel:
    """A :class:`regard.models.LanguageModel` as :class:`Reads`, without dropout."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.modules, self.vocabulary = model, list(model.modules()), model.config.vocab_size

    def __call__(self, ids: Int[Tensor, "1 n"], state: Any) -> tuple[Float[Tensor, "n vocab"], Any]:
        with evaluation_mode(self.model, self.modules):
            result = self.model(ids, context=Context(want=frozenset({"state"})), state=state)
        return result.output[0], result.state

    def cut(self, state: Any, read: int, kept: int) -> Any:
        return state if kept == read else None


class Draft(Protocol):
    """What proposes tokens."""

    def propose(
        self, text: Int[Tensor, " n"], count: int, pick: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Int[Tensor, " g"], Float[Tensor, "g vocab"] | None]:
        """At most `count` tokens that may follow a text.

        Args:
            text: all tokens so far; longer at each call, and else the same.
            pick: a token of logits (vocab) and the probabilities (vocab) that it was drawn from.

        Returns:
            Tokens, none where it has no idea, and the probabilities that each was drawn from; None where nothing was drawn.
        """
        ...


@dataclass
class PromptLookup:
    """What followed the latest place where the text went as it does at its end.

    Attributes:
        longest: tokens at the end that are to be found again: so many or, failing that, fewer.
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
    """A smaller model with the same tokens.

    Args:
        reads: the model.
    """

    def __init__(self, reads: Reads) -> None:
        self.reads, self.state, self.done = reads, None, 0

    def propose(
        self, text: Int[Tensor, " n"], count: int, pick: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Int[Tensor, " g"], Float[Tensor, "g vocab"] | None]:
        logits, self.state = self.reads(text[None, self.done :], self.state)
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
    """What speculation came to.

    Attributes:
        tokens: new ones.
        passes: of the model, the prompt's included.
        proposed, kept: tokens of the draft.
    """

    tokens: int = 0
    passes: int = 0
    proposed: int = 0
    kept: int = 0


@dataclass
class Speculation:
    """Text from a model with a draft.

    Attributes:
        reads: the model.
        draft: what proposes.
        count: how many tokens at once.
        counts: of the text so far.

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
                f"a draft of {self.draft.reads.vocabulary} tokens beside a model of {self.reads.vocabulary}",
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
        """New tokens, one at a time, distributed as those of :func:`regard.models.generation.generate_stream`, and with
        temperature 0 the same.

        Args:
            ids: one prompt of a token or more, without padding.
            temperature, top_k, top_p, stop_tokens, generator: as there. The draft draws by them too.

        Raises:
            Unsupported: for several prompts, and fewer than no tokens.
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

        text, state, seen = ids[0], None, 0  # `state` is that after the first `seen` tokens of the text
        left = max_new_tokens
        while left > 0:
            proposed, drawn = (
                self.draft.propose(text, min(self.count, left - 1), pick) if left > 1 else (text[:0], None)
            )
            block = torch.cat([text[seen:], proposed])
            logits, after = self.reads(block[None], state)
            p = distribution(logits[len(block) - len(proposed) - 1 :], **shares)
            kept, token = _judge(p, proposed, drawn, generator)
            self.counts.passes += 1
            self.counts.proposed += len(proposed)
            self.counts.kept += kept
            known = len(block) - len(proposed) + kept
            whole = self.reads.cut(after, len(block), known)
            if whole is None and known > 2 * self.count:  # what is read again must not grow
                _, whole = self.reads(block[None, :known], state)
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
    """How many proposed tokens are kept, and the token behind them.

    Args:
        p: the model's probabilities at the proposed tokens and behind the last one.
        drawn: those that the tokens were drawn from; None where each was certain.
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
        # where nothing is left over, the two agree but for rounding
        if chance * theirs >= mine and float(rest.sum()) > 0:
            return i, torch.multinomial(rest, 1, generator=generator)[0]
    return len(proposed), torch.multinomial(p[-1], 1, generator=generator)[0]
