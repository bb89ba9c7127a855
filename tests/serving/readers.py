"""Models for tests of the scheduler: the next token is a hash of the sequence, as read from where the scheduler put it."""

from __future__ import annotations

import torch

from regard.serving.engine import Request

VOCABULARY = 97


def following(tokens):
    """Logits of the token that follows a sequence."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens)) & 0x7FFFFFFF)
    return torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)


class HashReader:
    """Keeps tokens in pages as a model keeps keys and values, so that a page freed too early changes the answer."""

    vocab_size, at_once, device, page_bytes, held_bytes = VOCABULARY, False, torch.device("cpu"), 32, 0

    def __init__(self, context=64, pages=40, page_size=4, holds=False):
        self.context, self.pages, self.page_size, self.holds = context, pages, page_size, holds
        self.pool = [[None] * page_size for _ in range(max(pages, 1))]
        self.held = {}
        self.calls = []

    def read(self, rows, tokens):
        assert len({row.number for row in rows}) == len(rows) and all(tokens)
        assert len({row.length == 0 for row in rows}) == 1, "rows that begin come without others"
        self.calls.append([len(new) for new in tokens])
        logits = []
        for row, new in zip(rows, tokens, strict=True):
            if self.pages:
                for at, token in enumerate(new, row.length):
                    self.pool[row.pages[at // self.page_size]][at % self.page_size] = token
                end = row.length + len(new)
                text = [self.pool[row.pages[at // self.page_size]][at % self.page_size] for at in range(end)]
            if self.holds:
                before = self.held.get(row.number, ())
                assert len(before) == row.length
                self.held[row.number] = before + tuple(new)
                assert not self.pages or text == list(self.held[row.number])
                text = list(self.held[row.number])
            logits.append(following(text))
        return torch.stack(logits)

    def save(self, row):
        return self.held[row.number], len(self.held[row.number])

    def restore(self, row, saved):
        self.held[row.number] = saved

    def forget(self, row):
        self.held.pop(row.number, None)


def alone(request: Request):
    """The tokens that answer a request alone in the batch, and the reason why they end."""
    from regard.models.generation import sample

    generator = torch.Generator().manual_seed(request.seed or 0)
    text, new = list(request.prompt), []
    while len(new) < request.max_tokens:
        token = int(
            sample(
                following(text)[None],
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                generator=generator,
            )
        )
        text.append(token)
        new.append(token)
        if token in request.stop_tokens:
            return new, "stop"
    return new, "length"


def drain(engine, arrivals=(), every=1):
    """Run an engine until it is idle, submitting one of `arrivals` every `every` steps; returns tokens and ends by key."""
    waiting, tokens, ends, step = list(arrivals), {}, {}, 0
    while waiting or engine.busy:
        if waiting and step % every == 0:
            engine.submit(waiting.pop(0))
        for event in engine.step():
            assert event.key not in ends, "an event after the last"
            if event.token is not None:
                tokens.setdefault(event.key, []).append(event.token)
            if event.finish:
                ends[event.key] = event.finish
        step += 1
        assert step < 10_000, "the engine does not end"
    return tokens, ends
