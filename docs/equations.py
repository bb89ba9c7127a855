r"""Translates the plain-text equations of docstrings to TeX.

    python docs/equations.py regard/mechanisms/*.py      # the TeX of every indented block, or why it stays code

The mechanisms' docstrings share this notation:

- ``x_ij``, ``x_{t-1}``, ``W_max`` have subscripts; ``x^2``, ``K^-1/2``, ``e^(a + b)``, ``e^{a + b}`` superscripts, where
  ``^T`` is the transpose and ``^+`` the pseudo-inverse. ``x'``, ``x~`` and ``x^_i`` have a prime, a tilde and a hat.
- Products are written side by side; `` . `` is the dot product, `` * `` the elementwise product. ``a / (b)`` at the end of
  a term is a fraction; any other slash stays a slash.
- ``|x|``, ``||x||`` and ``<x, y>`` are brackets, ``{ x }`` is a set, ``(0, 1]`` an interval.
- Two or more spaces begin another equation on the same line. A line that is indented further continues the previous one.
- Words are the entries of `FUNCTIONS` and `WORDS`, and option names in backticks. All other letters are one-letter
  variables or indices.

A block that cannot be parsed, or can be read in two ways, is refused and stays a code block: a page shows an equation as it
was meant, or as it was written.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import cleandoc
from pathlib import Path


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


GREEK = _words("""
alpha beta gamma delta epsilon zeta eta theta kappa lambda mu nu xi pi rho sigma tau phi chi psi omega
Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega
""")

NAMES = {"inf": r"\infty", "eps": r"\varepsilon", "dt": r"\operatorname{dt}"}
"""Multi-letter variables that have a symbol of their own."""

SUMS = _words("sum prod max min")
COMMANDS = SUMS | _words("exp log ln sin cos tanh")
"""Functions that have a TeX command."""

FUNCTIONS = COMMANDS | _words("""
softmax softplus sigmoid logsigmoid logsumexp relu gelu silu swish clip clamp cap round argsort top-k diag tril concat
norm Norm LN RMSNorm RoPE KL MSE CNN FF PW DW DWD DWC LCE LKA Attn Attention SG S6 Re Im mean pool conv combine pixel
""")

WORDS = _words("""
after alike all among and another apart are as at before bias block blocks both by causal causal-self channels clamped
cls column detached divided divides DKV DQ drawn each else empty every exact features first for from gate group groups
Gumbel head heads hidden hides highest hold if in init input inputs is it items its kept key keys KR landmark
landmarks largest last later layer least lie likewise linear loss LSE maps means memory miss multiplies near NKA no
noise noncausal-self none normal normalised not numbers of one ones only or other others out over pairs pattern per
permutations places pooled positive QR queries query random rank regions residual routed row rows same sampled scores seen
segment seq several shape shared shortcut signed six small ssm T1 T2 temperature that the then there these this those
times to together token tokens trained training UK unbiased unbounded UQ used UV Var visible when where which with
""")
"""All other words. Add a word here when a docstring first uses it in an equation."""

FENCES = {"sqrt": (r"\sqrt{", "}"), "floor": (r"\lfloor ", r" \rfloor"), "ceil": (r"\lceil ", r" \rceil")}
"""Functions that TeX writes around their argument."""

INFIX = {"mod": r"\bmod", "div": r"\;\mathrm{div}\;"}

RELATIONS = {
    "=": "=",
    "!=": r"\ne",
    "<": "<",
    ">": ">",
    "<=": r"\le",
    ">=": r"\ge",
    "<-": r"\leftarrow",
    "->": r"\to",
    "~": r"\sim",
    "≈": r"\approx",
}
CLOSERS = {"(": (")", "]"), "[": ("]", ")"), "{": ("}",), "|": ("|",), "||": ("||",), "<": (">",)}
"""Signs that may close each bracket: the first normally, the second only for a half-open interval."""

LEFT = {"(": "(", "[": "[", "{": r"\{", "|": r"\lvert ", "||": r"\lVert ", "<": r"\langle "}
RIGHT = {")": ")", "]": "]", "}": r"\}", "|": r" \rvert", "||": r" \rVert", ">": r" \rangle"}

TOKEN = re.compile(
    r"""(?P<space>\s+)
    | (?P<number>\d+(?:\.\d+)?(?:e-?\d+)?)
    | (?P<word>(?:top-k|(?:non)?causal-self)\b | [A-Za-z]{2,}'s\b | [A-Za-z]+\d*)
    | (?P<code>`[\w.]+`)
    | (?P<mark>\.\.\. | \|\| | <= | >= | != | <- | -> | [-+*./=<>~≈^_,;:'()\[\]{}|])""",
    re.VERBOSE,
)


class Refused(ValueError):
    """The text is not an equation in this notation, or could be read in two ways."""


@dataclass(frozen=True)
class Token:
    """A token of a line: `kind` is a group of `TOKEN` or "end"; `before` and `after` count the spaces around it."""

    kind: str
    text: str
    before: int
    after: int
    column: int


@dataclass(frozen=True)
class Item:
    """A piece of an equation in TeX.

    Attributes:
        kind: "operand", "prefix" (a function or sum, which applies to what follows), "text", "sign", "plus", "product",
            "slash", "relation", "comma" or "gap" (between two equations).
        tex: the TeX; for "text" the plain words.
        inner: for an operand in round brackets, the TeX inside them.
        column, spaces: for a gap, the column where it ends and its width.
    """

    kind: str
    tex: str
    inner: str = ""
    column: int = 0
    spaces: int = 0


END = Token("end", "", 0, 0, 0)
WIDTH = 90
"""Longest line in characters; a longer one is broken at the gaps between its equations."""

DANGLING = ("sign", "plus", "product", "slash", "relation")
"""Kinds that must be followed by an operand."""


def equation(block: str) -> str:
    """The TeX of an indented block: one line, or several `aligned` ones.

    Raises:
        Refused: The block cannot be parsed, or is ambiguous.
    """
    lines = block.splitlines()
    indents = [len(line) - len(line.lstrip()) for line in lines]
    rows = [Parser(line.strip()).items() for line in lines]
    begins = [indent == indents[0] for indent in indents]
    if not rows or not all(rows) or min(indents) < indents[0]:
        raise Refused("a line is empty, or the first one is indented further than others")
    if not any(item.kind == "relation" for row in rows for item in row):
        raise Refused("nothing is said to be equal, smaller or greater")
    if any(all(item.kind in ("text", "comma") for item in row) for row in rows):
        raise Refused("a line has words alone")
    if any(begin and row[0].kind == "relation" for begin, row in zip(begins, rows, strict=True)):
        raise Refused("nothing stands before a relation")
    written = _aligned(rows, begins, [len(line.strip()) for line in lines])
    if len(written) == 1:
        return join(rows[0])
    return "\\begin{aligned}\n" + " \\\\\n".join(written) + "\n\\end{aligned}"


def _aligned(rows: Sequence[Sequence[Item]], begins: Sequence[bool], lengths: Sequence[int]) -> list[str]:
    """Lines of TeX; rows that do not begin an equation continue the one above."""
    at_relations = all(_anchor(row) for begin, row in zip(begins, rows, strict=True) if begin)
    in_columns = _in_columns(rows, begins)
    written = []
    for i, row in enumerate(rows):
        if not begins[i]:
            written.append(_continued(row))
        elif in_columns:
            written.append(" & ".join(_anchored(part, at_relations) for part in _parts(row)))
        else:
            goes_on = i + 1 < len(rows) and not begins[i + 1]
            first, *others = [row] if goes_on else _wrapped(row, lengths[i])
            written.append(_anchored(first, at_relations))
            written += [_anchored(other, at_relations) if _anchor(other) else _continued(other) for other in others]
    return written


def _in_columns(rows: Sequence[Sequence[Item]], begins: Sequence[bool]) -> bool:
    """Return whether the equations of all lines start in the same columns."""
    gaps = [columns for row in rows if (columns := [item.column for item in row if item.kind == "gap"])]
    return all(begins) and len(gaps) > 1 and all(columns == gaps[0] for columns in gaps)


def _parts(row: Sequence[Item]) -> list[list[Item]]:
    """Split a line at its gaps."""
    parts: list[list[Item]] = [[]]
    for item in row:
        if item.kind == "gap":
            parts.append([])
        else:
            parts[-1].append(item)
    return parts


def _wrapped(row: Sequence[Item], length: int) -> list[list[Item]]:
    """Break a line of `length` characters at its gaps into lines of at most `WIDTH` where possible."""
    first, *others = _parts(row)
    gaps = [item for item in row if item.kind == "gap"]
    starts = [0, *(gap.column for gap in gaps)]
    ends = [*(gap.column - gap.spaces for gap in gaps), length]
    widths = [end - start for start, end in zip(starts, ends, strict=True)]
    wrapped, width = [first], widths[0]
    for gap, part, more in zip(gaps, others, widths[1:], strict=True):
        if width + more > WIDTH:
            wrapped.append(part)
            width = more
        else:
            wrapped[-1] += [gap, *part]
            width += more
    return wrapped


def _anchor(row: Sequence[Item]) -> int:
    """Index of the relation at which a line is aligned with the others; 0 if it has none."""
    for i, item in enumerate(row):
        if item.kind == "relation":
            return i
        named = i == 0 and len(row) > 1 and row[1].kind == "relation"  # out = ...
        if item.kind == "gap" or (item.kind == "text" and not named):
            break
    return 0


def _anchored(row: Sequence[Item], at_relation: bool) -> str:
    anchor = _anchor(row) if at_relation else 0
    return f"{join(row[:anchor])} & {join(row[anchor:])}".lstrip()


def _continued(row: Sequence[Item]) -> str:
    return f"& {join(row)}" if row[0].kind == "relation" else rf"& \quad {join(row)}"


def join(items: Sequence[Item], script: bool = False) -> str:
    """Join the TeX of `items`; in a script without fractions, and without space after commas."""
    items = items if script else list(_fractions(items))
    spaced = ("operand", "prefix", "text") if script else ("operand", "prefix", "text", "comma")
    written = []
    for i, item in enumerate(items):
        tex = item.tex
        if item.kind == "text":
            before = " " if i and items[i - 1].kind in spaced else ""
            after = " " if i + 1 < len(items) and items[i + 1].kind in ("operand", "prefix", "sign") else ""
            tex = rf"\text{{{before}{tex}{after}}}"
        written.append(tex)
    return " ".join(written)


def _fractions(items: Sequence[Item]) -> Iterator[Item]:
    """Yield `items` with each term ``a / (b)`` replaced by a fraction."""
    term: list[Item] = []
    for item in [*items, Item("end", "")]:
        if item.kind in ("operand", "prefix", "text", "product", "slash"):
            term.append(item)
            continue
        yield from _fraction(term)
        term = []
        if item.kind != "end":
            yield item


def _fraction(term: Sequence[Item]) -> Sequence[Item]:
    if len(term) < 3 or term[-2].kind != "slash" or not term[-1].inner:
        return term
    above = term[:-2]
    if any(item.kind != "operand" for item in above):  # a . b / (c) may be a . (b / c)
        return term
    numerator = above[0].inner if len(above) == 1 and above[0].inner else join(above)
    return [Item("operand", rf"\frac{{{numerator}}}{{{term[-1].inner}}}")]


def tokenize(line: str) -> list[Token]:
    """The tokens of a line, followed by the end token."""
    found: list[re.Match[str]] = []
    at = 0
    while at < len(line):
        match = TOKEN.match(line, at)
        if not match:
            raise Refused(f"{line[at]!r} is no part of the notation")
        at = match.end()
        if match.lastgroup != "space":
            found.append(match)
    ends = [0, *(match.end() for match in found)]
    starts = [*(match.start() for match in found), len(line)]
    spaces = [start - end for end, start in zip(ends, starts, strict=True)]
    tokens = [
        Token(str(match.lastgroup), match[0], before, after, match.start())
        for match, before, after in zip(found, spaces, spaces[1:], strict=False)
    ]
    return [*tokens, END]


class Parser:
    """Parses one line from left to right."""

    def __init__(self, line: str) -> None:
        self.tokens = tokenize(line)
        self.at = 0

    @property
    def next(self) -> Token:
        return self.tokens[self.at]

    def take(self) -> Token:
        self.at += 1
        return self.tokens[self.at - 1]

    def tight(self, *texts: str, ahead: int = 0) -> bool:
        """Return whether the token `ahead` places after the next one is one of `texts`, without a space before it."""
        token = self.tokens[self.at + ahead]
        return token.before == 0 and token.text in texts

    def items(self, opener: str = "") -> list[Item]:
        """The items up to the bracket that closes `opener` (which is not consumed), or up to the end of the line."""
        items: list[Item] = []
        while not self._closes(opener, items):
            if self.next is END:
                raise Refused(f"{opener!r} is not closed")
            if self._begins_another(opener, items):
                items.append(Item("gap", r"\qquad", column=self.next.column, spaces=self.next.before))
            items.append(self._item(opener, items))
        if items and (items[-1].kind in DANGLING or (opener and items[-1].kind == "comma")):
            raise Refused(f"nothing follows {items[-1].tex!r}")
        return items

    def _closes(self, opener: str, items: Sequence[Item]) -> bool:
        if not opener:
            return self.next is END
        return self.next.text in CLOSERS[opener] and not (opener in ("|", "||") and _expects(items))

    def _begins_another(self, opener: str, items: Sequence[Item]) -> bool:
        """Return whether wide spaces separate two equations (around a relation they only align it with others)."""
        wide = self.next.before > 1 and bool(items) and not opener
        return wide and items[-1].kind not in DANGLING and self.next.text not in RELATIONS

    def _item(self, opener: str, items: Sequence[Item]) -> Item:
        token = self.take()
        if token.kind == "number":
            return self._number(token, items)
        if token.kind in ("word", "code"):
            return self._word(token, items)
        if token.text in RELATIONS and not (token.text == "<" and _expects(items)):
            return self._relation(token, opener, items)
        if token.text in CLOSERS:
            return self._group(token, items)
        if token.text in ("+", "-"):
            return self._plus(token, items)
        if token.text == ":":
            return self._colon(token, opener, items)
        if token.text == "...":
            return Item("operand", r"\dots")
        if not _expects(items):
            if token.text in (".", "*") and token.before and token.after:
                return Item("product", r"\cdot" if token.text == "." else r"\odot")
            if token.text == "/":
                return Item("slash", "/")
            if token.text in (",", ";"):
                return Item("comma", token.text)
        raise Refused(f"{token.text!r} has no meaning where it stands")

    def _number(self, token: Token, items: Sequence[Item]) -> Item:
        beside = bool(items) and items[-1].kind == "operand"
        if beside and items[-1].tex[-1].isdigit():
            raise Refused(f"two numbers side by side, the second {token.text}")
        mantissa, _, exponent = token.text.partition("e")
        if exponent and mantissa != "1":
            raise Refused(f"{token.text} is no power of ten")
        tex = f"10^{{{int(exponent)}}}" if exponent else self._scripts(token.text)
        return Item("operand", rf"\,{tex}" if beside else tex)

    def _word(self, token: Token, items: Sequence[Item]) -> Item:
        name = token.text
        if name in FENCES and self.tight("("):
            left, right = FENCES[name]
            return Item("operand", self._scripts(left + join(self._enclosed()) + right))
        if name in INFIX and not _expects(items):
            return Item("product", INFIX[name])
        if name == "in" and items and items[-1].kind == "operand" and not self._is_text(self.at):
            return Item("relation", r"\in")
        if self._is_text(self.at - 1):
            return self._text(token, items)
        tex = self._scripts(_name(name), name)
        if tex == "x" and items and items[-1].kind == "operand" and self.next.kind in ("word", "number"):
            raise Refused("x: a variable or times?")
        if self.next.text in ("+", "-"):  # after an operator TeX would set it as a unary sign
            tex = tex.replace("operatorname", "mathrm")
        if name in SUMS and self.next.kind not in ("word", "number") and self.next.text not in LEFT:
            raise Refused(f"nothing follows {name!r}")
        reaches = name in SUMS or (name in FUNCTIONS and not self.tight("(", "["))
        return Item("prefix" if reaches else "operand", tex)

    def _is_text(self, at: int) -> bool:
        """Return whether the token at `at` is a word of a sentence rather than a quantity or a function."""
        token = self.tokens[at]
        if token.kind == "code":
            return True
        if token.kind != "word":
            return False
        following = self.tokens[at + 1]
        if following.before == 0 and following.text in ("(", "[", "_", "^", "'", "~"):
            return False
        if token.text not in FUNCTIONS:
            return token.text.removesuffix("'s") in WORDS
        if following.kind == "word":
            return following.text not in FUNCTIONS and self._is_text(at + 1)
        ends = following is END or following.text in (",", ";", ":", ")")
        return ends and at > 0 and self.tokens[at - 1].text in WORDS

    def _text(self, token: Token, items: Sequence[Item]) -> Item:
        if items and items[-1].tex == "a":
            raise Refused(f"'a {token.text}': an article or a variable?")
        words = [token.text]
        while self.next.before == 1 and self._is_text(self.at):
            words.append(self.take().text)
        if self.tight(":"):
            words[-1] += self.take().text
        return Item("text", re.sub("`(.*?)`", _code, " ".join(words)))

    def _relation(self, token: Token, opener: str, items: Sequence[Item]) -> Item:
        if _expects(items) and (opener or items):
            raise Refused(f"nothing stands before {token.text!r}")
        lopsided = items and bool(token.before) != bool(token.after)
        if lopsided or (token.text in ("<-", "->", "~") and not token.after):
            raise Refused(f"{token.text!r} has no space on one side")
        return Item("relation", RELATIONS[token.text])

    def _group(self, token: Token, items: Sequence[Item]) -> Item:
        """An expression in brackets."""
        opener = token.text
        if opener not in ("(", "[") and not _expects(items) and not token.before:
            raise Refused(f"{opener!r} follows without a space")
        inside = self.items(opener)
        if not inside:
            raise Refused("brackets hold nothing")
        closer = self.take().text
        if closer != CLOSERS[opener][0] and [item.kind for item in inside].count("comma") != 1:
            raise Refused(f"{opener!r} is closed by {closer!r}")
        inner = join(inside)
        left, right = LEFT[opener], RIGHT[closer]
        if r"\frac" in inner:
            left, right = rf"\left{left}", rf"\right{right.lstrip()}"
        if token.before and inside[0].kind == "text" and items and items[-1].kind == "operand":
            left = rf"\ {left}"  # a remark, not an argument
        tex = f"{left}{inner}{right}"
        scripted = self._scripts(tex)
        round_only = opener == "(" and closer == ")" and scripted == tex
        return Item("operand", scripted, inner if round_only else "")

    def _plus(self, token: Token, items: Sequence[Item]) -> Item:
        leans = token.before > 0 and token.after == 0
        if _expects(items) or (items[-1].kind == "text" and leans):
            if items and items[-1].kind in ("sign", "plus"):
                raise Refused("two signs side by side")
            return Item("sign", token.text)
        if leans:
            raise Refused(f"{token.text!r} has no space on one side")
        return Item("plus", token.text)

    def _colon(self, token: Token, opener: str, items: Sequence[Item]) -> Item:
        if opener in ("[", "{") and _expects(items):
            return Item("operand", "{:}")  # a slice, or its beginning
        if opener == "{" and token.before and token.after:
            return Item("relation", ":")
        if _expects(items) or token.before or not token.after:
            raise Refused("':' has no meaning where it stands")
        return Item("comma", r"\colon")

    def _scripts(self, tex: str, base: str = "") -> str:
        """Append to `tex` the accents, primes, subscript and superscript that follow it."""
        if self.tight("~") and (self.next.after or self.at + 2 == len(self.tokens) or self.tight(*"_^)],'", ahead=1)):
            self.take()
            tex = rf"\tilde{{{tex}}}"
        elif self.tight("^") and self.tight("_", ahead=1):
            self.take()
            tex = rf"\hat{{{tex}}}"
        while self.tight("'"):
            tex += self.take().text
        below = above = ""
        while self.tight("_", "^"):
            mark = self.take().text
            if (mark == "_" and below) or (mark == "^" and above):
                raise Refused("two subscripts or two superscripts of the same")
            if mark == "_":
                below = f"_{_braced(self._subscript(base))}"
            else:
                above = f"^{_braced(self._superscript())}"
        return tex + above + below  # in this order TeX merges the superscript with the primes

    def _enclosed(self) -> list[Item]:
        """The items inside brackets that are not themselves printed."""
        opener = self.take().text
        items = self.items(opener)
        if self.take().text != CLOSERS[opener][0] or not items:
            raise Refused(f"{opener!r} holds nothing, or is closed by another bracket")
        return items

    def _subscript(self, base: str) -> str:
        if self.tight("{"):
            return join(self._enclosed(), script=True)
        pieces = []
        while self.next.kind in ("word", "number") and self.next.before == 0:
            pieces.append(_index(self.take().text, base))
        if not pieces:
            raise Refused("a subscript is missing")
        self._ends_here(",")
        return "".join(pieces)

    def _superscript(self) -> str:
        if self.tight("{", "("):
            return join(self._enclosed(), script=True)
        token = self.take()
        if token.before or not (token.text in ("+", "-") or token.kind in ("word", "number")):
            raise Refused("a superscript is missing")
        tex = r"\top" if token.text == "T" else token.text
        if token.text == "-":
            tex += self._tight_number()
            if self.tight("/"):
                tex += self.take().text + self._tight_number()
        elif token.kind == "word" and token.text != "T":
            tex = _index(token.text, "")
            if len(token.text) > 1 and token.text not in GREEK:
                raise Refused(f"{token.text!r} as a superscript without brackets")
        self._ends_here("/", "(")
        return tex

    def _tight_number(self) -> str:
        if self.next.kind != "number" or self.next.before:
            raise Refused(f"{self.next.text!r} where a superscript without brackets has a number")
        return self.take().text

    def _ends_here(self, *texts: str) -> None:
        """Refuse text that may or may not belong to an unbracketed script: ``x_t-1``."""
        following = self.tokens[self.at + 1] if self.next is not END else END
        goes_on = following is not END and (following.before == 0 or self.next.text == "(")
        if self.tight("+", "-", *texts) and goes_on:
            raise Refused(f"does {self.next.text!r} belong to the script before it? brackets would tell")


def _expects(items: Sequence[Item]) -> bool:
    """Return whether `items` must be followed by an operand."""
    return not items or items[-1].kind in (*DANGLING, "comma", "gap")


def _code(found: re.Match[str]) -> str:
    return rf"\texttt{{{found[1]}}}".replace("_", r"\_")


def _braced(tex: str) -> str:
    return tex if len(tex) == 1 or re.fullmatch(r"\\[a-z]+", tex) else f"{{{tex}}}"


def _name(name: str) -> str:
    """The TeX of a variable or a function."""
    if len(name) == 1:
        return name
    if name in GREEK or name in COMMANDS:
        return rf"\{name}"
    if name in NAMES:
        return NAMES[name]
    if name in FUNCTIONS or name in WORDS:
        return rf"\operatorname{{{name}}}"
    raise Refused(f"{name!r} is neither a known word nor a variable of one letter")


def _index(name: str, base: str) -> str:
    """The TeX of a part of an unbracketed subscript: numbers, adjacent indices, or a word."""
    if len(name) == 2 and name.islower() and name in WORDS and not (name == "in" and base.isupper()):
        raise Refused(f"'_{name}': two indices or a word?")
    if name.isdigit() or re.fullmatch(r"[a-z]\d+", name):
        return name
    if name in WORDS or name in FUNCTIONS:
        return rf"\mathrm{{{name}}}"
    if re.fullmatch(r"[a-z][A-Za-z]", name) and name not in GREEK and name not in NAMES:
        return name
    return _name(name)


def indented_blocks(docstring: str) -> list[str]:
    """The indented blocks of a docstring."""
    return [found[0].rstrip() for found in re.finditer(r"(?m)(?<=\n\n)(?: {4}.*\n?)+", cleandoc(docstring))]


def main() -> None:
    count = typeset = 0
    for path in map(Path, sys.argv[1:]):
        for block in indented_blocks(ast.get_docstring(ast.parse(path.read_text())) or ""):
            count += 1
            try:
                shown = equation(block)
                typeset += 1
            except Refused as reason:
                shown = f"{block}\n    stays code: {reason}"
            print(f"{path.stem}:\n{shown}\n")
    print(f"{typeset} of {count} blocks are typeset")


if __name__ == "__main__":
    main()
