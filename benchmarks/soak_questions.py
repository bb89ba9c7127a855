"""Questions for a soak test of the server, each with the answer that the model alone gives."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.compression.folders import load_causal_model
from regard.models import LanguageModel
from regard.models.generation import sample
from regard.serving.text import Text
from regard.workbench.trained.folder import RECORD, open_trained

CLEAR, TIMES_ROUNDING = 0.002, 10
"""The logit margin by which the likeliest token of a greedy answer must lead, so that rounding in another batch cannot change
it: at least `CLEAR`, and `TIMES_ROUNDING` times the measured rounding error."""
DISTURBED, SPREAD = 8, 4
"""A sampled token counts as known if it is drawn from so many disturbed logits too, each changed by at most `SPREAD` times
the measured rounding error."""
LENGTHS = (8, 16, 24)
LONG, SLOW = 128, 200
"""Fewest and most tokens of long answers, which clients abandon or read slowly."""
TURNS = 8
"""Attempts for each question to find a clear answer that no other question has."""


@dataclass(frozen=True)
class Answer:
    """The expected content of one choice of a response.

    Attributes:
        tokens: number of generated tokens; None if a stop string ended the answer.
    """

    text: str
    finish: str
    tokens: int | None


@dataclass(frozen=True)
class Question:
    """A request's body without its model, and the answers that it must get.

    Attributes:
        prompt_tokens: the count expected in the response's usage; None for chats, which are not checked.
    """

    kind: str
    body: dict[str, Any]
    answers: tuple[Answer, ...]
    prompt_tokens: int | None

    @property
    def chat(self) -> bool:
        """True for a chat, False for a completion."""
        return "messages" in self.body

    @property
    def path(self) -> str:
        """The path of its endpoint."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"


class Alone:
    """A model by itself, called through `generate`.

    Attributes:
        rounding: the measured rounding error of a logit.
        clear: the logit margin that the likeliest token needs for an answer to count as known.
    """

    def __init__(self, folder: Path, text: Text) -> None:
        self.text = text
        if (folder / RECORD).is_file():
            self.model = open_trained(folder).model("cpu")
        else:
            self.model = load_causal_model(folder)
        self.own = isinstance(self.model, LanguageModel)
        self.model.eval()
        self.rounding = self._rounding()
        self.clear = max(CLEAR, TIMES_ROUNDING * self.rounding)

    @torch.no_grad()
    def _rounding(self) -> float:
        """Largest change of a logit when few tokens are read at a time, for which low-bit weights use another kernel."""
        ids = torch.tensor(
            [self.text.encode("What one reads alone, and what one reads among others, is the same.\n" * 4)]
        )
        among = self._logits(ids)
        return max(float((self._logits(ids[:, :n]) - among[:n]).abs().max()) for n in (1, 2, 5, 17))

    @torch.no_grad()
    def greedy(self, prompt: Sequence[int], count: int) -> list[int] | None:
        """The answer's tokens; None if two tokens were nearly equally likely at some place."""
        ids, stops = torch.tensor([list(prompt)]), sorted(self.text.stop_tokens)
        if self.own:
            new = self.model.generate(ids, count, stop_tokens=stops)[0]
        else:
            options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": stops or None, "pad_token_id": 0}
            new = self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :]
        logits = self._logits(torch.cat([ids[0], new[:-1]])[None])[len(prompt) - 1 :]
        first, second = logits.topk(2, -1).values.unbind(-1)
        return new.tolist() if float((first - second).min()) > self.clear else None

    @torch.no_grad()
    def sampled(self, prompt: Sequence[int], count: int, seed: int, **options: Any) -> list[int] | None:
        """The answer's tokens, sampled with a seed; None if rounding could change one."""
        ids, stops = torch.tensor([list(prompt)]), self.text.stop_tokens
        options = {"top_k": None, "top_p": None} | options
        generator, noise, new = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed), list[int]()
        while len(new) < count and (not new or new[-1] not in stops):
            logits = self._logits(torch.cat([ids, torch.tensor([new], dtype=ids.dtype)], 1))[-1:]
            before, drawn = generator.get_state(), set()
            for i in range(DISTURBED + 1):
                generator.set_state(before)
                change = torch.rand(logits.shape, generator=noise, dtype=logits.dtype) * 2 - 1
                drawn.add(
                    int(sample(logits + bool(i) * SPREAD * self.rounding * change, generator=generator, **options))
                )
            if len(drawn) > 1:
                return None
            new += drawn
        return new

    def _logits(self, ids: Tensor) -> Tensor:
        """Logits at each place, (N, vocab)."""
        result = self.model(ids)
        return (result.output if self.own else result.logits)[0]


