"""What is peculiar to gated softmax attention: open and closed gates, its predictors and their starts, and parity."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import absorb, apply
from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, Mask, Unsupported
from regard.create import create_layer
from regard.layers.parts import LayerCall
from regard.mechanisms.gated_softmax import MECHANISM, PREDICTORS, Config
from regard.training.optimizer import parameter_groups

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"


def inputs(n: int, m: int | None = None, batch: int = 2) -> dict[str, Tensor]:
    sizes = {"q": n, "k": n if m is None else m, "v": n if m is None else m}
    tensors = {name: torch.randn(batch, 2, size, 4, dtype=torch.float64) for name, size in sizes.items()}
    return tensors | {"log_gate": torch.randn(batch, 2, n, dtype=torch.float64).sigmoid().log()}


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def make(pattern: str = "causal-self", dim: int = 8, **options):
    return create_layer("gated_softmax", dim, 2, pattern=pattern, **options).double()


def with_weights_of(plain: torch.nn.Module, **options) -> torch.nn.Module:
    """A gated layer with the projections of a layer of softmax attention."""
    layer = make(plain.pattern, **options)
    found = layer.load_state_dict(plain.state_dict(), strict=False)
    assert all(key.startswith("projection.") for key in found.missing_keys)
    return layer


@pytest.mark.parametrize("pattern", ALL_PATTERNS)
def test_the_output_is_that_of_softmax_times_the_gate_in_every_form(pattern):
    tensors = inputs(9, 7 if pattern.cross else None)
    plain = {name: x for name, x in tensors.items() if name != "log_gate"}
    softmax = apply(get_mechanism("softmax"), plain, pattern=pattern).output
    expected = tensors["log_gate"].exp()[..., None] * softmax
    call = {"pattern": pattern}
    close(apply(MECHANISM, tensors, form="reference", **call).output, expected)
    close(apply(MECHANISM, tensors, **call).output, expected)
    close(apply(MECHANISM, plain, **call).output, softmax)
    tuned = Config(fine_tune=True, initial_gate=0.25)
    for form in ("reference", "parallel"):
        close(apply(MECHANISM, tensors, form=form, config=tuned, **call).output, 4 * expected)
        close(apply(MECHANISM, plain, form=form, config=tuned, **call).output, 4 * softmax)
    if pattern.cross:
        state = absorb(MECHANISM, {name: tensors[name] for name in "kv"}, pattern=pattern)
        queries = {name: tensors[name] for name in ("q", "log_gate")}
        close(apply(MECHANISM, queries, state=state, **call).output, expected)


def test_weights_carry_the_gate_and_parts_of_the_keys_merge_by_the_lse_of_the_scores():
    tensors = inputs(5, 8)
    call = {"pattern": "noncausal-cross", "config": Config(fine_tune=True, initial_gate=0.5)}
    found = apply(MECHANISM, tensors, want={"weights", "lse"}, **call)
    close(found.extras["weights"] @ tensors["v"], found.output)
    close(found.extras["weights"].sum(-1), 2 * tensors["log_gate"].exp())
    shares = []
    for part in (slice(0, 3), slice(3, 8)):
        piece = tensors | {name: tensors[name][:, :, part] for name in "kv"}
        one = apply(MECHANISM, piece, want={"lse"}, **call)
        shares.append((one.extras["lse"], one.output))
    total = torch.stack([lse for lse, _ in shares]).logsumexp(0)
    close(total, found.extras["lse"])
    close(sum((lse - total).exp()[..., None] * output for lse, output in shares), found.output)


def test_gates_have_gradients_and_a_closed_one_lets_none_through():
    tensors = {name: x.requires_grad_() for name, x in inputs(4, batch=1).items()}

    def run(*given: Tensor) -> Tensor:
        return apply(MECHANISM, dict(zip(tensors, given, strict=True))).output

    assert torch.autograd.gradcheck(run, tuple(tensors.values()))
    tensors["log_gate"] = torch.full_like(tensors["log_gate"], -torch.inf)
    output = run(*tensors.values())
    assert (output == 0).all()
    for gradient in torch.autograd.grad(output.sum(), [tensors[name] for name in "qkv"]):
        assert (gradient == 0).all()


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_weights_of_zero_and_large_biases_open_and_close_the_layer(predictor):
    pattern = "noncausal-self" if predictor == "head_mean" else "causal-self"
    plain = create_layer("softmax", 8, 2, pattern=pattern).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    layer = with_weights_of(plain, predictor=predictor, initial_std=0.0)
    last = layer.projection.logit if predictor == "head" else layer.projection.maps[-1].bias
    for bias, expected in ((30.0, plain(x).output), (-30.0, torch.zeros_like(x))):
        last.data.fill_(bias)
        close(layer(x).output, expected, 1e-11)


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_fine_tuning_starts_as_the_model_that_it_tunes(predictor):
    pattern = "noncausal-self" if predictor == "head_mean" else "causal-self"
    plain = create_layer("softmax", 8, 2, pattern=pattern).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    options = {"predictor": predictor, "fine_tune": True, "initial_gate": 0.25}
    close(with_weights_of(plain, initial_std=0.0, **options)(x).output, plain(x).output, 1e-7)  # a float32 bias
    if predictor != "head":
        torch.manual_seed(0)
        near = with_weights_of(plain, **options)(x).output  # weights of N(0, 0.01^2)
        difference = (near - plain(x).output).abs().max() / plain(x).output.abs().max()
        assert 1e-6 < difference < 0.1


@pytest.mark.parametrize(
    ("predictor", "count"),
    [("linear", 2 * 9), ("mlp", 2 * (9 * 2 + 3)), ("mlp2", 2 * (9 * 8 + 9)), ("all_features", 2 * 17), ("head", 2)],
)
def test_predictors_have_the_stated_numbers_of_parameters_and_starts(predictor, count):
    layer = create_layer("gated_softmax", 16, 2, predictor=predictor, initial_gate=0.25)
    assert sum(p.numel() for p in layer.projection.parameters()) == count
    last = layer.projection.logit if predictor == "head" else layer.projection.maps[-1].bias
    torch.testing.assert_close(last.sigmoid(), torch.full_like(last, 0.25))
    undecayed = parameter_groups(layer.projection, 0.1)[-1]["params"]
    assert any(last is p for p in undecayed)


def test_the_gate_of_a_head_reads_its_own_slice_of_the_layers_input():
    layer, x = make(), torch.randn(1, 5, 8, dtype=torch.float64)
    before = layer.projection.inputs({}, LayerCall(x, None, Context()))["log_gate"]
    x[..., 4:] += 1.0
    after = layer.projection.inputs({}, LayerCall(x, None, Context()))["log_gate"]
    assert torch.equal(before[:, 0], after[:, 0]) and not torch.allclose(before[:, 1], after[:, 1])


@pytest.mark.parametrize("predictor", ["linear", "mlp", "mlp2", "all_features", "head"])
def test_steps_equal_the_whole_with_every_predictor(predictor):
    layer, x = make(predictor=predictor), torch.randn(2, 9, 8, dtype=torch.float64)
    if predictor == "head":
        layer.projection.logit.data.copy_(torch.tensor([0.3, -2.0]))
    whole = layer(x).output
    first = layer(x[:, :4], context=Context(want=frozenset({"state"})))
    state, outputs = first.state, [first.output]
    for t in range(4, 9):
        y, state = layer.step(x[:, t], state)
        outputs.append(y[:, None])
    close(torch.cat(outputs, 1), whole)


@pytest.mark.parametrize("kind", ["valid", "lengths", "cu_seqlens"])
def test_a_mean_over_tokens_counts_valid_tokens_only(kind):
    layer, x = make("noncausal-self", predictor="head_mean"), torch.randn(2, 7, 8, dtype=torch.float64)
    if kind == "cu_seqlens":
        x, mask, parts = x[:1], Mask(cu_seqlens=torch.tensor([0, 3, 3, 7])), [(0, slice(0, 3)), (0, slice(3, 7))]
    elif kind == "lengths":
        mask, parts = Mask(lengths=torch.tensor([7, 4])), [(0, slice(0, 7)), (1, slice(0, 4))]
    else:
        valid = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0]]).bool()
        mask, parts = Mask(valid=valid), [(0, valid[0]), (1, valid[1])]
    found = layer(x, context=Context(mask=mask)).output
    for row, part in parts:
        close(found[row, part], layer(x[row, part][None]).output[0])


def test_cross_attention_takes_its_gates_from_the_queries():
    layer = create_layer("gated_softmax", 8, 2, pattern="noncausal-cross", memory_dim=6).double()
    x, memory = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 7, 6, dtype=torch.float64)
    close(layer(x, state=layer.encode_memory(memory)).output, layer(x, memory).output)
    gate = layer.projection.inputs({}, LayerCall(x, memory, Context()))["log_gate"]
    assert gate.shape == (2, 2, 3) and torch.equal(
        gate, layer.projection.inputs({}, LayerCall(x, None, Context()))["log_gate"]
    )


def gate_weights(arrays: dict[str, Tensor], predictor: str) -> dict[str, Tensor]:
    """The authors' gate parameters under the names and in the shapes of the layer."""
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
    with np.load(FIXTURES / f"gated_softmax_{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    causal = bool((arrays["attn"].triu(1) == 0).all())
    options = {"predictor": "linear", "fine_tune": True} if name == "fine_tune" else {"predictor": name}
    if "initial_gate" in arrays:
        options["initial_gate"] = float(arrays["initial_gate"])
    layer = make("causal-self" if causal else "noncausal-self", 16, bias=True, **options)
    weights = {
        f"{part}.{kind}": arrays[f"weight_{part}_{kind}"]
        for part in ("query", "key", "value")
        for kind in ("weight", "bias")
    }
    weights |= {"output.weight": torch.eye(16), "output.bias": torch.zeros(16)}
    layer.load_state_dict(weights | gate_weights(arrays, options["predictor"]))
    x, mask = arrays["x"].requires_grad_(), None
    if "mask" in arrays:  # the authors' code pads keys only
        hidden = torch.zeros(2, 1, 1, 14, dtype=torch.float64).masked_fill(~arrays["mask"][:, None, None], -torch.inf)
        mask = Mask(bias=hidden)
    close(layer.projection.inputs({}, LayerCall(x, None, Context()))["log_gate"].exp(), arrays["gate"], 1e-12)
    output = layer(x, context=Context(mask=mask)).output
    close(output, arrays["core_out"], 1e-12)
    (gradient,) = torch.autograd.grad(output, x, arrays["grad_out"])
    close(gradient, arrays["grad_x"], 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"predictor": "conv"},
        {"initial_gate": 0.0},
        {"initial_gate": 1.0},
        {"initial_gate": math.nan},
        {"fine_tune": True},
        {"initial_std": -0.1},
        {"initial_std": math.inf},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(Unsupported):
        Config(**options)


def test_options_that_do_not_fit_the_layer_are_refused():
    for pattern in ("causal-self", "causal-cross"):
        with pytest.raises(Unsupported, match="later tokens"):
            make(pattern, predictor="head_mean")
    with pytest.raises(Unsupported, match="slice"):
        create_layer("gated_softmax", 9, 2, head_dim=4)
    create_layer("gated_softmax", 9, 2, head_dim=4, predictor="all_features")


def test_a_mean_over_queries_that_may_come_in_pieces_is_refused():
    layer = make("noncausal-cross", predictor="head_mean")
    x, memory = (torch.randn(2, n, 8, dtype=torch.float64) for n in (5, 7))
    layer(x, memory)
    with pytest.raises(Unsupported, match="absorbed memory"):
        layer(x, state=layer.encode_memory(memory))
