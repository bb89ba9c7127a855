"""The costs on cards count the operations that are needed; for sparse attention, those of the visible pairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from regard import backends, get_mechanism, list_mechanisms
from regard.contract import Pattern, Shape, Tensors
from regard.measurement.memory import peak_memory
from regard.workbench.verification.subjects import Subject

SPARSE = ("bigbird", "block_sparse", "diagonal", "local", "longformer", "sparse_strided", "transformer_xl")
PLACES = {"transformer_xl"}
"""Mechanisms whose scores need a second product, with an encoding of the pair's distance."""
OF_THE_MEAN = {("block_sparse", "random")}
CASES = [
    (name, variant)
    for name in SPARSE
    for variant in ("", *get_mechanism(name).variants)
    if (name, variant) not in OF_THE_MEAN
]


def pairs(subject: Subject, n: int) -> torch.Tensor:
    """A mask (H, N, N) of the pairs of n tokens with a nonzero weight, found with unit vectors as values."""
    inputs = subject.inputs(n, batch=1)
    for name in inputs:
        if name in ("v", "v_global"):
            inputs[name] = torch.eye(n, dtype=torch.float64).expand(1, inputs[name].shape[1], n, n)
        elif name in ("q", "k"):
            inputs[name] = inputs[name].abs()
    return subject.run(inputs).output[0] != 0


@pytest.mark.parametrize("name", ["activator", "mlp_mixer", "ninformer"])
def test_the_cost_of_maps_that_know_no_pairs_is_linear_in_the_tokens(name):
    card = get_mechanism(name)
    one, two = (card.cost(Shape(1, 4, n, n, 16, 16), card.options()).flops for n in (512, 1024))
    assert two == 2 * one


@pytest.mark.parametrize(("name", "variant"), CASES, ids=[f"{n}-{v}" for n, v in CASES])
def test_the_cost_counts_visible_pairs(name, variant):
    card = get_mechanism(name)
    pattern = Pattern.CAUSAL_SELF if Pattern.CAUSAL_SELF in card.patterns else card.patterns[0]
    subject = Subject.of(card, pattern, variant)
    options = {**subject.options, "output_norm": "none"} if name == "diagonal" else subject.options
    subject = Subject(card, pattern, options)
    for n in (12, 24, 36) if name == "bigbird" else (0, 1, 7, 12, 31):  # cut random blocks count whole
        seen = pairs(subject, n)
        numbers = 2 * (4 * (2 if name in PLACES else 1) + 5)
        assert card.cost(Shape(1, len(seen), n, n, 4, 5), subject.config).flops == pytest.approx(numbers * seen.sum())
        if pattern.causal and name != "local":
            last = pairs(subject, n + 1)[:, -1].sum()
            step = card.cost(Shape(1, len(seen), 1, n, 4, 5), subject.config).step_flops
            assert step == pytest.approx(numbers * last)


SHARED_BY_HEADS = {"activator", "fnet", "funnel", "large_kernel", "mlp_mixer", "ninformer", "sea", "token_parameter"}
"""Mechanisms that mix channels across heads, or have parts that all heads share."""


@pytest.mark.parametrize("name", [x for x in list_mechanisms() if x != "s4d"])  # s4d makes its kernel once for all rows
def test_the_cost_of_twice_the_rows_or_heads_is_twice_as_high(name):
    card = get_mechanism(name)
    once, rows, heads = (card.cost(Shape(b, h, 256, 256, 32, 48), card.options()) for b, h in ((3, 4), (6, 4), (3, 8)))
    for of in ("flops", "step_flops"):
        assert getattr(rows, of) == pytest.approx(2 * getattr(once, of)), of
        if name not in SHARED_BY_HEADS:
            assert getattr(heads, of) == pytest.approx(2 * getattr(once, of)), of


COUNTED = [
    *(
        (name, {})
        for name in ("clipped_softmax", "cosformer", "delta_rule", "hard_softmax", "landmark", "lara", "linear")
    ),
    *((name, {}) for name in ("norm_linear", "random_feature", "sigmoid", "universal_rpe")),
    ("delta_rule", {"vector_beta": True}),
    ("gated_linear", {"gate": "none"}),  # without gates: only torch sums them by matrix products
    ("performer", {"kernel": "relu"}),
    ("performer", {"kernel": "relu", "num_features": 5}),
]
ROUGHLY = {"universal_rpe": 0.05}


