"""What is peculiar to local attention: its two forms, its reach, its state of fixed size, and parity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.mechanisms.local import MECHANISM, Config, cost, visible_pairs

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
OPTIONS = [
    {"window": 1},
    {"window": 4},
    {"window": 99},
    {"form": "block", "block": 5, "lookback": 0},
    {"form": "block", "block": 4, "lookback": 1},
    {"form": "block", "block": 3, "lookback": 2},
    {"form": "block", "block": 1, "lookback": 0},
    {"form": "block", "block": 64, "lookback": 1},
]


def load(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def inputs(n: int, m: int | None = None, batch: int = 2) -> dict[str, Tensor]:
    sizes = {"q": n, "k": n if m is None else m, "v": n if m is None else m}
    return {name: torch.randn(batch, 2, size, 4, dtype=torch.float64) for name, size in sizes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", options: dict | None = None, **call) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call).output


def allowed(options: dict, pattern: str, n: int) -> Tensor:
    """Visible pairs, from the definition in words."""
    config = Config(**options)
    seen = torch.zeros(n, n, dtype=torch.bool)
    for i in range(n):
        for j in range(n):
            if config.form == "window":
                near = i - config.window < j <= i if pattern == "causal-self" else abs(i - j) <= config.window
            else:
                distance = i // config.block - j // config.block
                causal = j <= i and distance <= config.lookback
                near = causal if pattern == "causal-self" else abs(distance) <= config.lookback
            seen[i, j] = near
    return seen


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
@pytest.mark.parametrize("n", [1, 13, 64, 201])
def test_equals_masked_dense_attention(options, pattern, n):
    tensors = inputs(n)
    bias = torch.zeros(n, n, dtype=torch.float64).masked_fill(~allowed(options, pattern, n), -torch.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(*tensors.values(), attn_mask=bias)
    close(run(tensors, pattern, options), expected)
    close(run(tensors, pattern, options, form="reference"), expected)


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
@pytest.mark.parametrize(
    "options", [{"window": 40}, {"form": "block", "block": 40}, {"form": "block", "block": 13, "lookback": 3}]
)
def test_a_reach_of_the_whole_sequence_equals_softmax(options, pattern):
    tensors = inputs(37)
    close(run(tensors, pattern, options), apply(get_mechanism("softmax"), tensors, pattern=pattern).output)


@pytest.mark.parametrize("options", [{"window": 37}, {"form": "block", "block": 40, "lookback": 0}])
def test_a_reach_of_the_whole_sequence_takes_the_same_kernel_as_softmax(options):
    tensors = inputs(37)
    assert torch.equal(run(tensors, options=options), apply(get_mechanism("softmax"), tensors).output)


@pytest.mark.parametrize("m", [201, 203, 140])
@pytest.mark.parametrize("options", OPTIONS)
def test_uneven_calls_equal_masked_dense_attention(options, m):
    """The last query is aligned with the last key, wherever that puts the first query in its block."""
    n = 150
    tensors = inputs(n, m)
    seen = allowed(options, "causal-self", max(n, m))[m - n :, :m] if m >= n else allowed(options, "causal-self", m)
    seen = torch.cat([torch.zeros(max(n - m, 0), m, dtype=torch.bool), seen])
    expected = (tensors["q"] @ tensors["k"].mT / 2).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    close(run(tensors, options=options), expected @ tensors["v"])


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_blocks_without_lookback_are_independent(pattern):
    options = {"form": "block", "block": 5, "lookback": 0}
    tensors = inputs(18)
    whole = run(tensors, pattern, options)
    for start in range(0, 18, 5):
        part = {name: x[:, :, start : start + 5] for name, x in tensors.items()}
        alone = apply(get_mechanism("softmax"), part, pattern=pattern).output
        close(whole[:, :, start : start + 5], alone)


@pytest.mark.parametrize("options", OPTIONS[:6])
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_gradients_reach_exactly_the_visible_keys(options, pattern):
    n = 17
    tensors = {name: x.requires_grad_() for name, x in inputs(n, batch=1).items()}
    output = run(tensors, pattern, options)
    reached = torch.stack(
        [torch.autograd.grad(output[0, :, i].sum(), tensors["v"], retain_graph=True)[0] for i in range(n)]
    )
    assert torch.equal(reached[:, 0, 0, :, 0] != 0, allowed(options, pattern, n))


@pytest.mark.parametrize(("options", "reach"), [({"window": 3}, 6), ({"form": "block", "block": 4}, 15)])
def test_stacked_layers_reach_a_bounded_distance(options, reach):
    """Three layers: L (w - 1) ranks, or L p b + b - 1 from the last query of a block."""
    torch.manual_seed(0)
    layers = [create_layer("local", 8, 2, **options).double() for _ in range(3)]
    x = torch.randn(1, 32, 8, dtype=torch.float64, requires_grad=True)
    y = x
    for layer in layers:
        y = y + layer(y).output
    (gradient,) = torch.autograd.grad(y[0, 31].sum(), x)
    touched = (gradient[0].abs().sum(-1) > 0).nonzero()[:, 0]
    assert 31 - int(touched.min()) == reach


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", [[1] * 23, [23], [1, 7, 1, 0, 14], [4, 5, 6, 8]])
def test_decoding_across_windows_and_blocks_equals_the_whole(options, sizes):
    tensors = inputs(23)
    state, outputs = None, []
    for part in torch.arange(23).split(sizes):
        piece = {name: x[:, :, part] for name, x in tensors.items()}
        result = apply(MECHANISM, piece, state=state, return_state=True, config=Config(**options))
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 2), run(tensors, options=options))


@pytest.mark.parametrize("options", OPTIONS)
def test_rows_of_different_lengths_continue_each_from_its_own_place(options):
    lengths = [torch.tensor([0, 3, 9]), torch.tensor([5, 0, 4]), torch.tensor([1, 1, 0]), torch.tensor([8, 2, 7])]
    total = sum(lengths)
    whole = {name: x for name, x in inputs(int(total.max()), batch=3).items()}
    expected = run(whole, options=options, mask=Mask(lengths=total))
    state, done = None, torch.zeros(3, dtype=torch.long)
    for new in lengths:
        width = int(new.max())
        slots = (done[:, None] + torch.arange(width)).clamp(max=int(total.max()) - 1)
        piece = {name: torch.stack([x[b, :, slots[b]] for b in range(3)]) for name, x in whole.items()}
        result = apply(
            MECHANISM, piece, mask=Mask(lengths=new), state=state, return_state=True, config=Config(**options)
        )
        state = result.state
        for b in range(3):
            close(result.output[b, :, : new[b]], expected[b, :, done[b] : done[b] + new[b]])
        done = done + new
    assert torch.equal(state.length, total)


@pytest.mark.parametrize("options", OPTIONS)
def test_the_state_has_the_size_that_the_card_says(options):
    config = Config(**options)
    expected = cost(Shape(1, 2, 1, 1000, 4, 4), config).state
    state = None
    for n in (1, 30, 2):
        state = apply(MECHANISM, inputs(n, batch=1), state=state, return_state=True, config=config).state
        assert state.k.numel() + state.v.numel() == expected
    assert MECHANISM.recurrent


def test_a_long_continuation_takes_blocks_of_queries():
    """Rows at different places of their blocks, so that blocks of work cannot follow the mechanism's own."""
    options = {"form": "block", "block": 9, "lookback": 1}
    tensors = inputs(230)
    first = torch.tensor([10, 3])
    start = {name: x[:, :, :10] for name, x in tensors.items()}
    state = apply(MECHANISM, start, mask=Mask(lengths=first), return_state=True, config=Config(**options)).state
    rest = {name: torch.stack([x[0, :, 10:210], x[1, :, 3:203]]) for name, x in tensors.items()}
    found = apply(MECHANISM, rest, state=state, config=Config(**options)).output
    whole = run(tensors, options=options)
    close(found, torch.stack([whole[0, :, 10:210], whole[1, :, 3:203]]))


