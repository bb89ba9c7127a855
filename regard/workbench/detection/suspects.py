"""The modules that :mod:`regard.workbench.detection.patterns` probes: layers from the catalogue, and modules from a
user's file.

A class from a file is constructed by the names of its arguments: a width (``dim``, ``embed_dim``, ``d_model``, ...),
heads (``num_heads``, ``nhead``, ...), and, if it accepts them, ``causal`` and ``cross`` or ``pattern``, so it is made
once for each pattern. It is called with tokens (B, N, C), alone, with a memory, or as query, key and value, according
to the names of ``forward``'s arguments, with ``key_padding_mask`` and ``query_padding_mask``, True at padding, if it
names them.

It decodes if ``forward`` names ``state``, which is returned next to the output (last in a tuple, or as ``.state``), or
fairseq's ``incremental_state``, a dict that the module fills; or by ``step(x_t, state)``, for one token (B, C).
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from regard.catalogue import get_mechanism, run_file
from regard.contract import Context, Mask, Pattern, Unsupported, an_instance, closest
from regard.layers.base import STEP
from regard.models.variants import known_name
from regard.workbench.advice.layer_work import MIXING, LayerSettings, LayerWork
from regard.workbench.detection.patterns import LENGTH, MEMORY_LENGTH, OTHER_LENGTHS, Probe, Suspect, first_line

DIM, HEADS = 32, 4
WIDTHS = (
    "dim", "embed_dim", "d_model", "hidden_size", "hidden_dim", "embedding_dim", "model_dim", "emb_dim", "n_embd",
    "channels", "features", "in_features", "in_dim", "input_dim", "width",
)  # fmt: skip
HEAD_COUNTS = ("num_heads", "heads", "n_heads", "nhead", "n_head", "num_attention_heads")
CAUSAL, CROSS = ("causal", "is_causal"), ("cross", "is_cross", "cross_attention")
MEMORIES = ("memory", "context", "encoder", "source", "src", "kv", "cond", "y", "other", "key_value")
"""Prefixes of argument names for a second sequence, which holds keys and values."""
KEYS, VALUES = ("key", "keys", "k"), ("value", "values", "v")
KEY_PADDING, QUERY_PADDING = "key_padding_mask", "query_padding_mask"
STATE, INCREMENTAL = "state", "incremental_state"
RETURNS_STATE = ("return_state", "use_cache")
"""Flags by which a forward returns its state."""


def catalogue_suspect(name: str, *, dim: int = DIM, heads: int = HEADS) -> Suspect:
    """A mechanism from the catalogue, with options if the name has some, as a layer with random weights.

    Raises:
        Unsupported: for an unknown name, and for poolings and projections, which do not mix tokens of a sequence.
    """
    card = get_mechanism(known_name(name))
    if card.kind not in MIXING:
        raise Unsupported(
            f"patterns of {card.name}, a {card.kind.value}", supported="mechanisms that give an output for each token"
        )

    def make(pattern: Pattern) -> Probe:
        return _LayerProbe(LayerWork(card, LayerSettings(pattern, dim, heads, dtype="float64")))

    return Suspect(card.name, dim, make, card.patterns)


class _LayerProbe:
    """A layer from the catalogue, with the grid and the inserted tokens that it needs."""

    dtype = torch.float64

    def __init__(self, work: LayerWork) -> None:
        self.work = work
        self.takes_padding = work.card.sample_context is None and not work.subject.on_grid
        keeps_out = getattr(work.card.module, "keeps_padding_out", None)  # of a user's module, see `adopted`
        if keeps_out is not None:
            self.takes_padding = keeps_out(work.subject.pattern)
        self.takes_query_padding = self.takes_padding
        self.takes_state = work.decodes and work.card.sample_context is None
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            for parameter in work.layer.parameters():
                parameter.add_(
                    0.1 * torch.randn_like(parameter)
                )  # weights initialised to zero would hide what they multiply
        work.layer.eval()

    def __call__(self, x: Tensor, memory: Tensor | None = None, *, padded: int = 0, padded_queries: int = 0) -> Tensor:
        keys = x if memory is None else memory
        context = Context(
            mask=self._mask(x, padded if memory is None else padded_queries),
            memory_mask=None if memory is None else self._mask(memory, padded),
            roles=self._roles(keys),
            grid=self.work.subject.grid(x.shape[1]),
            generator=torch.Generator().manual_seed(0),
            progress=1000.0,
        )
        output: Tensor = self.work.layer(x, memory, context=context).output
        return output

    def decoded(self, x: Tensor) -> Tensor:
        layer: Any = self.work.layer
        outputs, state = [], None
        for token in x.unbind(1):
            output, state = layer.step(token, state)
            outputs.append(output)
        return torch.stack(outputs, 1)

    def _mask(self, tokens: Tensor, padded: int) -> Mask | None:
        if not (padded and self.takes_padding):
            return None
        return Mask(lengths=torch.full((tokens.shape[0],), tokens.shape[1] - padded))

    def _roles(self, keys: Tensor) -> Tensor | None:
        """Roles for as many tokens as `keys` has: those for a longer text, cut."""
        make = self.work.card.sample_context
        if make is None:
            return None
        longest = max(LENGTH, MEMORY_LENGTH, keys.shape[1])
        drawn = make(torch.Generator().manual_seed(0), batch=1, n=longest, m=longest, pattern=self.work.subject.pattern)
        return drawn["roles"][:, : keys.shape[1]].expand(keys.shape[0], -1) if "roles" in drawn else None


def module_suspect(
    path: str, name: str | None, given: Mapping[str, Any], *, dim: int = DIM, heads: int = HEADS, seeded: bool = False
) -> Suspect:
    """A module from a user's file.

    Args:
        path: path of the Python file, which is executed.
        name: name of a class, a function that makes a module, or a module; None if the file has a single module class.
        given: arguments for the constructor.
        dim: width of the module's input.
        heads: number of attention heads.
        seeded: seed torch before each call, for modules that draw random numbers.

    Raises:
        Unsupported: for a file that does not run or has no such module, and for unknown arguments.
    """
    name, maker = find_maker(path, name)
    if isinstance(maker, nn.Module):
        only = maker
        return Suspect(name, dim, lambda pattern: _ModuleProbe(only, pattern, dim, seeded))
    arguments = Arguments(name, maker, {**given}, dim, heads)
    arguments.of(Pattern.CAUSAL_SELF)  # report unknown arguments before anything runs
    return Suspect(name, dim, lambda pattern: _ModuleProbe(arguments.make(pattern), pattern, dim, seeded))


def find_maker(path: str, name: str | None) -> tuple[str, Any]:
    """The name, and the class, function or module of that name in a file; see :func:`module_suspect`."""
    module = run_file(path, "module file")
    if name is None:
        own = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
        ]
        if len(own) != 1:
            raise Unsupported(
                f"{path} without the name of a class",
                supported=f"{path}:NAME, of " + (", ".join(own) or "a class of torch modules, which the file lacks"),
                nearest=f"{path}:{own[0]}" if own else "",
            )
        name = own[0]
    maker = getattr(module, name, None)
    if not callable(maker):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise Unsupported(f"{name!r} in {path}", supported=", ".join(names) or "classes", nearest=closest(name, names))
    return name, maker


class Arguments:
    """The arguments with which a constructor is called."""

    def __init__(self, name: str, maker: Callable[..., Any], given: dict[str, Any], dim: int, heads: int) -> None:
        self.name, self.maker, self.given, self.dim, self.heads = name, maker, given, dim, heads
        self.taken = _parameters(maker)
        anything = any(p.kind is p.VAR_KEYWORD for p in self.taken.values())
        for option in given:
            if option not in self.taken and not anything:
                raise Unsupported(
                    f"option {option!r} of {name}",
                    supported=", ".join(self.taken) or "no options",
                    nearest=closest(option, self.taken),
                )

    def of(self, pattern: Pattern) -> dict[str, Any]:
        """Arguments by name for a pattern: the given ones, then sizes and flags under the names that layers usually
        use.

        Raises:
            Unsupported: for an argument without default whose name has no known meaning.
        """
        known: dict[str, Any] = dict.fromkeys(WIDTHS, self.dim) | dict.fromkeys(HEAD_COUNTS, self.heads)
        known |= dict.fromkeys(CAUSAL, pattern.causal) | dict.fromkeys(CROSS, pattern.cross)
        known |= {"pattern": pattern.value, "batch_first": True}
        width = next((name for name in WIDTHS if name in self.taken), None)
        chosen = {}
        for name, parameter in self.taken.items():
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                continue
            needed = parameter.default is parameter.empty
            if name in self.given:
                chosen[name] = self.given[name]
            elif name in known and (needed or name not in WIDTHS or name == width):
                chosen[name] = known[name]
            elif needed:
                raise Unsupported(
                    f"{self.name} without {name}",
                    supported="a value for each argument that has none: a default, a function in the file that makes the "
                    f"module or, in regard detect-patterns, --option {name}=...",
                )
        return chosen | {name: value for name, value in self.given.items() if name not in chosen}

    def make(self, pattern: Pattern) -> nn.Module:
        """The module for a pattern; its weights are the same in every pattern, as far as its parts are the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                made = self.maker(**self.of(pattern))
            except Unsupported:
                raise
            except Exception as error:
                raise Unsupported(f"{type(error).__name__}: {first_line(error)}") from error
        if not isinstance(made, nn.Module):
            raise Unsupported(
                f"{self.name}, which makes {an_instance(made)}", supported="a class or function that makes a module"
            )
        return made


