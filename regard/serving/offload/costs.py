"""What a step of decoding costs when attention is elsewhere, by counting operations and bytes; and which devices to rent.

With L layers of H query heads and G heads of keys and values of width d, P parameters of e bytes, a batch of B sequences with S
tokens together, and a device of F operations and W bytes a second:

    model       t_m(B) = max(2 P B / F, e P / W)
    attention   t_a(S) = max(4 L H d S / F, 2 e L G d S / W)
    wire        e L B d (2 H + 2 G) bytes: queries, keys and values there, outputs back; and 2 L times the latency
    memory      e P where the model is, 2 e L G d S where keys and values are

One batch at a time takes the sum. R micro-batches in turn keep everybody busy: a layer of all of them takes
max(R max(stages), sum of stages), with the stages of one micro-batch of B / R sequences, which reads all weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regard.contract import Unsupported, at_least, check_options
from regard.layers.attention import AttentionLayer
from regard.measurement.data_files import read_data
from regard.models import LanguageModel, count_parameters
from regard.serving.offload.layers import offloadable

ALPHA = 0.2
"""Share of a step's time that its transfers may take, by default."""


@dataclass(frozen=True)
class Device:
    """A device that can be rented, or several of them as one.

    Attributes:
        name: its name.
        flops: operations a second that it reaches.
        bandwidth: bytes a second between its memory and itself.
        memory: bytes.
        price_per_hour: in any currency.
        source: where the figures are from.
        available: most that may be taken.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    price_per_hour: float
    source: str
    available: int = 8

    def __post_init__(self) -> None:
        _check_numbers(self, "flops", "bandwidth", "memory", "price_per_hour")
        at_least("available", self.available, 1)
        if not isinstance(self.source, str) or not self.source.strip():
            raise Unsupported(f"figures of {self.name} without a source", supported="source: where they are from")

    def times(self, count: int) -> Device:
        """So many, which share the work."""
        return dataclasses.replace(
            self,
            name=f"{count} x {self.name}",
            **{name: count * getattr(self, name) for name in ("flops", "bandwidth", "memory", "price_per_hour")},
        )


@dataclass(frozen=True)
class Network:
    """Between the devices: bytes a second in each direction, and seconds of a message of no size."""

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        _check_numbers(self, "bandwidth")
        at_least("latency", self.latency, 0.0)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a language model.

    Attributes:
        layers: of softmax attention.
        heads, kv_heads: of queries, and of keys and values.
        head_dim: of each.
        parameters: of the whole model.
        element_bytes: of a number, in weights, cache and messages.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: float
    element_bytes: int = 2

    def __post_init__(self) -> None:
        _check_numbers(self, *(f.name for f in dataclasses.fields(self)))
        if self.heads % self.kv_heads:
            raise Unsupported(f"{self.heads} heads over {self.kv_heads} of keys", supported="a multiple")

    @classmethod
    def of(cls, model: LanguageModel) -> Sizes:
        """The sizes of a model whose softmax layers are alike."""
        shapes = set()
        layers = offloadable(model)[0]
        for i in layers:
            layer: AttentionLayer = model.blocks[i].mixer  # type: ignore[assignment]
            shapes.add((layer.num_heads, layer.kv_heads, layer.head_dim, layer.value_dim))
        heads, kv_heads, width, value_width = next(iter(shapes))
        if len(shapes) > 1 or width != value_width:
            raise Unsupported("a plan for softmax layers of different sizes", supported="layers that are alike")
        element = model.embedding.weight.element_size()
        return cls(len(layers), heads, kv_heads, width, count_parameters(model), element)

    @property
    def weight_bytes(self) -> float:
        """Bytes of all parameters."""
        return self.element_bytes * self.parameters

    @property
    def token_bytes(self) -> float:
        """Bytes of the keys and values of a token."""
        return 2 * self.element_bytes * self.layers * self.kv_heads * self.head_dim

    @property
    def attention_intensity(self) -> float:
        """Operations for each byte of keys and values."""
        return 2 * self.heads / self.kv_heads / self.element_bytes


def traffic_bytes(sizes: Sizes, batch: float, *, owners: int = 1, state_bytes: int = 4) -> tuple[float, float]:
    """Bytes of tensors that a step sends to attention workers, and that come back.

    Args:
        owners: among how many workers the tokens of a sequence are split: each is sent its queries, and answers with a
            log-sum-exp of `state_bytes` a head beside its output. 1 for whole sequences and for a split of heads.
    """
    each = sizes.layers * batch
    vector = sizes.element_bytes * sizes.heads * sizes.head_dim
    new = 2 * sizes.element_bytes * sizes.kv_heads * sizes.head_dim
    state = 0 if owners == 1 else state_bytes * sizes.heads
    return each * (owners * vector + new), each * owners * (vector + state)


def model_seconds(sizes: Sizes, device: Device, batch: float) -> float:
    """t_m of all layers."""
    return max(2 * sizes.parameters * batch / device.flops, sizes.weight_bytes / device.bandwidth)


def attention_seconds(sizes: Sizes, device: Device, tokens: float) -> float:
    """t_a of all layers, of sequences with so many tokens together."""
    operations = 4 * sizes.layers * sizes.heads * sizes.head_dim * tokens
    return max(operations / device.flops, sizes.token_bytes * tokens / device.bandwidth)


def required_bandwidth(sizes: Sizes, batch: float, seconds: float, alpha: float = ALPHA) -> float:
    """Bytes a second with which transfers take no more than a share of a step's other `seconds`."""
    return sum(traffic_bytes(sizes, batch)) / (alpha * seconds)


