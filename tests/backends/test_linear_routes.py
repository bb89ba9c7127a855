"""Every route of the linear product, its operator, and how a route is chosen."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from regard.backends import linear as routes
from regard.backends.linear import CHOICES, ROUTES, Choices, FrozenWeights, Product, linear, use_route
from regard.contract import Unsupported

AVAILABLE = [name for name, route in ROUTES.items() if route.available()]
FORCED = [name for name in AVAILABLE if name != "onednn_packed"]
LARGE = Product.plain(64, 1024, 512)


@pytest.fixture(autouse=True)
def _own_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is measured for, or read from, the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(routes, "CHOICES", Choices())
    monkeypatch.setitem(globals(), "CHOICES", routes.CHOICES)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def sample(*shape: int, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    *rows, k, n = shape
    return torch.randn(*rows, k), torch.randn(n, k) / k**0.5, torch.randn(n) if bias else None


@pytest.mark.parametrize("name", FORCED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 16), (7, 33, 5), (2, 3, 40, 24), (13, 1), (64, 128, 257), (100, 1, 7)])
def test_value_and_gradients_are_those_of_float64(name: str, bias: bool, shape: tuple[int, ...]) -> None:
    shape = shape if len(shape) > 2 else (*shape, 3)
    tensors = [t for t in sample(*shape, bias=bias) if t is not None]
    exact = [t.double().requires_grad_() for t in tensors]
    expected = F.linear(*exact)
    weights = torch.randn(expected.shape)
    expected.mul(weights.double()).sum().backward()
    for t in tensors:
        t.requires_grad_()
    with use_route(name):
        y = linear(*tensors)
        assert y.is_contiguous()
        assert error(y.detach(), expected.detach()) < 2e-6
        y.mul(weights).sum().backward()
    for t, wanted in zip(tensors, exact, strict=True):
        assert t.grad is not None and wanted.grad is not None
        assert error(t.grad, wanted.grad) < 2e-6


@pytest.mark.parametrize("name", FORCED)
@pytest.mark.parametrize("rows", [(0,), (2, 0), ()])
def test_no_rows_and_a_single_vector(name: str, rows: tuple[int, ...]) -> None:
    x, weight, bias = torch.randn(*rows, 6), torch.randn(4, 6, requires_grad=True), torch.randn(4)
    with use_route(name):
        y = linear(x, weight, bias)
        y.sum().backward()
    assert y.shape == (*rows, 4)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    assert weight.grad is not None and weight.grad.isfinite().all()


@pytest.mark.parametrize("name", FORCED)
@pytest.mark.parametrize("sizes", [(0, 4), (6, 0)])
def test_empty_widths(name: str, sizes: tuple[int, int]) -> None:
    k, n = sizes
    x, weight, bias = torch.randn(3, k), torch.randn(n, k), torch.randn(n)
    with use_route(name):
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(torch.ops.regard.linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("name", FORCED)
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
            assert error(linear(x, weight), F.linear(x.double(), weight.double())) < 2e-6


@pytest.mark.parametrize("name", FORCED)
def test_nan_and_infinity_propagate(name: str) -> None:
    x, weight, _ = sample(8, 16, 8)
    x[3, 5], x[4, 2] = torch.nan, torch.inf
    with use_route(name):
        y = linear(x, weight)
    assert y[3].isnan().all() and not y[4].isfinite().any()
    assert y[[0, 1, 2, 5, 6, 7]].isfinite().all()


@pytest.mark.parametrize("name", FORCED)
def test_second_derivatives_are_those_of_float64(name: str) -> None:
    def penalty(x: Tensor, weight: Tensor, bias: Tensor, product: object) -> tuple[Tensor, ...]:
        y = product(x, weight, bias).tanh()  # type: ignore[operator]
        slopes = torch.autograd.grad(y.square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(s.square().sum() for s in slopes), (x, weight, bias))

    tensors = [t.requires_grad_() for t in sample(5, 7, 6) if t is not None]
    expected = penalty(*(t.detach().double().requires_grad_() for t in tensors), F.linear)
    with use_route(name):
        for got, wanted in zip(penalty(*tensors, linear), expected, strict=True):
            assert error(got, wanted) < 5e-6


@pytest.mark.parametrize("name", FORCED)
@pytest.mark.parametrize("bias", [True, False])
def test_operator_passes_opcheck(name: str, bias: bool) -> None:
    x, weight, offset = sample(6, 20, 9, bias=bias)
    given = (x.requires_grad_(), weight.requires_grad_(), None if offset is None else offset.requires_grad_())
    with use_route(name):
        torch.library.opcheck(torch.ops.regard.linear, given)
        torch.library.opcheck(torch.ops.regard.linear, (torch.randn(20, 6).t(), torch.randn(20, 9).t(), None))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, within jvp
@pytest.mark.parametrize("name", FORCED)
def test_transforms_of_functions(name: str) -> None:
    x, weight, bias = sample(5, 4, 8, 6)

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return linear(x, weight, bias).square().sum()

    def plain(weight: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, weight, bias).square().sum()

    with use_route(name):
        got = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
        torch.testing.assert_close(
            got, torch.func.vmap(torch.func.grad(plain), (None, 0))(weight, x), rtol=1e-4, atol=1e-4
        )
        tangent = torch.randn_like(weight)
        got = torch.func.jvp(lambda w: loss(w, x), (weight,), (tangent,))
        torch.testing.assert_close(got, torch.func.jvp(lambda w: plain(w, x), (weight,), (tangent,)))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(weight, tangent), x))
        assert torch.equal(dual.tangent, got[1])
        got = torch.func.vmap(linear, (0, None, 0))(x, weight, torch.stack([bias] * 5))
        torch.testing.assert_close(got, F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_torch_s_own(dtype: torch.dtype) -> None:
    x, weight, bias = (t.to(dtype) for t in sample(9, 32, 16) if t is not None)
    with use_route("onednn" if "onednn" in FORCED else "torch"):
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))


def test_autocast_is_respected() -> None:
    x, weight, bias = sample(9, 32, 16)
    with use_route(FORCED[-1]), torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, bias).dtype == torch.bfloat16


def test_errors_are_torch_s_own() -> None:
    with use_route(FORCED[-1]), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(torch.randn(3, 4), torch.randn(5, 6))
    with use_route(FORCED[-1]), pytest.raises(RuntimeError, match="dtype"):
        linear(torch.randn(3, 4), torch.randn(5, 4).double())


@pytest.mark.parametrize("name", FORCED)
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
        for n in (24, 7, 0):  # other lengths, one of them none
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


def test_operations_are_counted_as_torch_s() -> None:
    x, weight, bias = sample(64, 32, 16)
    weight.requires_grad_()
    counts = []
    for name in FORCED:
        with use_route(name), FlopCounterMode(display=False) as counter:
            linear(x, weight, bias).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 64 * 32 * 16] * len(FORCED)


def measured_as(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> list[Product]:
    """Let each measurement find the next of these times of "onednn", where torch's is 1, and the last of them for ever."""
    calls: list[Product] = []

    def probe(product: Product) -> dict[str, float]:
        calls.append(product)
        return {"torch": 1.0, "onednn": seconds[min(len(calls), len(seconds)) - 1]}

    monkeypatch.setattr(routes, "probe", probe)
    monkeypatch.setattr(routes, "_available", lambda: ("torch", "onednn"))
    return calls