def _parameters(maker: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a constructor, plus those of its base classes if it passes keyword arguments on."""
    found: dict[str, inspect.Parameter] = {}
    makers: list[Any] = [maker]
    if isinstance(maker, type):
        makers = [
            vars(made)["__init__"] for made in maker.__mro__ if made is not nn.Module and "__init__" in vars(made)
        ]
    for one in makers:
        own = inspect.signature(one).parameters
        for name, parameter in own.items():
            if name != "self":
                found.setdefault(name, parameter)
        if one is object.__init__ or not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    return found


class Called:
    """A user's module in a pattern, called according to the names of its forward's arguments.

    Attributes:
        takes_padding: whether its forward accepts a mask of keys (of tokens, in self patterns), True at padding.
        takes_query_padding: whether, in a cross pattern, it accepts one of queries.
        takes_state: whether it decodes token by token.
    """

    def __init__(self, module: nn.Module, pattern: Pattern, seeded: bool = False) -> None:
        self.module, self.pattern, self.seeded = module, pattern, seeded
        taken = inspect.signature(module.forward).parameters
        named = [name for name in (KEY_PADDING, QUERY_PADDING, STATE, INCREMENTAL) if name in taken]
        free = [
            p for p in taken.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.name not in named
        ]
        self.needed = sum(p.default is p.empty for p in free)
        self.names = [p.name for p in free]
        self.masks = [name for name in named if name in (KEY_PADDING, QUERY_PADDING)]
        self.takes_padding = KEY_PADDING in taken or bool(self.masks and not pattern.cross)
        self.takes_query_padding = pattern.cross and QUERY_PADDING in taken
        self.state = next((name for name in (STATE, INCREMENTAL) if name in taken), None)
        step = getattr(module, "step", None)
        self.step = step if callable(step) and STATE in inspect.signature(step).parameters else None
        # a seed before every token would draw other numbers than one before the whole call
        self.takes_state = not seeded and (self.state is not None or self.step is not None)
        self.more: dict[str, Any] = {"batch_first": True} if "batch_first" in taken else {}
        self.more |= {name: None for name in named if taken[name].default is inspect.Parameter.empty}
        if "attn_mask" not in taken:
            self.more |= {name: pattern.causal for name in CAUSAL if name in taken}
        self.returning: dict[str, Any] = {name: True for name in RETURNS_STATE if name in taken}
        if "context" in taken and taken["context"].kind is inspect.Parameter.KEYWORD_ONLY:
            self.returning["context"] = STEP  # regard's contract
        self.keywords = self._keywords()

    def _keywords(self) -> tuple[str, ...]:
        """Names of the arguments for the memory; in self patterns, of further required arguments, which get `x` too."""
        others = self.names[1:]
        if not self.pattern.cross:
            return tuple(others[: max(self.needed - 1, 0)])
        pair = [name for name in others if name in KEYS + VALUES]
        if len(pair) == 2:
            return tuple(pair)
        one = [name for name in others if name.startswith(MEMORIES)][:1] or others[: max(self.needed - 1, 0)][:2]
        if not one:
            taken = ", ".join(self.names) or "nothing"
            raise Unsupported(f"it takes no second sequence (its forward takes {taken})")
        return tuple(one)

    def run(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        hidden: Tensor | None = None,
        hidden_queries: Tensor | None = None,
    ) -> Tensor:
        """The module's output.

        Args:
            hidden: (B, M), True where a key is padding; (B, N), where a token is, in self patterns.
            hidden_queries: (B, N), True where a query is padding, in cross patterns.
        """
        given = {KEY_PADDING: hidden, QUERY_PADDING: hidden if memory is None else hidden_queries}
        masks = {name: given[name] for name in self.masks if given[name] is not None}
        with torch.random.fork_rng(devices=[], enabled=self.seeded):
            if self.seeded:
                torch.manual_seed(0)
            return _first(self._call(x, memory, **masks))

    def decoded(self, x: Tensor) -> Tensor | None:
        """The outputs for tokens given one at a time, as :class:`regard.workbench.detection.patterns.Probe` has it."""
        outputs = []
        state: Any = {} if self.state == INCREMENTAL else None
        for token in x.split(1, 1):
            if self.state is None:
                assert self.step is not None
                output, state = self.step(token[:, 0], state)
                outputs.append(output[:, None])
                continue
            found = self._call(token, None, **{self.state: state}, **self.returning)
            outputs.append(_first(found))
            if self.state == STATE:
                rest = found[-1] if isinstance(found, tuple | list) and len(found) > 1 else None
                state = getattr(found, "state", rest)
                if state is None:
                    return None
        return torch.cat(outputs, 1)

    def _call(self, x: Tensor, memory: Tensor | None, **more: Any) -> Any:
        keys = x if memory is None else memory
        return self.module(x, **{**dict.fromkeys(self.keywords, keys), **self.more, **more})


def _first(found: Any) -> Tensor:
    """The output in what a module returns: alone, first in a tuple, or as ``.output``."""
    output = getattr(found, "output", found)
    first: Tensor = output[0] if isinstance(output, tuple | list) and output else output
    return first


class _ModuleProbe(Called):
    """A user's module, in float64 if it accepts that."""

    def __init__(self, module: nn.Module, pattern: Pattern, dim: int, seeded: bool) -> None:
        super().__init__(module.eval(), pattern, seeded)
        self.dtype = torch.float64
        lengths = ((LENGTH, MEMORY_LENGTH), *((n, n) for n in OTHER_LENGTHS))
        if not any(self._gives_doubles(dim, n, m) for n, m in lengths):
            self.dtype = torch.float32
        self.module.to(self.dtype)

    def _gives_doubles(self, dim: int, n: int, m: int) -> bool:
        """Whether the module accepts float64, for tokens of these lengths."""
        x = torch.zeros(1, n, dim, dtype=torch.float64)
        memory = torch.zeros(1, m, dim, dtype=torch.float64) if self.pattern.cross else None
        with contextlib.suppress(Exception), torch.no_grad():
            self.module.double()
            return self(x, memory).dtype == torch.float64
        return False

    def __call__(self, x: Tensor, memory: Tensor | None = None, *, padded: int = 0, padded_queries: int = 0) -> Tensor:
        return self.run(x, memory, _hidden(x if memory is None else memory, padded), _hidden(x, padded_queries))


def _hidden(tokens: Tensor, padded: int) -> Tensor | None:
    """A mask, True at the last `padded` tokens."""
    rows, n = tokens.shape[:2]
    return (torch.arange(n) >= n - padded).repeat(rows, 1) if padded else None


FILE = re.compile(r"(?P<path>.+\.py)(?::(?P<name>\w+))?")
"""The format in which a module of a user's file is given."""


def suspect(
    target: str, given: Mapping[str, Any], *, dim: int = DIM, heads: int = HEADS, seeded: bool = False
) -> Suspect:
    """The suspect for a target: ``file.py``, ``file.py:Class``, or a mechanism as `regard compare` accepts it.

    Raises:
        Unsupported: as for :func:`module_suspect` and :func:`catalogue_suspect`.
    """
    file = FILE.fullmatch(target)
    if file is not None:
        return module_suspect(file["path"], file["name"], given, dim=dim, heads=heads, seeded=seeded)
    if given:
        raise Unsupported(f"--option for {target}", supported="options in its name", nearest=f"{target}:name=value")
    return catalogue_suspect(target, dim=dim, heads=heads)
