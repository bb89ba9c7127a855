"""Requests and answers of OpenAI's API: completions and chat completions, whole or as a stream of events.

A field that this server does not support is refused by name; nothing in a request is silently ignored.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from regard.contract import Unsupported, closest
from regard.serving.engine import FAILED, STOP, Event, Request
from regard.serving.text import Text, Writer

MOST_STOPS, MOST_LIKELIEST, LONGEST_STOP, LONGEST_USER, LONGEST_NAME = 16, 20, 1000, 512, 64


class ApiError(Exception):
    """An error that is sent as the answer.

    Args:
        status: HTTP status.
        message: one sentence.
        param: the offending field of the request, if any.
        code: machine-readable error code.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """Return the error in the API's format."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """A request for one or several answers.

    Attributes:
        prompts: tokens of each prompt.
        chat: whether the request is a chat completion.
        n: number of answers to each prompt.
        stream: whether tokens are sent as they are generated.
        with_usage: whether a stream ends with the numbers of tokens.
        logprobs: number of likeliest tokens to report with each token; None for no log-probabilities.
        stop: strings that end an answer.
        max_tokens: maximum tokens of an answer; as many as fit when None.
        ignore_stop: whether the model's own stop tokens do not end an answer.
    """

    prompts: tuple[tuple[int, ...], ...]
    chat: bool
    n: int
    stream: bool
    with_usage: bool
    logprobs: int | None
    stop: tuple[str, ...]
    max_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    seed: int | None
    user: str | None
    ignore_stop: bool

    def requests(self, text: Text, context: int, client: str) -> list[Request]:
        """Return one request for each answer, in order. The answers to a prompt use consecutive seeds."""
        made = []
        for prompt in self.prompts:
            room = max(1, context - len(prompt))
            for i in range(self.n):
                made.append(
                    Request(
                        key=uuid.uuid4().hex,
                        prompt=prompt,
                        max_tokens=room if self.max_tokens is None else self.max_tokens,
                        temperature=self.temperature,
                        top_k=self.top_k,
                        top_p=self.top_p,
                        seed=None if self.seed is None else self.seed + i,
                        stop_tokens=frozenset() if self.ignore_stop else text.stop_tokens,
                        logprobs=self.logprobs,
                        client=self.user or client,
                    )
                )
        return made


def _number(low: float, high: float = math.inf, *, whole: bool = False) -> Callable[[Any], str | None]:
    name = "a whole number" if whole else "a number"
    limits = f" from {low:g}" + (f" to {high:g}" if math.isfinite(high) else " on")

    def check(value: Any) -> str | None:
        fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and low <= value <= high
        return None if fits else name + limits

    return check


def _is(kind: type, name: str) -> Callable[[Any], str | None]:
    return lambda value: None if isinstance(value, kind) else name


def _only(*values: Any) -> Callable[[Any], str | None]:
    return lambda value: None if value in values else "left out, since this server does not have it"


def _user(value: Any) -> str | None:
    fits = isinstance(value, str) and len(value) <= LONGEST_USER  # names are kept in memory for some time
    return None if fits else f"a string of up to {LONGEST_USER} characters"


def _stops(value: Any) -> str | None:
    given = [value] if isinstance(value, str) else value
    fits = isinstance(given, list) and len(given) <= MOST_STOPS
    fits = fits and all(
        isinstance(x, str) and 1 <= len(x) <= LONGEST_STOP for x in given
    )  # all of them are searched for at each token
    return None if fits else f"a string of 1 to {LONGEST_STOP} characters, or up to {MOST_STOPS} of them"


def _stream_options(value: Any) -> str | None:
    fits = (
        isinstance(value, dict)
        and set(value) <= {"include_usage"}
        and isinstance(value.get("include_usage", False), bool)
    )
    return None if fits else '{"include_usage": true} or false'


COMMON: dict[str, Callable[[Any], str | None]] = {
    "model": _is(str, "a string"),
    "max_tokens": _number(1, whole=True),
    "temperature": _number(0, 100),
    "top_p": _number(1e-9, 1),
    "top_k": _number(1, whole=True),
    "n": _number(1, 128, whole=True),
    "seed": _number(-(2**63), 2**63 - 1, whole=True),
    "stream": _is(bool, "true or false"),
    "stream_options": _stream_options,
    "stop": _stops,
    "user": _user,
    "ignore_eos": _is(bool, "true or false"),
    "presence_penalty": _only(0),
    "frequency_penalty": _only(0),
    "logit_bias": _only({}),
}
COMPLETION = COMMON | {
    "prompt": _is(object, ""),
    "logprobs": _number(0, MOST_LIKELIEST, whole=True),
    "echo": _only(False),
    "best_of": _only(1),
    "suffix": _only(""),
}
CHAT = COMMON | {
    "messages": _is(list, "a list of messages"),
    "max_completion_tokens": _number(1, whole=True),
    "logprobs": _is(bool, "true or false"),
    "top_logprobs": _number(0, MOST_LIKELIEST, whole=True),
    "response_format": _only({"type": "text"}),
    "tools": _only([]),
    "tool_choice": _only("none"),
    "parallel_tool_calls": _only(True, False),
}
"""Fields of requests with their checks, which return None or what the value must be. A null field counts as absent."""


def read_completion(body: Mapping[str, Any], text: Text, model: str, most: int) -> Asked:
    """Parse the body of a request to ``/v1/completions`` for up to `most` answers; raises ApiError."""
    given = _checked(body, COMPLETION, model)
    if "prompt" not in given:
        raise ApiError(400, "prompt is missing", "prompt")
    prompt = given["prompt"]
    several = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    _check_count(given.get("n", 1) * (len(prompt) if several else 1), most)
    prompts = tuple(_tokens(x, text) for x in (prompt if several else [prompt]))
    return _asked(given, prompts, chat=False, logprobs=given.get("logprobs"), max_tokens=given.get("max_tokens", 16))


def read_chat(body: Mapping[str, Any], text: Text, model: str, most: int) -> Asked:
    """Parse the body of a request to ``/v1/chat/completions`` for up to `most` answers; raises ApiError."""
    given = _checked(body, CHAT, model)
    _check_count(given.get("n", 1), most)
    messages = [_message(message) for message in given.get("messages", ())]
    if not messages:
        raise ApiError(400, "messages is missing or empty", "messages")
    top = given.get("top_logprobs")
    if top is not None and not given.get("logprobs"):
        raise ApiError(400, "top_logprobs without logprobs: true", "top_logprobs")
    try:
        tokens = tuple(text.chat(messages))
    except Unsupported as error:
        raise ApiError(400, str(error), "messages") from None
    longest = given.get("max_completion_tokens", given.get("max_tokens"))
    return _asked(
        given, (tokens,), chat=True, logprobs=(top or 0) if given.get("logprobs") else None, max_tokens=longest
    )


def _check_count(count: int, most: int) -> None:
    """Raise ApiError for too many answers, before any prompt is tokenized."""
    if count > most:
        raise ApiError(400, f"{count} answers at once; this server takes up to {most}")


def _asked(
    given: Mapping[str, Any],
    prompts: tuple[tuple[int, ...], ...],
    *,
    chat: bool,
    logprobs: int | None,
    max_tokens: int | None,
) -> Asked:
    temperature, top_p, stop = float(given.get("temperature", 1)), given.get("top_p"), given.get("stop", [])
    greedy = temperature == 0  # the likeliest token passes any top_k and top_p
    options = given.get("stream_options")
    if options is not None and not given.get("stream"):
        raise ApiError(400, "stream_options without stream: true", "stream_options")
    return Asked(
        prompts=prompts,
        chat=chat,
        n=given.get("n", 1),
        stream=given.get("stream", False),
        with_usage=bool((options or {}).get("include_usage")),
        logprobs=logprobs,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=None if greedy else given.get("top_k"),
        top_p=None if greedy or top_p == 1 else top_p,
        seed=given.get("seed"),
        user=given.get("user"),
        ignore_stop=given.get("ignore_eos", False),
    )


def _checked(body: Any, fields: Mapping[str, Callable[[Any], str | None]], model: str) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ApiError(400, "the body is not a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name, value in given.items():
        if name not in fields:
            name = name[:LONGEST_NAME]
            near = closest(name, fields)
            raise ApiError(
                400, f"unknown parameter {name!r}" + (f"; try {near}" if near else ""), name, "unknown_parameter"
            )
        wanted = fields[name](value)
        if wanted is not None:
            raise ApiError(400, f"{name} must be {wanted}", name)
    if given.get("model", model) != model:
        raise ApiError(404, f"no model {given['model']!r} here; this server has {model!r}", "model", "model_not_found")
    return given


def _message(message: Any) -> dict[str, str]:
    """Return a checked message, its content joined to one string."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ApiError(400, "a message is an object with a role and a content", "messages")
    message = {field: value for field, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise ApiError(400, "the content of a message is text", "messages")
    extra = set(message) - {"role", "content", "name"}
    if extra:
        raise ApiError(400, f"unknown field {sorted(extra)[0]!r} of a message", "messages")
    if not isinstance(message.get("name", ""), str):
        raise ApiError(400, "the name in a message is text", "messages")
    return message | {"content": content}


def _tokens(prompt: Any, text: Text) -> tuple[int, ...]:
    """Return the tokens of a prompt that is a string or already a list of tokens."""
    if isinstance(prompt, str):
        return tuple(text.encode(prompt))
    if isinstance(prompt, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in prompt):
        return tuple(prompt)
    raise ApiError(400, "prompt is a string, a list of tokens, or a list of either", "prompt")


@dataclass
class Choice:
    """An answer while it is generated.

    Attributes:
        index: its number among the answers to the request.
        writer: decoder of its tokens.
        tokens: number of tokens so far.
        text: text so far.
        finish: the API's finish reason; None while the answer goes on.
        told: log-probabilities of its tokens, if requested.
    """

    index: int
    writer: Writer
    tokens: int = 0
    text: str = ""
    finish: str | None = None
    told: list[dict[str, Any]] = field(default_factory=list)


class Answer:
    """The answers to one HTTP request, and their JSON.

    Args:
        asked: the parsed HTTP request.
        requests: the scheduler's request for each answer.
        text: the tokenizer.
        model: name of the model.
    """

    def __init__(self, asked: Asked, requests: Sequence[Request], text: Text, model: str) -> None:
        self.asked, self.text, self.model = asked, text, model
        self.identity = ("chatcmpl-" if asked.chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self.choices = {r.key: Choice(i, Writer(text.decode, asked.stop)) for i, r in enumerate(requests)}
        self.stop_tokens = {r.key: r.stop_tokens for r in requests}

    def push(self, event: Event) -> tuple[Choice, str, list[dict[str, Any]]]:
        """Add a token; return its choice, which may have finished, the choice's new text and the token's
        log-probabilities.

        Raises:
            ApiError: if the model failed.
        """
        choice = self.choices[event.key]
        if event.finish == FAILED or event.token is None:
            raise ApiError(500, event.error, code="model_failed")
        choice.tokens += 1
        new, told = "", list[dict[str, Any]]()
        if event.token not in self.stop_tokens[event.key]:
            if event.logprob is not None:
                told = [self._told(event, len(choice.text))]
            new = choice.writer.push(event.token)
        if event.finish and not choice.writer.stopped:
            new += choice.writer.finish()
        if choice.writer.stopped:
            choice.finish = STOP
        elif event.finish:
            choice.finish = event.finish
        choice.text += new
        choice.told += told
        return choice, new, told

    @property
    def usage(self) -> dict[str, int]:
        """Numbers of prompt tokens and of generated tokens so far."""
        prompt, written = sum(map(len, self.asked.prompts)), sum(c.tokens for c in self.choices.values())
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    def whole(self) -> dict[str, Any]:
        """Return the complete answer to a request without streaming."""
        choices = []
        for choice in self.choices.values():
            content: dict[str, Any] = {"text": choice.text}
            if self.asked.chat:
                content = {"message": {"role": "assistant", "content": choice.text}}
            choices.append(self._choice(choice, content, choice.told, choice.finish))
        return self._around("chat.completion" if self.asked.chat else "text_completion", choices) | {
            "usage": self.usage
        }

    def first(self) -> list[dict[str, Any]]:
        """Return the first events of a stream: for chats, the role of each answer."""
        if not self.asked.chat:
            return []
        begun: dict[str, Any] = {"delta": {"role": "assistant", "content": ""}}
        return [self._piece([self._choice(choice, begun, [], None)]) for choice in self.choices.values()]

    def piece(self, choice: Choice, new: str, told: list[dict[str, Any]]) -> dict[str, Any]:
        """Return an event of a stream, with new text of one choice."""
        content: dict[str, Any] = {"delta": {"content": new}} if self.asked.chat else {"text": new}
        return self._piece([self._choice(choice, content, told, choice.finish)])

    def last(self) -> list[dict[str, Any]]:
        """Return the last events of a stream: the usage, if requested."""
        return [self._piece([]) | {"usage": self.usage}] if self.asked.with_usage else []

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._around("chat.completion.chunk" if self.asked.chat else "text_completion", choices)

    def _around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _choice(
        self, choice: Choice, content: dict[str, Any], told: list[dict[str, Any]], finish: str | None
    ) -> dict[str, Any]:
        return {"index": choice.index, **content, "logprobs": self._logprobs(told), "finish_reason": finish}

    def _logprobs(self, told: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        if self.asked.chat:
            return {"content": [{k: v for k, v in one.items() if k != "offset"} for one in told]}
        return {
            "tokens": [one["token"] for one in told],
            "token_logprobs": [one["logprob"] for one in told],
            "top_logprobs": [_by_name(one["top_logprobs"]) for one in told],
            "text_offset": [one["offset"] for one in told],
        }

    def _told(self, event: Event, offset: int) -> dict[str, Any]:
        assert event.token is not None and event.logprob is not None
        top = [self._named(token, nats) for token, nats in event.top]
        return self._named(event.token, event.logprob) | {"top_logprobs": top, "offset": offset}

    def _named(self, token: int, nats: float) -> dict[str, Any]:
        name = self.text.decode([token])
        known = None if "\ufffd" in name else list(name.encode())
        return {"token": name, "logprob": max(nats, -9999.0), "bytes": known}  # JSON has no infinity


def _by_name(top: list[dict[str, Any]]) -> dict[str, float]:
    """Return log-probabilities by text; of tokens with the same text (parts of characters), the likeliest counts."""
    found = dict[str, float]()
    for one in top:
        found.setdefault(one["token"], one["logprob"])
    return found
