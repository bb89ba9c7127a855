"""Properties of every kernel and its operators, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regard.backends.native import library
from regard.contract import Unsupported

from .kernels import CASES, Tensors, differentiated

N = 300  # enough to store several states for the backward pass
WITHOUT_GRADIENT = (
    "attention to pages",
    "attention to chosen pages",
    "retrieved blocks",
    "retrieved blocks that are given, turned",
)
FUNCTIONS = [name for name in CASES if name not in WITHOUT_GRADIENT]
DIVIDED = ("attention of few queries", "attention to pages", "attention to chosen pages")
"""Cases whose keys are divided among threads."""
SEQUENCES = [name for name in FUNCTIONS if CASES[name].kernel.sequences]

each_case = pytest.mark.parametrize("name", CASES)
each_function = pytest.mark.parametrize("name", FUNCTIONS)


class Calls(TorchDispatchMode):
    """Records the operators called inside the block, by name, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple[Any, list[Any]]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "regard":
            detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
            self.found[func._opname] = (func, detached)
        return func(*args, **(kwargs or {}))


def calls_of(name: str, n: int = N) -> Iterator[tuple[Any, list[Any], list[Tensor], Callable[..., list[Tensor]]]]:
    """Yield each operator that a case calls, its arguments, its results, and a function that calls it with one changed."""
    case = CASES[name]
    with Calls() as calls, torch.set_grad_enabled(name in FUNCTIONS):
        differentiated(case.call(n), case.sample(n), {})
    for operator, arguments in calls.found.values():

        def changed(at: int, to: Any, operator=operator, arguments=arguments) -> list[Tensor]:
            found = operator(*arguments[:at], to, *arguments[at + 1 :])
            return [found] if isinstance(found, Tensor) else list(found)

        yield operator, arguments, changed(0, arguments[0]), changed


def equal(found: list[Tensor], expected: list[Tensor], what: str, tolerance: float = 0.0) -> None:
    for x, y in zip(found, expected, strict=True):
        size = float(y.double().masked_fill(~y.isfinite(), 0).abs().max()) if y.numel() else 0.0
        torch.testing.assert_close(
            x, y, rtol=0, atol=tolerance * size, equal_nan=True, msg=lambda m, what=what: f"{what}: {m}"
        )


# Operators called directly, as by a graph or a debugger: misfits are refused before any pointer is passed.

BROADCAST = {
    "totals",
    "query_ranks",
    "key_ranks",
    "blocks",
    "bias",
    "distance",
    "landmark",
    "own",
    "positions",
    "log_decay",
    "g",
}
"""Inputs that rows, heads or features may share, with an axis of size 1."""

ANY_NUMBER = {
    *(("attention", "blocks", axis) for axis in (2, 3)), ("attention", "distance", 1), ("selective_scan", "b", 2),
    ("pixel_attention", "estimate", 3), ("map_distance", "estimate", 3),
}  # fmt: skip
"""Axes that may have any size."""


