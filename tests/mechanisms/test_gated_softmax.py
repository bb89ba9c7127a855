"""Tests specific to gated softmax attention: open and closed gates, its predictors and their initial values, and parity."""

from __future__ import annotations

import pytest
import torch
from support import calls, check_recorded, close, load, qkv, refused
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, LayerCall, Mask
from regard.create import create_layer
from regard.mechanisms.gated_softmax import MECHANISM, PREDICTORS
from regard.training.optimizer import parameter_groups

run, softmax = calls(MECHANISM), calls(get_mechanism("softmax"))


def inputs(n: int, m: int | None = None, batch: int = 2) -> dict[str, Tensor]:
    return qkv(n, m, batch=batch) | {"log_gate": torch.randn(batch, 2, n, dtype=torch.float64).sigmoid().log()}


def make(pattern: str = "causal-self", dim: int = 8, **options):
    return create_layer("gated_softmax", dim, 2, pattern=pattern, **options).double()


def last_bias(layer) -> Tensor:
    """The gates' logits when the predictor's weights are 0."""
    return layer.projection.logit if layer.config.predictor == "head" else layer.projection.maps[-1].bias


def gated_and_plain(predictor: str, **options):
    """A gated layer and a softmax attention layer with the same projections."""
    pattern = "noncausal-self" if predictor == "head_mean" else "causal-self"
    plain = create_layer("softmax", 8, 2, pattern=pattern).double()
    layer = make(pattern, predictor=predictor, **options)
    found = layer.load_state_dict(plain.state_dict(), strict=False)
    assert all(key.startswith("projection.") for key in found.missing_keys)
    return layer, plain


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("form", ["reference", "parallel"])
def test_the_output_is_that_of_softmax_times_the_gate(form, pattern):
    tensors = inputs(9, 7 if pattern.cross else None)
    plain = {name: tensors[name] for name in "qkv"}
    expected = softmax(plain, pattern=pattern).output
    for options, factor in (({}, 1), ({"fine_tune": True, "initial_gate": 0.25}, 4)):
        call = {"options": options, "pattern": pattern, "form": form}
        close(run(tensors, **call).output, factor * tensors["log_gate"].exp()[..., None] * expected)
        close(run(plain, **call).output, factor * expected)


def test_weights_carry_the_gate_and_parts_of_the_keys_merge_by_the_lse_of_the_scores():
    tensors = inputs(5, 8)
    call = {"pattern": "noncausal-cross", "options": {"fine_tune": True, "initial_gate": 0.5}}
    found = run(tensors, want={"weights", "lse"}, **call)
    close(found.extras["weights"] @ tensors["v"], found.output)
    close(found.extras["weights"].sum(-1), 2 * tensors["log_gate"].exp())
    shares = []
    for part in (slice(0, 3), slice(3, 8)):
        piece = tensors | {name: tensors[name][:, :, part] for name in "kv"}
        one = run(piece, want={"lse"}, **call)
        shares.append((one.extras["lse"], one.output))
    total = torch.stack([lse for lse, _ in shares]).logsumexp(0)
    close(total, found.extras["lse"])
    close(sum((lse - total).exp()[..., None] * output for lse, output in shares), found.output)


def test_a_closed_gate_lets_no_gradient_through():
    tensors = {name: x.requires_grad_() for name, x in inputs(4).items()}
    output = run(tensors | {"log_gate": torch.full_like(tensors["log_gate"], -torch.inf)}).output
    assert (output == 0).all()
    for gradient in torch.autograd.grad(output.sum(), [tensors[name] for name in "qkv"]):
        assert (gradient == 0).all()


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_weights_of_zero_and_large_biases_open_and_close_the_layer(predictor):
    layer, plain = gated_and_plain(predictor, initial_std=0.0)
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    last_bias(layer).data.fill_(30.0)
    close(layer(x).output, plain(x).output, 1e-11)
    last_bias(layer).data.fill_(-30.0)
    close(layer(x).output, torch.zeros_like(x), 1e-11)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_fine_tuning_starts_as_the_model_that_it_tunes(predictor):
    x, options = torch.randn(2, 6, 8, dtype=torch.float64), {"fine_tune": True, "initial_gate": 0.25}
    layer, plain = gated_and_plain(predictor, initial_std=0.0, **options)
    close(layer(x).output, plain(x).output, 1e-7)  # a float32 bias
    if predictor != "head":
        near, plain = gated_and_plain(predictor, **options)  # weights of N(0, 0.01^2)
        difference = (near(x).output - plain(x).output).abs().max() / plain(x).output.abs().max()
        assert 1e-6 < difference < 0.1


