"""Finds mechanisms: modules in `regard/mechanisms`, third-party entry points, and plugin files."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from regard import backends, mechanisms
from regard.contract import Kind, Mechanism, Pattern, Unsupported, closest, read_options, spelled

ENTRY_POINTS = "regard.mechanisms"

_plugins: dict[str, tuple[Mechanism, ModuleType]] = {}


@functools.cache
def _module_names() -> tuple[str, ...]:
    return tuple(entry.name for entry in pkgutil.iter_modules(mechanisms.__path__))


@functools.cache
def _installed() -> dict[str, tuple[Mechanism, ModuleType]]:
    found: dict[str, tuple[Mechanism, ModuleType]] = {}
    for name in _module_names():
        module = importlib.import_module(f"regard.mechanisms.{name}")
        found[module.MECHANISM.name] = (module.MECHANISM, module)
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            module, card = importlib.import_module(point.module), point.load()
        except Exception as error:
            raise Unsupported(
                f"entry point {point.value!r} raised {type(error).__name__}: {error}",
                supported="an installed package that imports without error",
            ) from error
        if not isinstance(card, Mechanism):
            raise Unsupported(f"entry point {point.value!r} of type {type(card).__name__}", supported="a Mechanism")
        _refuse_clash(card, found)
        found[card.name] = (card, module)
    return found


def _refuse_clash(card: Mechanism, entries: dict[str, tuple[Mechanism, ModuleType]]) -> None:
    for other, _ in entries.values():
        clash = {card.name, *card.aliases} & {other.name, *other.aliases}
        if clash:
            raise Unsupported(f"a second mechanism called {sorted(clash)[0]!r}", supported="names not in regard list")


def _catalogue() -> dict[str, tuple[Mechanism, ModuleType]]:
    return _installed() | _plugins


def register(card: Mechanism, module: ModuleType) -> Mechanism:
    """Add a mechanism to the catalogue of this process. A name or alias that is already taken raises Unsupported."""
    entries = _catalogue()
    if any(other is card for other, _ in entries.values()):
        return card
    _refuse_clash(card, entries)
    _plugins[card.name] = (card, module)
    return card


def unregister(name: str) -> None:
    """Remove a mechanism added by :func:`register` or :func:`load_plugin`."""
    _plugins.pop(name, None)


PLUGGED = ("MECHANISM", "TASK", "MODEL")
"""Names that a plugin may define: a mechanism card, a task (or its class), or a pair (model class, config class)."""


RUN = "regard_plugin_"
"""How the names of modules begin that :func:`run_file` made."""


_folders: set[Path] = set()
"""The folders of the files that :func:`run_file` ran."""
CODE = "__regard_code__"
"""Attribute of such modules: a hash of their code, and of what they imported from their folder, as it was run."""


def run_file(path: str | Path, what: str = "plugin") -> ModuleType:
    """Run a user's Python file as a module of its own; `what` is what error messages call the file.

    What the file imports is looked for in its own folder first, as Python does for scripts. The folder then stays at the
    end of ``sys.path``, where installed modules come before it, for imports inside functions and in processes that are
    started later.

    Raises:
        Unsupported: when the file is missing or fails to run.
    """
    file = Path(path)
    if not file.is_file():
        siblings = [p.name for p in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise Unsupported(
            f"{what} {str(path)!r}: no such file", supported="a Python file", nearest=closest(file.name, siblings)
        )
    name = f"{RUN}{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise Unsupported(f"{what} {str(path)!r}", supported="a Python file ending in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    code = hashlib.sha256(file.read_bytes())
    try:
        with _importing_from(file.parent.absolute()):
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise Unsupported(
            f"{what} {str(path)!r} raised {type(error).__name__}: {error}",
            supported="a file that imports without error",
        ) from error
    for beside in files_beside(file):
        code.update(beside.read_bytes())
    setattr(module, CODE, code.hexdigest()[:12])
    return module


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Imports look in a folder first, and afterwards last. Modules of the same name that plugins imported from other
    folders are forgotten, since Python has one module of a name."""
    others = _folders - {folder}
    beside = {entry.stem for entry in folder.iterdir()} & sys.modules.keys() - {"regard"}
    namesakes = {name for name in beside if _home(name) in others}
    for name in list(sys.modules):
        if name.partition(".")[0] in namesakes:
            del sys.modules[name]
    _folders.add(folder)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _home(name: str) -> Path | None:
    """The folder in which an imported module that is in no package, or a package, was found."""
    file = getattr(sys.modules[name], "__file__", None)
    if file is None:
        return None
    return Path(file).parents[1] if Path(file).name == "__init__.py" else Path(file).parent


