"""What is peculiar to S4D: kernels and their recurrence, both directions, its rates at the start, and parity."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern, Unsupported
from regard.create import create_layer
from regard.mechanisms.s4d import MECHANISM, Config, DiagonalState, S4DLayer, initial_rates, sample_inputs

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
SELF = ["causal-self", "noncausal-self"]
WANT_STATE = Context(want=frozenset({"state"}))


def load(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def sample(pattern: str = "causal-self", n: int = 21, dtype=torch.float64, **sizes: int) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(n)
    return sample_inputs(
        rng, batch=2, n=n, m=n, dtype=dtype, pattern=Pattern(pattern), config=Config(), sizes=sizes or None
    )


def run(inputs, pattern: str = "causal-self", config: Config | None = None, **call):
    return apply(MECHANISM, inputs, pattern=pattern, config=config or Config(), **call)


def close(found, expected, tolerance=1e-12):
    assert found.shape == expected.shape
    assert float((found - expected).detach().abs().max()) <= tolerance * float(expected.detach().abs().max())


def make_layer(pattern: str = "causal-self", dim: int = 6, **options) -> S4DLayer:
    torch.manual_seed(len(str(options)))
    return create_layer("s4d", dim, pattern=pattern, **options).double()


def kernel_of(x: dict[str, Tensor], name: str, n: int) -> Tensor:
    """2 Re sum_k C (exp(dt A) - 1) / A exp(dt A t), (C, n), as the equation has it."""
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
    close(run(alone, "noncausal-self").output[0], expected)


def test_without_a_second_kernel_both_directions_share_one():
    x = sample("noncausal-self")
    x["c_back"] = x["c"]
    expected = run(x, "noncausal-self").output
    del x["c_back"]
    close(run(x, "noncausal-self").output, expected)
    close(run(x, "noncausal-self", form="reference").output, expected)


def test_a_constant_input_is_integrated_exactly_by_the_hold():
    """h' = A h + x over pieces on which x is constant, by a matrix exponential."""
    x = sample(n=4)
    x["dt"] += 0.5  # torch.linalg.matrix_exp has 9 digits for small matrices
    del x["skip"]
    expected = torch.zeros(2, 6, dtype=torch.float64)
    for row, e, k in itertools.product(range(2), range(6), range(4)):
        decay, turn = x["a"][e, k].tolist()
        h = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)  # real and imaginary part, and a one
        for t in range(4):
            held = float(x["x"][row, t, e])
            system = torch.tensor([[decay, -turn, held], [turn, decay, 0], [0, 0, 0]], dtype=torch.float64)
            h = torch.linalg.matrix_exp(x["dt"][e] * system) @ h
        expected[row, e] += 2 * (x["c"][e, k, 0] * h[0] - x["c"][e, k, 1] * h[1])
    close(run(x).output[:, -1], expected)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_steps_cut_in_pieces_come_to_the_exact_output_of_a_held_input(discretization):
    x, config = sample(n=12), Config(discretization=discretization)
    del x["skip"]

    def coarse(parts: int) -> Tensor:
        fine = {**x, "x": x["x"].repeat_interleave(parts, 1), "dt": x["dt"] / parts}
        return run(fine, config=config).output[:, parts - 1 :: parts]

    exact = run(x).output  # the hold is exact for a held input
    errors = [float((coarse(parts) - exact).abs().max()) for parts in (1, 4, 16)]
    if discretization == "zoh":
        assert max(errors) < 1e-12
    else:
        assert errors[0] > 4 * errors[1] > 16 * errors[2] > 0


def test_real_rates_are_mamba_without_selection():
    """Mamba's step is exact in A and of first order in B, so its B is the hold's divided by dt."""
    x = sample(n=17)
    x["a"][..., 1] = 0
    x["c"][..., 1] = 0
    rate, n = x["a"][..., 0], 17
    write = torch.expm1(x["dt"][:, None] * rate) / rate / x["dt"][:, None]
    expected = sum(
        apply(
            get_mechanism("mamba"),
            {
                "x": x["x"][..., e : e + 1],
                "dt": x["dt"][e].expand(2, n, 1),
                "a": rate[e : e + 1],
                "b": write[e].expand(2, n, 1, -1),
                "c": 2 * x["c"][e, :, 0].expand(2, n, 1, -1),
                "skip": x["skip"][e : e + 1],
            },
        ).output
        * torch.nn.functional.one_hot(torch.tensor(e), 6)
        for e in range(6)
    )
    close(run(x).output, expected)


