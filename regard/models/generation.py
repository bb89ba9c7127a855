"""Text generation for every model that continues a sequence: sampling token by token, and beam search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from regard.contract import Mask, Unsupported, at_least
from regard.core.precision import wide
from regard.core.ragged import gathering
from regard.models.inputs import check_ids

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Read = Callable[[Tensor, Tensor, Mask | None, Any], tuple[Tensor, Any]]
"""``read(ids (B, N), last (B), mask, state) -> (logits (B, vocab) at token `last` of each row, state after ids)``."""


@dataclass
class Prompts:
    """Right-padded sequences that grow by one token at a time, and the part of them that is still to be read.

    Attributes:
        whole: (B, N) all tokens so far.
        lengths: (B) number of valid tokens in each row.
        ragged: whether the unread tokens include padding.
        unread: (B, n) the tokens to be read next.
        last: (B) index of the last valid unread token.
    """

    whole: Int[Tensor, "b n"]
    lengths: Int[Tensor, " b"]
    ragged: bool
    unread: Int[Tensor, "b n2"]
    last: Int[Tensor, " b"]

    @classmethod
    def of(cls, ids: Int[Tensor, "b n"], mask: Mask | None) -> Prompts:
        """Make prompts from ids padded anywhere or packed; raises Unsupported for a row without a token."""
        check_ids(ids)
        layout = gathering(mask, ids.shape[0], ids.shape[1], ids.device)
        whole = layout.gather(ids, axis=1)
        lengths = layout.lengths
        if lengths is None:
            lengths = torch.full((whole.shape[0],), whole.shape[1], device=ids.device)
        if not lengths.numel() or int(lengths.min()) < 1:
            raise Unsupported("a prompt without tokens", supported="at least one token in each row")
        return cls(whole, lengths, layout.lengths is not None, whole, lengths - 1)

    @property
    def mask(self) -> Mask | None:
        """The mask of the unread tokens; None if they have no padding."""
        return Mask(lengths=self.last + 1) if self.ragged else None

    def repeat(self, times: int) -> Prompts:
        """Repeat each row `times` times, next to each other."""
        whole, lengths = (x.repeat_interleave(times, 0) for x in (self.whole, self.lengths))
        return Prompts(whole, lengths, self.ragged, whole, lengths - 1)

    def select(self, rows: Int[Tensor, " rows"]) -> Prompts:
        """Return the chosen rows, in that order."""
        return Prompts(self.whole[rows], self.lengths[rows], self.ragged, self.unread[rows], self.last[rows])

    def append(self, token: Int[Tensor, " b"], *, reread: bool) -> Prompts:
        """Append a token to each row; `reread` marks the whole sequence as unread again."""
        whole = F.pad(self.whole, (0, 1)).scatter(1, self.lengths[:, None], token[:, None])
        if reread:
            return Prompts(whole, self.lengths + 1, self.ragged, whole, self.lengths)
        return Prompts(whole, self.lengths + 1, False, token[:, None], torch.zeros_like(self.lengths))


def generate(
    read: Read,
    ids: Int[Tensor, "b n"],
    max_new_tokens: int,
    *,
    beams: int = 1,
    length_penalty: float | None = None,
    **options: Any,
) -> Int[Tensor, "b new"]:
    """Generate tokens by :func:`generate_stream`, or with more than one beam by :func:`beam_search`.

    Args:
        length_penalty: the length penalty of a beam search; 1 when None.
        options: as for :func:`generate_stream`; a beam search does not sample.
    """
    at_least("beams", beams, 1)
    if beams == 1:
        if length_penalty is not None:
            raise Unsupported(f"length_penalty={length_penalty} without a beam search", supported="beams > 1")
        tokens = list(generate_stream(read, ids, max_new_tokens, **options))
        return torch.stack(tokens, dim=1) if tokens else ids.new_zeros((ids.shape[0], 0))
    accepted = ("mask", "stop_tokens", "use_state")
    for option in options:
        if option not in (*accepted, "state"):
            raise Unsupported(f"{option} in a beam search", supported=", ".join(accepted), nearest="beams=1")
    penalty = 1.0 if length_penalty is None else length_penalty
    return beam_search(read, ids, max_new_tokens, beams=beams, length_penalty=penalty, **options)


@torch.no_grad()
def generate_stream(
    read: Read,
    ids: Int[Tensor, "b n"],
    max_new_tokens: int,
    *,
    state: Any = None,
    mask: Mask | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
    use_state: bool = True,
) -> Iterator[Int[Tensor, " b"]]:
    """Continue prompts; yields the next token of every row until all have stopped.

    Args:
        read: reads tokens and returns logits, see `Read`.
        ids: prompts, at least one token each; padded anywhere or packed, as `mask` says.
        state: the state passed to the first call of `read`. Later calls get the state that `read` returned, or this one
            again when not `use_state`.
        temperature: logits are divided by the temperature before sampling; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens.
        top_p: sample among the likeliest tokens that together reach this probability (nucleus sampling,
            arXiv 1904.09751).
        stop_tokens: a row stops after one of these tokens, and repeats it until all other rows have stopped too.
        generator: random generator for sampling.
        use_state: if False, the whole sequence is read again for each token.
    """
    at_least("max_new_tokens", max_new_tokens, 0)
    check_sampling(temperature, top_k, top_p)
    prompts = Prompts.of(ids, mask)
    stop = torch.tensor(list(stop_tokens), dtype=ids.dtype, device=ids.device)
    stopped = torch.zeros_like(prompts.lengths, dtype=torch.bool)
    rows = torch.arange(len(stopped), device=ids.device)
    for _ in range(max_new_tokens):
        logits, after = read(prompts.unread, prompts.last, prompts.mask, state)
        chosen = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        token = torch.where(stopped, prompts.whole[rows, prompts.lengths - 1], chosen)
        yield token
        stopped = stopped | torch.isin(token, stop)
        if bool(stopped.all()):
            return
        prompts = prompts.append(token, reread=not use_state)
        state = after if use_state else state


@torch.no_grad()
def beam_search(
    read: Read,
    ids: Int[Tensor, "b n"],
    max_new_tokens: int,
    *,
    beams: int,
    length_penalty: float = 1.0,
    state: Any = None,
    mask: Mask | None = None,
    stop_tokens: Sequence[int] = (),
    use_state: bool = True,
) -> Int[Tensor, "b new"]:
    """Return the best continuation of each row found by a beam search over `beams` hypotheses.

    The score of a hypothesis of n new tokens is the sum of their log-probabilities divided by ``n ** length_penalty``.
    The `beams` best hypotheses, finished or not, are kept after each token. The search ends when no unfinished
    hypothesis can overtake the best finished one.

    Args:
        beams: number of hypotheses of each row; 1 takes the likeliest token each time.
        length_penalty: 0 scores by the total log-probability, which favours short answers; 1 by the mean per token.
        others: as in :func:`generate_stream`; a state is a :class:`regard.contract.State`.

    Returns:
        The new tokens; a row that ended repeats its stop token.
    """
    at_least("max_new_tokens", max_new_tokens, 0)
    at_least("beams", beams, 1)
    at_least("length_penalty", length_penalty, 0.0)
    prompts = Prompts.of(ids, mask)
    rows, device = len(prompts.lengths), ids.device
    first = torch.arange(rows, device=device)[:, None] * beams
    prompts = prompts.repeat(beams)
    if state is not None:
        state = state.select(torch.arange(rows, device=device).repeat_interleave(beams))
    stop = torch.tensor(list(stop_tokens), dtype=ids.dtype, device=device)
    new = ids.new_zeros((rows, beams, 0))
    finished = torch.zeros((rows, beams), dtype=torch.bool, device=device)
    length = torch.zeros((rows, beams), device=device)
    score: Tensor | None = None
    for step in range(1, max_new_tokens + 1):
        logits, after = read(prompts.unread, prompts.last, prompts.mask, state)
        precise = wide(logits)
        nats = precise.log_softmax(-1).view(rows, beams, -1)
        if score is None:  # all hypotheses of a row are still identical: only the first counts
            score = nats.new_full((rows, beams), -torch.inf)
            score[:, 0] = 0
        else:  # a finished hypothesis only repeats its stop token, at no cost
            frozen = torch.full_like(nats, -torch.inf).scatter(-1, new[..., -1:], 0)
            nats = torch.where(finished[..., None], frozen, nats)
        length = torch.where(finished, length, step)
        total = score[..., None] + nats  # (B, beams, vocab)
        worth = total / (length**length_penalty)[..., None]
        best = worth.flatten(1).topk(beams).indices
        parent, token = best // nats.shape[-1], best % nats.shape[-1]
        score = total.flatten(1).gather(1, best)
        finished, length = finished.gather(1, parent), length.gather(1, parent)
        new = torch.cat([new.gather(1, parent[..., None].expand(-1, -1, step - 1)), token[..., None]], -1)
        finished = finished | torch.isin(token, stop)
        # Upper bound of an unfinished hypothesis's score: its log-probability only falls, its length only grows.
        hope = torch.where(finished, -torch.inf, score / max_new_tokens**length_penalty).amax(1)
        leader = torch.where(finished, score / length**length_penalty, -torch.inf).amax(1)
        if bool((leader >= hope).all()):
            break
        chosen = (first + parent).flatten()
        prompts = prompts.select(chosen).append(token.flatten(), reread=not use_state)
        state = after if use_state else state
        state = None if state is None else state.select(chosen)
    if score is None:
        return new[:, 0]
    winner = (score / length**length_penalty).argmax(1)
    each = torch.arange(rows, device=device)
    return new[each, winner, : int(length[each, winner].max())]


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise Unsupported for invalid or incompatible options of :func:`sample`."""
    at_least("temperature", temperature, 0.0)
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise Unsupported(
            "top_k or top_p with temperature=0, which takes the likeliest token", supported="temperature > 0"
        )
    if top_k is not None:
        at_least("top_k", top_k, 1)
    if top_p is not None and not 0 < top_p <= 1:
        raise Unsupported(f"top_p={top_p}", supported="0 < top_p <= 1", nearest="top_p=0.9")


