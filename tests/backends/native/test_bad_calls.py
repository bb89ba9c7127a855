"""Operators called directly, as a graph or a debugger may: what does not fit is refused before a pointer is passed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regard.backends.native import library
from regard.contract import BlockMask, Unsupported
from regard.core.visibility import DistanceBias, Ranks, Visibility
from regard.engines.attention import native_form as attention
from regard.engines.attention import paged as attention_decode
from regard.engines.conserved_flows import native_form as conserved_flows
from regard.engines.conserved_flows.torch_form import Rule as FlowRule
from regard.engines.conserved_flows.torch_form import Sums
from regard.engines.gated_recurrence import native_form as gated_recurrence
from regard.engines.grouped_attention import native_form as grouped_attention
from regard.engines.grouped_attention.torch_form import Dropout
from regard.engines.layers import native_form as layers
from regard.engines.linear_attention import native_form as linear_attention
from regard.engines.linear_attention.torch_form import Rule
from regard.engines.selective_scan import native_form as selective_scan
from regard.engines.softmax_scan import native_form as softmax_scan
from regard.engines.softmax_scan.torch_form import Carry


@pytest.fixture(autouse=True)
def _filled():
    """What no kernel writes is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


B, H, N, K, V = 2, 4, 300, 8, 6  # several states are kept for the backward pass


def leaf(*shape: int, low: bool = False) -> Tensor:
    return (-torch.rand(shape) if low else torch.randn(shape)).requires_grad_()


def attend(rule: str, **more: Any) -> Any:
    options = dict.fromkeys(("sink", "bias", "position_bias", "blocks")) | more
    at = torch.arange(N)[None]
    return attention.run(
        leaf(B, H, N, K), leaf(B, 2, N, K), leaf(B, 2, N, V), Ranks(at, at.expand(B, -1), None, None, False),
        Visibility(causal=True), 0.3, rule, 0.0, None, *options.values(), 0.0, None, False, rule == "softmax",
    )  # fmt: skip


def biased_attention() -> Any:
    return attend("softmax", sink=leaf(H), bias=leaf(B, H, N, N))


def attention_by_distance() -> Any:
    table = leaf(H, 2 * N + 1)
    blocks = BlockMask(torch.ones(1, 1, 3, 3, dtype=torch.bool).tril(), 128)
    return attend("sigmoid", position_bias=DistanceBias(lambda d: table[:, (d + N).clamp(0, 2 * N)]), blocks=blocks)


def decoding() -> Any:
    at = torch.arange(N)[None]
    return attention.run(
        leaf(B, H, 2, K), leaf(B, 2, N, K), leaf(B, 2, N, V), Ranks(at[:, -2:], at, None, None, False),
        Visibility(causal=True, left=40), 0.3, "softmax", 0.0, None, None, None, None, None, 0.0, None, False, True,
    )  # fmt: skip


def paged_decoding() -> Any:
    k, v, pages = torch.randn(6, 2, 16, K), torch.randn(6, 2, 16, V), torch.randperm(6).view(B, 3)
    limits = [1, 20, -1, 0, 0, 0]
    return attention_decode.attention_decode(
        torch.randn(B, H, 2, K),
        k,
        v,
        pages,
        torch.tensor([40, 7]),
        torch.tensor([[38, 39], [5, 6]]),
        limits,
        0.3,
        0.0,
        None,
    )


def recurrence(beta: bool) -> Any:
    q, k, v = leaf(B, H, N, K), leaf(B, H, N, K), leaf(B, H, N, V)
    rate = leaf(B, H, N) if beta else None
    return gated_recurrence.run(q, k / 4, v, leaf(B, H, N, K, low=True), rate, leaf(B, H, K, V), 64, 16, True)


def step() -> Any:
    q, k, v = leaf(B, H, K), leaf(B, H, K), leaf(B, H, V)
    return gated_recurrence.run_step(q, k, v, leaf(B, H, K, low=True), leaf(B, H), leaf(B, H, K, V))


def linear() -> Any:
    tensors = leaf(B, H, N, K), leaf(B, H, N, K), leaf(B, H, N, V)
    valid = torch.tensor([N, 7])
    return linear_attention.run(*tensors, Rule("elu", 1.0, 1e-6), leaf(B, H, K, V + 1), valid, 64)