@pytest.mark.parametrize("predictor", ["linear", "mlp", "mlp2", "all_features", "head"])
def test_predictors_start_as_they_are_told(predictor):
    layer = create_layer("gated_softmax", 16, 2, predictor=predictor, initial_gate=0.25)
    last = last_bias(layer)
    close(last.sigmoid(), torch.full_like(last, 0.25), 1e-6)
    assert any(last is p for p in parameter_groups(layer.projection, 0.1)[-1]["params"])  # exempt from weight decay


def test_a_mean_over_tokens_is_that_of_each_packed_document():
    layer, x = make("noncausal-self", predictor="head_mean"), torch.randn(1, 7, 8, dtype=torch.float64)
    found = layer(x, context=Context(mask=Mask(cu_seqlens=torch.tensor([0, 3, 3, 7])))).output
    for part in (slice(0, 3), slice(3, 7)):
        close(found[:, part], layer(x[:, part]).output)


def gate_weights(arrays: dict[str, Tensor], predictor: str) -> dict[str, Tensor]:
    """The authors' gate parameters with the layer's names and shapes."""
    if predictor == "head":
        return {"projection.logit": arrays["weight_alpha"]}
    if predictor == "all_features":
        return {f"projection.maps.0.{kind}": arrays[f"weight_alpha_{kind}"] for kind in ("weight", "bias")}
    parts = [("0", "0_"), ("1", "2_")] if predictor.startswith("mlp") else [("0", "")]
    found = {}
    for ours, theirs in parts:
        weights = [arrays[f"weight_alpha_{head}_{theirs}weight"].mT for head in range(2)]
        biases = [arrays[f"weight_alpha_{head}_{theirs}bias"] for head in range(2)]
        found[f"projection.maps.{ours}.weight"] = torch.stack(weights)
        found[f"projection.maps.{ours}.bias"] = torch.stack(biases)[:, None]
    return found


@pytest.mark.parametrize("name", [*PREDICTORS, "fine_tune"])
def test_parity_with_the_authors_layer(name):
    arrays = load(f"gated_softmax_{name}")
    causal = bool((arrays["attn"].triu(1) == 0).all())
    options = {"predictor": "linear", "fine_tune": True} if name == "fine_tune" else {"predictor": name}
    if "initial_gate" in arrays:
        options["initial_gate"] = float(arrays["initial_gate"])
    layer = make("causal-self" if causal else "noncausal-self", 16, bias=True, **options)
    parts = [f"{part}.{kind}" for part in ("query", "key", "value") for kind in ("weight", "bias")]
    weights = {part: arrays[f"weight_{part.replace('.', '_')}"] for part in parts}
    weights |= {"output.weight": torch.eye(16), "output.bias": torch.zeros(16)}
    layer.load_state_dict(weights | gate_weights(arrays, options["predictor"]))
    x, mask = arrays["x"].requires_grad_(), None
    if "mask" in arrays:  # the authors' code masks only padded keys
        hidden = torch.zeros(2, 1, 1, 14, dtype=torch.float64).masked_fill(~arrays["mask"][:, None, None], -torch.inf)
        mask = Mask(bias=hidden)
    gate = layer.projection.inputs({}, LayerCall(x, None, Context()))["log_gate"].exp()
    close(gate, arrays["gate"])
    output = layer(x, context=Context(mask=mask)).output
    check_recorded(arrays | {"out": arrays["core_out"]}, output, {"x": x})


@pytest.mark.parametrize("predictor", ["linear", "all_features"])
def test_gates_have_the_strides_that_a_compiled_program_expects(predictor):
    """torch's logsigmoid gives contiguous memory whatever it is given; its fake version keeps the strides."""
    gates, x = make(predictor=predictor).projection, torch.randn(2, 5, 8, dtype=torch.float64)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        expected = gates.inputs({}, LayerCall(mode.from_tensor(x), None, Context()))["log_gate"]
    assert gates.inputs({}, LayerCall(x, None, Context()))["log_gate"].stride() == expected.stride()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pattern": "causal-self", "predictor": "head_mean"}, "later tokens"),
        ({"pattern": "causal-cross", "predictor": "head_mean"}, "later tokens"),
        ({"dim": 9, "head_dim": 4}, "slice"),
    ],
)
def test_options_that_do_not_fit_the_layer_are_refused(arguments, words):
    refused(words, make, **arguments)
    make(dim=9, head_dim=4, predictor="all_features")


def test_a_mean_over_queries_that_may_come_in_pieces_is_refused():
    layer = make("noncausal-cross", predictor="head_mean")
    x, memory = (torch.randn(2, n, 8, dtype=torch.float64) for n in (5, 7))
    layer(x, memory)
    refused("absorbed memory", layer, x, state=layer.encode_memory(memory))