def files_beside(path: str | Path) -> list[Path]:
    """The files of the modules that this process imported from the folder of a user's file."""
    folder = Path(path).parent.absolute()
    others = {name for name in sys.modules if "." not in name and name != "regard" and not name.startswith(RUN)}
    tops = {name for name in others if _home(name) == folder}
    found = [module for name, module in sys.modules.items() if name.partition(".")[0] in tops]
    files = {Path(file) for module in found if (file := getattr(module, "__file__", None)) is not None}
    return sorted(file for file in files if file.is_relative_to(folder))


def load_plugin(path: str | Path) -> ModuleType:
    """Run a user's Python file; if it defines ``MECHANISM``, add the mechanism to the catalogue of this process.

    Raises:
        Unsupported: when the file is missing, fails to run, or its MECHANISM is not a card.
    """
    module = run_file(path)
    card = getattr(module, "MECHANISM", None)
    if card is not None:
        if not isinstance(card, Mechanism):
            raise Unsupported(
                f"MECHANISM of type {type(card).__name__} in {str(path)!r}", supported="a regard.Mechanism"
            )
        register(card, module)
    elif not any(hasattr(module, name) for name in PLUGGED):
        raise Unsupported(
            f"plugin {str(path)!r} without {' or '.join(PLUGGED)}",
            supported=f"a file that defines one of them; in commands also {path}:CLASS, of a torch module",
        )
    return module


def plugin_file(name: str) -> str | None:
    """The file that :func:`load_plugin` ran for a mechanism; None for those that are found without it."""
    module = _plugins[name][1] if name in _plugins else None
    return module.__file__ if module is not None and module.__name__.startswith(RUN) else None


def plugin_code(*of: Any) -> list[str]:
    """Hashes of the code, as it was loaded, of the plugins that define these; other things have none.

    A stored result of a plugin's mechanism is that of its code at the time.

    Args:
        of: settings that name mechanisms (texts, mappings and lists of them), and objects, such as a task or the config of
            a model.
    """
    named = {each: module for card, module in _plugins.values() for each in (card.name, *card.aliases)}
    found: list[ModuleType | None] = []
    for one in of:
        if isinstance(one, str):
            found += [named[word] for word in re.findall(r"\w+", one) if word in named]
        else:
            found.append(sys.modules.get(type(one).__module__))
    codes = {getattr(module, CODE, None) for module in found}
    inside = [each for one in of if isinstance(one, (list, tuple, Mapping)) for each in _values(one)]
    return sorted({*filter(None, codes), *(plugin_code(*inside) if inside else ())})


def _values(of: Any) -> list[Any]:
    return [each for pair in of.items() for each in pair] if isinstance(of, Mapping) else list(of)


def get_mechanism(name: str) -> Mechanism:
    """Return a mechanism's card by name or alias.

    Raises:
        Unsupported: for an unknown name, naming the nearest known one; or for an alias that stands for a mechanism with
            options, which the card alone would lose (see :func:`resolve`).
    """
    card, options = resolve(name)
    if options:
        raise Unsupported(
            f"{name!r} without its options, since it is {card.name} with {spelled(options)}",
            supported="create_layer, plans of models, wrappers, and resolve for the card and the options",
            nearest=f"{card.name!r} with {spelled(options)}",
        )
    return card