def grouped() -> Any:
    at = torch.arange(N)[None]
    where, own = Ranks(at, at, 0, 0, True), (at // 9).contiguous()
    return grouped_attention.run(
        leaf(B, H, N, K), leaf(B, 2, N, K), leaf(B, 2, N, V), where, at % 9 == 8, own, True, 0.5, None, None, None,
        Dropout(0.0, 0.0, None), False,
    )  # fmt: skip


def flows() -> Any:
    sums = Sums(
        torch.rand(4, B, H, K).requires_grad_(), torch.randn(B, H), torch.rand(B, H) + 0.5, torch.tensor([3, 0])
    )
    sinks, sources = (torch.rand(B, H, N, K).requires_grad_() for _ in range(2))
    competition, acceptance, after = conserved_flows.run(
        sinks, sources, sums, FlowRule(True, True, None, 1.0, 1e-6), torch.tensor([N, 7])
    )
    return competition, acceptance, after.totals, after.normalizer


def selective() -> Any:
    x, dt, z = leaf(B, N, 6), leaf(B, N, 6), leaf(B, N, 6)
    by_group, vectors = (leaf(B, N, 2, 5), leaf(B, N, 2, 5)), (leaf(6), leaf(6))
    lengths = torch.tensor([N, 7])
    return selective_scan.run(x, dt, leaf(6, 5, low=True), *by_group, *vectors, z, leaf(B, 6, 5), lengths, 64, True)


def scan(mixed: bool) -> Any:
    carry = Carry(torch.zeros(B, H, 3), torch.ones(B, H, 3).requires_grad_(), leaf(B, H, 3, V))
    mix = leaf(B, H, N, 3) if mixed else None
    output, after = softmax_scan.run(leaf(B, H, N, 3), leaf(B, H, N, V), carry, 64, leaf(B, H, N, low=True), mix)
    return output, after.u, after.w


def convolution() -> Any:
    lengths = torch.tensor([N, 7])
    return layers.short_convolution(leaf(B, N, 6), leaf(6, 4), leaf(6), leaf(B, 3, 6), lengths, True, True)


CALLS: dict[str, Callable[[], Any]] = {
    "attention": biased_attention,
    "attention by distance": attention_by_distance,
    "attention of few queries": decoding,
    "attention to pages": paged_decoding,
    "gated recurrence": lambda: recurrence(False),
    "delta rule": lambda: recurrence(True),
    "step": step,
    "linear attention": linear,
    "grouped attention": grouped,
    "conserved flows": flows,
    "selective scan": selective,
    "softmax scan": lambda: scan(False),
    "mixed softmax scan": lambda: scan(True),
    "short convolution": convolution,
    "norm": lambda: layers.rms_norm(leaf(B, N, 8), leaf(8), leaf(B, N, 8), 2, 1e-6, True),
    "rotary": lambda: layers.rotary(leaf(B, H, N, K), torch.arange(N)[None], 6, 1e4, 1.0),
    "gated product": lambda: layers.gated_product(leaf(B, N, 8), leaf(B, N, 8), "silu"),
}

BROADCAST = {"query_ranks", "key_ranks", "blocks", "bias", "distance", "landmark", "own", "positions", "log_decay", "g"}
"""Inputs that rows, heads or features may share, with 1 instead of their number."""

ANY_NUMBER = {("attention", "blocks", 2), ("attention", "blocks", 3), ("attention", "distance", 1)}
"""Axes whose size the operator takes as it is."""


class Calls(TorchDispatchMode):
    """The calls of operators inside the block, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[Any, list[Any]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "regard":
            detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
            self.found[func._opname] = (func, detached)
        return func(*args, **(kwargs or {}))


def calls_of(make: Callable[[], Any]) -> dict[str, tuple[Any, list[Any]]]:
    with Calls() as calls:
        results = make()
        results = [x for x in (results if isinstance(results, tuple) else (results,)) if x is not None]
        results = [x for x in results if x.requires_grad]
        torch.autograd.backward(results, [torch.randn_like(x) for x in results])
    return calls.found


def misfits(name: str, argument: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor with another number of axes, another size, another dtype."""
    yield "one axis more", x[None]
    yield "no axis", x.new_zeros(())
    if x.ndim > 1:
        yield "one axis less", x[0]
    for axis, size in enumerate(x.shape):
        if (name.removesuffix("_backward"), argument, axis) in ANY_NUMBER:
            continue
        if size > 1 and not (argument in BROADCAST and size == 2):
            yield f"axis {axis} shorter", x.narrow(axis, 0, size - 1)
        if size == 1 and argument in BROADCAST:
            continue
        yield (
            f"axis {axis} longer",
            torch.cat([x, x.narrow(axis, 0, 1)], axis)
            if size
            else x.new_zeros([s + (i == axis) for i, s in enumerate(x.shape)]),
        )
    for dtype in {torch.float64, torch.int32, torch.bfloat16} - {x.dtype}:
        yield str(dtype), x.to(dtype)


def strided(x: Tensor) -> Tensor:
    """The same numbers, no two of them side by side."""
    room = x.new_zeros((*x.shape, 3))
    room[..., 1] = x
    return room[..., 1]


def allowed(name: str, argument: str, change: str) -> bool:
    """Whether the changed call is another good one."""
    backward = name.endswith("_backward")
    if "axis" in change:
        return not backward  # which decides about sizes, that results then have to have
    # each tensor of these may be in bfloat16 by itself; the gradient of the output has the dtype of v
    own = {"gated_recurrence": "qkvg", "gated_recurrence_step": ("q", "k", "v", "g", "beta")}
    own |= {"rotary": "x", "linear_attention": "qkv", "softmax_scan": "" if backward else "v"}
    narrow = argument in own.get(name.removesuffix("_backward"), ()) and not (backward and argument == "v")
    return change == "torch.bfloat16" and narrow


@pytest.mark.parametrize("call", CALLS)
def test_tensors_that_do_not_fit_are_refused_one_by_one(call):
    for name, (operator, arguments) in calls_of(CALLS[call]).items():
        operator(*arguments)
        for at, given in enumerate(operator._schema.arguments):
            x = arguments[at]
            if not isinstance(x, Tensor):
                continue
            for change, changed in misfits(name, given.name, x):
                try:
                    operator(*arguments[:at], changed, *arguments[at + 1 :])
                except Unsupported:
                    continue
                if not allowed(name, given.name, change):
                    pytest.fail(f"{name} took {given.name} with {change}: {tuple(changed.shape)} {changed.dtype}")


def extremes(given: Any) -> Iterator[Any]:
    """The integer, the list of integers or the tensor of integers with a number in it that is far too large or small."""
    for number in (2**31, 2**32, 2**40, 2**62, -(2**31), -(2**40), -(2**62)):
        if isinstance(given, Tensor):
            changed = given.clone()
            changed.view(-1)[-1] = number
            yield changed
        elif isinstance(given, list):
            yield from ([*given[:at], number, *given[at + 1 :]] for at in range(len(given)))
        else:
            yield number


def is_integral(given: Any) -> bool:
    if isinstance(given, list):
        return bool(given) and all(type(x) is int for x in given)
    return type(given) is int or (isinstance(given, Tensor) and given.dtype == torch.int64)


ANY_INTEGER = {"length", "lengths", "valid", "positions"}
"""Tensors of integers that 64-bit numbers read as they are: more tokens than there are mean all."""


@pytest.mark.parametrize("call", CALLS)
def test_integers_out_of_range_are_refused(call):
    for name, (operator, arguments) in calls_of(CALLS[call]).items():
        for at, given in enumerate(operator._schema.arguments):
            for changed in extremes(arguments[at]) if is_integral(arguments[at]) else ():
                try:
                    operator(*arguments[:at], changed, *arguments[at + 1 :])
                except Unsupported:
                    continue
                paged = name == "attention_decode"
                if paged and given.name == "pages":
                    continue  # beyond the last key of a row, where it may be any number
                if given.name not in ANY_INTEGER or paged:
                    pytest.fail(f"{name} took {given.name} = {changed}")


@pytest.mark.parametrize("call", CALLS)
def test_another_default_device_and_dtype_change_nothing(call):
    for name, (operator, arguments) in calls_of(CALLS[call]).items():
        expected = operator(*arguments)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                found = operator(*arguments)
        finally:
            torch.set_default_dtype(torch.float32)
        single = isinstance(found, Tensor)
        for x, y in zip([found] if single else found, [expected] if single else expected, strict=True):
            torch.testing.assert_close(x, y, equal_nan=True, msg=f"{name}")


@pytest.mark.parametrize(
    "x", [torch.empty(3, device="meta"), torch._efficientzerotensor(3)], ids=["another device", "no memory"]
)
def test_no_address_is_taken_but_of_memory_of_the_processor(x):
    with pytest.raises(Unsupported, match="native kernel"):
        library.pointer(x)


@pytest.mark.parametrize("call", CALLS)
def test_tensors_of_any_strides_give_the_same(call):
    for name, (operator, arguments) in calls_of(CALLS[call]).items():
        expected = operator(*arguments)
        for at, given in enumerate(operator._schema.arguments):
            if isinstance(arguments[at], Tensor):
                found = operator(*arguments[:at], strided(arguments[at]), *arguments[at + 1 :])
                single = isinstance(found, Tensor)
                for x, y in zip([found] if single else found, [expected] if single else expected, strict=True):
                    torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6, equal_nan=True, msg=f"{name} {given.name}")


@pytest.mark.parametrize("call", CALLS)
def test_gradients_of_what_is_not_there_are_refused_or_empty(call):
    for name, (operator, arguments) in calls_of(CALLS[call]).items():
        if not name.endswith("_backward"):
            continue
        for at, given in enumerate(operator._schema.arguments):
            if not isinstance(arguments[at], Tensor) or not isinstance(given.type, torch.OptionalType):
                continue
            try:
                operator(*arguments[:at], None, *arguments[at + 1 :])
            except Unsupported:
                continue
