"""Names of mechanisms and models: with options, as hybrids, or from a file.

    softmax                                 a name or an alias of the catalogue
    local:window=32                         a name with an option of the mechanism or of its layer
    delta_rule:gated=true,gate=diagonal     a name with several options
    gated_linear*3+softmax                  a hybrid: three layers and one, repeated
    van_b0                                  an image backbone, with or without options, where models are compared
    my_variant.toml                         a file: TOML, JSON or, where PyYAML is installed, YAML

Commas separate several names; ``option=value`` after a comma belongs to the name before it. A file has ``mechanism``
and ``options``, or ``layers``, a list of names as above or of tables with ``mechanism`` and ``options``; ``name`` is
the variant's name (by default the file's)::

    name = "near and far"
    layers = ["local:window=64", {mechanism = "softmax", options = {positions = "none"}}]

In tasks with a memory these are the layers between the two sequences; ``encoder`` and ``decoder``, lists like
``layers``, are the layers within each sequence, softmax by default, and ``encoder_dim`` is the encoder's width. Layers
between the two may have the option ``memory_layers``, see :class:`regard.models.EncoderDecoderConfig`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.catalogue import find_mechanism, get_mechanism, get_module, register, resolve
from regard.contract import Mechanism, Unsupported, closest, read_options, split_list, written_options
from regard.create import layer_options
from regard.measurement.data_files import read_data
from regard.models.vision import check_network, list_networks

LAYER = re.compile(r"(?P<name>[^:*+\s]+)(?::(?P<options>.+?))?(?:\*(?P<count>\d+))?")
FILES = (".toml", ".json", ".yaml", ".yml")
BLOCK_OPTIONS = ("positions", "feed_forward", "num_heads", "feed_forward_kind", "feed_forward_options", "memory_layers")
"""Options of a plan's entry that belong to the block instead of the layer."""

Layers = tuple[tuple[str, Mapping[str, Any]], ...]
"""Mechanism and options of each layer."""

Check = Callable[[Mechanism, Mapping[str, Any]], object]
"""Raises Unsupported for options of a mechanism that do not go together."""

ACCEPTED = "NAME, NAME:option=value,option=value, NAME*3+NAME, or a .toml, .json or .yaml file"