class Pool:
    """Draws questions and asks the model alone.

    Args:
        prose: the text from which prompts are cut.
        context: the server's limit on the tokens of a prompt and its answer together.
    """

    def __init__(self, alone: Alone, prose: str, context: int, draws: random.Random) -> None:
        self.alone, self.text, self.prose, self.context, self.draws = alone, alone.text, prose, context, draws
        self.shared = [self._cut(context) for _ in range(3)]  # `context` bytes: about a third of the context in tokens
        self._seen: set[str] = set()

    def fill(self, each: int) -> list[Question]:
        """Make up to `each` questions of each kind."""
        makers = (self._plain, self._shared, self._full, self._chat, self._sampled, self._stopped, self._slow)
        made = [question for maker in makers for _ in range(each) if (question := self._clear(maker))]
        kinds = {question.kind for question in made}
        if len(kinds) < len(makers):
            raise SystemExit(f"the model alone has clear answers to {', '.join(sorted(kinds))} only")
        return made

    def _clear(self, maker: Any) -> Question | None:
        for _ in range(TURNS):
            question = maker()
            if question is not None and question.answers[0].text not in self._seen:
                self._seen.add(question.answers[0].text)
                return question
        return None

    def _cut(self, characters: int) -> str:
        start = self.draws.randrange(len(self.prose) - characters)
        return self.prose[start : start + characters]

    def _greedy(self, kind: str, body: dict[str, Any], tokens: Sequence[int]) -> Question | None:
        if len(tokens) + body["max_tokens"] > self.context:
            return None
        new = self.alone.greedy(tokens, body["max_tokens"])
        counted = None if "messages" in body else len(tokens)
        return new and Question(kind, {"temperature": 0, **body}, (self._answer(new),), counted)

    def _answer(self, new: list[int]) -> Answer:
        stopped = new[-1] in self.text.stop_tokens
        return Answer(self.text.decode(new[:-1] if stopped else new), "stop" if stopped else "length", len(new))

    def _plain(self) -> Question | None:
        prompt = self._cut(self.draws.randint(5, 200))
        body = {"prompt": prompt, "max_tokens": self.draws.choice(LENGTHS)}
        return self._greedy("short prompt", body, self.text.encode(prompt))

    def _shared(self) -> Question | None:
        prompt = self.draws.choice(self.shared) + self._cut(self.draws.randint(5, 60))
        body = {"prompt": prompt, "max_tokens": self.draws.choice(LENGTHS)}
        return self._greedy("shared beginning", body, self.text.encode(prompt))

    def _full(self) -> Question | None:
        """A question whose prompt and answer fill the context."""
        count = self.draws.choice(LENGTHS)
        tokens = self.text.encode(self._cut(8 * self.context))[: self.context - count]
        return self._greedy("full context", {"prompt": tokens, "max_tokens": count}, tokens)

    def _chat(self) -> Question | None:
        system = {"role": "system", "content": self.draws.choice(self.shared)}
        messages = [system, {"role": "user", "content": self._cut(self.draws.randint(5, 60))}]
        body = {"messages": messages, "max_tokens": self.draws.choice(LENGTHS)}
        return self._greedy("chat", body, self.text.chat(messages))

    def _slow(self) -> Question | None:
        prompt = self._cut(self.draws.randint(5, 60))
        body = {"prompt": prompt, "max_tokens": self.draws.randint(LONG, SLOW), "logprobs": 20, "ignore_eos": True}
        if self.text.stop_tokens:
            body["max_tokens"] = LONG // 2
            del body["ignore_eos"]
        return self._greedy("long answer", body, self.text.encode(prompt))

    def _sampled(self) -> Question | None:
        prompt, count, seed = (
            self._cut(self.draws.randint(5, 60)),
            self.draws.choice(LENGTHS),
            self.draws.randrange(999),
        )
        options = {"temperature": 0.8, **self.draws.choice([{}, {"top_k": 20}, {"top_p": 0.9}])}
        tokens = self.text.encode(prompt)
        new = self.alone.sampled(tokens, count, seed, **options)
        if new is None:
            return None
        body = {"prompt": prompt, "max_tokens": count, "seed": seed, **options}
        return Question("sampled with a seed", body, (self._answer(new),), len(tokens))

    def _stopped(self) -> Question | None:
        """A greedy question with a stop string taken from the middle of its answer."""
        found = self._plain()
        if found is None or len(found.answers[0].text) < 6:
            return None
        text = found.answers[0].text
        stop = text[len(text) // 2 :][:3]
        if "\ufffd" in text:
            return None
        answer = Answer(text[: text.find(stop)], "stop", None)
        return Question("stop string", found.body | {"stop": ["no such thing", stop]}, (answer,), found.prompt_tokens)


def together(questions: Sequence[Question]) -> Question:
    """Several completions of the same length in one request."""
    body = questions[0].body | {"prompt": [question.body["prompt"] for question in questions]}
    counted = sum(question.prompt_tokens or 0 for question in questions)
    return Question("several prompts", body, tuple(question.answers[0] for question in questions), counted)
