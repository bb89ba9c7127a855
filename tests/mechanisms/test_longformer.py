"""What is peculiar to Longformer: windows, dilation, global tokens that count once, its state, and parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Context, Mask, Pattern, Role, Shape, Unsupported
from regard.create import create_layer
from regard.integrations import swap
from regard.mechanisms.longformer import MECHANISM, Config, copy_projections, cost, visible_pairs
from regard.models import LanguageModel, LanguageModelConfig

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
OPTIONS = [
    {"window": 4},
    {"window": 2, "global_tokens": 0},
    {"window": 6, "global_tokens": 3},
    {"window": 4, "dilation": 3, "global_tokens": 2},
    {"window": 2, "dilation": (1, 4)},
    {"window": 100, "global_tokens": 5},
]
SELF = ["causal-self", "noncausal-self"]


def inputs(n: int, batch: int = 2, own: bool = True) -> dict[str, Tensor]:
    names = ("q", "k", "v", *(("q_global", "k_global", "v_global") if own else ()))
    return {name: torch.randn(batch, 2, n, 4, dtype=torch.float64) for name in names}


def run(tensors: dict[str, Tensor], pattern: str, options: dict, **call: Any) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**options), **call).output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def allowed(options: dict, pattern: str, n: int, chosen: set[int]) -> Tensor:
    """Pairs (head, i, j) that a token which is not global sees, from the definition in words."""
    config = Config(**options)
    seen = torch.zeros(2, n, n, dtype=torch.bool)
    for head in range(2):
        g = config.dilations[head % len(config.dilations)]
        for i in range(n):
            if pattern == "causal-self":
                near = {i - a * g for a in range(config.window)}
                keys = {j for j in near | chosen if 0 <= j <= i}
            else:
                near = {i + a * g for a in range(-(config.window // 2), config.window // 2 + 1)}
                keys = {j for j in near | chosen if 0 <= j < n}
            seen[head, i, sorted(keys)] = True
    return seen


def expected(tensors: dict[str, Tensor], pattern: str, options: dict, chosen: set[int]) -> Tensor:
    """One row of unpadded tokens, query by query."""
    q, k, v = (tensors[name] for name in "qkv")
    own = [tensors.get(f"{name}_global", tensors[name]) for name in "qkv"]
    n = q.shape[2]
    seen = allowed(options, pattern, n, chosen)
    local = (q @ k.mT / 2).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    past = torch.ones(n, n, dtype=torch.bool)
    past = past.tril() if pattern == "causal-self" else past
    far = (own[0] @ own[1].mT / 2).masked_fill(~past, -torch.inf).softmax(-1) @ own[2]
    is_global = torch.tensor([i in chosen for i in range(n)])
    return torch.where(is_global[:, None], far, local)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("n", [1, 4, 13, 70])
def test_equals_its_definition(options, pattern, n, own):
    tensors = inputs(n, own=own)
    chosen = set(range(min(Config(**options).global_tokens, n)))
    for form in (None, "reference"):
        close(run(tensors, pattern, options, form=form), expected(tensors, pattern, options, chosen))


@pytest.mark.parametrize("options", OPTIONS)
def test_tokens_with_the_role_of_a_class_token_are_global(options):
    tensors, roles = inputs(21, batch=3), torch.zeros(3, 21, dtype=torch.long)
    roles[0, [4, 5, 20]] = int(Role.CLS)
    roles[1, 0] = int(Role.CLS)
    roles[2, 3] = int(Role.LANDMARK)  # of other mechanisms
    first = set(range(Config(**options).global_tokens))
    for form in (None, "reference"):
        found = run(tensors, "noncausal-self", options, roles=roles, form=form)
        for row in range(3):
            alone = {name: x[row : row + 1] for name, x in tensors.items()}
            chosen = first | set((roles[row] == int(Role.CLS)).nonzero()[:, 0].tolist())
            close(found[row : row + 1], expected(alone, "noncausal-self", options, chosen))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("roles", [True, False])
def test_padding_does_not_leak(options, roles):
    """Nor do roles of padding make it global."""
    tensors, valid = inputs(30, batch=4), torch.rand(4, 30) < torch.tensor([0.1, 0.5, 0.9, 1.0])[:, None]
    chosen = (torch.rand(4, 30) < 0.2).long() * int(Role.CLS) if roles else None
    for pattern in ["noncausal-self"] if roles else SELF:
        found = run(tensors, pattern, options, mask=Mask(valid=valid), roles=chosen)
        for row in range(4):
            alone = {name: x[row : row + 1, :, valid[row]] for name, x in tensors.items()}
            own = None if chosen is None else chosen[row : row + 1, valid[row]]
            close(found[row : row + 1, :, valid[row]], run(alone, pattern, options, roles=own))
            assert (found[row, :, ~valid[row]] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_a_causal_query_does_not_see_later_tokens(options):
    tensors = {name: x.requires_grad_() for name, x in inputs(19, batch=1).items()}
    output = run(tensors, "causal-self", options)
    for i in (0, 1, 7, 17):
        reached = output[0, :, i].sum()
        gradients = torch.autograd.grad(reached, list(tensors.values()), retain_graph=True, allow_unused=True)
        assert all(gradient is None or (gradient[0, :, i + 1 :] == 0).all() for gradient in gradients)


@pytest.mark.parametrize("pattern", SELF)
def test_a_window_over_everything_is_softmax_attention(pattern):
    tensors = inputs(37, own=False)
    softmax = apply(get_mechanism("softmax"), tensors, pattern=pattern).output
    for count in (0, 1, 9):
        close(run(tensors, pattern, {"window": 74, "global_tokens": count}), softmax)


def test_a_global_key_inside_the_window_counts_once():
    """Equal scores: the output is the mean of the values that are seen."""
    tensors = inputs(9, own=False)
    tensors["k"] = torch.zeros_like(tensors["k"])
    found = run(tensors, "noncausal-self", {"window": 4, "global_tokens": 2})
    close(found[:, :, 2], tensors["v"][:, :, :5].mean(2))
    close(found[:, :, 8], tensors["v"][:, :, [0, 1, 6, 7, 8]].mean(2))
    close(found[:, :, 0], tensors["v"].mean(2))


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("global_tokens") == 0 or o.get("dilation") is None])
def test_without_global_tokens_it_is_local_attention(options):
    tensors, local = inputs(29, own=False), get_mechanism("local")
    for pattern in SELF:
        window = options["window"] if pattern == "causal-self" else options["window"] // 2
        config = local.options(window=window)
        near = apply(local, tensors, pattern=pattern, config=config).output
        close(run(tensors, pattern, {**options, "global_tokens": 0}), near)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", [[1] * 23, [23], [1, 7, 1, 0, 14], [4, 5, 6, 8]])
def test_decoding_equals_the_whole(options, sizes):
    tensors, state, outputs = inputs(23), None, []
    for part in torch.arange(23).split(sizes):
        piece = {name: x[:, :, part] for name, x in tensors.items()}
        result = apply(MECHANISM, piece, state=state, return_state=True, config=Config(**options))
        outputs.append(result.output)
        state = result.state
    close(torch.cat(outputs, 2), run(tensors, "causal-self", options))
    kept = sum(x[0].numel() for name, x in state.tensors().items() if name != "length")
    assert kept == cost(Shape(1, 2, 1, 1000, 4, 4), Config(**options)).state


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [0, 1, 7, 12, 31])
def test_the_cost_counts_visible_pairs(options, n):
    config = Config(**options)
    count = min(config.global_tokens, n)
    seen = allowed(options, "causal-self", n, set(range(count))).sum((1, 2)).double().mean()
    assert visible_pairs(config, n) == seen
    assert cost(Shape(2, 2, n, n, 4, 5), config).flops == 2 * 2 * 2 * 9 * seen
    last = allowed(options, "causal-self", n + 1, set(range(config.global_tokens)))[:, -1].sum(-1).double().mean()
    assert cost(Shape(2, 2, 1, n, 4, 5), config).step_flops == 2 * 2 * 2 * 9 * last


def test_one_layer_carries_a_first_token_to_all_and_two_carry_anything():
    layers = [create_layer("longformer", 8, 2, pattern="noncausal-self", window=2).double() for _ in range(2)]
    x = torch.randn(1, 30, 8, dtype=torch.float64, requires_grad=True)
    once = layers[0](x).output
    (near,) = torch.autograd.grad(once[0, 20].sum(), x, retain_graph=True)
    assert (near[0].abs().sum(-1) > 0).nonzero()[:, 0].tolist() == [0, 19, 20, 21]
    (far,) = torch.autograd.grad(layers[1](once).output[0, 20].sum(), x)
    assert (far[0].abs().sum(-1) > 0).all()


def test_a_layer_has_projections_of_its_own_for_global_tokens():
    layer = create_layer("longformer", 8, 2, pattern="noncausal-self", window=2).double()
    shared = create_layer("longformer", 8, 2, pattern="noncausal-self", window=2, separate_projections=False).double()
    shared.load_state_dict({name: x for name, x in layer.state_dict().items() if "projection" not in name})
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    first, second = layer(x).output, shared(x).output
    close(first[:, 1:], second[:, 1:])
    assert not torch.allclose(first[:, 0], second[:, 0])
    assert copy_projections(layer) is layer  # as the paper begins
    close(layer(x).output, second)


def test_a_trained_softmax_model_becomes_one_with_copied_projections():
    softmax, model = (
        LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, positions="none", plan=[entry] * 2))
        for entry in ("softmax", ("longformer", {"window": 40, "global_tokens": 2}))
    )
    missing = model.load_state_dict(softmax.state_dict(), strict=False).missing_keys
    assert missing and all("projection" in name for name in missing)
    ids = torch.randint(11, (2, 20))
    expected = softmax.double()(ids).output
    assert not torch.allclose(model.double()(ids).output, expected)
    close(copy_projections(model)(ids).output, expected)


def test_projections_of_a_swapped_module_are_not_copied():
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    swap(model, "longformer", window=2)
    with pytest.raises(Unsupported, match="swapped module"):
        copy_projections(model)


def test_a_model_decodes_past_its_window():
    plan = [("longformer", {"window": 4, "dilation": d}) for d in (1, 2)]
    model = LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan)).double().eval()
    ids = torch.randint(11, (2, 6))
    assert torch.equal(model.generate(ids, 12), model.generate(ids, 12, use_state=False))


def test_dropout_keeps_the_mean():
    tensors = {name: x.expand(200, -1, -1, -1) for name, x in inputs(20, batch=1).items()}
    options = {"window": 4}
    exact = run(tensors, "causal-self", options)[0]
    generator = torch.Generator().manual_seed(0)
    dropped = run(tensors, "causal-self", options, dropout=0.3, generator=generator)
    assert not torch.equal(dropped[0], dropped[1])
    assert (dropped.mean(0) - exact).abs().max() < 0.35 * exact.abs().max()
    again = run(tensors, "causal-self", options, dropout=0.3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropped, again)


def test_parity_with_transformers():
    with np.load(FIXTURES / "longformer_transformers.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    layer = create_layer("longformer", 8, 2, pattern="noncausal-self", window=4, global_tokens=0, bias=True).double()
    weights = layer.state_dict()
    for name in ("query", "key", "value"):
        for kind in ("weight", "bias"):
            weights[f"{name}.{kind}"] = arrays[f"weight_{name}_{kind}"]
            weights[f"projection.{name}.{kind}"] = arrays[f"weight_{name}_global_{kind}"]
    weights["output.weight"], weights["output.bias"] = torch.eye(8), torch.zeros(8)
    layer.load_state_dict(weights)
    x, kind = arrays["x"].requires_grad_(), arrays["kind"]
    context = Context(mask=Mask(valid=kind >= 0), roles=(kind > 0).long() * int(Role.CLS))
    output = layer(x, context=context).output
    close(output[kind >= 0], arrays["out"][kind >= 0], 1e-10)
    (gradient,) = torch.autograd.grad(output, x, arrays["grad_out"])
    close(gradient[kind >= 0], arrays["grad_x"][kind >= 0], 1e-10)


def test_what_it_lacks_is_refused_with_the_reason():
    for pattern in (Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS):
        with pytest.raises(Unsupported, match="no place near a query"):
            create_layer("longformer", 8, 2, pattern=pattern)
    for options in ({"window": 5}, {"window": 0}, {"dilation": 0}, {"dilation": ()}, {"global_tokens": -1}):
        with pytest.raises(Unsupported):
            Config(**options)
    with pytest.raises(Unsupported, match="window=6"):
        Config(window=5)
    for make in (
        lambda: create_layer("longformer", 8, 2, dilation=(1, 2, 3)),
        lambda: run(inputs(3), "causal-self", {"dilation": (1, 2, 3)}),
    ):
        with pytest.raises(Unsupported, match="3 dilations for 2 heads"):
            make()
    with pytest.raises(Unsupported, match="roles in causal-self"):
        run(inputs(3), "causal-self", {}, roles=torch.zeros(2, 3, dtype=torch.long))