def counted(subject: Subject, inputs: Tensors, also: Mapping[Any, Callable[..., int]], **call: Any) -> int:
    """Operations of a call in torch: those of matrix products and of the operators in `also`."""
    with torch.no_grad(), backends.only("torch"), FlopCounterMode(display=False, custom_mapping=dict(also)) as counter:
        subject.run(inputs, **call)
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "options"), COUNTED)
def test_the_cost_is_what_is_counted_of_the_products_in_torch(name, options):
    card = get_mechanism(name)
    pattern = Pattern.CAUSAL_SELF if Pattern.CAUSAL_SELF in card.patterns else card.patterns[0]
    subject = Subject(card, pattern, options)
    for n, width, value_width in ((64, 8, 7), (128, 8, 6), (192, 16, 12)):

        def solve(lower: torch.Size, right: torch.Size, *, width: int = width, **_: Any) -> int:
            return 2 * math.prod(lower) * (right[-1] - width)  # only for values; kernels do not solve for the keys

        inputs = subject.inputs(n, batch=1, d=width, k=width, v=value_width)
        found = counted(subject, inputs, {torch.ops.aten.linalg_solve_triangular: solve})
        cost = card.cost(Shape(1, inputs["q"].shape[1], n, n, width, value_width), subject.config)
        assert cost.flops == pytest.approx(found, rel=ROUGHLY.get(name, 1e-3))


STEPS = [
    *((name, {}) for name in ("cosformer", "gated_linear", "linear", "mlstm", "norm_linear")),
    ("delta_rule", {"gated": True}),
    ("performer", {"kernel": "relu"}),
]


@pytest.mark.parametrize(("name", "options"), STEPS)
def test_the_cost_of_a_step_is_what_is_counted_in_torch(name, options):
    card, batch, width, value_width = get_mechanism(name), 8, 96, 64
    subject = Subject(card, Pattern.CAUSAL_SELF, options)
    past, token = (subject.inputs(n, batch=batch, d=width, k=width, v=value_width) for n in (3, 1))
    each = dict.fromkeys((torch.ops.aten.mul, torch.ops.aten.add), lambda *_, out_shape, **__: math.prod(out_shape))
    found = counted(subject, token, each, state=subject.run(past, return_state=True).state)
    cost = card.cost(Shape(batch, token["q"].shape[1], 1, 3, width, value_width), subject.config)
    assert cost.step_flops == pytest.approx(found, rel=0.03)


@pytest.mark.parametrize(("name", "options"), [("delta_rule", {}), ("performer", {"kernel": "relu"})])
def test_the_memory_is_about_what_torch_holds_at_once(name, options):
    card, n = get_mechanism(name), 256
    subject = Subject(card, Pattern.CAUSAL_SELF, options)
    for width, value_width in ((8, 6), (8, 96), (64, 8)):
        inputs = subject.inputs(n, batch=1, d=width, k=width, v=value_width)
        with torch.no_grad(), backends.only("torch"):
            held = peak_memory(partial(subject.run, inputs)).bytes / 8
        cost = card.cost(Shape(1, inputs["q"].shape[1], n, n, width, value_width), subject.config)
        assert 1 < held / cost.memory < 1.6


@pytest.mark.parametrize(
    ("least", "most", "names"),
    [
        (1.95, 2.05, ["softmax", "sigmoid", "differential"]),
        (0.95, 1.05, ["linear", "gated_linear", "delta_rule", "mamba2", "local"]),
        (1.05, 1.2, ["fnet"]),  # grows as N log N
    ],
)
def test_the_cost_grows_with_the_tokens_as_its_class_does(least, most, names):
    for name in names:
        card = get_mechanism(name)
        short, long = (card.cost(Shape(1, 4, n, n, 32, 32), card.options()).flops for n in (4096, 16_384))
        assert least < math.log(long / short, 4) < most, name