def test_phases_of_far_tokens_keep_their_digits_in_single_precision():
    x = sample(n=4099, dtype=torch.float32)
    x["a"] = torch.stack([torch.full((6, 4), -1e-3), 50 * x["a"][..., 1]], -1)
    exact = {name: t.double() for name, t in x.items()}
    close(run(x).output.double(), run(exact).output, 2e-6)
    split = run({**x, "x": x["x"][:, :4000]}, return_state=True)
    rest = run({**x, "x": x["x"][:, 4000:]}, state=split.state).output
    close(rest.double(), run(exact).output[:, 4000:], 2e-6)


def test_small_steps_keep_their_digits():
    x = sample(n=5)
    x["dt"] = torch.full((6,), 1e-9, dtype=torch.float64)
    del x["skip"]
    c = x["c"][..., 0].sum(-1)
    close(run(x).output, 2e-9 * c * x["x"].cumsum(1), 1e-6)
    step = 2 * (torch.view_as_complex(x["c"]) * (1e-9 + torch.view_as_complex(x["a"]) * 1e-18 / 2)).real.sum(-1)
    close(run({**x, "x": x["x"][:, :1]}).output, step * x["x"][:, :1], 1e-14)


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(found) if isinstance(t, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return found


@pytest.mark.parametrize("pattern", SELF)
def test_no_tensor_has_a_number_for_each_state_and_token(pattern):
    n, states = 2048, 64
    x = sample(pattern, n=n, c=3, k=states)
    with Largest() as largest:
        run(x, pattern, return_state=pattern == "causal-self")
    assert largest.numbers <= 10 * 3 * n < 3 * n * states


def test_scale_multiplies_what_is_read_but_not_the_skip():
    x = sample("noncausal-self")
    scaled = {**x, "c": 0.3 * x["c"], "c_back": 0.3 * x["c_back"]}
    close(run(x, "noncausal-self", scale=0.3).output, run(scaled, "noncausal-self").output)
    close(run(x, "noncausal-self", scale=0.3, form="reference").output, run(scaled, "noncausal-self").output)


def test_a_row_without_a_token_keeps_its_state():
    x = sample(n=1)
    state = DiagonalState(torch.randn(2, 6, 4, 2, dtype=torch.float64), torch.tensor([3, 5]))
    for form in ("step", "chunked"):
        after = run(x, state=state, form=form, mask=Mask(lengths=torch.tensor([1, 0]))).state
        assert torch.equal(after.memory[1], state.memory[1])
        assert not torch.allclose(after.memory[0], state.memory[0])
        assert after.length.tolist() == [4, 5]


@pytest.mark.parametrize("pattern", SELF)
def test_padding_inside_a_row_takes_no_time(pattern):
    """A kernel counts tokens, so padding between two of them must not move them apart."""
    layer, x = make_layer(pattern), torch.randn(1, 6, 6, dtype=torch.float64)
    valid = torch.tensor([[0, 1, 0, 0, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    padded = torch.full((1, 10, 6), float("nan"), dtype=torch.float64)
    padded[valid] = x[0]
    output = layer(padded, context=Context(mask=Mask(valid=valid))).output
    close(output[valid][None], layer(x).output)
    assert (output[~valid] == 0).all()


def test_packed_documents_begin_with_an_empty_state():
    layer, x = make_layer(), torch.randn(1, 9, 6, dtype=torch.float64)
    mask = Mask(cu_seqlens=torch.tensor([0, 4, 4, 9]))
    result = layer(x, context=Context(mask=mask, want=frozenset({"state"})))
    close(result.output, torch.cat([layer(x[:, :4]).output, layer(x[:, 4:]).output], 1))
    assert result.state.length.tolist() == [4, 0, 5]
    assert (result.state.memory[1] == 0).all()


def recorded_layer(f: dict[str, Tensor], pattern: str) -> S4DLayer:
    layer = create_layer("s4d", 10, pattern=pattern, d_state=8, tied=True).double()
    weights = {
        "log_dt": f["weight_log_dt"],
        "log_decay": f["weight_log_w_real"],
        "frequency": f["weight_w_imag"],
        "c": f["weight_C"][0],
        "D": f["weight_D"],
        "out_proj.weight": f["weight_proj_weight"],
        "out_proj.bias": f["weight_proj_bias"],
    }
    if pattern == "noncausal-self":
        weights["c_back"] = f["weight_C"][1]
    layer.load_state_dict(weights)
    return layer


@pytest.mark.parametrize(("name", "pattern"), [("s4d_causal_cab", SELF[0]), ("s4d_bidirectional_cab", SELF[1])])
def test_parity_of_the_layer(name, pattern):
    f = load(name)
    layer, x = recorded_layer(f, pattern), f["x"].requires_grad_()
    output = layer(x).output
    torch.testing.assert_close(output, f["out"], rtol=0, atol=1e-12)  # observed 7e-16
    (output * f["grad_out"]).sum().backward()
    found = {"C": layer.c.grad[None], "log_dt": layer.log_dt.grad, "log_w_real": layer.log_decay.grad}
    found |= {"w_imag": layer.frequency.grad, "x": x.grad}
    if layer.c_back is not None:
        found["C"] = torch.stack([layer.c.grad, layer.c_back.grad])
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, f[f"grad_{key}"], rtol=1e-11, atol=1e-11)


def test_parity_of_decoding():
    f = load("s4d_causal_cab")
    layer = recorded_layer(f, "causal-self")
    output, state = layer.step(f["x"][:, 0], layer(f["x"][:, :0], context=WANT_STATE).state)
    torch.testing.assert_close(output, f["step_out"][:, 0], rtol=0, atol=1e-12)
    for t in range(1, 19):
        output, state = layer.step(f["x"][:, t], state)
        torch.testing.assert_close(output, f["step_out"][:, t], rtol=0, atol=1e-12)  # observed 7e-16


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
    assert make_layer(tied=True).log_decay.shape == (1, 8)


def test_parameter_count():
    count = sum(p.numel() for p in make_layer(dim=32, d_state=16).parameters())
    assert count == 32 + 2 * 32 * 8 + 32 * 16 + 32 + 32 * 32 + 32
    assert sum(p.numel() for p in make_layer("noncausal-self", dim=32).parameters()) == count + 32 * 16


def test_time_constants_keep_float32_and_have_no_weight_decay():
    layer = create_layer("s4d", 6)
    before = {name: getattr(layer, name).detach().clone() for name in layer.FLOAT32}
    layer = layer.to(torch.bfloat16)
    for name, value in before.items():
        assert torch.equal(getattr(layer, name), value)
    assert layer.log_dt._no_weight_decay and layer.log_decay._no_weight_decay and layer.frequency._no_weight_decay
    result = layer(torch.randn(1, 5, 6).bfloat16(), context=WANT_STATE)
    assert result.output.dtype == torch.bfloat16
    assert result.state.memory.dtype == torch.float32


def test_state_is_constant_in_the_length():
    assert MECHANISM.recurrent
    layer = make_layer()
    sizes = {layer(torch.randn(1, n, 6).double(), context=WANT_STATE).state.nbytes for n in (0, 1, 50)}
    assert sizes == {6 * 16 * 8 + 8}


@pytest.mark.parametrize(
    "options",
    [
        {"d_state": 0},
        {"d_state": 5},
        {"init": "real"},
        {"discretization": "euler"},
        {"dt_init": (0.0, 0.1)},
        {"dt_init": (0.2, 0.1)},
        {"pattern": "causal-cross"},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options):
    with pytest.raises(Unsupported):
        make_layer(**options)


def test_calls_that_cannot_be_honoured_are_refused():
    x = sample("noncausal-self")
    with pytest.raises(Unsupported, match="c_back"):
        run(x)
    with pytest.raises(Unsupported, match="real and imaginary"):
        run({**x, "a": x["a"][..., :1], "c": x["c"][..., :1], "c_back": x["c_back"][..., :1]}, "noncausal-self")
    with pytest.raises(Unsupported, match="state"):
        make_layer("noncausal-self")(torch.randn(1, 4, 6).double(), context=WANT_STATE)