def misfits(name: str, argument: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensor with another number of axes, another size or another dtype."""
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
        longer = [s + (i == axis) for i, s in enumerate(x.shape)]
        yield f"axis {axis} longer", torch.cat([x, x.narrow(axis, 0, 1)], axis) if size else x.new_zeros(longer)
    for dtype in {torch.float64, torch.int32, torch.bfloat16} - {x.dtype}:
        yield str(dtype), x.to(dtype)


def allowed(name: str, argument: str, change: str) -> bool:
    """Return whether the changed call is valid as well."""
    backward = name.endswith("_backward")
    if "axis" in change:
        # forward arguments define sizes that the results then have; several query heads may share a key head
        return not backward or (name, argument) == ("map_distance_backward", "k")
    # each of these tensors may be bfloat16 on its own; the output's gradient has the dtype of v
    own = {"gated_recurrence": ("q", "k", "v", "log_decay"), "gated_recurrence_step": ("q", "k", "v", "g", "beta")}
    own |= {"rotary": "x", "linear_attention": "qkv", "softmax_scan": "" if backward else "v"}
    narrow = argument in own.get(name.removesuffix("_backward"), ()) and not (backward and argument == "v")
    return change == "torch.bfloat16" and narrow


@each_case
def test_tensors_that_do_not_fit_are_refused_one_by_one(name):
    for operator, arguments, _, call in calls_of(name):
        for at, given in enumerate(operator._schema.arguments):
            if not isinstance(arguments[at], Tensor):
                continue
            for change, changed in misfits(operator._opname, given.name, arguments[at]):
                try:
                    call(at, changed)
                except Unsupported:
                    continue
                if not allowed(operator._opname, given.name, change):
                    pytest.fail(f"{operator} took {given.name} with {change}: {tuple(changed.shape)} {changed.dtype}")


def extremes(given: Any) -> Iterator[Any]:
    """Yield an integer argument (a number, a list or a tensor) with one value far too large or too small."""
    whole = isinstance(given, list) and bool(given) and all(type(x) is int for x in given)
    for number in (2**31, 2**32, 2**40, 2**62, -(2**31), -(2**40), -(2**62)):
        if isinstance(given, Tensor) and given.dtype == torch.int64:
            changed = given.clone()
            changed.view(-1)[-1] = number
            yield changed
        elif whole:
            yield from ([*given[:at], number, *given[at + 1 :]] for at in range(len(given)))
        elif type(given) is int:
            yield number


ANY_INTEGER = {"length", "lengths", "valid", "positions"}
"""Integer tensors that may hold any 64-bit number: more tokens than exist mean all of them."""


@each_case
def test_integers_out_of_range_are_refused(name):
    for operator, arguments, _, call in calls_of(name):
        for at, given in enumerate(operator._schema.arguments):
            for changed in extremes(arguments[at]):
                try:
                    call(at, changed)
                except Unsupported:
                    continue
                paged = operator._opname == "attention_decode"
                if paged and given.name == "pages":
                    continue  # past a row's last key any number is allowed
                if given.name not in ANY_INTEGER or paged:
                    pytest.fail(f"{operator} took {given.name} = {changed}")


@each_function
def test_gradients_of_what_is_not_there_are_refused_or_empty(name):
    for operator, arguments, _, call in calls_of(name):
        for at, given in enumerate(operator._schema.arguments):
            optional = isinstance(arguments[at], Tensor) and isinstance(given.type, torch.OptionalType)
            if optional and operator._opname.endswith("_backward"):
                try:
                    call(at, None)
                except Unsupported:
                    continue


@pytest.mark.parametrize(
    "x", [torch.empty(3, device="meta"), torch._efficientzerotensor(3)], ids=["another device", "no memory"]
)
def test_no_address_is_taken_but_of_memory_of_the_processor(x):
    with pytest.raises(Unsupported, match="native kernel"):
        library.pointer(x)


@each_case
def test_another_default_device_and_dtype_change_nothing(name):
    for operator, arguments, expected, call in calls_of(name):
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device("meta"):
                found = call(0, arguments[0])
        finally:
            torch.set_default_dtype(torch.float32)
        equal(found, expected, f"{operator}")


def spread(x: Tensor) -> Tensor:
    """A view of x in which no two numbers are adjacent in memory."""
    room = torch.full((*x.shape, 3), torch.nan if x.is_floating_point() else 1).to(x.dtype)
    room[..., 1] = x
    return room[..., 1]


def sliced(x: Tensor) -> Tensor:
    """A view of x with other numbers before and after each row."""
    beside = torch.full_like(x, torch.nan) if x.is_floating_point() else torch.ones_like(x)
    return torch.cat([beside, x, beside], -1)[..., x.shape[-1] : 2 * x.shape[-1]]


def turned(first: int) -> Callable[[Tensor], Tensor]:
    """Swap the memory order of two adjacent axes."""
    return lambda x: x.transpose(first, first + 1).contiguous().transpose(first, first + 1)


def shared(x: Tensor) -> Tensor:
    """Share one head among all."""
    return x.narrow(x.ndim - 3, 0, 1).expand(x.shape)


LAYOUTS = {"spread": (1, spread), "sliced": (1, sliced), "columns": (2, turned(-2)), "by token": (3, turned(-3))}
LAYOUTS["shared"] = (3, shared)


@each_case
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_of_any_strides_is_read_and_nothing_beside_it(name, layout):
    least, laid = LAYOUTS[layout]
    for operator, arguments, _, call in calls_of(name):
        for at, given in enumerate(operator._schema.arguments):
            if isinstance(arguments[at], Tensor) and arguments[at].ndim >= least:
                changed = laid(arguments[at])
                # row sums may be rounded differently in another layout
                equal(call(at, changed), call(at, changed.contiguous()), f"{operator}, {given.name}", 1e-6)


@each_case
def test_threads_change_no_result_and_gradients_by_rounding_alone(name):
    for operator, arguments, expected, call in calls_of(name):
        exact = not operator._opname.endswith("_backward") and name not in DIVIDED
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found = call(0, arguments[0])
            equal(found, expected, f"{operator} with {threads} threads", 0.0 if exact else 3e-6)
            for _ in range(3):
                equal(call(0, arguments[0]), found, f"{operator} again with {threads} threads")


@each_case
@pytest.mark.usefixtures("_any_memory")
def test_operators_are_well_formed(name):
    """Operators with gradients pass torch's full check, which compiles; the others its schema and shape checks."""
    for operator, arguments, _, _ in calls_of(name, 20):
        if operator._opname.endswith("_backward") or name not in FUNCTIONS:
            torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
            continue
        floating = [isinstance(x, Tensor) and x.is_floating_point() for x in arguments]
        leaves = [x.clone().requires_grad_() if y else x for x, y in zip(arguments, floating, strict=True)]
        torch.library.opcheck(operator, leaves)


@each_function
@pytest.mark.usefixtures("_any_memory")
def test_compiles_whole_with_gradients(name):
    case = CASES[name]
    inputs, call = case.sample(N), case.call(N)
    names = [x for x in inputs if inputs[x] is not None]

    def results(*tensors: Tensor) -> Tensors:
        return call(**inputs | dict(zip(names, tensors, strict=True)))

    torch.compiler.reset()
    compiled, weights = torch.compile(results, fullgraph=True, backend="aot_eager"), {}
    given = {x: inputs[x] for x in names}
    expected = differentiated(lambda **x: results(*x.values()), given, weights)
    found = differentiated(lambda **x: compiled(*x.values()), given, weights)
    for result, x in found.items():
        torch.testing.assert_close(x, expected[result], rtol=1e-6, atol=1e-6)


@each_function
def test_second_derivatives_are_refused(name):
    case = CASES[name]
    leaves = {
        x: y if y is None or not y.is_floating_point() else y.requires_grad_() for x, y in case.sample(20).items()
    }
    total = sum(y.sum() for y in case.call(20)(**leaves).values() if y is not None and y.requires_grad)
    first = next(x for x in leaves.values() if x is not None and x.requires_grad)
    (gradient,) = torch.autograd.grad(total, first, create_graph=True)
    if name in ("rotary", "step"):  # their gradients are a rotation and torch operators
        assert torch.isfinite(gradient).all()
        return
    with pytest.raises(Unsupported, match=r"second derivative|gradients of gradients"):
        gradient.sum().backward()


@each_function
def test_each_gradient_alone_is_the_same(name):
    case = CASES[name]
    inputs, weights = case.sample(N), {}
    expected = differentiated(case.call(N), inputs, weights)
    for name in [x for x in inputs if f"grad {x}" in expected]:
        found = differentiated(case.call(N), inputs, weights, by=(name,))
        equal([found[f"grad {name}"]], [expected[f"grad {name}"]], name, 1e-6)


@each_function
def test_gradients_of_one_result_alone_are_those_of_float64(name):
    case = CASES[name]
    inputs = case.sample(N)
    results = [x for x, y in case.call(N)(**inputs).items() if y is not None]
    for chosen in results:
        found, expected, weights = {}, {}, {}
        for of, form, dtype in ((found, None, None), (expected, case.kernel.plain, torch.float64)):
            call = case.call(N, form)
            alone = partial(lambda call, chosen, **x: {chosen: call(**x)[chosen]}, call, chosen)
            of |= differentiated(alone, inputs, weights, dtype)
        for x, y in found.items():
            case.kernel.close(y, expected[x], x)


@pytest.mark.parametrize("name", SEQUENCES)
def test_nan_reaches_what_depends_on_it_and_nothing_else(name):
    case = CASES[name]
    case.kernel.check_nan(case.sample(100), **case.options(100))


def test_a_library_that_was_built_before_a_kernel_was_written_says_so():
    class Later(library.Arguments):
        kernel = "later"

    with pytest.raises(RuntimeError, match=r"native kernel later.*install regard again"):
        library.call(Later())
