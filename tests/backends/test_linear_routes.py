"""The routes of the linear product, their operator, and how a route is chosen."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from support import close
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from regard.backends import linear as entry
from regard.backends.linear import linear, measuring, use_route
from regard.backends.linear.choices import Choices, cache_file, machine
from regard.backends.linear.product import PROBED_WORK, Product
from regard.backends.linear.routes import LOCAL, ROUTES, FrozenWeights, Route
from regard.contract import Unsupported

AVAILABLE = [name for name, route in ROUTES.items() if route.available()]
FORCED = [name for name in AVAILABLE if name != "onednn_packed"]
LARGE = Product.plain(64, 1024, 512)

each_route = pytest.mark.parametrize("name", FORCED)
needs_onednn = pytest.mark.skipif("onednn" not in AVAILABLE, reason="this build of torch has no oneDNN")


@pytest.fixture(autouse=True)
def choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Choices:
    """Fresh choices that neither read nor write the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(entry, "CHOICES", Choices())
    return entry.CHOICES


def near(got: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    close(got.detach().double(), expected.detach(), tolerance)


def sample(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    *rows, k, n = shape
    return torch.randn(*rows, k), torch.randn(n, k) / k**0.5, torch.randn(n)


# The results of a route.


@each_route
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 16), (7, 33, 5), (2, 3, 40, 24), (13, 1, 3), (64, 128, 257), (100, 1, 7)])
def test_value_and_gradients_are_those_of_float64(name: str, bias: bool, shape: tuple[int, ...]) -> None:
    tensors = [t.requires_grad_() for t in sample(*shape)[: 3 if bias else 2]]
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = F.linear(*exact)
    weights = torch.randn(expected.shape)
    with use_route(name):
        y = linear(*tensors)
        found = torch.autograd.grad(y, tensors, weights)
    assert y.is_contiguous()
    near(y, expected)
    for got, wanted in zip(found, torch.autograd.grad(expected, exact, weights.double()), strict=True):
        near(got, wanted)


@each_route
@pytest.mark.parametrize(("rows", "k", "n"), [((0,), 6, 4), ((2, 0), 6, 4), ((), 6, 4), ((3,), 0, 4), ((3,), 6, 0)])
def test_no_rows_a_single_vector_and_empty_widths(name: str, rows: tuple[int, ...], k: int, n: int) -> None:
    x, weight, bias = torch.randn(*rows, k), torch.randn(n, k, requires_grad=True), torch.randn(n)
    with use_route(name):
        y = linear(x, weight, bias)
        y.sum().backward()
        if len(rows) == 1:
            torch.testing.assert_close(torch.ops.regard.linear(x, weight, bias), F.linear(x, weight, bias))
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    assert weight.grad is not None and weight.grad.isfinite().all()


@each_route
def test_views_need_no_copy_by_the_caller(name: str) -> None:
    wide, table = torch.randn(60, 200), torch.randn(70, 150)
    operands = [
        (wide[:, 5:105], table[:, 50:]),
        (wide[::2, :100], table[::3, :100]),
        (wide.t()[:50].t(), table[:, :50]),
        (wide[:, ::2], table[:40].t()[:100, :30].contiguous().t()[:, :100]),
        (torch.ones(1, 1).expand(9, 20), table[:, :20]),
        (wide[:1, :100], table[:1, :100]),
        (wide.view(3, 20, 200).transpose(0, 1), torch.randn(200, 8).t()),
    ]
    with use_route(name):
        for x, weight in operands:
            near(linear(x, weight), F.linear(x.double(), weight.double()))


@each_route
def test_nan_and_infinity_propagate(name: str) -> None:
    x, weight, _ = sample(8, 16, 8)
    x[3, 5], x[4, 2] = torch.nan, torch.inf
    with use_route(name):
        y = linear(x, weight)
    assert y[3].isnan().all() and not y[4].isfinite().any()
    assert y[[0, 1, 2, 5, 6, 7]].isfinite().all()


