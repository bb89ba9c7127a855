"""Mixing matrices: the drawn matrix is what the mechanism computes, and the statements about it are true."""

from __future__ import annotations

import pytest
import torch
from support import close, refused

from regard import get_mechanism
from regard.contract import Pattern
from regard.workbench.mixing import (
    DENSE,
    FIXED,
    LEVELS,
    LOW_RANK,
    NONLINEAR,
    SEMISEPARABLE,
    SHADES,
    SPARSE,
    TOKENS,
    _inputs,
    _outputs,
    _values,
    as_svg,
    as_text,
    mixed_mechanisms,
    mixing_of,
)
from regard.workbench.verification.subjects import Subject

KNOWN = {
    ("softmax", "causal-self"): DENSE,
    ("sigmoid", "noncausal-self"): DENSE,
    ("local", "causal-self"): SPARSE,
    ("linear", "noncausal-self"): LOW_RANK,
    ("nystrom", "noncausal-self"): LOW_RANK,
    ("hard_softmax", "causal-self"): SPARSE,
    ("differential", "causal-self"): DENSE,
    ("linear", "causal-self"): SEMISEPARABLE,
    ("delta_rule", "causal-self"): SEMISEPARABLE,
    ("mamba2", "causal-self"): SEMISEPARABLE,
    ("s4d", "causal-self"): FIXED,
    ("fnet", "noncausal-self"): FIXED,
    ("mlp_mixer", "noncausal-self"): NONLINEAR,
}


@pytest.mark.parametrize(("name", "pattern"), KNOWN)
def test_structures_are_those_of_the_definitions(name, pattern):
    found = mixing_of(name, pattern)
    assert found.structure == KNOWN[name, pattern]
    assert found.linear == (found.structure != NONLINEAR)
    if found.pattern.causal:
        close(found.weights, found.weights.tril())


@pytest.mark.parametrize("name", ["softmax", "gated_linear"])
def test_outputs_are_the_matrix_times_the_values(name):
    found = mixing_of(name)
    subject = Subject(get_mechanism(name), Pattern.CAUSAL_SELF)
    inputs = _inputs(subject, 0)
    if name == "gated_linear":  # with a decay for each value feature, each feature has its own matrix
        close(subject.run(inputs).output[0, 0, :, 0], found.weights @ inputs["v"][0, 0, :, 0])
        return
    close(subject.run(inputs).output[0, 0], found.weights @ inputs["v"][0, 0])
    assert found.normalised and not found.per_feature and found.seen == 1


@pytest.mark.parametrize("name", mixed_mechanisms())
def test_outputs_for_the_inputs_own_values_are_the_matrix_times_one_feature_of_them(name):
    found = mixing_of(name)
    if not found.linear:
        return
    subject = Subject(get_mechanism(name), found.pattern, found.options)
    inputs, values = _inputs(subject, 0), _values(subject.card)
    one = inputs[values].flatten(0, -3)[0].clone()
    one[:, 1:] = 0  # features may be mixed, or have their own matrices
    close(_outputs(subject, inputs, values, one[None])[0, :, 0], found.weights @ one[:, 0], 1e-10)


@pytest.mark.parametrize(
    ("name", "equivariant"),
    [(name, True) for name in ("softmax", "sigmoid", "linear", "flow_attention", "performer", "hard_softmax")]
    + [(name, False) for name in ("local", "fnet", "linformer", "nystrom", "kernelized_rpe")],
)
def test_only_mechanisms_without_positions_give_permuted_outputs_for_permuted_tokens(name, equivariant):
    subject = Subject(get_mechanism(name), Pattern.NONCAUSAL_SELF, mixing_of(name, "noncausal-self").options)
    inputs, order = _inputs(subject, 0), torch.randperm(TOKENS)
    permuted = {key: _permuted(x, subject.card.axes.get(key, ""), order) for key, x in inputs.items()}
    whole, moved = subject.run(inputs).output, subject.run(permuted).output
    error = float((moved - whole[..., order, :]).abs().max() / whole.abs().max())
    assert (error < 1e-9) == equivariant


def _permuted(x, axes, order):
    axis = next((i for i, letter in enumerate(axes) if letter in "nm" and axes.startswith("b")), None)
    return x if axis is None else x.index_select(axis, order)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        *((name, "causal-self") for name in ("linear", "gated_linear", "delta_rule", "mamba2", "rwkv7", "mlstm")),
        ("linear", "noncausal-self"),
    ],
)
def test_the_rank_of_a_recurrence_is_at_most_the_width_of_its_keys(name, pattern):
    width = _inputs(Subject(get_mechanism(name), Pattern(pattern)), 0)["k"].shape[-1]
    assert 0 < mixing_of(name, pattern).rank <= width < TOKENS // 2


def test_a_fourier_transform_is_its_matrix_and_a_convolution_depends_on_distance():
    angles = 2 * torch.pi * torch.arange(TOKENS, dtype=torch.float64).outer(torch.arange(TOKENS)) / TOKENS
    fourier = mixing_of("fnet").weights
    close(fourier / fourier[0, 0], angles.cos(), 1e-9)
    s4d = mixing_of("s4d", "causal-self").weights
    for distance in range(TOKENS):
        line = s4d.diagonal(-distance)
        close(line, line[:1].expand_as(line), 1e-9)


def test_pictures_have_a_row_for_each_output_and_shades_of_its_largest_weight():
    weights = torch.tensor([[1.0, 0.0, 0.0], [-2.0, 4.0, 0.0]], dtype=torch.float64)
    assert as_text(weights) == [f"{SHADES[-1] * 2}    ", f"{SHADES[2] * 2}{SHADES[-1] * 2}  "]
    found = mixing_of("softmax")
    shares = found.weights / found.weights.amax(1, keepdim=True)
    assert as_svg(found, side=1).count("h1v1h-1z") == int((shares >= LEVELS[0]).sum())
    assert 'class="negative"' in as_svg(mixing_of("fnet"))


def test_what_mixes_no_tokens_by_itself_is_refused():
    assert "mixture_of_heads" not in mixed_mechanisms() and "token_parameter" not in mixed_mechanisms()
    refused("a wrapper", mixing_of, "mixture_of_heads")
    refused("causal-self, noncausal-self", mixing_of, "softmax", "noncausal-cross")
    refused("fnet", mixing_of, "fnet", "causal-self")
