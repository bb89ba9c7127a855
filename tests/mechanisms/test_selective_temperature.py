"""What is peculiar to selective temperature: places from the start, terms, sharing, what sharpness does, and parity."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard.apply import absorb, apply
from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, Mask, Unsupported
from regard.create import create_layer
from regard.layers.parts import LayerCall
from regard.mechanisms.selective_temperature import MECHANISM, Config
from regard.training.optimizer import parameter_groups

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
SOFTMAX = get_mechanism("softmax")


def inputs(n: int, m: int | None = None, batch: int = 2, groups: int = 2) -> dict[str, Tensor]:
    """Inputs with every term."""
    m = n if m is None else m

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    return {
        "q": normal(batch, 2, n, 4),
        "k": normal(batch, groups, m, 4),
        "v": normal(batch, groups, m, 3),
        "q_token": normal(batch, 2, n).tanh(),
        "k_token": normal(batch, groups, m).tanh(),
        "v_token": normal(batch, groups, m).tanh(),
        "q_slope": normal(2).sigmoid(),
        "k_slope": normal(groups).sigmoid(),
        "v_slope": normal(groups).sigmoid(),
    }


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def part(tensors: dict[str, Tensor], tokens: slice) -> dict[str, Tensor]:
    """Some tokens of every input that has any."""
    return {name: x if "slope" in name else x[:, :, tokens] for name, x in tensors.items()}


def without(tensors: dict[str, Tensor], *endings: str) -> dict[str, Tensor]:
    return {name: x for name, x in tensors.items() if not name.endswith(endings)}


def make(pattern: str = "causal-self", dim: int = 8, heads: int = 2, *, perturbed: bool = True, **options):
    """A layer whose terms have left their start."""
    layer = create_layer("selective_temperature", dim, heads, pattern=pattern, **options).double()
    if perturbed:
        for parameter in layer.projection.parameters():
            parameter.data.add_(0.5 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("groups", [1, 2])
def test_scaling_queries_keys_and_values_of_softmax_gives_the_same_in_every_form(pattern, groups):
    n, m = (9, 7) if pattern.cross else (9, 9)
    tensors = inputs(n, m, groups=groups)
    queries = torch.arange(1, n + 1) if pattern == "causal-self" else torch.full((n,), m)
    keys = torch.arange(1, m + 1) if pattern == "causal-self" else torch.full((m,), m)
    scaled = {}
    for name, count in {"q": queries, "k": keys, "v": keys}.items():
        tau = 1 + tensors[f"{name}_token"] + tensors[f"{name}_slope"][:, None] * count.double().log()
        assert (tau > 0).all()
        scaled[name] = tau[..., None] * tensors[name]
    expected = apply(SOFTMAX, scaled, pattern=pattern).output
    call = {"pattern": pattern}
    close(apply(MECHANISM, tensors, form="reference", **call).output, expected)
    close(apply(MECHANISM, tensors, **call).output, expected)
    if pattern.cross:
        state = None
        for tokens in (slice(0, 2), slice(2, 7)):
            memory = {name: tensors[name][:, :, tokens] for name in ("k", "v", "k_token", "v_token")}
            state = absorb(MECHANISM, memory, pattern=pattern, state=state)
        rest = {name: tensors[name] for name in ("q", "q_token", "q_slope", "k_slope", "v_slope")}
        close(apply(MECHANISM, rest, state=state, **call).output, expected)
    elif pattern.causal:
        for sizes in ([1] * 9, [4, 1, 4]):
            state, outputs, start = None, [], 0
            for size in sizes:
                piece = part(tensors, slice(start, start + size))
                result = apply(MECHANISM, piece, state=state, return_state=True, **call)
                state, start = result.state, start + size
                outputs.append(result.output)
            close(torch.cat(outputs, 2), expected)


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_without_terms_it_is_softmax_bit_for_bit(pattern):
    tensors = without(inputs(9, 7 if pattern.cross else None), "token", "slope")
    found = apply(MECHANISM, tensors, pattern=pattern, want={"weights", "lse"})
    expected = apply(SOFTMAX, tensors, pattern=pattern, want={"weights", "lse"})
    assert torch.equal(found.output, expected.output)
    for name in ("weights", "lse"):
        assert torch.equal(found.extras[name], expected.extras[name])


def test_constant_temperatures_of_queries_and_values_are_a_scale_and_a_factor():
    tensors = without(inputs(8), "token", "slope")
    constant = torch.full((2, 2, 8), 0.6, dtype=torch.float64)
    sharper = apply(MECHANISM, tensors | {"q_token": constant}).output
    close(sharper, apply(SOFTMAX, tensors, scale=1.6 * 0.5).output)
    louder = apply(MECHANISM, tensors | {"v_token": constant}).output
    close(louder, 1.6 * apply(SOFTMAX, tensors).output)


def test_the_first_token_has_its_own_value_with_its_temperature_and_no_position():
    tensors = inputs(5)
    found = apply(MECHANISM, tensors).output[:, :, 0]
    close(found, (1 + tensors["v_token"][:, :, :1]) * tensors["v"][:, :, 0])


def test_a_bias_is_added_after_the_temperature():
    tensors, bias = without(inputs(6), "v_token", "v_slope"), torch.randn(1, 2, 6, 6, dtype=torch.float64)
    found = apply(MECHANISM, tensors, pattern="noncausal-self", mask=Mask(bias=bias), want={"weights"})
    taus = [1 + tensors[f"{x}_token"] + tensors[f"{x}_slope"][:, None] * math.log(6) for x in "qk"]
    scores = 0.5 * tensors["q"] @ tensors["k"].mT
    close(found.extras["weights"], (taus[0][..., None] * taus[1][:, :, None] * scores + bias).softmax(-1))


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
@pytest.mark.parametrize("where", ["left", "inside"])
def test_padding_does_not_count_as_places(pattern, where):
    tensors = inputs(10)
    valid = torch.arange(10) >= torch.tensor([[0], [6]]) if where == "left" else torch.rand(2, 10) > 0.4
    found = apply(MECHANISM, tensors, pattern=pattern, mask=Mask(valid=valid)).output
    for b in range(2):
        alone = {name: x if "slope" in name else x[b : b + 1, :, valid[b]] for name, x in tensors.items()}
        close(found[b : b + 1, :, valid[b]], apply(MECHANISM, alone, pattern=pattern).output)


def test_padded_memory_has_the_temperature_of_its_own_length():
    tensors, lengths = inputs(3, 7), torch.tensor([7, 4])
    found = apply(MECHANISM, tensors, pattern="noncausal-cross", memory_mask=Mask(lengths=lengths)).output[1:]
    short = {name: x if "slope" in name else x[1:] for name, x in tensors.items()}
    short |= {name: short[name][:, :, :4] for name in ("k", "v", "k_token", "v_token")}
    close(found, apply(MECHANISM, short, pattern="noncausal-cross").output)


def weight_of_the_marked_key(n: int, delta: float, slope: float) -> float:
    """Of the last query of n keys, of which one has a score that is larger by delta."""
    k = torch.zeros(1, 1, n, 1, dtype=torch.float64)
    k[:, :, n // 2] = delta
    tensors = {"q": torch.ones_like(k), "k": k, "v": torch.zeros_like(k), "q_slope": torch.tensor([slope]).double()}
    return float(apply(MECHANISM, tensors, scale=1.0, want={"weights"}).extras["weights"][0, 0, -1, n // 2])


def test_a_marked_keys_weight_has_its_closed_form_and_lasts_where_slope_times_delta_is_one():
    for n in (4, 64, 512):
        tau = 1 + 0.7 * math.log(n)
        assert weight_of_the_marked_key(n, 1.5, 0.7) == pytest.approx(1 / (1 + (n - 1) * math.exp(-1.5 * tau)))
    lasting, growing, fading = (
        [weight_of_the_marked_key(n, delta, 0.5) for n in (64, 512, 2048)] for delta in (2.0, 4.0, 1.0)
    )
    limit = 1 / (1 + math.exp(-2))
    assert all(abs(w - limit) < 0.02 for w in lasting)
    assert growing[2] > growing[0] > 0.98 and fading[2] < 0.25 * fading[0]


def test_equal_scores_give_equal_weights_whatever_the_temperature():
    tensors = inputs(7)
    tensors["k"] = torch.zeros_like(tensors["k"])
    weights = apply(MECHANISM, tensors, pattern="noncausal-self", want={"weights"}).extras["weights"]
    close(weights, torch.full_like(weights, 1 / 7))


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-cross"])
def test_gradcheck_of_every_input(pattern):
    tensors = {name: x.requires_grad_() for name, x in inputs(4, batch=1).items()}

    def run(*given: Tensor) -> Tensor:
        return apply(MECHANISM, dict(zip(tensors, given, strict=True)), pattern=pattern).output

    assert torch.autograd.gradcheck(run, tuple(tensors.values()))


def test_memory_with_terms_for_a_part_of_it_is_refused():
    tensors = inputs(3, 7)
    call = {"pattern": "noncausal-cross"}
    state = absorb(MECHANISM, {name: tensors[name] for name in ("k", "v", "v_token")}, **call)
    with pytest.raises(Unsupported, match="v_token"):
        absorb(MECHANISM, {name: tensors[name] for name in "kv"}, state=state, **call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_scaled_tensors_in_float32_unless_they_are_to_be_rounded(dtype):
    tensors = {name: x.to(dtype) for name, x in inputs(40).items()}
    wide = {name: x.double() for name, x in tensors.items()}
    expected = apply(MECHANISM, wide, form="reference").output
    errors = {}
    for rounded in (False, True):
        result = apply(MECHANISM, tensors, config=Config(round_scaled=rounded), return_state=True)
        assert result.output.dtype == dtype
        assert result.state.v.dtype == (dtype if rounded else torch.float32)
        errors[rounded] = float((result.output - expected).abs().max() / expected.abs().max())
    assert errors[False] < MECHANISM.tolerances[dtype] < 20 * errors[True]
    assert errors[False] < errors[True]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2 * 16 + 2),
        ({"k_temperature": "both"}, 3 * 16 + 2),
        ({"q_temperature": "position", "v_temperature": "position"}, 2),
        ({"q_temperature": "token", "v_temperature": "none"}, 16),
        ({"share_heads": True}, 2 * 8 + 2),
        ({"position_granularity": "layer"}, 2 * 16 + 1),
        ({"token_features": "tokens", "hidden": 5}, 2 * (16 * 5 + 5 + 5 * 2) + 2),
        ({"token_features": "tokens", "v_temperature": "none"}, 16 * 16 + 16 + 16 * 2 + 2),
        ({"num_kv_heads": 1}, 16 + 8 + 2),
    ],
)
def test_a_layer_has_the_stated_number_of_parameters_more(options, count):
    layer = create_layer("selective_temperature", 16, 2, **options)
    assert sum(p.numel() for p in layer.projection.parameters()) == count


@pytest.mark.parametrize(
    ("options", "slope"),
    [
        ({}, 0.5),
        ({"position_start": -10.0}, 1 / (1 + math.exp(10))),
        ({"position_form": "double_exp"}, math.exp(-math.exp(2.0))),
        ({"position_form": "double_exp", "position_start": 1.5}, math.exp(-math.exp(1.5))),
        ({"position_form": "linear"}, 1e-5),
        ({"position_form": "linear", "position_start": 0.25}, 0.25),
    ],
)
def test_layers_start_with_the_stated_slope_and_no_token_terms(options, slope):
    layer = make(perturbed=False, **options)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    heads = {name: torch.randn(2, 2, 6, 4, dtype=torch.float64) for name in "qkv"}
    found = layer.projection.inputs(heads, LayerCall(x, x, Context()))
    assert set(found) == {"q", "k", "v", "q_token", "v_token", "q_slope", "v_slope"}
    for name in "qv":
        assert (found[f"{name}_token"] == 0).all()
        close(found[f"{name}_slope"], torch.full((2,), slope, dtype=torch.float64), 1e-6)
    layer(x).output.square().sum().backward()
    for parameter in layer.projection.parameters():
        assert parameter.grad.abs().max() > 0
    assert any(layer.projection.alpha is p for p in parameter_groups(layer, 0.1)[-1]["params"])


def test_a_layer_that_starts_near_the_identity_is_its_softmax_layer():
    plain = create_layer("softmax", 8, 2, positions="rotary").double()
    layer = make(perturbed=False, positions="rotary", position_start=-40.0)
    assert layer.load_state_dict(plain.state_dict(), strict=False).unexpected_keys == []
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    close(layer(x).output, plain(x).output)


def test_token_terms_read_the_projected_heads_before_rotation_and_before_any_temperature():
    layer = make(positions="rotary")
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    seen = {}
    layer.projection.register_forward_hook(lambda module, given, result: seen.update(result[0]))
    layer(x)
    for name, linear in (("q", layer.query), ("v", layer.value)):
        head = linear(x).unflatten(-1, (2, 4)).transpose(1, 2)
        expected = (F.gelu(head) * layer.projection.weights[name][:, None]).sum(-1).tanh()
        close(seen[f"{name}_token"], expected)


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("positions", [None, "rotary"])
def test_a_norm_of_queries_comes_before_the_temperature_and_does_not_cancel_it(norm, positions):
    options = {"query_key_norm": norm, "positions": positions}
    layer = make(**options, q_temperature="position", v_temperature="none")
    plain = create_layer("softmax", 8, 2, **options).double()
    plain.load_state_dict({name: x for name, x in layer.state_dict().items() if "projection" not in name})
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    found, slopes = layer(x).output, layer.projection.alpha.sigmoid()
    close(found[:, 0], plain(x).output[:, 0])
    assert ((found - plain(x).output)[:, 1:].abs().amax(-1) > 1e-6).all()
    tau = 1 + slopes[:, None] * torch.arange(1, 10, dtype=torch.float64).log()

    class Sharpened(torch.nn.Module):
        """The norm of queries (B, H, N, D), and the temperature after it."""

        def __init__(self, norm):
            super().__init__()
            self.norm = norm

        def forward(self, q):
            return tau[..., None] * self.norm(q)

    plain.query_norm = Sharpened(plain.query_norm)
    close(found, plain(x).output)


@pytest.mark.parametrize("form", ["sigmoid", "double_exp", "linear"])
@pytest.mark.parametrize(
    "options",
    [{"k_temperature": "both"}, {"token_features": "tokens", "hidden": 3}, {"share_heads": True, "num_kv_heads": 1}],
)
def test_gradients_of_a_layers_own_parameters_are_those_of_differences(form, options):
    layer = make(position_form=form, position_start=0.3, perturbed=False, **options)
    for name, parameter in layer.projection.named_parameters():
        if name != "alpha":
            parameter.data = 0.5 * torch.randn_like(parameter)
    names, values = zip(*layer.projection.named_parameters(prefix="projection"), strict=True)
    assert "projection.alpha" in names and len(names) > 2
    x = torch.randn(1, 6, 8, dtype=torch.float64)

    def run(*given):
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,)).output

    assert torch.autograd.gradcheck(run, values)


def test_a_group_of_heads_shares_the_mean_of_its_alphas():
    layer = make(heads=4, num_kv_heads=2, perturbed=False)
    layer.projection.alpha.data.copy_(torch.tensor([1.0, 3.0, -2.0, 0.0]))
    found = layer.projection.inputs({}, LayerCall(None, None, Context()))
    close(found["q_slope"], torch.tensor([1.0, 3.0, -2.0, 0.0], dtype=torch.float64).sigmoid())
    close(found["v_slope"], torch.tensor([2.0, -1.0], dtype=torch.float64).sigmoid())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k_temperature": "both", "num_kv_heads": 1},
        {"token_features": "tokens"},
        {"position_form": "double_exp", "position_granularity": "layer", "q_temperature": "position"},
        {"q_temperature": "none", "v_temperature": "token"},
    ],
)
@pytest.mark.parametrize("positions", ["rotary", "alibi"])
def test_decoding_goes_on_counting_places(options, positions):
    layer = make(positions=positions, **options)
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    whole = layer(x).output
    state, outputs = None, []
    for tokens in (slice(0, 5), slice(5, 6)):
        result = layer(x[:, tokens], state=state, context=Context(want=frozenset({"state"})))
        state = result.state
        outputs.append(result.output)
    for t in range(6, 11):
        y, state = layer.step(x[:, t], state)
        outputs.append(y[:, None])
    close(torch.cat(outputs, 1), whole)


@pytest.mark.parametrize("options", [{}, {"k_temperature": "both"}, {"token_features": "tokens"}])
def test_memory_that_streams_in_has_the_temperature_of_its_whole_length(options):
    layer = make("causal-cross", memory_dim=6, **options)
    x, memory = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 7, 6, dtype=torch.float64)
    state = layer.encode_memory(memory[:, :4])
    state = layer.encode_memory(memory[:, 4:], state=state)
    close(layer(x, state=state).output, layer(x, memory).output)


@pytest.mark.parametrize("name", ["rotary", "grouped", "gpt2"])
def test_parity_with_the_authors_position_term_for_queries(name):
    with np.load(FIXTURES / f"selective_temperature_{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    heads, kv_heads = (4, 2) if name == "grouped" else (2, 2)
    options = {"q_temperature": "position", "v_temperature": "none", "position_form": "double_exp"}
    layer = make(
        dim=16,
        heads=heads,
        num_kv_heads=kv_heads,
        positions="rotary" if name == "rotary" else None,
        position_granularity="layer",
        **options,
    )
    weights = {f"{part}.weight": arrays[f"weight_{part}"] for part in ("query", "key", "value", "output")}
    layer.load_state_dict(weights | {"projection.alpha": arrays["beta"][None]})
    x = arrays["x"].requires_grad_()
    output = layer(x).output
    close(output, arrays["out"])
    gradients = torch.autograd.grad(output, [x, layer.projection.alpha], arrays["grad_out"])
    close(gradients[0], arrays["grad_x"])
    close(gradients[1][0], arrays["grad_beta"])


@pytest.mark.parametrize(
    "options",
    [
        {"q_temperature": "all"},
        {"k_temperature": ""},
        {"v_temperature": "tok"},
        {"token_features": "x"},
        {"hidden": 4},
        {"hidden": 0, "token_features": "tokens"},
        {"share_heads": True, "token_features": "tokens"},
        {"position_form": "log"},
        {"position_form": "linear", "position_start": -0.1},
        {"position_start": math.inf},
        {"position_start": math.nan},
        {"position_granularity": "token"},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)