def sample(
    logits: Float[Tensor, "b vocab"],
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " b"]:
    """Sample a token from each row of logits; options as in :func:`generate_stream`."""
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    probability, tokens = _ordered(logits, temperature, top_k, top_p)
    return tokens.gather(-1, torch.multinomial(probability, 1, generator=generator)).squeeze(-1)


def distribution(
    logits: Float[Tensor, "*b vocab"],
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "*b vocab"]:
    """Return the probability with which :func:`sample` draws each token of the vocabulary, in at least float32."""
    check_sampling(temperature, top_k, top_p)
    zeros = torch.zeros_like(wide(logits))
    if temperature == 0:
        return zeros.scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    probability, tokens = _ordered(logits, temperature, top_k, top_p)
    return zeros.scatter(-1, tokens, probability)


def _ordered(
    logits: Float[Tensor, "*b vocab"], temperature: float, top_k: int | None, top_p: float | None
) -> tuple[Float[Tensor, "*b vocab"], Int[Tensor, "*b vocab"]]:
    """Return the probabilities in descending order, and their tokens."""
    ordered, tokens = wide(logits).sort(-1, descending=True)
    ordered = ordered - ordered[..., :1]  # before the division, so that no temperature makes a score infinite
    ordered = ordered / max(temperature, torch.finfo(ordered.dtype).tiny)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if top_k is not None:
        kept[..., top_k:] = False
    if top_p is not None:
        # A token is kept if the likelier tokens together have less than top_p, so the likeliest is always kept.
        probability = ordered.softmax(-1)
        kept &= probability.cumsum(-1) - probability < top_p
    return ordered.masked_fill(~kept, -torch.inf).softmax(-1), tokens
