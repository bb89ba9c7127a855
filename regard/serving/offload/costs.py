"""Estimates the cost of a decoding step with offloaded attention, from operations and bytes, and chooses devices to
rent.

With L layers of H query heads and G key/value heads of width d, P parameters of e bytes, a batch of B sequences with S
tokens in total, and a device with F operations and W bytes per second:

    model       t_m(B) = max(2 P B / F, e P / W)
    attention   t_a(S) = max(4 L H d S / F, 2 e L G d S / W)
    wire        e L B d (2 H + 2 G) bytes: queries, keys and values out, outputs back; plus 2 L times the latency
    memory      e P on the model's device, 2 e L G d S on the device of keys and values

A single batch takes the sum of the stages. R alternating micro-batches keep all devices busy: one layer of all of them
takes max(R max(stages), sum of stages), with the stages of one micro-batch of B / R sequences, which reads all weights.
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
"""Default maximum time for transfers, relative to the rest of the step."""


@dataclass(frozen=True)
class Device:
    """A device that can be rented, or a group of them as one device.

    Attributes:
        name: its name.
        flops: achievable operations per second.
        bandwidth: memory bandwidth in bytes per second.
        memory: bytes of memory.
        price_per_hour: price per hour, in any currency.
        source: source of these figures.
        available: maximum number of devices.
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
        """Return a group of `count` devices as one device."""
        return dataclasses.replace(
            self,
            name=f"{count} x {self.name}",
            **{name: count * getattr(self, name) for name in ("flops", "bandwidth", "memory", "price_per_hour")},
        )


@dataclass(frozen=True)
class Network:
    """The network between devices: bytes per second in each direction, and the seconds of an empty message."""

    bandwidth: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        _check_numbers(self, "bandwidth")
        at_least("latency", self.latency, 0.0)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a language model.

    Attributes:
        layers: number of softmax layers.
        heads, kv_heads: heads of queries, and of keys and values.
        head_dim: width of a head.
        parameters: parameters of the whole model.
        element_bytes: bytes of a number in weights, cache and messages.
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
        """Return the sizes of a model whose softmax layers are alike."""
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
        """Operations per byte of keys and values."""
        return 2 * self.heads / self.kv_heads / self.element_bytes


def traffic_bytes(sizes: Sizes, batch: float, *, owners: int = 1, state_bytes: int = 4) -> tuple[float, float]:
    """Return the bytes of tensors that a step sends to attention workers, and the bytes that it receives from them.

    Args:
        owners: number of workers over which the tokens of a sequence are split: each receives the queries, and returns
            a log-sum-exp of `state_bytes` per head with its output. 1 for whole sequences and for a split by heads.
    """
    each = sizes.layers * batch
    vector = sizes.element_bytes * sizes.heads * sizes.head_dim
    new = 2 * sizes.element_bytes * sizes.kv_heads * sizes.head_dim
    state = 0 if owners == 1 else state_bytes * sizes.heads
    return each * (owners * vector + new), each * owners * (vector + state)


def model_seconds(sizes: Sizes, device: Device, batch: float) -> float:
    """Return t_m, the seconds of everything but attention, for a batch."""
    return max(2 * sizes.parameters * batch / device.flops, sizes.weight_bytes / device.bandwidth)


def attention_seconds(sizes: Sizes, device: Device, tokens: float) -> float:
    """Return t_a, the seconds of attention in all layers, for sequences with `tokens` tokens in total."""
    operations = 4 * sizes.layers * sizes.heads * sizes.head_dim * tokens
    return max(operations / device.flops, sizes.token_bytes * tokens / device.bandwidth)


def required_bandwidth(sizes: Sizes, batch: float, seconds: float, alpha: float = ALPHA) -> float:
    """Return the bytes per second at which transfers take a share `alpha` of the step's other `seconds`."""
    return sum(traffic_bytes(sizes, batch)) / (alpha * seconds)


@dataclass(frozen=True)
class Stages:
    """Seconds of one micro-batch in one layer.

    Attributes:
        model, attention: compute time.
        send, receive: transfer time, in which the other micro-batches cannot use the wire.
        latency: latency of each message, which does not block other micro-batches.
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
        """Return the stages for a batch at a context, with the model on one device and its attention on another."""
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
        """Seconds of each resource that serves one micro-batch at a time."""
        return {"model": self.model, "send": self.send, "attention": self.attention, "receive": self.receive}

    def period(self, micro_batches: int = 1) -> float:
        """Return the seconds of one layer of all micro-batches, with steps that follow each other without a break."""
        return max(micro_batches * max(self.busy.values()), sum(self.busy.values()) + 2 * self.latency)

    def step(self, layers: int, micro_batches: int = 1) -> float:
        """Return the seconds of one step of one or two micro-batches that start together and wait for each other at the
        end. The model computes before the first layer's attention and after the last one's. Transfer times are not
        counted.
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
    """A choice of devices, and its speed and price.

    Attributes:
        model, attention: names of the devices; `attention` is None if the model's devices do everything.
        batch: number of sequences: as many as fit in memory.
        micro_batches: 2 if that is faster than 1.
        seconds: seconds of a step, which adds a token to every sequence.
        price_per_hour: price of all devices.
        busiest: the stage that limits the speed.
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
        """Tokens per second of the whole batch."""
        return self.batch / self.seconds

    @property
    def tokens_per_unit(self) -> float:
        """Tokens per unit of the currency."""
        return 3600 * self.tokens_per_second / self.price_per_hour

    def as_record(self) -> dict[str, Any]:
        """Return the plan as plain data, with the tokens per second and per unit of currency."""
        record = dataclasses.asdict(self)
        return record | {"tokens_per_second": self.tokens_per_second, "tokens_per_unit": self.tokens_per_unit}


def homogeneous(sizes: Sizes, device: Device, context: int) -> Plan | None:
    """Plan for everything on one kind of device; None if not even one sequence fits."""
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
    """Plan for the model on one kind of device, and keys, values and attention on another; None if they do not fit."""
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
    """Return all plans with one kind of device, and all with a pair of kinds; both sorted, cheapest tokens first."""
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
    """Return the shortest context that gains from a split (gain >= 1) with all longer ones; None if there is none."""
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
    """The contents of a file: devices, the network between them, and optionally the sizes of a model."""

    devices: tuple[Device, ...]
    network: Network
    model: Sizes | None


def read_table(path: Path) -> Table:
    """Read a table of devices from JSON, TOML or YAML.

    Raises:
        Unsupported: for a file that cannot be read; the error says what is wrong in it.
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
    """Convert text to a number if possible: YAML reads 9.9e14 as text, since its exponent has no sign."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