@dataclass(frozen=True)
class Stages:
    """Seconds of one micro-batch in one layer.

    Attributes:
        model, attention: computing.
        send, receive: on the wire, which others cannot use meanwhile.
        latency: of each message, which others do not feel.
    """

    model: float
    attention: float
    send: float = 0.0
    receive: float = 0.0
    latency: float = 0.0

    @classmethod
    def of(
        cls, sizes: Sizes, model: Device, attention: Device, network: Network, batch: float, context: float
    ) -> Stages:
        """The stages of a model on one device whose attention another one computes, for a batch at a context."""
        sent, received = (count / sizes.layers / network.bandwidth for count in traffic_bytes(sizes, batch))
        return cls(
            model_seconds(sizes, model, batch) / sizes.layers,
            attention_seconds(sizes, attention, batch * context) / sizes.layers,
            sent,
            received,
            network.latency,
        )

    @property
    def busy(self) -> dict[str, float]:
        """Seconds of each that can do one thing at a time."""
        return {"model": self.model, "send": self.send, "attention": self.attention, "receive": self.receive}

    def period(self, micro_batches: int = 1) -> float:
        """Seconds of a layer of all micro-batches, one step after another without a break."""
        return max(micro_batches * max(self.busy.values()), sum(self.busy.values()) + 2 * self.latency)

    def step(self, layers: int, micro_batches: int = 1) -> float:
        """Seconds of one step of at most two micro-batches that begin together, when none begins the next before all are
        done; the model works before the first layer's attention and after the last one's. Without time on the wire.
        """
        model, attention, away = self.model, self.attention, self.attention + 2 * self.latency
        alone = layers * (model + away) + model
        if micro_batches == 1:
            return alone
        return max(
            2 * (layers + 1) * model,
            2 * (model + self.latency + layers * attention),
            alone + max(model, attention),
        )