@each_route
def test_second_derivatives_are_those_of_float64(name: str) -> None:
    def penalty(product: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        y = product(x, weight, bias).tanh()
        slopes = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(s.square().sum() for s in slopes), (x, weight, bias))

    tensors = [t.requires_grad_() for t in sample(5, 7, 6)]
    expected = penalty(F.linear, *(t.detach().double().requires_grad_() for t in tensors))
    with use_route(name):
        for got, wanted in zip(penalty(linear, *tensors), expected, strict=True):
            near(got, wanted, 5e-6)


# Observers of a call.


@each_route
@pytest.mark.parametrize("bias", [True, False])
def test_operator_passes_opcheck(name: str, bias: bool) -> None:
    x, weight, offset = (t.requires_grad_() for t in sample(6, 20, 9))
    with use_route(name):
        torch.library.opcheck(torch.ops.regard.linear, (x, weight, offset if bias else None))
        torch.library.opcheck(torch.ops.regard.linear, (torch.randn(20, 6).t(), torch.randn(20, 9).t(), None))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # raised by torch in jvp
@each_route
def test_transforms_of_functions(name: str) -> None:
    x, weight, bias = sample(5, 4, 8, 6)

    def loss(product: Callable[..., Tensor], weight: Tensor, x: Tensor) -> Tensor:
        return product(x, weight, bias).square().sum()

    ours, plain, tangent = partial(loss, linear), partial(loss, F.linear), torch.randn_like(weight)
    with use_route(name):
        by_row, expected = (torch.func.vmap(torch.func.grad(f), (None, 0))(weight, x) for f in (ours, plain))
        torch.testing.assert_close(by_row, expected, rtol=1e-4, atol=1e-4)
        got, expected = (torch.func.jvp(lambda w, f=f: f(w, x), (weight,), (tangent,)) for f in (ours, plain))
        torch.testing.assert_close(got, expected)
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(ours(forward_ad.make_dual(weight, tangent), x))
        assert torch.equal(dual.tangent, got[1])
        got = torch.func.vmap(linear, (0, None, 0))(x, weight, torch.stack([bias] * 5))
        torch.testing.assert_close(got, F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_autocast_and_errors_are_torch_s_own(dtype: torch.dtype) -> None:
    given = sample(9, 32, 16)
    narrow = [t.to(dtype) for t in given]
    with use_route(FORCED[-1]):
        assert torch.equal(linear(*narrow), F.linear(*narrow))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(*given).dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            linear(torch.randn(3, 4), torch.randn(5, 6))
        with pytest.raises(RuntimeError, match="dtype"):
            linear(torch.randn(3, 4), torch.randn(5, 4).double())


@each_route
def test_compiled_equals_eager(name: str) -> None:
    x, weight, bias = sample(2, 24, 256, 512)
    weight.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return linear(x, weight, bias).square().mean()

    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with use_route(name):
        for n in (24, 7, 0):  # also other lengths, and none
            part = x[:, :n]
            (got,), (expected,) = (torch.autograd.grad(f(part), weight) for f in (compiled, loss))
            torch.testing.assert_close(got, expected, equal_nan=True)
        torch.compile(loss, fullgraph=True, backend=keep)(x)
    assert "regard.linear" in graphs[0]


@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_has_only_torch_s_operators(strict: bool) -> None:
    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(512, 256))

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, self.weight)

    rows = torch.export.Dim("rows")
    program = torch.export.export(Head(), (torch.randn(8, 256),), dynamic_shapes={"x": {0: rows}}, strict=strict)
    assert "regard" not in str(program.graph)
    assert program.module()(torch.randn(3, 256)).shape == (3, 512)


@each_route
def test_operations_are_counted_as_torch_s(name: str) -> None:
    x, weight, bias = sample(64, 32, 16)
    with use_route(name), FlopCounterMode(display=False) as counter:
        linear(x, weight.requires_grad_(), bias).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 64 * 32 * 16


# How a route is chosen.