def test_padded_keys_do_not_leak():
    """The benchmark's own code combines window and padding with AND."""
    tensors = inputs(20)
    mask = Mask(valid=torch.rand(2, 20) > 0.4)
    for pattern in ("causal-self", "noncausal-self"):
        found = run(tensors, pattern, {"window": 3}, mask=mask)
        for b in range(2):
            alone = {name: x[b : b + 1, :, mask.valid[b]] for name, x in tensors.items()}
            close(found[b : b + 1, :, mask.valid[b]], run(alone, pattern, {"window": 3}))
            assert (found[b, :, ~mask.valid[b]] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [0, 1, 7, 12, 31])
def test_the_cost_counts_visible_pairs(options, n):
    config = Config(**options)
    assert visible_pairs(config, n) == allowed(options, "causal-self", n).sum()
    full = cost(Shape(2, 3, n, n, 4, 5), config)
    assert full.flops == 2 * 2 * 3 * 9 * visible_pairs(config, n)


def test_a_quarter_of_full_layers_saves_three_quarters_in_the_limit():
    n = 1 << 20
    local_share = visible_pairs(Config(form="block", block=512), n) / (n * (n + 1) / 2)
    assert (6 + 18 * local_share) / 24 == pytest.approx(0.25, abs=2e-3)