def test_a_route_is_believed_after_two_processes_have_measured_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = measured_as(monkeypatch, 0.5)
    assert CHOICES.route(LARGE) == "onednn" and len(calls) == 2
    assert CHOICES.route(LARGE._replace(m=65, n=1500)) == "onednn" and len(calls) == 2  # the same class
    assert Choices().route(LARGE) == "onednn" and len(calls) == 4  # another process
    assert Choices().route(LARGE) == "onednn" and len(calls) == 4  # a third one
    assert list(json.loads(routes.cache_file().read_text())) == [routes.machine(torch.get_num_threads())]
    monkeypatch.setattr(routes, "_available", lambda: ("torch", "onednn", "another"))
    assert Choices().route(LARGE) == "onednn" and len(calls) == 6  # a new route is given its chance
    assert len(json.loads(routes.cache_file().read_text())) == 2


def test_a_doubtful_measurement_is_torch_s_and_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = measured_as(monkeypatch, 0.5, 1.5, 0.5)
    assert CHOICES.route(LARGE) == "torch" and not routes.cache_file().exists()
    assert CHOICES.route(LARGE) == "torch" and len(calls) == 2  # for as long as the process lives
    assert Choices().route(LARGE) == "onednn"


def test_processes_that_disagree_take_torch_s_until_two_in_a_row_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    measured_as(monkeypatch, 0.5, 0.5, 1.5, 1.5, 0.5)
    assert [Choices().route(LARGE) for _ in range(4)] == ["onednn", "torch", "onednn", "onednn"]


@pytest.mark.parametrize("layout", ["rows", "rows with gaps", "columns", "columns with gaps", "scattered"])
def test_operands_of_one_class_lie_alike_and_are_measured_as_they_lie(layout: str) -> None:
    made = {
        "rows": lambda rows, columns: torch.ones(rows, columns),
        "rows with gaps": lambda rows, columns: torch.ones(rows, 3 * columns)[:, :columns],
        "columns": lambda rows, columns: torch.ones(columns, rows).t(),
        "columns with gaps": lambda rows, columns: torch.ones(columns, 2 * rows)[:, :rows].t(),
        "scattered": lambda rows, columns: torch.ones(rows, 2 * columns)[:, ::2],
    }[layout]
    for m, n, k in ((64, 512, 512), (4096, 2048, 512)):
        x, weight = made(m, k), made(n, k)
        product = Product(m, n, k, x.stride(), weight.stride(), False)
        assert product.x_layout == product.weight_layout == layout
        assert product.size_class() != Product.plain(m, n, k).size_class() or layout == "rows"
        small = product.measured()
        assert small.work <= routes.PROBED_WORK and (small.x_layout, small.weight_layout) == (layout, layout)
        assert [(t.shape, t.stride()) for t in small.operands()] == [
            ((small.m, k), small.x_strides),
            ((small.n, k), small.weight_strides),
        ]