@dataclass(frozen=True)
class Variant:
    """One or more layers, repeated over the depth of a model.

    Attributes:
        name: the name in tables and reports: as given, in a canonical spelling.
        layers: mechanism and options of each layer of the pattern; empty for an image backbone.
        backbone: name and options of an image backbone, which has layers of its own; None for mechanisms.
        encoder, decoder: layers within the memory and within the sequence of an encoder-decoder, whose `layers` are those
            between the two; empty for softmax.
        encoder_dim: width of the encoder of an encoder-decoder; None for that of the model.
    """

    name: str
    layers: Layers
    backbone: tuple[str, Mapping[str, Any]] | None = None
    encoder: Layers = ()
    decoder: Layers = ()
    encoder_dim: int | None = None

    @property
    def cards(self) -> tuple[Mechanism, ...]:
        """The variant's mechanisms, each once."""
        return tuple(dict.fromkeys(get_mechanism(name) for name, _ in self.layers))

    @property
    def card(self) -> Mechanism:
        """The variant's only mechanism.

        Raises:
            Unsupported: for a hybrid.
        """
        if len(self.cards) > 1:
            raise Unsupported(
                f"{self.name}, a hybrid, where a single mechanism is required",
                supported="a name, or a name with options",
                nearest=self.cards[0].name,
            )
        return self.cards[0]

    @property
    def options(self) -> dict[str, Any]:
        """The options of the variant's only layer; raises Unsupported if it has different layers."""
        if any(layer != self.layers[0] for layer in self.layers):
            raise Unsupported(f"{self.name} where one layer is asked", supported="a name, or a name with options")
        return dict(self.layers[0][1])

    def as_card(self) -> Mechanism:
        """Return a card of the mechanism under the variant's name, with the variant's options as defaults.

        Raises:
            Unsupported: for a hybrid, and for options of the block around a layer.
        """
        card, options = self.card, self.options
        if not options:
            return card
        fields = {f.name: f for f in dataclasses.fields(card.config)}
        defaults = [
            (name, fields[name].type, dataclasses.field(default=value))
            for name, value in options.items()
            if name in fields
        ]
        layer = {name: value for name, value in options.items() if name not in fields}
        for option in layer:
            if option not in layer_options(card):
                raise Unsupported(f"option {option!r} of {card.name} without a model", supported="options of its layer")
        config = dataclasses.make_dataclass(
            card.config.__name__,
            defaults,
            bases=(card.config,),
            frozen=True,
            namespace={"__module__": card.config.__module__},
        )
        config()  # raises for options that do not go together
        return dataclasses.replace(
            card,
            name=self.name,
            aliases=(),
            alias_options={},
            config=config,
            layer_defaults={**card.layer_defaults, **layer},
        )

    @property
    def sized(self) -> bool:
        """Whether every layer sets its feed-forward width, so that no width is left to match a model size by."""
        every = (*self.layers, *self.encoder)
        return bool(every) and all("feed_forward" in options for _, options in every)

    def record(self) -> dict[str, Any]:
        """The variant as JSON: its ``layers``, and ``encoder``, ``decoder`` and ``encoder_dim`` if given."""
        stacks = {"layers": self.layers, "encoder": self.encoder, "decoder": self.decoder}
        found: dict[str, Any] = {
            stack: [[name, dict(options)] for name, options in layers]
            for stack, layers in stacks.items()
            if layers or stack == "layers"
        }
        return found if self.encoder_dim is None else {**found, "encoder_dim": self.encoder_dim}

    def plan(self, num_layers: int | None = None) -> list[tuple[str, dict[str, Any]]]:
        """Return the plan of a model with `num_layers` layers; one repetition when None.

        Raises:
            Unsupported: for a number that is not a multiple of the pattern's length.
        """
        count = len(self.layers) if num_layers is None else num_layers
        if count % len(self.layers):
            raise Unsupported(
                f"{self.name}, a pattern of {len(self.layers)} layers, in {count} layers",
                supported=f"a multiple of {len(self.layers)} layers",
                nearest=f"{-(-count // len(self.layers)) * len(self.layers)} layers",
            )
        return [(name, dict(options)) for name, options in self.layers * (count // len(self.layers))]


def go_together(card: Mechanism, options: Mapping[str, Any]) -> None:
    """Raise Unsupported for options of a mechanism that do not go together, or are out of range."""
    card.options(**options)


def read_variant(text: str, check: Check = go_together) -> Variant:
    """Read one variant from its written form, or from a file.

    Args:
        check: called with each mechanism and the options that are given.

    Raises:
        Unsupported: for an unknown name or option, with the nearest known one, for text that cannot be read, and as
            `check` does.
    """
    text = text.strip()
    if text.endswith(FILES):
        return _from_file(Path(text), check)
    layers: list[tuple[str, Mapping[str, Any]]] = []
    words = []
    for part in text.split("+"):
        match = LAYER.fullmatch(part.strip())
        count = int(match["count"] or 1) if match else 0
        if match is None or count < 1:
            raise Unsupported(f"mechanism {text!r}", supported=ACCEPTED, nearest="gated_linear*3+softmax")
        name, options = _checked(match["name"], read_options(match["options"] or "", match["name"]), check)
        layers += [(name, options)] * count
        words.append(written_options(name, options) + (f"*{match['count']}" if match["count"] else ""))
    return Variant("+".join(words), tuple(layers))


def read_model(text: str) -> Variant:
    """Read one variant or an image backbone; raises Unsupported as :func:`read_variant`."""
    name, _, written = text.strip().partition(":")
    if name not in list_networks():
        return read_variant(text)
    options = read_options(written, name)
    check_network(name, options)
    return Variant(written_options(name, options), (), (name, options))


def read_variants(text: str, read: Callable[[str], Variant] = read_model) -> list[Variant]:
    """Read several variants or image backbones, separated by commas, each by `read`; raises Unsupported as it does."""
    written: list[str] = []
    for part in split_list(text):
        key = part.partition("=")[0]
        follows = "=" in part and not {":", "*", "+"} & set(key)
        if follows and written:
            written[-1] += f",{part}" if ":" in written[-1].rpartition("+")[2] else f":{part}"
        elif part:
            written.append(part)
    return [read(part) for part in written]


def known_name(text: str) -> str:
    """Return the catalogue's name of a mechanism; one with options is registered for this process.

    Raises:
        Unsupported: for a hybrid, and as :func:`read_variant`.
    """
    if find_mechanism(text) is not None and not resolve(text)[1]:
        return resolve(text)[0].name
    variant = read_variant(text)
    card = variant.as_card()
    if find_mechanism(card.name) is None:
        register(card, get_module(variant.card.name))
    return card.name


def _checked(name: str, options: Mapping[str, Any], check: Check) -> tuple[str, Mapping[str, Any]]:
    """Return a layer's catalogue name and options; raises Unsupported for an unknown name or option."""
    card, options = resolve(name, options)
    accepted = sorted({*layer_options(card), *BLOCK_OPTIONS})
    for option in options:
        if option not in accepted:
            raise Unsupported(
                f"option {option!r} of {card.name}", supported=", ".join(accepted), nearest=closest(option, accepted)
            )
    fields = [f.name for f in dataclasses.fields(card.config)]
    check(card, {option: value for option, value in options.items() if option in fields})
    return card.name, options


def written_layers(layers: Layers) -> str:
    """Write layers as :func:`read_variant` reads them, each run of equal layers once."""
    runs = [(layer, len(list(equal))) for layer, equal in itertools.groupby(layers)]
    return "+".join(written_options(*layer) + (f"*{count}" if count > 1 else "") for layer, count in runs)


def _from_file(path: Path, check: Check) -> Variant:
    found = read_data(path, f"variant {str(path)!r}")
    shape = "mechanism and options, or layers (a list of names or of tables with mechanism and options)"
    if not isinstance(found, Mapping) or not {"mechanism", "layers"} & set(found):
        raise Unsupported(f"variant {str(path)!r}", supported=f"a table with {shape}")
    unknown = set(found) - {"name", "mechanism", "options", "layers", "encoder", "decoder", "encoder_dim"}
    if unknown or ("mechanism" in found) == ("layers" in found):
        said = f"with {sorted(unknown)[0]!r}" if unknown else "with both mechanism and layers"
        raise Unsupported(f"variant {str(path)!r} {said}", supported=f"name, and {shape}")
    layers = _listed(found.get("layers", [found]), "layers", path, check)
    encoder, decoder = (_listed(found[n], n, path, check) if n in found else () for n in ("encoder", "decoder"))
    width = found.get("encoder_dim")
    if width is not None and (type(width) is not int or width < 1):
        raise Unsupported(f"encoder_dim={width!r} in {str(path)!r}", supported="a positive whole number")
    return Variant(str(found.get("name", path.stem)), layers, encoder=encoder, decoder=decoder, encoder_dim=width)


def _listed(entries: Any, name: str, path: Path, check: Check) -> Layers:
    """Read layers from a list in a file."""
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise Unsupported(f"{name}={entries!r} in {str(path)!r}", supported="a list of layers")
    layers: list[tuple[str, Mapping[str, Any]]] = []
    for entry in entries:
        if isinstance(entry, str):
            layers += read_variant(entry, check).layers
        elif isinstance(entry, Mapping) and isinstance(entry.get("mechanism"), str):
            layers.append(_checked(entry["mechanism"], entry.get("options") or {}, check))
        else:
            raise Unsupported(f"layer {entry!r} in {str(path)!r}", supported="a name, or mechanism and options")
    return tuple(layers)