@pytest.mark.parametrize("name", ["local_window_causal_flash", "local_window_causal_more_keys_flash"])
def test_parity_causal_window(name):
    arrays = load(name)
    options = {"window": int(arrays["window"][0]) + 1}
    _parity(arrays, "causal-self", options)


def test_parity_noncausal_window():
    arrays = load("local_window_noncausal_flash")
    _parity(arrays, "noncausal-self", {"window": int(arrays["window"][0])})


def _parity(arrays: dict[str, Tensor], pattern: str, options: dict) -> None:
    tensors = {name: arrays[name].requires_grad_() for name in "qkv"}
    result = apply(MECHANISM, tensors, pattern=pattern, config=Config(**options), want={"weights"})
    close(result.output, arrays["out"], 1e-10)  # observed 4e-16
    close(result.extras["weights"], arrays["attn"], 1e-10)
    for name, gradient in zip(
        "qkv", torch.autograd.grad(result.output, list(tensors.values()), arrays["grad_out"]), strict=True
    ):
        close(gradient, arrays[f"grad_{name}"], 1e-10)  # observed 9e-16


@pytest.mark.parametrize(
    ("name", "pattern"), [("local_causal_cab", "causal-self"), ("local_noncausal_cab", "noncausal-self")]
)
def test_parity_with_the_benchmarks_layer(name, pattern):
    arrays = load(name)
    layer = create_layer("local", 16, 2, pattern=pattern, window=int(arrays["wsize"]), bias=True).double()
    ours = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
    layer.load_state_dict({f"{a}.{p}": arrays[f"weight_{b}_{p}"] for a, b in ours.items() for p in ("weight", "bias")})
    x = arrays["x"].requires_grad_()
    output = layer(x).output
    close(output, arrays["out"], 1e-10)  # observed 3e-16
    close(torch.autograd.grad(output, x, arrays["grad_out"])[0], arrays["grad_x"], 1e-10)
    core = run({name: arrays[name] for name in "qkv"}, pattern, {"window": int(arrays["wsize"])})
    close(core.transpose(1, 2).flatten(2), arrays["core_out"], 1e-10)
    if pattern == "causal-self":
        state = layer(x[:, :0], context=Context(want=frozenset({"state"}))).state
        core_steps = []
        for t in range(x.shape[1]):
            y, state = layer.step(x[:, t], state)
            core_steps.append(y)
        close(torch.stack(core_steps, 1), arrays["step_out"], 1e-10)


def test_parity_of_the_masks():
    arrays = load("local_mask_transformers")
    options = {"window": int(arrays["window"])}
    assert torch.equal(allowed(options, "causal-self", 21), arrays["causal_mask"])
    assert torch.equal(allowed(options, "noncausal-self", 21), arrays["noncausal_mask"])
    tensors = inputs(21)
    for pattern, name in (("causal-self", "causal_mask"), ("noncausal-self", "noncausal_mask")):
        weights = apply(MECHANISM, tensors, pattern=pattern, config=Config(**options), want={"weights"}).extras[
            "weights"
        ]
        assert torch.equal(weights > 0, arrays[name].expand_as(weights))


def test_what_it_lacks_is_refused_with_the_reason():
    for pattern in (Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS):
        with pytest.raises(Unsupported, match="no place near a query"):
            create_layer("local", 8, 2, pattern=pattern)
    for options in ({"form": "dilated"}, {"window": 0}, {"block": 0}, {"lookback": -1}):
        with pytest.raises(Unsupported):
            Config(**options)
    state = apply(MECHANISM, inputs(3), return_state=True).state
    with pytest.raises(Unsupported, match="bias of pairs"):
        apply(MECHANISM, inputs(3), state=state, mask=Mask(bias=torch.zeros(1, 1, 3, 3)))