@pytest.mark.skipif("onednn" not in AVAILABLE, reason="this build of torch has no oneDNN")
def test_onednn_is_given_no_weight_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no kernel for those, only a loop."""
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
def test_a_spoiled_cache_is_replaced(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(routes, "choice", lambda product: ("torch", True))
    routes.cache_file().parent.mkdir(parents=True)
    routes.cache_file().write_text(text)
    assert CHOICES.route(LARGE) in AVAILABLE
    assert str(LARGE) in json.loads(routes.cache_file().read_text())[routes.machine(torch.get_num_threads())]


def test_a_route_that_is_gone_is_not_recalled() -> None:
    stored = {routes.machine(torch.get_num_threads()): {str(LARGE): ["gone", "gone"]}}
    routes.cache_file().parent.mkdir(parents=True)
    routes.cache_file().write_text(json.dumps(stored))
    assert CHOICES.route(LARGE) in AVAILABLE


def test_without_a_folder_to_write_in_the_choice_lasts_as_long_as_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert CHOICES.route(LARGE) == CHOICES.route(LARGE)


def test_threads_that_ask_at_once_get_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Product] = []
    monkeypatch.setattr(routes, "choice", lambda product: (calls.append(product), ("torch", True))[1])
    workers = [threading.Thread(target=CHOICES.route, args=(LARGE,)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    # the number of threads of torch is a thread's own until it has computed something
    assert len(calls) == len(CHOICES.known)


def test_measuring_leaves_no_trace() -> None:
    generator = torch.get_rng_state()
    x, weight = torch.randn(64, 512), torch.randn(1024, 512, requires_grad=True)
    torch.set_rng_state(generator)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == LARGE.work
    assert torch.equal(torch.get_rng_state(), generator)
    assert CHOICES.known
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert set(routes.probe(LARGE)) == {"torch", *AVAILABLE} - {"onednn_packed"}


def test_small_products_and_slower_routes_are_torch_s() -> None:
    assert CHOICES.route(Product.plain(8, 64, 64)) == "torch"
    assert not CHOICES.known
    assert routes.fastest({"torch": 1.0, "onednn": 0.99}) == "torch"
    assert routes.fastest({"torch": 1.0, "onednn": 0.9, "another": 0.8}) == "another"
    assert routes.fastest({"torch": 50e-6, "onednn": 25e-6}) == "torch"  # the time of the call


def test_what_is_measured_is_bounded() -> None:
    huge = Product.plain(50_000, 128_000, 8192).measured()
    assert huge.work <= routes.PROBED_WORK < 8 * huge.work
    assert LARGE.measured() == LARGE


def test_unknown_routes_are_refused() -> None:
    with pytest.raises(Unsupported, match="onednn"), use_route("onednm"):
        pass
    with use_route("auto"):
        assert CHOICES.forced is None


@pytest.mark.skipif("onednn_packed" not in AVAILABLE, reason="this build of torch has no oneDNN")
def test_packed_weights_follow_changes() -> None:
    weight = torch.nn.Parameter(torch.randn(48, 32))
    x = torch.randn(8, 32)
    packs = FrozenWeights()
    with use_route("onednn_packed"), torch.no_grad():
        for change in (lambda: None, lambda: weight.add_(1), lambda: setattr(weight, "data", torch.randn(48, 32))):
            change()
            with packs:
                assert error(linear(x, weight), F.linear(x.double(), weight.double())) < 2e-6
                part = weight[:20]  # as the tied head of a model does
                assert error(linear(x, part), F.linear(x.double(), part.double())) < 2e-6
        assert any(kept is weight for _, kept, _ in packs._packs.values())
        count = len(packs._packs)
        assert count == 4  # two weights, for the assignment to `data` gave another, and a part of each
        with packs:
            linear(x, weight * 2)  # computed anew, not kept
            linear(x, weight)
        assert len(packs._packs) == count
        linear(x, weight[:7])
        assert len(packs._packs) == count  # outside the block nothing is packed


@pytest.mark.skipif("onednn_packed" not in AVAILABLE, reason="this build of torch has no oneDNN")
def test_packed_weights_have_gradients_and_end_with_their_block() -> None:
    weight, x = torch.nn.Parameter(torch.randn(48, 32)), torch.randn(8, 32, requires_grad=True)
    with use_route("onednn_packed"), FrozenWeights() as outer:
        with FrozenWeights() as inner:
            linear(x, weight).square().sum().backward()
        assert inner._packs and not outer._packs
        assert routes._LOCAL.frozen is outer
    assert routes._LOCAL.frozen is None
    expected = 2 * F.linear(x.double(), weight.double()) @ weight.double()
    assert x.grad is not None
    assert error(x.grad, expected.detach()) < 2e-6
