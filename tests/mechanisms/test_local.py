"""Tests specific to local attention: its two forms, its reach, its state of fixed size, and parity."""

from __future__ import annotations

import pytest
import torch
from support import calls, check_recorded, close, cut, in_steps, load, qkv
from torch import Tensor

from regard.catalogue import get_mechanism
from regard.contract import Mask
from regard.create import create_layer
from regard.mechanisms.local import MECHANISM, Config

run = calls(MECHANISM)
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


def allowed(options: dict, pattern: str, n: int) -> Tensor:
    """Visible pairs, by the definition in words."""
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


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("pattern", "n", "m"),
    [
        *((pattern, n, n) for pattern in ("causal-self", "noncausal-self") for n in (1, 13, 201)),
        # the last query is aligned with the last key, so the first query may be anywhere in its block
        ("causal-self", 150, 203),
        ("causal-self", 150, 140),
    ],
)
def test_equals_masked_dense_attention(options, pattern, n, m):
    inputs = qkv(n, m)
    nothing = torch.zeros(max(n - m, 0), m, dtype=torch.bool)
    seen = torch.cat([nothing, allowed(options, pattern, m)[max(m - n, 0) :]])
    weights = (inputs["q"] @ inputs["k"].mT / 2).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    for form in (None, "reference"):
        close(run(inputs, options, pattern=pattern, form=form).output, weights @ inputs["v"])


@pytest.mark.parametrize("options", [{"window": 37}, {"form": "block", "block": 40, "lookback": 0}])
def test_a_reach_of_the_whole_sequence_takes_the_same_kernel_as_softmax(options):
    inputs, softmax = qkv(37), calls(get_mechanism("softmax"))
    assert torch.equal(run(inputs, options).output, softmax(inputs).output)


@pytest.mark.parametrize(("options", "reach"), [({"window": 3}, 6), ({"form": "block", "block": 4}, 15)])
def test_stacked_layers_reach_a_bounded_distance(options, reach):
    """Three layers reach L (w - 1) ranks, or L p b + b - 1 from the last query of a block."""
    layers = [create_layer("local", 8, 2, **options).double() for _ in range(3)]
    x = torch.randn(1, 32, 8, dtype=torch.float64, requires_grad=True)
    y = x
    for layer in layers:
        y = y + layer(y).output
    (gradient,) = torch.autograd.grad(y[0, 31].sum(), x)
    touched = (gradient[0].abs().sum(-1) > 0).nonzero()[:, 0]
    assert 31 - int(touched.min()) == reach


@pytest.mark.parametrize("options", [{"window": 1}, {"form": "block", "block": 1, "lookback": 0}], ids=str)
def test_a_token_that_sees_itself_alone_gives_its_value_and_keeps_no_key(options):
    inputs, state = qkv(7), None
    for part in torch.arange(7).split([1, 3, 1, 2]):
        result = run(cut(inputs, part), options, state=state, return_state=True)
        state = result.state
        close(result.output, inputs["v"][:, :, part])


def test_a_long_continuation_takes_blocks_of_queries():
    """Rows are at different places of their blocks, so blocks of work cannot coincide with the mechanism's blocks."""
    options, inputs = {"form": "block", "block": 9, "lookback": 1}, qkv(230)
    state = run(cut(inputs, slice(0, 10)), options, mask=Mask(lengths=torch.tensor([10, 3])), return_state=True).state
    rest = {name: torch.stack([x[0, :, 10:210], x[1, :, 3:203]]) for name, x in inputs.items()}
    whole = run(inputs, options).output
    close(run(rest, options, state=state).output, torch.stack([whole[0, :, 10:210], whole[1, :, 3:203]]))


@pytest.mark.parametrize(
    "name",
    ["local_window_causal_flash", "local_window_causal_more_keys_flash", "local_window_noncausal_flash"],
)
def test_parity_of_windows(name):
    """The recorded code does not count the query itself in a causal window."""
    arrays, causal = load(name), "noncausal" not in name
    inputs = {x: arrays[x].requires_grad_() for x in "qkv"}
    pattern = "causal-self" if causal else "noncausal-self"
    result = run(inputs, {"window": int(arrays["window"][0]) + causal}, pattern=pattern, want={"weights"})
    close(result.extras["weights"], arrays["attn"], 1e-10)
    check_recorded(arrays, result.output, inputs, 1e-10)  # observed 9e-16


@pytest.mark.parametrize(
    ("name", "pattern"), [("local_causal_cab", "causal-self"), ("local_noncausal_cab", "noncausal-self")]
)
def test_parity_with_the_benchmarks_layer(name, pattern):
    arrays = load(name)
    options = {"window": int(arrays["wsize"])}
    layer = create_layer("local", 16, 2, pattern=pattern, bias=True, **options).double()
    ours = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "out_proj"}
    layer.load_state_dict({f"{a}.{p}": arrays[f"weight_{b}_{p}"] for a, b in ours.items() for p in ("weight", "bias")})
    x = arrays["x"].requires_grad_()
    output = layer(x).output
    check_recorded(arrays, output, {"x": x}, 1e-10)  # observed 3e-16
    core = run({name: arrays[name] for name in "qkv"}, options, pattern=pattern).output
    close(core.transpose(1, 2).flatten(2), arrays["core_out"], 1e-10)
    if pattern == "causal-self":
        close(in_steps(layer, x)[0], arrays["step_out"], 1e-10)


@pytest.mark.parametrize(("pattern", "name"), [("causal-self", "causal_mask"), ("noncausal-self", "noncausal_mask")])
def test_parity_of_the_masks(pattern, name):
    arrays = load("local_mask_transformers")
    options = {"window": int(arrays["window"])}
    weights = run(qkv(21), options, pattern=pattern, want={"weights"}).extras["weights"]
    assert torch.equal(weights > 0, arrays[name].expand_as(weights))