@dataclass(frozen=True)
class Plan:
    """A choice of devices, and what comes of it.

    Attributes:
        model, attention: devices; no attention devices where one kind does all.
        batch: sequences at one time: as many as the memory holds.
        micro_batches: 2 where that is faster than 1.
        seconds: of a step, which gives every sequence a token.
        price_per_hour: of all devices.
        busiest: what decides the time.
    """

    model: str
    attention: str | None
    batch: int
    micro_batches: int
    seconds: float
    price_per_hour: float
    busiest: str

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second of the whole batch."""
        return self.batch / self.seconds

    @property
    def tokens_per_unit(self) -> float:
        """Tokens for one unit of the currency."""
        return 3600 * self.tokens_per_second / self.price_per_hour

    def as_record(self) -> dict[str, Any]:
        """The plan as plain data, with what follows from it."""
        record = dataclasses.asdict(self)
        return record | {"tokens_per_second": self.tokens_per_second, "tokens_per_unit": self.tokens_per_unit}


def homogeneous(sizes: Sizes, device: Device, context: int) -> Plan | None:
    """Everything on one kind of device; None where not one sequence fits."""
    batch = _fitting(device.memory - sizes.weight_bytes, sizes, context)
    if batch < 1:
        return None
    parts = {
        "model": model_seconds(sizes, device, batch),
        "attention": attention_seconds(sizes, device, batch * context),
    }
    busiest = max(parts, key=parts.__getitem__)
    return Plan(device.name, None, batch, 1, sum(parts.values()), device.price_per_hour, busiest)


def offloaded(sizes: Sizes, model: Device, attention: Device, network: Network, context: int) -> Plan | None:
    """The model on one kind of device, keys, values and attention on another; None where they do not fit."""
    batch = _fitting(attention.memory, sizes, context)
    if batch < 1 or model.memory < sizes.weight_bytes:
        return None
    price = model.price_per_hour + attention.price_per_hour
    plans = []
    for parts in (1, 2) if batch > 1 else (1,):
        stages = Stages.of(sizes, model, attention, network, batch / parts, context)
        seconds = sizes.layers * stages.period(parts)
        busy = stages.busy | {"latency": 2 * stages.latency}
        plans.append(Plan(model.name, attention.name, batch, parts, seconds, price, max(busy, key=busy.__getitem__)))
    return min(plans, key=lambda plan: plan.seconds)


def plans(devices: Sequence[Device], network: Network, sizes: Sizes, context: int) -> tuple[list[Plan], list[Plan]]:
    """All that one kind of device can do, and all pairs of kinds; of each those with the most tokens for the money first."""
    alone = [homogeneous(sizes, device.times(n), context) for device in devices for n in _counts(device)]
    pairs = [
        offloaded(sizes, model.times(n), attention.times(count), network, context)
        for model in devices
        for attention in devices
        for n in _counts(model)
        for count in _counts(attention)
        if model is not attention or n + count <= model.available
    ]
    return _best_first(alone), _best_first(pairs)


def crossing(gains: Mapping[int, float | None]) -> int | None:
    """The shortest context from which on a split is worth its money, in all longer ones that were tried; None for none."""
    found = None
    for context in sorted(gains, reverse=True):
        gain = gains[context]
        if gain is None or gain < 1:
            break
        found = context
    return found


def _counts(device: Device) -> range:
    return range(1, device.available + 1)


def _best_first(found: Iterable[Plan | None]) -> list[Plan]:
    return sorted((plan for plan in found if plan is not None), key=lambda plan: -plan.tokens_per_unit)


def _fitting(memory: float, sizes: Sizes, context: int) -> int:
    at_least("context", context, 1)
    return int(memory // (sizes.token_bytes * context))


def _check_numbers(values: Any, *names: str) -> None:
    for name in names:
        value = getattr(values, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise Unsupported(f"{name}={value!r} of a {type(values).__name__.lower()}", supported=f"{name} > 0")


EXAMPLE = "devices: a list of name, flops, bandwidth, memory, price_per_hour and source; network: bandwidth and latency"


@dataclass(frozen=True)
class Table:
    """What a file says of devices, of the network between them, and perhaps of a model."""

    devices: tuple[Device, ...]
    network: Network
    model: Sizes | None


def read_table(path: Path) -> Table:
    """A table of devices from JSON, TOML or YAML.

    Raises:
        Unsupported: for a file that cannot be read, with what is wrong in it.
    """
    found = read_data(path, f"the table {path}")
    known = ("devices", "network", "model")
    if not isinstance(found, Mapping) or not set(found) <= set(known) or not {"devices", "network"} <= set(found):
        raise Unsupported(f"the table {path}", supported=EXAMPLE)
    rows = found["devices"]
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise Unsupported(f"devices of the table {path}", supported=EXAMPLE)
    devices = tuple(_made(Device, row, path) for row in rows)
    if len({device.name for device in devices}) < len(devices):
        raise Unsupported(f"two devices of one name in {path}", supported="a name for each")
    model = found.get("model")
    return Table(devices, _made(Network, found["network"], path), None if model is None else _made(Sizes, model, path))


def _made(kind: type[Any], values: Any, path: Path) -> Any:
    what = f"a {kind.__name__.lower()} in {path}"
    if not isinstance(values, Mapping):
        raise Unsupported(f"{what}: {values!r}", supported=EXAMPLE)
    check_options(kind, values, what)
    for field in dataclasses.fields(kind):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise Unsupported(f"{what} without {field.name}", supported=EXAMPLE)
    floats = {field.name for field in dataclasses.fields(kind) if field.type == "float"}
    return kind(**{name: _number(value) if name in floats else value for name, value in values.items()})


def _number(value: Any) -> Any:
    """What 9.9e14 means, which YAML takes for text since its exponent has no sign; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
