"""Gradients of the native attention kernel against the torch engine in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from regard.backends.native import library
from regard.contract import BlockMask, Unsupported
from regard.core.visibility import DistanceBias, Ranks, Visibility
from regard.engines.attention import native_form as native
from regard.engines.attention import torch_form as eager
from regard.engines.grouped_attention import native_form as grouped_attention
from regard.engines.grouped_attention.torch_form import Dropout
from regard.training.memory import TensorMemory

# of the largest gradient of the tensor; in bfloat16 the output was rounded too, of which softmax's gradients are a
# difference; observed 1.6e-6 and 1.1e-2
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
SETS = library.instruction_sets() if library.why_missing() is None else []
CAUSAL = Visibility(causal=True)


@pytest.fixture(autouse=True)
def _poisoned():
    """Workspaces and new tensors are full of NaN."""
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    with library.poisoned_workspaces():
        yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@dataclass
class Problem:
    """Inputs of one call, and the options given to the engine."""

    q: Tensor
    k: Tensor
    v: Tensor
    ranks: Ranks
    scale: float
    visibility: Visibility = field(default_factory=Visibility)
    rule: str = "softmax"
    shift: float = 0.0
    softcap: float | None = None
    sink: Tensor | None = None
    bias: Tensor | None = None
    distance: Tensor | None = None
    blocks: BlockMask | None = None
    stretch: tuple[float, float] | None = None

    def run(self, engine: Any, dtype: torch.dtype, grad_out: Tensor, grad_lse: Tensor | None) -> dict[str, Tensor]:
        """Gradients by name."""
        side = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {"q": self.q.to(dtype), "k": self.k.to(dtype), "v": self.v.to(dtype)}
        tensors |= {n: x.to(side) for n in ("sink", "bias", "distance") if (x := getattr(self, n)) is not None}
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        position_bias = None
        if self.distance is not None:
            middle = self.distance.shape[1] // 2
            position_bias = DistanceBias(lambda distances: leaves["distance"][:, distances + middle])
        out, _, lse = engine.run(
            leaves["q"], leaves["k"], leaves["v"], self.ranks, self.visibility, self.scale, self.rule, self.shift,
            self.softcap, leaves.get("sink"), leaves.get("bias"), position_bias, self.blocks, 0.0, None, False,
            grad_lse is not None, self.stretch,
        )  # fmt: skip
        total = (out * grad_out.to(dtype)).sum()
        if grad_lse is not None:
            total = total + (torch.where(lse > -math.inf, lse, 0) * grad_lse.to(side)).sum()
        if not total.requires_grad:  # no queries or no keys
            return {name: torch.zeros_like(x) for name, x in leaves.items()}
        found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(leaves.items(), found, strict=True)}


def problem(
    n: int,
    m: int | None = None,
    *,
    batch: int = 1,
    heads: int = 2,
    kv_heads: int | None = None,
    width: int = 16,
    value_width: int | None = None,
    lengths: list[int] | None = None,
    sink: bool = False,
    bias: bool | Tensor = False,
    distance: bool = False,
    tokens_first: bool = False,
    **options: Any,
) -> Problem:
    m = n if m is None else m

    def heads_of(count: int, tokens: int, features: int) -> Tensor:
        if tokens_first:
            return torch.randn(batch, tokens, count, features, dtype=torch.float64).transpose(1, 2)
        return torch.randn(batch, count, tokens, features, dtype=torch.float64)

    kv_heads = kv_heads or heads
    options.setdefault("scale", 1.5 * width**-0.5)
    queries, keys = torch.arange(n)[None] + (m - n), torch.arange(m)[None]
    ranks = Ranks(queries, keys, m - n, m - n, True)
    if lengths is not None:
        valid = torch.tensor(lengths)[:, None]
        ranks = Ranks(torch.arange(n) + valid - n, torch.where(keys < valid, keys, -1), None, None, False)
    if isinstance(bias, Tensor):
        options["bias"] = bias
    elif bias:
        options["bias"] = torch.randn(batch, heads, n, m, dtype=torch.float64)
        options["bias"][torch.rand(batch, heads, n, m) < 0.2] = -math.inf
    if sink:
        options["sink"] = torch.randn(heads, dtype=torch.float64)
    if distance:
        options["distance"] = torch.randn(heads, 2 * (n + m) + 1, dtype=torch.float64)
    return Problem(
        heads_of(heads, n, width), heads_of(kv_heads, m, width), heads_of(kv_heads, m, value_width or width), ranks, **options
    )  # fmt: skip


def near_a_bound(given: Problem) -> bool:
    """Whether rounding might decide which weights are clipped."""
    if given.stretch is None or given.q.numel() * given.k.numel() == 0:
        return False
    (low, high), position_bias = given.stretch, None
    if given.distance is not None:
        middle = given.distance.shape[1] // 2
        position_bias = DistanceBias(lambda distances: given.distance[:, distances + middle])
    _, weights, _ = eager.run(
        given.q, given.k, given.v, given.ranks, given.visibility, given.scale, given.rule, given.shift, given.softcap,
        given.sink, given.bias, position_bias, given.blocks, 0.0, None, True, False,
    )  # fmt: skip
    stretched = (high - low) * weights + low
    # weights of 0 have no gradient on either side, nor have the only ones of their queries
    return bool(low < 0 and (stretched.abs() < 1e-6).any()) or bool(high > 1 and ((stretched - 1).abs() < 1e-6).any())


def check(given: Problem, dtype: torch.dtype = torch.float32, with_lse: bool = False) -> None:
    """Native gradients equal those in float64 of the same, rounded, inputs."""
    rounded = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    for name in ("q", "k", "v"):
        setattr(given, name, getattr(given, name).to(rounded).double())
    for name in ("sink", "bias", "distance"):
        if getattr(given, name) is not None:
            setattr(given, name, getattr(given, name).float().double())
    shape = (*given.q.shape[:3], given.v.shape[-1])
    grad_out = torch.randn(shape, dtype=torch.float64).to(rounded).double()
    grad_lse = torch.randn(shape[:3]).double() if with_lse else None
    while near_a_bound(given):
        given.q = torch.randn_like(given.q).to(rounded).double()
    wanted = given.run(eager, torch.float64, grad_out, grad_lse)
    found = given.run(native, dtype, grad_out, grad_lse)
    # clipping leaves little of numbers that rounded when there was more of them
    whole = replace(given, stretch=None).run(eager, torch.float64, grad_out, grad_lse) if given.stretch else wanted
    stretched = 1.0 if given.stretch is None else given.stretch[1] - given.stretch[0]
    for name, gradient in wanted.items():
        assert found[name].shape == gradient.shape
        if gradient.numel() == 0:
            continue
        error = (found[name].double() - gradient).abs().max().item()
        # where a gradient vanishes (one key) what it is made of does not
        size = max(gradient.abs().max().item(), stretched * whole[name].abs().max().item(), stretched)
        # a distance's gradient is a sum over the whole diagonal
        limit = TOLERANCE[dtype] * (3 if name == "distance" else 1)
        assert error <= limit * size, (name, error / size)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("instruction_set", SETS)
def test_gradients_equal_float64_at_any_length(instruction_set: str, causal: bool) -> None:
    with library.using_instruction_set(instruction_set):
        for n, m in [(0, 3), (3, 0), (1, 1), (2, 2), (63, 63), (64, 64), (65, 65), (127, 131), (50, 170), (170, 50)]:
            for dtype in TOLERANCE:
                check(problem(n, m, visibility=Visibility(causal=causal)), dtype)


@pytest.mark.parametrize("instruction_set", SETS)
def test_gradients_equal_float64_at_any_width(instruction_set: str) -> None:
    with library.using_instruction_set(instruction_set):
        for width, value_width in [
            (1, 1),
            (3, 17),
            (8, 8),
            (64, 64),
            (80, 96),
            (97, 5),
            (128, 100),
            (5, 256),
            (256, 64),
        ]:
            for dtype in TOLERANCE:
                check(problem(70, width=width, value_width=value_width, visibility=CAUSAL), dtype)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_gradients_equal_float64_with_grouped_heads_and_any_number_of_threads(kv_heads: int, threads: int) -> None:
    torch.set_num_threads(threads)
    check(problem(150, 201, heads=6, kv_heads=kv_heads, sink=True, distance=True, visibility=CAUSAL), with_lse=True)
    check(problem(200, heads=1, tokens_first=True, visibility=CAUSAL))


MASKS = {
    "window": Visibility(causal=True, left=40),
    "both sides": Visibility(left=20, right=9),
    "itself and the next": Visibility(left=0, right=1),
    "blocks": Visibility(block=24, lookback=1, lookahead=1),
    "causal blocks": Visibility(causal=True, block=70, lookback=1),
}


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_equal_float64_under_masks(mask: str, instruction_set: str) -> None:
    with library.using_instruction_set(instruction_set):
        check(problem(200, batch=2, visibility=MASKS[mask], distance=True))
        check(problem(90, 160, batch=3, visibility=MASKS[mask], lengths=[160, 95, 0]))


@pytest.mark.parametrize("block_size", [16, 30, 64])
@pytest.mark.parametrize("shared", [True, False])
def test_gradients_equal_float64_under_block_masks(block_size: int, shared: bool) -> None:
    blocks = math.ceil(180 / block_size)
    visible = torch.rand(*((1, 1) if shared else (2, 2)), blocks, blocks) < 0.4
    check(problem(180, batch=2, blocks=BlockMask(visible, block_size)))
    check(problem(180, batch=2, blocks=BlockMask(visible[..., :-1], block_size)))  # the last keys lie beyond the mask
    check(problem(180, batch=2, blocks=BlockMask(visible, block_size), visibility=CAUSAL, lengths=[180, 77]))


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_equal_float64_with_biases_sink_and_softcap(softcap: float | None, instruction_set: str) -> None:
    with library.using_instruction_set(instruction_set):
        for dtype in TOLERANCE:
            for options in (
                {"bias": True},
                {"distance": True},
                {"sink": True},
                {"bias": True, "distance": True, "sink": True},
            ):
                check(problem(100, 130, batch=2, softcap=softcap, visibility=CAUSAL, **options), dtype, with_lse=True)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("rule", native.RULES[1:])
def test_gradients_equal_float64_for_other_rules(rule: str, instruction_set: str) -> None:
    with library.using_instruction_set(instruction_set):
        for dtype in TOLERANCE:
            check(problem(100, rule=rule, shift=-0.5, visibility=CAUSAL), dtype)
            check(problem(70, 130, batch=2, rule=rule, shift=0.3, softcap=1.5, bias=True, distance=True), dtype)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("stretch", [(-0.1, 1.0), (-0.03, 1.2), (0.0, 1.5), (-0.01, 6.0)])
def test_gradients_equal_float64_through_clipped_weights(stretch: tuple[float, float], instruction_set: str) -> None:
    with library.using_instruction_set(instruction_set):
        for dtype in TOLERANCE:
            for n, m in [(1, 1), (2, 2), (65, 65), (127, 131), (50, 170), (170, 50)]:
                check(problem(n, m, visibility=CAUSAL, stretch=stretch), dtype)
            check(problem(70, 90, heads=6, kv_heads=2, width=17, value_width=70, stretch=stretch), dtype)
            check(
                problem(100, 130, batch=2, softcap=2.0, bias=True, distance=True, visibility=CAUSAL, stretch=stretch),
                dtype,
                with_lse=True,
            )
            check(problem(90, 160, batch=3, visibility=MASKS["window"], lengths=[160, 95, 0], stretch=stretch), dtype)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gradients_equal_float64_through_clipped_weights_with_any_number_of_threads(
    kv_heads: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    check(problem(150, 201, kv_heads=kv_heads, stretch=(-0.01, 3.0), visibility=CAUSAL), with_lse=True)


def test_gradients_at_a_bound_of_the_clip_are_those_of_one_side() -> None:
    # weights of 1 / 4: within the bounds, beyond the lower one and beyond the upper one, and at them, where rounding
    # chooses the side for all of a query's weights
    given = problem(1, 4, heads=1)
    given.k[:] = given.k[:, :, :1]
    grad_out = torch.randn(1, 1, 1, 16).double()

    def gradient(engine: Any, dtype: torch.dtype, *stretch: float) -> Tensor:
        return replace(given, stretch=stretch).run(engine, dtype, grad_out, None)["k"].double()

    for at, inside, outside in (((-1.0, 3.0), (-0.99, 3.0), (-1.01, 3.0)), ((0.0, 4.0), (0.0, 3.99), (0.0, 4.01))):
        sides = [gradient(eager, torch.float64, *stretch) for stretch in (inside, outside)]
        assert sides[0].abs().max() > 0.1 and (sides[1] == 0).all()
        for side, stretch in zip(sides, (inside, outside), strict=True):
            torch.testing.assert_close(gradient(native, torch.float32, *stretch), side, atol=1e-5, rtol=1e-5)
        found = gradient(native, torch.float32, *at)
        assert min((found - side).abs().max() / sides[0].abs().max() for side in sides) < 0.01


@pytest.mark.parametrize("instruction_set", SETS)
def test_a_weight_of_almost_one_has_almost_no_gradient(instruction_set: str) -> None:
    # rounding decides whether its stretched weight exceeds 1, and must decide it the same way throughout
    n = 64
    given = problem(n, width=n, heads=1, scale=1.0, stretch=(-0.1, 1.0))
    given.k[:] = torch.eye(n).double()
    given.q[:] = torch.eye(n).double() * torch.linspace(15, 25, n).double()[:, None]
    grad_out = torch.randn(1, 1, n, n, dtype=torch.float64)
    wanted = given.run(eager, torch.float64, grad_out, None)
    with library.using_instruction_set(instruction_set):
        found = given.run(native, torch.float32, grad_out, None)
    # a weight has an error of 1e-6 here, half of a last place of its score
    made_of = 25 * 1.1 * (grad_out @ given.v.mT).abs().max()
    for name in "qk":
        assert (found[name] - wanted[name]).abs().max() <= 3e-6 * made_of, name


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 1, 1), (2, 1, 100, 1), (2, 3, 1, 130), (1, 3, 100, 130)])
def test_a_bias_that_broadcasts_has_the_sum_of_its_pairs_gradients(
    shape: tuple[int, ...], instruction_set: str
) -> None:
    with library.using_instruction_set(instruction_set):
        for rule in ("softmax", "sigmoid"):
            bias, grad_out, grad_lse = torch.randn(shape), torch.randn(2, 3, 100, 16), torch.randn(2, 3, 100)
            for lengths in (None, [130, 31]):
                given = problem(
                    100, 130, batch=2, heads=3, kv_heads=1, rule=rule, bias=bias, visibility=CAUSAL, lengths=lengths
                )
                wanted = replace(given, bias=bias.expand(2, 3, 100, 130))
                grads = (grad_out, grad_lse if rule == "softmax" else None)
                by_pair = wanted.run(eager, torch.float64, *grads)["bias"]
                found = given.run(native, torch.float32, *grads)["bias"]
                assert found.shape == shape
                # softmax's gradients sum to almost nothing over keys: the error is measured by what is summed
                size = by_pair.abs().sum_to_size(shape).max()
                error = (found.double() - by_pair.sum_to_size(shape)).abs().max()
                assert error <= TOLERANCE[torch.float32] * size


def test_a_bias_a_head_needs_no_gradient_a_pair() -> None:
    n = 600
    given = problem(n, rule="sigmoid", bias=torch.randn(1, 2, 1, 1), visibility=CAUSAL)
    with TensorMemory() as memory:
        given.run(native, torch.float32, torch.randn(1, 2, n, 16), None)
    assert memory.peak < 4 * n * n


def test_gradients_equal_float64_for_a_long_sequence() -> None:
    check(problem(10_000, heads=1, width=8, visibility=Visibility(causal=True, left=100)))


def test_shared_keys_and_expanded_gradients_need_no_copies() -> None:
    given = problem(70, heads=3, kv_heads=1, visibility=CAUSAL)
    given.k = given.k.expand(1, 3, -1, -1)
    given.v = given.v.expand(1, 3, -1, -1)
    check(given)
    q = torch.randn(1, 2, 40, 8, requires_grad=True)
    ranks = Ranks(torch.arange(40)[None], torch.arange(40)[None], 0, 0, True)
    out = native.run(
        q, q, q, ranks, CAUSAL, 1.0, "softmax", 0.0, None, None, None, None, None, 0.0, None, False, False
    )[0]
    (by_sum,) = torch.autograd.grad(out.sum(), q, retain_graph=True)  # a gradient of strides 0
    (by_ones,) = torch.autograd.grad(out, q, torch.ones_like(out))
    torch.testing.assert_close(by_sum, by_ones)


def test_queries_that_see_nothing_have_no_gradient() -> None:
    given = problem(90, 40, visibility=CAUSAL, sink=True)
    grad_out = torch.randn(1, 2, 90, 16)
    found = given.run(native, torch.float32, grad_out, None)
    assert (found["q"][:, :, :50] == 0).all()
    assert all(torch.isfinite(x).all() for x in found.values())
    clipped = problem(90, 40, visibility=CAUSAL, stretch=(-0.01, 1.5)).run(native, torch.float32, grad_out, None)
    assert (clipped["q"][:, :, :50] == 0).all()
    assert all(torch.isfinite(x).all() for x in clipped.values())
    for stretch in (None, (-0.01, 1.5)):
        nothing = problem(20, 30, visibility=Visibility(left=0), lengths=[0], batch=1, stretch=stretch)
        for gradient in nothing.run(native, torch.float32, grad_out[:, :, :20], None).values():
            assert (gradient == 0).all()


@pytest.mark.parametrize("instruction_set", SETS)
def test_gradients_are_right_for_scores_of_ten_thousand(instruction_set: str) -> None:
    # scores are exact in float32: 0 or +-1e4, and the log-sum-exp of a single largest one too
    n = 80
    sign = torch.where(torch.rand(n) < 0.5, 1.0, -1.0).double()
    given = problem(n, width=128, scale=1.0, visibility=CAUSAL)
    given.q = (torch.eye(n, 128).double() * 100 * sign[:, None]).expand(1, 2, -1, -1)
    given.k = (torch.eye(n, 128).double() * 100).expand(1, 2, -1, -1)
    grad_out = torch.randn(1, 2, n, 128, dtype=torch.float64)
    wanted = given.run(eager, torch.float64, grad_out, None)
    with library.using_instruction_set(instruction_set):
        found = given.run(native, torch.float32, grad_out, None)
    for name, gradient in wanted.items():
        size = gradient.abs().max()
        assert (found[name] - gradient).abs().max() <= 3e-6 * size, name


def test_sinks_of_any_size_leave_finite_gradients() -> None:
    for value in (-math.inf, -1e4, 1e4, math.inf):
        given = problem(70, visibility=CAUSAL, sink=True)
        given.sink = torch.full((2,), value, dtype=torch.float64)
        grads = [torch.randn(1, 2, 70, 16), torch.randn(1, 2, 70)]
        found = given.run(native, torch.float32, *grads)
        assert all(torch.isfinite(x).all() for x in found.values()), value
        given.sink = given.sink.clamp(-1e30, 1e30)
        wanted = given.run(eager, torch.float64, *grads)
        torch.testing.assert_close(found["k"].double(), wanted["k"], atol=1e-5, rtol=1e-5)


def test_nan_reaches_what_depends_on_it_and_nothing_else() -> None:
    given = problem(140, heads=1, visibility=CAUSAL)
    given.q[0, 0, 70, 3] = math.nan
    found = given.run(native, torch.float32, torch.randn(1, 1, 140, 16), None)
    assert found["q"][0, 0, 70].isnan().all() and found["k"][0, 0, :71].isnan().all()
    assert found["v"][0, 0, :71].isnan().all()
    assert not found["q"][0, 0, :70].isnan().any() and not found["q"][0, 0, 71:].isnan().any()
    assert not found["k"][0, 0, 128:].isnan().any()
    given = problem(140, heads=1, visibility=CAUSAL)
    given.v[0, 0, 100] = 3e38  # its product with a gradient overflows, also for queries that do not see it
    found = given.run(native, torch.float32, torch.randn(1, 1, 140, 16), None)
    assert found["q"][0, 0, :100].isfinite().all() and not found["q"][0, 0, 100:].isfinite().any()
    given = problem(9, visibility=CAUSAL, sink=True)
    given.sink = torch.tensor([math.nan, 0.0])
    found = given.run(native, torch.float32, torch.randn(1, 2, 9, 16), None)
    for name, gradient in found.items():
        assert gradient.movedim(-1 if name == "sink" else 1, 0)[0].isnan().all()
        assert not gradient.movedim(-1 if name == "sink" else 1, 0)[1].isnan().any()


def test_the_same_gradients_every_time() -> None:
    torch.set_num_threads(3)
    for options in ({"sink": True}, {"stretch": (-0.01, 1.5)}):
        given = problem(300, heads=2, visibility=CAUSAL, distance=True, **options)
        grad_out = torch.randn(1, 2, 300, 16)
        first = given.run(native, torch.float32, grad_out, None)
        for _ in range(5):
            again = given.run(native, torch.float32, grad_out, None)
            assert all(torch.equal(first[name], again[name]) for name in first)


def test_gradients_of_gradients_are_refused() -> None:
    q = torch.randn(1, 1, 5, 4, requires_grad=True)
    ranks = Ranks(torch.arange(5)[None], torch.arange(5)[None], 0, 0, True)
    out = native.run(
        q, q, q, ranks, CAUSAL, 1.0, "softmax", 0.0, None, None, None, None, None, 0.0, None, False, False
    )[0]
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(Unsupported, match="gradients of gradients"):
        gradient.sum().backward()


class Recorded(TorchDispatchMode):
    """Keeps the arguments of the backward op."""

    def __torch_dispatch__(self, op: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if op is torch.ops.regard.attention_backward.default:
            self.arguments = arguments
        return op(*arguments, **(options or {}))


@pytest.mark.parametrize("options", [{"sink": True}, {"stretch": (-0.05, 1.5)}])
def test_the_backward_op_passes_opcheck(options: dict[str, Any]) -> None:
    given = problem(9, batch=2, bias=True, distance=True, lengths=[9, 5], visibility=CAUSAL, **options)
    with Recorded() as recorded:
        given.run(native, torch.float32, torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9))
    detached = [x.detach() if isinstance(x, Tensor) else x for x in recorded.arguments]
    torch.library.opcheck(torch.ops.regard.attention_backward.default, detached)


@pytest.mark.parametrize("instruction_set", SETS)
@pytest.mark.parametrize("engine", ["attention", "clipped", "biased", "grouped"])
@pytest.mark.parametrize("size", [3e3, 1e4, 1e5])
def test_weights_of_scores_of_any_size_are_no_more_than_one(engine: str, size: float, instruction_set: str) -> None:
    """The gradient of a value is a sum of weights times gradients of outputs, however the scores were rounded."""
    q, k, v = (torch.randn(1, 2, 70, 16) * scale for scale in (size, size, 1.0))
    for x in (q, k, v):
        x.requires_grad_()
    at = torch.arange(70)[None]
    where = Ranks(at, at, None, None, False)
    with library.using_instruction_set(instruction_set):
        if engine == "grouped":
            landmark, own = at % 9 == 8, (at // 9).contiguous()
            out = grouped_attention.run(
                q, k, v, where, landmark, own, True, 1.0, None, None, None, Dropout(0.0, 0.0, None), False
            )[0]
        else:
            bias = torch.randn(1, 2, 70, 70) if engine == "biased" else None
            stretch = (-0.1, 1.1) if engine == "clipped" else None
            out = native.run(
                q,
                k,
                v,
                where,
                CAUSAL,
                1.0,
                "softmax",
                0.0,
                None,
                None,
                bias,
                None,
                None,
                0.0,
                None,
                False,
                True,
                stretch,
            )[0]
        grad_q, grad_k, grad_v = torch.autograd.grad(out.sum(), (q, k, v))
    assert grad_v.abs().max() <= 70 * (1 + 1e-5)
    assert torch.isfinite(grad_q).all() and torch.isfinite(grad_k).all()
