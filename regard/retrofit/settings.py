"""The settings of a retrofit, checked before anything is read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from regard.catalogue import get_mechanism, plugin_code, resolve
from regard.contract import Kind, Pattern, TrainedModel, Unsupported, at_least, one_of
from regard.integrations.swap import Choice
from regard.measurement.budget import Budget
from regard.models.plans import PLACES, layers_at
from regard.models.variants import written_layers
from regard.retrofit.inserting import inserts_tokens, read_mechanism

AUTO, RECALL = "auto", "recall"
"""Ways to choose the layers to keep by their sensitivity: by the model's answers, or by what it finds in its context."""
KEEP = (
    "auto, auto:SHARE (0 to 1), auto:NUMBER, recall (likewise), bottom:NUMBER, top:NUMBER, middle:NUMBER, spread:NUMBER, "
    "none, or layers by number from 0 (0,5,29)"
)
FIRST, IMPORTANT = "first", "important"
"""The heads that a mixture of heads shares."""
PRECISIONS = ("float32", "bfloat16")
"""Precisions of training; float16 would need a scaled loss."""
MIXTURE = "mixture_of_heads"
TRAIN = "all, new (the swapped layers alone), or lora:RANK"
ON_HEADS = {"mamba2": "gated_linear:gate=step"}
"""Mechanisms with layers of their own, and the equivalent recurrence that takes existing queries, keys and values."""
KIN = {**ON_HEADS, "mamba": "gated_linear", "rwkv7": "delta_rule:gated=True"}
"""Mechanisms with layers of their own, and the nearest one that takes existing queries, keys and values."""


