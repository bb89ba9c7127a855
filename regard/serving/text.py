"""Text in and out of a model: tokenizers, chat templates, incremental decoding and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from regard.contract import Unsupported
from regard.tasks.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""The replacement character, for bytes that are not, or not yet, a character."""

CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
"""The chat template for models without one of their own."""

OF_TEMPLATES = (ArithmeticError, LookupError, TypeError, ValueError)
"""Errors that an expression in a template may raise, in addition to jinja2's own."""

Messages = Sequence[Mapping[str, Any]]


class Text(Protocol):
    """The interface of a tokenizer to the server.

    Attributes:
        stop_tokens: tokens that end an answer.
    """

    stop_tokens: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; bytes that are not a character become replacement characters."""
        ...

    def chat(self, messages: Messages) -> list[int]:
        """Return the tokens of a chat, up to the start of the answer."""
        ...


class PlainText:
    """One of regard's own tokenizers, which have no special tokens.

    Args:
        tokenizer: the tokenizer.
        template: jinja2 chat template; :data:`CHAT` when None.
    """

    stop_tokens: frozenset[int] = frozenset()

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._render = compiled(CHAT if template is None else template)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode([text.encode()]).tolist()

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)

    def chat(self, messages: Messages) -> list[int]:
        return self.encode(self._render(messages))


class TransformersText:
    """A tokenizer of transformers, with its own chat template if it has one.

    Args:
        tokenizer: the tokenizer.
        stop_tokens: stop tokens from the model's settings; the tokenizer's end-of-sequence token is added.
        template: jinja2 chat template, instead of the tokenizer's.
    """

    def __init__(self, tokenizer: Any, stop_tokens: Sequence[int] = (), template: str | None = None) -> None:
        self._tokenizer = tokenizer
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        self.stop_tokens = frozenset((*stop_tokens, *own))
        render = template if template is not None or tokenizer.chat_template else CHAT
        self._render = None if render is None else compiled(render)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def chat(self, messages: Messages) -> list[int]:
        if self._render is not None:
            return self.encode(self._render(messages))
        from jinja2 import TemplateError

        plain = [dict(message) for message in messages]
        try:
            laid_out = self._tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        except (TemplateError, *OF_TEMPLATES) as error:
            raise Unsupported(f"a chat that the model's template cannot lay out ({error})") from None
        return self._tokenizer.encode(laid_out, add_special_tokens=False)


def compiled(template: str) -> Callable[[Messages], str]:
    """Compile a jinja2 chat template in a sandbox; return the function that renders a chat.

    Raises:
        Unsupported: for a template that is not valid jinja2. The returned function raises it for a chat that the
            template fails on.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        made = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
        ).from_string(template)
    except TemplateError as error:
        raise Unsupported(f"a chat template that cannot be read ({error})", supported="jinja2") from None

    def render(messages: Messages) -> str:
        try:
            return made.render(messages=messages, add_generation_prompt=True)
        except (TemplateError, *OF_TEMPLATES) as error:
            raise Unsupported(f"a chat that its template cannot lay out ({error})") from None

    return render


class Writer:
    """Decodes tokens one at a time, without partial characters, up to the first stop string.

    All pieces together are the text of all tokens decoded at once, cut before the first stop string.

    Args:
        decode: function from tokens to text.
        stop: strings that end the text.

    Attributes:
        stopped: whether a stop string was found.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, [text for text in stop if text]
        self._tokens: list[int] = []
        self._from = self._done = 0  # the last settled tokens, and the first whose text may change
        self._taken = 0  # characters of the unsettled text that are in `_text` already
        self._text, self._shown = "", 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Add a token; return the text that can be shown now."""
        self._tokens.append(token)
        new = self._unsettled()
        whole = new.rstrip(UNFINISHED) if new.endswith(UNFINISHED) else new
        certain = new[: max(len(whole), len(new) - 3)]  # an unfinished character has at most three bytes
        self._text += certain[self._taken :]
        self._taken = max(self._taken, len(certain))
        if not new.endswith(UNFINISHED):
            self._from, self._done, self._taken = self._done, len(self._tokens), 0
        return self._show(hold=True)

    def finish(self) -> str:
        """Return the rest of the text after the last token."""
        if not self.stopped:
            self._text += self._unsettled()[self._taken :]
            self._from = self._done = len(self._tokens)
            self._taken = 0
        return self._show(hold=False)

    def _unsettled(self) -> str:
        """Return the text of the tokens from `_done` on, decoded with those before, which can affect a first space."""
        before = self._decode(self._tokens[self._from : self._done]) if self._done > self._from else ""
        return self._decode(self._tokens[self._from :])[len(before) :]

    def _show(self, *, hold: bool) -> str:
        if self.stopped:
            return ""
        end = len(self._text)
        longest = max(map(len, self._stop), default=0)
        start = max(0, self._shown - longest)
        met = [at for at in (self._text.find(stop, start) for stop in self._stop) if at >= 0]
        if met:
            self.stopped, end = True, max(self._shown, min(met))
        elif hold:
            end -= max((_overlap(self._text, stop) for stop in self._stop), default=0)
        part = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return part


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of the text that an incomplete stop string begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
