"""Tests specific to S4D: kernels and their recurrence, both directions, initial rates, and parity."""

from __future__ import annotations

import math

import pytest
import torch
from support import WANT_STATE, Largest, calls, close, in_steps, load, refused
from torch import Tensor

from regard.contract import Pattern, Unsupported
from regard.create import create_layer
from regard.mechanisms.s4d import MECHANISM, Config, S4DLayer, initial_rates, sample_inputs

SELF = ["causal-self", "noncausal-self"]
run = calls(MECHANISM)


def sample(pattern: str = "causal-self", n: int = 21, dtype: torch.dtype = torch.float64, **sizes: int):
    shape = {"batch": 2, "n": n, "m": n, "dtype": dtype, "sizes": sizes}
    return sample_inputs(torch.Generator().manual_seed(n), pattern=Pattern(pattern), config=Config(), **shape)


def make_layer(pattern: str = "causal-self", dim: int = 6, **options) -> S4DLayer:
    return create_layer("s4d", dim, pattern=pattern, **options).double()


def kernel_of(x: dict[str, Tensor], name: str, n: int) -> Tensor:
    """The kernel 2 Re sum_k C (exp(dt A) - 1) / A exp(dt A t), (C, n), as in the equation."""
    a, c = (torch.view_as_complex(x[part].contiguous()) for part in ("a", name))
    step = x["dt"][:, None] * a
    time = torch.arange(n, dtype=torch.float64)[:, None, None]
    return 2 * (c * (step.exp() - 1) / a * (step * time).exp()).real.sum(-1).T


@pytest.mark.parametrize("n", [1, 2, 70])
def test_it_is_a_convolution_with_the_kernel_of_the_definition(n):
    x = sample(n=n)
    kernel = kernel_of(x, "c", n)
    expected = torch.stack([(kernel[:, : t + 1].flip(1).T * x["x"][:, : t + 1]).sum(1) for t in range(n)], 1)
    close(run(x).output, expected + x["skip"] * x["x"])


def test_the_second_kernel_begins_with_the_next_token():
    x = sample("noncausal-self", n=9)
    alone = {**x, "x": torch.zeros_like(x["x"])}
    alone["x"][:, 5] = 1
    forward, backward = kernel_of(x, "c", 4), kernel_of(x, "c_back", 5)
    skip = torch.zeros(4, 6, dtype=torch.float64)
    skip[0] = x["skip"]
    expected = torch.cat([backward.T.flip(0), forward.T + skip])
    close(run(alone, pattern="noncausal-self").output[0], expected)


@pytest.mark.parametrize("form", ["parallel", "reference"])
def test_without_a_second_kernel_both_directions_share_one(form):
    x = sample("noncausal-self")
    call = {"pattern": "noncausal-self", "form": form}
    close(run(x | {"c_back": None}, **call).output, run(x | {"c_back": x["c"]}, **call).output)


@pytest.mark.parametrize("form", ["parallel", "reference"])
def test_scale_multiplies_what_is_read_but_not_the_skip(form):
    x = sample("noncausal-self")
    call = {"pattern": "noncausal-self", "form": form}
    scaled = x | {"c": 0.3 * x["c"], "c_back": 0.3 * x["c_back"]}
    close(run(x, scale=0.3, **call).output, run(scaled, **call).output)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_steps_cut_in_pieces_come_to_the_exact_output_of_a_held_input(discretization):
    x, options = sample(n=12), {"discretization": discretization}
    del x["skip"]

    def coarse(parts: int) -> Tensor:
        fine = {**x, "x": x["x"].repeat_interleave(parts, 1), "dt": x["dt"] / parts}
        return run(fine, options).output[:, parts - 1 :: parts]

    exact = run(x).output  # zero-order hold is exact for a held input
    errors = [float((coarse(parts) - exact).abs().max()) for parts in (1, 4, 16)]
    if discretization == "zoh":
        assert max(errors) < 1e-12
    else:
        assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


def test_phases_of_far_tokens_keep_their_digits_in_single_precision():
    x = sample(n=4099, dtype=torch.float32)
    x["a"] = torch.stack([torch.full((6, 4), -1e-3), 50 * x["a"][..., 1]], -1)
    exact = run({name: t.double() for name, t in x.items()}).output
    close(run(x).output.double(), exact, 2e-6)
    split = run({**x, "x": x["x"][:, :4000]}, return_state=True)
    rest = run({**x, "x": x["x"][:, 4000:]}, state=split.state).output
    close(rest.double(), exact[:, 4000:], 2e-6)