@dataclass(frozen=True)
class RetrofitSettings:
    """How to retrofit a model.

    Attributes:
        mechanism: the mechanism of the new layers: a name, optionally with options (``local:window=64``).
        keep_layers: which layers keep their attention: ``auto:0.5`` half of them, ``auto:22`` that many, those whose
            swap alone loses the most; ``recall:4`` the four without which a language model finds the least in its
            context; ``bottom:4`` the first four, likewise ``top``, ``middle`` and ``spread`` (evenly, with the first); or
            their numbers, from 0; or ``none``.
        budget: time of the whole command, or tokens or steps of the training.
        length: tokens of a block of text, >= 2; the default for the kind of model when None.
        batch_size: blocks or images of a training step, >= 1; likewise.
        train: weights that the last stage trains: ``all``, ``new`` (only the swapped layers) or ``lora:RANK``.
        distil: weight of the teacher's answers in the last stage, 0 to 1; the rest is the weight of the right ones
            (next tokens, masked tokens, classes). At 1 a mechanism meant to improve the model, such as
            selective_temperature, learns to change nothing.
        transfer_rate, rate: peak learning rates of the attention transfer and of the last stage, relative to the root
            mean square of each parameter; new parameters learn four times as fast.
        lengths: context lengths at which time, state and recall are measured; the default for the kind of model when
            None.
        evaluation_blocks: the most blocks (or batches of images) of each source in the evaluation, and the most texts of
            each probe; as the budget allows when None.
        positions: number of positions to which a table of learned positions is stretched before anything else, in the
            original too, as in :func:`regard.integrations.transformers.with_longer_positions`; with distil=0. None for
            the model's own.
        shared_heads: which heads of a layer ``mixture_of_heads`` always has: the ``first``, or the ``important``, on which
            the original's loss depends most; see :func:`regard.retrofit.important.head_importance`.
        precision: that of the matrix products in training, the teacher's too: ``float32``, or ``bfloat16`` under torch's
            autocast, with weights in float32 as before. Everything is evaluated in the weights' own dtype.
        seed: for drawing blocks and for random initial values.
    """

    mechanism: str
    keep_layers: str | tuple[int, ...] = "auto:0.5"
    budget: Budget = Budget("seconds", 3600.0)
    length: int | None = None
    batch_size: int | None = None
    train: str = "all"
    distil: float = 1.0
    transfer_rate: float = 0.02
    rate: float = 0.0002
    lengths: tuple[int, ...] | None = None
    evaluation_blocks: int | None = None
    positions: int | None = None
    shared_heads: str = FIRST
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        check_mechanism(self.mechanism)
        for name, low in (("length", 2), ("batch_size", 1), ("evaluation_blocks", 1), ("positions", 2), ("seed", 0)):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), low)
        one_of("precision", self.precision, PRECISIONS)
        if not 0 <= self.distil <= 1:
            raise Unsupported(f"distil={self.distil}", supported="a weight from 0 to 1", nearest="distil=1.0")
        if self.positions is not None and self.distil:
            raise Unsupported(
                f"positions={self.positions} with distil={self.distil}: the original has not learned its longer table, so its "
                "answers teach nothing",
                supported="distil=0, with which the model learns from the text itself",
                nearest="distil=0",
            )
        for name in ("transfer_rate", "rate"):
            if not getattr(self, name) > 0:
                raise Unsupported(
                    f"{name}={getattr(self, name)}",
                    supported="a positive rate",
                    nearest=f"{name}={getattr(RetrofitSettings, name)}",
                )
        if self.budget.unit == "flops":
            raise Unsupported(f"a budget of {self.budget}", supported="a time, tokens or steps", nearest="60m")
        if self.lengths and min(self.lengths) < 32:
            raise Unsupported(
                f"lengths={self.lengths}", supported="one or more of 32 or more", nearest="lengths=(512,)"
            )
        self.lora  # noqa: B018 read for its check
        self._check_shared_heads()
        read_keep(self.keep_layers)

    @property
    def block(self) -> int:
        """Tokens of a block; for text models, once the defaults are filled in."""
        assert self.length is not None
        return self.length

    @property
    def rows(self) -> int:
        """Blocks or images of a step, once the defaults are filled in."""
        assert self.batch_size is not None
        return self.batch_size

    @property
    def spans(self) -> tuple[int, ...]:
        """Lengths for measurements, once the defaults are filled in."""
        assert self.lengths is not None
        return self.lengths

    @property
    def lora(self) -> int | None:
        """The rank of low-rank updates; None if whole weights are trained."""
        if self.train in ("all", "new"):
            return None
        found = re.fullmatch(r"lora:([1-9][0-9]*)", self.train)
        if found is None:
            raise Unsupported(f"train={self.train!r}", supported=TRAIN, nearest="lora:16")
        return int(found[1])

    @property
    def shares_important(self) -> bool:
        """Whether the heads that a mixture of heads always has are chosen by their importance."""
        return self.shared_heads == IMPORTANT

    def _check_shared_heads(self) -> None:
        one_of("shared_heads", self.shared_heads, (FIRST, IMPORTANT))
        if not self.shares_important:
            return
        asked = f"shared_heads={self.shared_heads!r} with {self.mechanism}"
        ((name, options), *_) = read_mechanism(self.mechanism).layers
        if name != MIXTURE:
            raise Unsupported(f"{asked}, which shares no heads", supported=MIXTURE, nearest="shared_heads='first'")
        if isinstance(options.get("shared_heads"), (tuple, list)):
            raise Unsupported(
                f"{asked}, which names its shared heads", supported="their number", nearest=f"{MIXTURE}:shared_heads=2"
            )

    @property
    def inserts(self) -> bool:
        """Whether the mechanism inserts tokens."""
        return inserts_tokens(self.mechanism)

    @property
    def stages(self) -> tuple[str, ...]:
        """The names of the training stages."""
        if self.inserts:
            return ("tune",)  # no layer has an old output to learn from: the old layer saw other tokens
        return ("warm", "transfer", "tune") if self.chosen else ("transfer", "tune")

    @property
    def chosen(self) -> bool:
        """Whether the layers to keep are chosen by their sensitivity."""
        return isinstance(read_keep(self.keep_layers), (int, float))

    @property
    def by_recall(self) -> bool:
        """Whether the sensitivity of layers is that of what the model finds in its context."""
        return isinstance(self.keep_layers, str) and self.keep_layers.strip().partition(":")[0] == RECALL

    def kept(self, layers: int) -> int | tuple[int, ...]:
        """How many of `layers` layers are to keep their attention, or which ones.

        Raises:
            Unsupported: for layers that do not exist, and if no layer would be left to change.
        """
        found = read_keep(self.keep_layers)
        if isinstance(found, float):
            found = round(found * layers)
        if isinstance(found, str):
            place, _, number = found.partition(":")
            found = tuple(layers_at(place, min(int(number), layers), layers))
        if isinstance(found, tuple):
            for layer in found:
                if not 0 <= layer < layers:
                    raise Unsupported(
                        f"layer {layer} of a model of {layers} layers", supported=f"layers from 0 to {layers - 1}"
                    )
        count = found if isinstance(found, int) else len(found)
        if count >= layers:
            raise Unsupported(
                f"keep_layers={self.keep_layers!r} of a model of {layers} layers, which leaves no layer to change",
                supported=f"at most {layers - 1} kept layers",
                nearest="auto:0.5",
            )
        return found

    def changeable(self, layers: int) -> list[int]:
        """The layers of `layers` that are not given as layers to keep."""
        kept = self.kept(layers)
        return [number for number in range(layers) if isinstance(kept, int) or number not in kept]

    def identity(self) -> dict[str, Any]:
        """The settings that must not change when a retrofit is resumed."""
        own = asdict(self)
        for name in ("positions", "shared_heads", "precision"):  # folders of earlier versions do not have them
            if own[name] == getattr(RetrofitSettings, name):
                del own[name]
        if code := plugin_code(self.mechanism):
            own["plugins"] = code
        return {
            **own,
            "budget": str(self.budget),
            "lengths": list(self.spans),
            "keep_layers": self.spelled_keep(),
        }

    def spelled_keep(self) -> str:
        """The layers to keep, in the command line's notation."""
        keep = self.keep_layers
        return keep if isinstance(keep, str) else ",".join(map(str, keep)) or "none"