def measured_as(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> list[Product]:
    """Let measurements find these times of "onednn" one by one, and then always the last; torch's time is always 1."""
    measured: list[Product] = []

    def probe(product: Product) -> dict[str, float]:
        measured.append(product)
        return {"torch": 1.0, "onednn": seconds[min(len(measured), len(seconds)) - 1]}

    monkeypatch.setattr(measuring, "probe", probe)
    monkeypatch.setattr("regard.backends.linear.choices.available_routes", lambda: ("torch", "onednn"))
    return measured


def test_a_route_is_believed_after_two_processes_have_measured_it(monkeypatch: pytest.MonkeyPatch) -> None:
    measured, first = measured_as(monkeypatch, 0.5), Choices()
    same_class = LARGE._replace(m=65, n=1500)
    for process, product, count in (
        (first, LARGE, 2),
        (first, same_class, 2),
        (Choices(), LARGE, 4),
        (Choices(), LARGE, 4),
    ):
        assert process.route(product) == "onednn" and len(measured) == count
    assert list(json.loads(cache_file().read_text())) == [machine(torch.get_num_threads())]
    monkeypatch.setattr("regard.backends.linear.choices.available_routes", lambda: ("torch", "onednn", "another"))
    assert Choices().route(LARGE) == "onednn" and len(measured) == 6  # a new route is measured too
    assert len(json.loads(cache_file().read_text())) == 2


def test_routes_of_another_process_are_taken_where_none_is_chosen_yet_and_the_machine_is_the_same(
    choices: Choices,
) -> None:
    one, other = (1, 5, 5, 5, "rows", "rows", False), (1, 6, 6, 6, "rows", "columns", True)
    record = json.loads(json.dumps(Choices(known={one: AVAILABLE[-1], other: AVAILABLE[-1]}).as_record()))
    entry.take_routes(record | {"machine": "another"})
    assert not choices.known
    choices.known[one] = "torch"
    entry.take_routes(record)
    assert choices.known == {one: "torch", other: AVAILABLE[-1]}
    assert entry.chosen_routes()["routes"] == [[*one, "torch"], [*other, AVAILABLE[-1]]]


def test_a_doubtful_measurement_is_torch_s_and_is_not_kept(monkeypatch: pytest.MonkeyPatch, choices: Choices) -> None:
    measured = measured_as(monkeypatch, 0.5, 1.5, 0.5)
    assert choices.route(LARGE) == "torch" and not cache_file().exists()
    assert choices.route(LARGE) == "torch" and len(measured) == 2  # until the process ends
    assert Choices().route(LARGE) == "onednn"


def test_processes_that_disagree_take_torch_s_until_two_in_a_row_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, 0.5, 0.5, 1.5, 1.5, 0.5)
    assert [Choices().route(LARGE) for _ in range(4)] == ["onednn", "torch", "onednn", "onednn"]


LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "rows": lambda rows, columns: torch.ones(rows, columns),
    "rows with gaps": lambda rows, columns: torch.ones(rows, 3 * columns)[:, :columns],
    "columns": lambda rows, columns: torch.ones(columns, rows).t(),
    "columns with gaps": lambda rows, columns: torch.ones(columns, 2 * rows)[:, :rows].t(),
    "scattered": lambda rows, columns: torch.ones(rows, 2 * columns)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_operands_of_one_class_lie_alike_and_are_measured_as_they_lie(layout: str) -> None:
    for m, n, k in ((64, 512, 512), (4096, 2048, 512)):
        x, weight = LAYOUTS[layout](m, k), LAYOUTS[layout](n, k)
        product = Product(m, n, k, x.stride(), weight.stride(), False)
        assert product.x_layout == product.weight_layout == layout
        assert product.size_class() != Product.plain(m, n, k).size_class() or layout == "rows"
        small = product.measured()
        assert small.work <= PROBED_WORK and (small.x_layout, small.weight_layout) == (layout, layout)
        shapes = [((small.m, k), small.x_strides), ((small.n, k), small.weight_strides)]
        assert [(t.shape, t.stride()) for t in small.operands()] == shapes