def resolve(name: str, options: Mapping[str, Any] | None = None) -> tuple[Mechanism, dict[str, Any]]:
    """Resolve a name to a card and options: those that the name implies, followed by those of `options`.

    Most names stand for a card alone. Some aliases are variants of a mechanism: ``gated_delta_rule`` is `delta_rule`
    with ``gated=True``. A name may also carry options: ``local:window=32``. Options are not checked here.

    Raises:
        Unsupported: for an unknown name, or an option that contradicts the name.
    """
    bare, _, written = name.partition(":") if isinstance(name, str) else (name, "", "")
    if written and _find(name) is None:  # a variant may be in the catalogue under its full written name
        card, meant = resolve(bare, read_options(written, bare))
    else:
        card = _lookup(name)[0]
        meant = dict(card.alias_options.get(name, {}))
    given = {} if options is None else options
    for option, value in meant.items():
        if option in given and given[option] != value:
            raise Unsupported(
                f"{option}={given[option]!r} of {name}, which is {card.name} with {spelled(meant)}",
                supported=f"{option}={value!r}",
                nearest=f"{card.name!r} with {option}={given[option]!r}",
            )
    return card, {**meant, **given}


def find_mechanism(name: str) -> Mechanism | None:
    """Like :func:`get_mechanism`, but returns None for an unknown name."""
    found = _find(name)
    return None if found is None else found[0]


def _reduce(card: Mechanism) -> str | tuple[Any, ...]:
    """Pickle and copy a card of the catalogue by its name, so that it stays the same card; others as any object."""
    return (get_mechanism, (card.name,)) if find_mechanism(card.name) is card else card.__reduce_ex__(2)


copyreg.pickle(Mechanism, _reduce)


def get_module(name: str) -> ModuleType:
    """Return the module that defines a mechanism; its docstring documents the mechanism."""
    return _lookup(name)[1]


def _lookup(name: str) -> tuple[Mechanism, ModuleType]:
    if not isinstance(name, str):
        raise Unsupported(
            f"a mechanism of type {type(name).__name__}", supported="a name, as text", nearest='"softmax"'
        )
    found = _find(name)
    if found is None:
        words = [word for card, _ in _catalogue().values() for word in (card.name, *card.aliases)]
        raise Unsupported(
            f"mechanism {name!r}",
            supported="names and aliases that `regard list` tells",
            nearest=closest(name, words),
        )
    return found


def _find(name: str) -> tuple[Mechanism, ModuleType] | None:
    if name in _plugins:
        return _plugins[name]
    if name in _module_names():  # without importing the other modules
        module = importlib.import_module(f"regard.mechanisms.{name}")
        return module.MECHANISM, module
    entries = _catalogue()
    if name in entries:
        return entries[name]
    return next((entry for entry in entries.values() if name in entry[0].aliases), None)


def which_backend(
    name: str,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> backends.Choice:
    """The backend that would run a mechanism, and why. For an actual call, :func:`regard.watch_backends` tells more.

    Args:
        name: name or alias of a mechanism, or the name of an engine (see :mod:`regard.backends`). For a mechanism, the
            engine of its card decides; forms that need no engine are plain PyTorch on every device.
        device: where the tensors are.
        dtype: their dtype; None for one that the backends support.
        backend: a backend to require by name, without fallback to another.

    Raises:
        Unsupported: for an unknown name, device or backend, or a backend that lacks the engine or the device.
    """
    engine = name if name in backends.engine_names() else resolve(name)[0].engine
    return backends.which_backend(engine, device=device, dtype=dtype, backend=backend)


def list_mechanisms(
    *,
    pattern: str | Pattern | None = None,
    kind: str | Kind | None = None,
    recurrent: bool | None = None,
    where: Callable[[Mechanism], bool] | None = None,
) -> list[str]:
    """Names of the mechanisms in the catalogue, sorted.

    Args:
        pattern: only those that have this pattern.
        kind: only those of this kind.
        recurrent: only those whose decoding state has (True) or does not have (False) a fixed size.
        where: any other condition on the card.
    """
    wanted = None if pattern is None else Pattern.parse(pattern)
    if kind is not None and kind not in list(Kind):
        raise Unsupported(f"kind {kind!r}", supported=", ".join(Kind), nearest=closest(str(kind), list(Kind)))
    return sorted(
        card.name
        for card, _ in _catalogue().values()
        if (wanted is None or wanted in card.patterns)
        and (kind is None or card.kind == kind)
        and (recurrent is None or card.recurrent == recurrent)
        and (where is None or where(card))
    )