def read_keep(keep: str | tuple[int, ...] | list[int]) -> float | int | tuple[int, ...] | str:
    """Parse which layers to keep: a share, a number, the layers' numbers, or a place and a number (``bottom:4``)."""
    if isinstance(keep, (tuple, list)):
        if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in keep):
            raise Unsupported(f"keep_layers={keep!r}", supported=KEEP, nearest="auto:0.5")
        if len(set(keep)) < len(keep):
            raise Unsupported(f"keep_layers={keep!r}, which names a layer twice", supported="each layer once")
        return tuple(sorted(keep))
    text = str(keep).strip()
    name, _, amount = text.partition(":")
    if name in (AUTO, RECALL):
        if text == name:
            return 0.5
        if re.fullmatch(r"[0-9]+", amount):
            return int(amount)
        if re.fullmatch(r"(0?\.[0-9]+|1\.0*|0\.0*)", amount):
            return float(amount)
    elif name in PLACES and re.fullmatch(r"[0-9]+", amount):
        return text
    elif text == "none":
        return ()
    elif re.fullmatch(r"[0-9]+(\s*,\s*[0-9]+)*", text):
        return read_keep([int(part) for part in text.split(",")])
    raise Unsupported(f"keep_layers={keep!r}", supported=KEEP, nearest="auto:0.5")


def on_heads(written: str) -> str:
    """A mechanism in the form that takes existing queries, keys and values. Only those of :data:`ON_HEADS` change, and
    only without options, which would belong to their layer."""
    layers = read_mechanism(written).layers
    return ON_HEADS.get(layers[0][0], written) if len(layers) == 1 and not layers[0][1] else written


def told_of_start(written: str, begun: str) -> str:
    """Explain in words why the new layers start with something other than what was requested."""
    if on_heads(written) != written:
        return (
            f"{written} has a layer of its own: the new layers are {begun}, its recurrence with the model's queries, keys and "
            "values as its C, B and x, without its convolution, skip and gated norm"
        )
    return f"the new layers are {begun}, its settings for trained models; options that you give are kept"


def as_papers_begin(
    written: str, length: int, heads: int, pattern: Pattern = Pattern.CAUSAL_SELF, longest: int = 0
) -> str:
    """The mechanism with its card's options for trained models, made for the longest text if its length is limited.
    Given options are kept; if the two do not go together, only the given ones are used.

    Args:
        length: tokens that a layer reads in training.
        heads: number of heads of a layer.
        pattern: the pattern of its attention.
        longest: tokens of the longest text that it has to read.

    Raises:
        Unsupported: for given options that the card refuses for such a model.
    """
    written = on_heads(written)
    ((name, given),) = read_mechanism(written).layers
    card, options = get_mechanism(name), dict[str, Any]()
    if card.in_trained_models is not None:
        options.update(card.in_trained_models(TrainedModel(length, heads, pattern, given)))
    if card.length == "max" and longest > (card.options().length or longest):
        options["length"] = longest
    if options.keys() <= given.keys():
        return written
    options |= given
    try:
        if card.prepare is None:
            Choice.of((name, options), pattern)
        else:
            card.options(**options)
    except Unsupported:
        return written
    return written_layers(((name, options),))


@contextmanager
def advising(written: str, longest: int) -> Iterator[None]:
    """Within the context, advice about a mechanism's own `length` names the mechanism (alone it is a block's length), and
    is enough for the longest text that it has to read."""
    try:
        yield
    except Unsupported as error:
        found = re.match(r"length=(\d+)", error.nearest)
        if found is None:
            raise
        ((name, given),) = read_mechanism(written).layers
        nearest = written_layers(((name, {**given, "length": max(int(found[1]), longest)}),))
        raise Unsupported(error.asked, supported=error.supported, nearest=nearest) from error


def check_mechanism(written: str, pattern: Pattern | None = None) -> None:
    """Raise Unsupported, with the nearest alternative, unless a mechanism can take a model's queries, keys and values.

    Args:
        pattern: pattern of the model's attention; None if not known yet.
    """
    written = on_heads(written)
    if pattern in (None, Pattern.CAUSAL_SELF) and inserts_tokens(written):
        return  # the model is rebuilt around the mechanism
    try:
        Choice.of(written, pattern).chosen  # noqa: B018 made for its checks
    except Unsupported as error:
        variant = read_mechanism(written)
        name = resolve(variant.layers[0][0])[0].name if len(variant.layers) == 1 else ""
        if name in KIN:
            raise Unsupported(
                f"a retrofit with {name}, a {get_mechanism(name).kind.value} with a layer of its own"
                if get_mechanism(name).kind is not Kind.ATTENTION
                else error.asked,
                supported="attention mechanisms of queries, keys and values that a model has",
                nearest=KIN[name],
            ) from None
        raise