@needs_onednn
def test_onednn_is_given_no_weight_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN has no kernel for such weights, only a loop."""
    given = []
    original = torch.ops.mkldnn._linear_pointwise.default

    class Listening:
        @staticmethod
        def default(x: Tensor, weight: Tensor, *rest: object) -> Tensor:
            given.append(weight)
            return original(x, weight, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", Listening)
    x, weight = torch.randn(5, 32, requires_grad=True), torch.randn(24, 64, requires_grad=True)
    with use_route("onednn"):
        linear(x, weight[:, :32]).square().sum().backward()
    assert len(given) == 3  # the product and its two gradients
    assert all(w.is_contiguous() or w.t().is_contiguous() for w in given)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1}', '{"a": {"b": 3}}', "\x00"])
def test_a_spoiled_cache_is_replaced(monkeypatch: pytest.MonkeyPatch, choices: Choices, text: str) -> None:
    monkeypatch.setattr("regard.backends.linear.choices.choice", lambda product: ("torch", True))
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(text)
    assert choices.route(LARGE) in AVAILABLE
    assert str(LARGE) in json.loads(cache_file().read_text())[machine(torch.get_num_threads())]


def test_a_route_that_is_gone_is_not_recalled(choices: Choices) -> None:
    stored = {machine(torch.get_num_threads()): {str(LARGE): ["gone", "gone"]}}
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(json.dumps(stored))
    assert choices.route(LARGE) in AVAILABLE


def test_without_a_folder_to_write_in_the_choice_lasts_as_long_as_the_process(
    monkeypatch: pytest.MonkeyPatch, choices: Choices, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choices.route(LARGE) == choices.route(LARGE)


def test_a_choice_that_cannot_be_stored_leaves_no_file(monkeypatch: pytest.MonkeyPatch, choices: Choices) -> None:
    monkeypatch.setattr("regard.backends.linear.choices.choice", lambda product: ("torch", True))
    cache_file().mkdir(parents=True)  # a folder, which no file can replace
    assert choices.route(LARGE) in AVAILABLE
    assert list(cache_file().parent.iterdir()) == [cache_file()]


def test_threads_that_ask_at_once_get_one_answer(monkeypatch: pytest.MonkeyPatch, choices: Choices) -> None:
    asked: list[Product] = []
    monkeypatch.setattr(
        "regard.backends.linear.choices.choice", lambda product: (asked.append(product), ("torch", True))[1]
    )
    workers = [threading.Thread(target=choices.route, args=(LARGE,)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # a thread has its own torch thread count until it has computed something
    assert len(asked) == len(choices.known)


def test_products_that_go_to_torch_are_remembered_until_a_route_is_forced(monkeypatch, choices) -> None:
    asked: list[Product] = []
    find = choices.find
    monkeypatch.setattr(choices, "find", lambda x, weight: (asked.append(x.shape), find(x, weight))[1])
    monkeypatch.setattr(measuring, "probe", lambda product: {"torch": 0.5, AVAILABLE[-1]: 1.0})
    x, weight, bias = sample(64, 512, 1024)
    expected = F.linear(x.double(), weight.double(), bias.double())
    for given in (x, x, x.mT.contiguous().mT):  # another layout is another product
        near(linear(given, weight, bias), expected)
    assert len(asked) == 2
    with use_route(FORCED[-1]):
        near(linear(x, weight, bias), expected)
    assert len(asked) > 2, "not asked which route is forced"
    linear(x, weight, bias)
    asked.clear()
    with FrozenWeights():  # packed weights have their own route
        linear(x, torch.nn.Parameter(weight), bias)
    torch.set_num_threads(torch.get_num_threads() + 1)
    linear(x, weight, bias)
    assert len(asked) == 2
    monkeypatch.setattr("regard.backends.linear.MOST_REMEMBERED", 3)
    for rows in range(64, 74):
        near(linear(x[:1].expand(rows, -1).contiguous(), weight, bias), expected[:1].expand(rows, -1))
    assert len(choices.torchs) <= 3
    assert linear(x.to_sparse(), weight).shape == expected.shape  # sparse: no strides


def test_measuring_leaves_no_trace(choices: Choices) -> None:
    generator = torch.get_rng_state()
    x, weight = torch.randn(64, 512), torch.randn(1024, 512, requires_grad=True)
    torch.set_rng_state(generator)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == LARGE.work
    assert torch.equal(torch.get_rng_state(), generator)
    assert choices.known
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert set(measuring.probe(LARGE)) == {"torch", *AVAILABLE} - {"onednn_packed", "native"}


@pytest.mark.skipif("native" not in AVAILABLE, reason="no native library")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 300, 501), (5, 517, 260), (2, 8, 256, 512)])
def test_few_rows_go_to_the_kernel_where_it_is_faster_and_nobody_watches(shape, bias, monkeypatch, choices):
    x, weight, b = sample(*shape)
    b, ran = b if bias else None, []
    kernel = entry.few_rows
    monkeypatch.setattr(entry, "few_rows", lambda *given: (ran.append(1), kernel(*given))[1])
    monkeypatch.setattr(measuring, "probe", lambda product: {"torch": 1.0, "native": 0.5})
    expected = F.linear(*(t if t is None else t.double() for t in (x, weight, b)))
    near(linear(x, weight, b), expected)
    assert len(ran) == 1 and set(choices.known.values()) == {"native"}
    near(linear(x.flip(-1).flip(-1).mT.contiguous().mT, weight, b), expected)  # strided: no fast path
    weight.requires_grad_()
    linear(x, weight, b).sum().backward()
    near(weight.grad, x.flatten(0, -2).sum(0).double().expand_as(weight), 1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, b).dtype == torch.bfloat16
    monkeypatch.setattr(measuring, "probe", lambda product: {"torch": 0.5, "native": 1.0})
    monkeypatch.setattr(entry, "CHOICES", Choices())
    before = len(ran)
    with torch.no_grad():
        linear(x, weight, b)
        linear(torch.randn(17, x.shape[-1]), weight, b)
    assert len(ran) == before


def test_weights_of_products_of_few_rows_are_measured_out_of_the_cache(monkeypatch):
    read = []
    monkeypatch.setitem(
        ROUTES,
        "torch",
        Route(lambda x, weight, bias: (read.append(weight.data_ptr()), F.linear(x, weight, bias))[1]),
    )
    measuring.probe(Product.plain(1, 1024, 1024))
    assert 4 * 1024 * 1024 * len({*read}) >= min(len(read) * 4 * 1024 * 1024, measuring.COLD_BYTES) / 2
    read.clear()
    measuring.probe(LARGE)
    assert len({*read}) == 1


def test_small_products_and_slower_routes_are_torch_s(choices: Choices) -> None:
    assert choices.route(Product.plain(8, 64, 64)) == "torch"
    assert not choices.known
    assert measuring.fastest({"torch": 1.0, "onednn": 0.99}) == "torch"
    assert measuring.fastest({"torch": 1.0, "onednn": 0.9, "another": 0.8}) == "another"
    assert measuring.fastest({"torch": 50e-6, "onednn": 25e-6}) == "torch"  # mostly call overhead


def test_unknown_routes_are_refused(choices: Choices) -> None:
    with pytest.raises(Unsupported, match="onednn"), use_route("onednm"):
        pass
    with use_route("auto"):
        assert choices.forced is None


# Packed weights.


@needs_onednn
def test_packed_weights_follow_changes() -> None:
    weight, x, packs = torch.nn.Parameter(torch.randn(48, 32)), torch.randn(8, 32), FrozenWeights()
    with use_route("onednn_packed"), torch.no_grad():
        for change in (lambda: None, lambda: weight.add_(1), lambda: setattr(weight, "data", torch.randn(48, 32))):
            change()
            with packs:
                for part in (weight, weight[:20]):  # as in a tied head
                    near(linear(x, part), F.linear(x.double(), part.double()))
        assert any(kept is weight for _, kept, _ in packs._packs.values())
        count = len(packs._packs)
        assert count == 4  # two weights (assigning `data` made another), and a part of each
        with packs:
            linear(x, weight * 2)  # a new tensor, not kept
            linear(x, weight)
        linear(x, weight[:7])  # outside the block nothing is packed
        assert len(packs._packs) == count


@needs_onednn
def test_packed_weights_have_gradients_and_end_with_their_block() -> None:
    weight, x = torch.nn.Parameter(torch.randn(48, 32)), torch.randn(8, 32, requires_grad=True)
    with use_route("onednn_packed"), FrozenWeights() as outer:
        with FrozenWeights() as inner:
            linear(x, weight).square().sum().backward()
        assert inner._packs and not outer._packs
        assert LOCAL.frozen is outer
    assert LOCAL.frozen is None
    near(x.grad, 2 * F.linear(x.double(), weight.double()) @ weight.double())