def test_small_steps_keep_their_digits():
    x = sample(n=5)
    x["dt"] = torch.full((6,), 1e-9, dtype=torch.float64)
    del x["skip"]
    close(run(x).output, 2e-9 * x["c"][..., 0].sum(-1) * x["x"].cumsum(1), 1e-6)
    step = 2 * (torch.view_as_complex(x["c"]) * (1e-9 + torch.view_as_complex(x["a"]) * 1e-18 / 2)).real.sum(-1)
    close(run({**x, "x": x["x"][:, :1]}).output, step * x["x"][:, :1], 1e-14)


@pytest.mark.parametrize("pattern", SELF)
def test_no_tensor_has_a_number_for_each_state_and_token(pattern):
    n, states = 2048, 64
    x = sample(pattern, n=n, c=3, k=states)
    with Largest() as largest:
        run(x, pattern=pattern, return_state=pattern == "causal-self")
    assert largest.numbers <= 10 * 3 * n < 3 * n * states


# parity


def recorded_layer(f: dict[str, Tensor], pattern: str) -> S4DLayer:
    layer = make_layer(pattern, 10, d_state=8, tied=True)
    names = {"log_dt": "log_dt", "log_decay": "log_w_real", "frequency": "w_imag", "D": "D"}
    names |= {"out_proj.weight": "proj_weight", "out_proj.bias": "proj_bias"}
    weights = {ours: f[f"weight_{theirs}"] for ours, theirs in names.items()}
    layer.load_state_dict(weights | dict(zip(("c", "c_back"), f["weight_C"], strict=False)))
    return layer


@pytest.mark.parametrize(("name", "pattern"), [("s4d_causal_cab", SELF[0]), ("s4d_bidirectional_cab", SELF[1])])
def test_parity_of_the_layer(name, pattern):
    f = load(name)
    layer, x = recorded_layer(f, pattern), f["x"].requires_grad_()
    output = layer(x).output
    torch.testing.assert_close(output, f["out"], rtol=0, atol=1e-12)  # observed 7e-16
    (output * f["grad_out"]).sum().backward()
    found = {"log_dt": layer.log_dt.grad, "log_w_real": layer.log_decay.grad, "w_imag": layer.frequency.grad}
    found |= {"C": torch.stack([c.grad for c in (layer.c, layer.c_back) if c is not None]), "x": x.grad}
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, f[f"grad_{key}"], rtol=1e-11, atol=1e-11)


def test_parity_of_decoding():
    f = load("s4d_causal_cab")
    layer = recorded_layer(f, "causal-self")
    torch.testing.assert_close(in_steps(layer, f["x"])[0], f["step_out"], rtol=0, atol=1e-12)  # observed 7e-16


# the initial layer


def test_rates_at_the_start():
    k = torch.arange(8, dtype=torch.float64)
    for init, frequency in (("linear", math.pi * k), ("inverse", 16 / math.pi * (16 / (2 * k + 1) - 1))):
        a = initial_rates(Config(init=init))
        close(a.imag, frequency)
        assert (a.real == -0.5).all()
    n = torch.arange(16, dtype=torch.float64)
    root = (2 * n + 1).sqrt()
    hippo = -(torch.outer(root, root).tril(-1) + torch.diag(n + 1))
    normal = hippo + 0.5 * torch.outer(root, root)  # without the rank-1 part
    eigenvalues = torch.linalg.eigvals(normal)
    expected = eigenvalues[eigenvalues.imag > 0]
    a = initial_rates(Config(init="legs"))
    close(a.imag, expected.imag.sort().values)
    close(a.real, expected.real)


def test_initial_values_of_a_layer():
    layer = make_layer(dim=4096)
    dt = layer.log_dt.detach().exp()
    assert 0.99e-3 < float(dt.min()) < 2e-3 and 0.05 < float(dt.max()) < 0.1001
    a, c = torch.complex(-layer.log_decay.exp(), layer.frequency), torch.view_as_complex(layer.c)
    integral = (-2 * (c / a).real).sum(-1)
    assert abs(float(integral.detach().std()) - 1) < 0.05
    assert abs(float(layer.D.detach().std()) - 1) < 0.05


# refusals


def test_calls_that_cannot_be_honoured_are_refused():
    x = sample("noncausal-self")
    refused("c_back", run, x)
    with pytest.raises(Unsupported, match="real and imaginary"):
        run(x | {name: x[name][..., :1] for name in ("a", "c", "c_back")}, pattern="noncausal-self")
    refused("state", lambda: make_layer("noncausal-self")(torch.randn(1, 4, 6).double(), context=WANT_STATE))
