"""Native attention to chosen pixels against the torch form in float64, and the cases that it leaves to torch."""

from __future__ import annotations

import pytest
import torch

from regard.apply import apply
from regard.contract import Mask, Unsupported
from regard.core.visibility import Ranks
from regard.engines.pixel_attention import Mix, Problem, native_form, torch_form
from regard.mechanisms.sea import MECHANISM, Config
from regard.training import peak_memory

from .kernels import PIXELS, heads_of, last_of, pixels_of

SIZES = [
    {"n": 0, "m": 3},
    {"n": 1, "m": 1, "heads": 1, "groups": 1},
    {"n": 67, "m": 67, "width": 17, "values": 33, "pixels": 40},
    {"n": 9, "m": 300, "heads": 6, "groups": 3, "width": 64, "values": 64, "pixels": 16},
    {"n": 40, "m": 23, "values": 140, "pixels": 5},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("running", [True, False])
def test_outputs_and_gradients_equal_float64(instruction_set, dtype, sizes, running):
    x = pixels_of(**sizes, running=running and sizes["m"] > 5, jitter=not running, dtype=dtype)
    options = {"ranks": last_of(sizes["n"], sizes["m"], True)}
    with torch.no_grad():
        together = PIXELS.run(x, **options)["o"]
        exact = {name: y.double() if y.is_floating_point() else y for name, y in x.items()}
        PIXELS.close(together, PIXELS.call(torch_form, **exact, **options)["o"])
    assert together.dtype == dtype
    PIXELS.check(x, **options)


@pytest.mark.parametrize(
    "names", [(), ("row_logit",), ("mix_logit", "first"), ("mix_logit", "first", "before")], ids=str
)
def test_each_gate_may_be_left_out(names):
    x = pixels_of(40, heads=4, groups=2, pixels=9, running="before" in names)
    optional = {"row_logit", "mix_logit", "first", "before"}
    PIXELS.check({n: y for n, y in x.items() if n in names or n not in optional}, ranks=last_of(40, 40, True))


@pytest.mark.parametrize(
    "options",
    [{"grouping": "query"}, {"grouping": "head"}, {"grouping": "batch"}, {"oversample": 2.5, "top_k": 2}],
    ids=str,
)
def test_each_option_has_the_gradients_of_float64(options):
    PIXELS.check(pixels_of(50, jitter=True), ranks=last_of(50, 50, True), **options)


@pytest.mark.parametrize("grouping", ["row", "query"])
@pytest.mark.parametrize("estimate", ["normal", "equal", "coarse", "impossible"])
def test_the_same_pixels_are_kept_as_in_float64(grouping, estimate):
    """Among equal pixels the first ones are kept, also when most are impossible."""
    x = pixels_of(70, heads=3, groups=1, pixels=37)
    if estimate == "equal":
        x["estimate"].zero_()
    elif estimate == "coarse":
        x["estimate"].round_()
    elif estimate == "impossible":
        x["estimate"][..., 5:] = -torch.inf
    problem = Problem(x["estimate"], x["totals"], last_of(70, 70, True), 3, 1.0, grouping, 0.5)
    packed = native_form.PackedProblem.of(x["q"], x["k"], x["v"], problem, Mix())
    kept = native_form._pixel_attention(packed, True)[2]
    bits = (kept[..., None].long() >> torch.arange(32)) & 1
    assert torch.equal(bits.flatten(-2)[..., :37].bool(), torch_form.kept_pixels(problem))


def test_keys_in_other_slots_than_their_ranks_are_read_where_they_lie():
    x = pixels_of(30, 50, batch=2, running=False)
    order = torch.stack([torch.randperm(50), torch.randperm(50)])
    moved = {n: y.gather(2, order[:, None, :, None].expand_as(y)) if n in ("k", "v") else y for n, y in x.items()}
    there = Ranks(torch.arange(20, 50)[None], order, None, None, plain=False)
    found, expected = (PIXELS.run(y, ranks=where)["o"] for y, where in ((moved, there), (x, last_of(30, 50, True))))
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_oversampling_reads_the_same_keys_as_float64():
    x = heads_of(90, heads=2, groups=2)
    problem = Problem(torch.randn(2, 2, 90, 12), torch.arange(1, 91)[None], last_of(90, 90, True), 4, 2.5, "row", 0.5)
    found, _ = native_form.run(*x.values(), problem, Mix())
    expected, _ = torch_form.run(*(y.double() for y in x.values()), problem, Mix())
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


def test_training_holds_results_and_gradients_and_a_bit_a_pixel():
    x = pixels_of(2000, batch=1, heads=2, groups=2, width=32, values=32, pixels=16)
    leaves = {n: y.requires_grad_() if y.is_floating_point() and n != "estimate" else y for n, y in x.items()}
    wanted = [y for y in leaves.values() if y.requires_grad]

    def step():
        torch.autograd.grad(PIXELS.run(leaves, ranks=last_of(2000, 2000, True))["o"].sum(), wanted)

    assert peak_memory(step).bytes < 4 * 1.2 * 4 * x["v"].numel()


def test_it_holds_little_beside_its_result():
    x = pixels_of(2000, batch=1, heads=2, groups=2, width=32, values=32, pixels=16)
    with torch.no_grad():
        peak = peak_memory(lambda: PIXELS.run(x, ranks=last_of(2000, 2000, True))).bytes
    assert peak < 1.1 * 4 * x["v"].numel()


@pytest.mark.parametrize("grouping", ["head", "batch"])
def test_pixels_ranked_over_the_valid_queries_are_those_of_float64(grouping):
    x = {**heads_of(29, heads=2, groups=2), "estimate": torch.randn(2, 2, 29, 8)}
    call = {"mask": Mask(lengths=torch.tensor([29, 14])), "pattern": "noncausal-self"}
    options = Config(grouping=grouping, top_k=5)
    found = apply(MECHANISM, x, backend="native", config=options, **call)
    expected = apply(MECHANISM, {name: y.double() for name, y in x.items()}, config=options, **call)
    torch.testing.assert_close(found.output.double(), expected.output, rtol=0, atol=4e-6)


def test_what_it_lacks_is_left_to_torch():
    x = {**heads_of(9, heads=2, groups=2), "estimate": torch.randn(2, 2, 9, 8)}
    apply(MECHANISM, x, want={"weights"})
    with pytest.raises(Unsupported, match="try torch"):
        apply(MECHANISM, x, want={"weights"}, backend="native")
