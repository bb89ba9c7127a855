"""Tests specific to Longformer: windows, dilation, global tokens that count once, its state, and parity."""

from __future__ import annotations

import pytest
import torch
from support import calls, close, in_pieces, load, qkv, refused
from torch import Tensor

from regard.contract import Context, Mask, Role
from regard.create import create_layer
from regard.integrations import swap
from regard.mechanisms.longformer import MECHANISM, Config, copy_projections
from regard.models import LanguageModel, LanguageModelConfig

run = calls(MECHANISM)
OPTIONS = [
    {"window": 4},
    {"window": 2, "global_tokens": 0},
    {"window": 6, "global_tokens": 3},
    {"window": 4, "dilation": 3, "global_tokens": 2},
    {"window": 2, "dilation": (1, 4)},
    {"window": 100, "global_tokens": 5},
]


def sample(n: int, batch: int = 2, own: bool = True) -> dict[str, Tensor]:
    """Random inputs; with `own`, global tokens have separate projections."""
    more = {f"{name}_global": x for name, x in qkv(n, batch=batch).items()} if own else {}
    return qkv(n, batch=batch) | more


def allowed(options: dict, pattern: str, n: int, chosen: set[int]) -> Tensor:
    """Pairs (head, i, j) that non-global tokens see, by the definition in words."""
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


def definition(inputs: dict[str, Tensor], pattern: str, options: dict, chosen: set[int]) -> Tensor:
    """The definition for unpadded rows that share the same global tokens."""
    q, k, v = (inputs[name] for name in "qkv")
    own = [inputs.get(f"{name}_global", inputs[name]) for name in "qkv"]
    n = q.shape[2]
    seen = allowed(options, pattern, n, chosen)
    local = (q @ k.mT / 2).masked_fill(~seen, -torch.inf).softmax(-1) @ v
    past = torch.ones(n, n, dtype=torch.bool)
    past = past.tril() if pattern == "causal-self" else past
    far = (own[0] @ own[1].mT / 2).masked_fill(~past, -torch.inf).softmax(-1) @ own[2]
    is_global = torch.tensor([i in chosen for i in range(n)])
    return torch.where(is_global[:, None], far, local)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
@pytest.mark.parametrize("n", [1, 4, 13, 70])
def test_equals_its_definition(options, pattern, n, own):
    inputs = sample(n, own=own)
    chosen = set(range(min(Config(**options).global_tokens, n)))
    for form in (None, "reference"):
        found = run(inputs, options, pattern=pattern, form=form).output
        close(found, definition(inputs, pattern, options, chosen), 1e-11)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_a_key_head_serves_all_query_heads_of_its_group(pattern, options):
    inputs = sample(30)
    for name in ("k", "v", "k_global", "v_global"):
        inputs[name] = inputs[name][:, :1]
    repeated = {name: x.expand(-1, 2, -1, -1) for name, x in inputs.items()}
    chosen = set(range(Config(**options).global_tokens))
    for form in (None, "reference"):
        found = run(inputs, options, pattern=pattern, form=form).output
        close(found, definition(repeated, pattern, options, chosen), 1e-11)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_equal_the_definition_before_and_after_a_window_leaves_the_first_tokens_behind(options, heads):
    inputs = sample(40)
    inputs |= {name: inputs[name][:, :heads] for name in ("k", "v", "k_global", "v_global")}
    tokens = [{name: x[:, :, at : at + 1] for name, x in inputs.items()} for at in range(40)]
    found, _ = in_pieces(lambda token, state: run(token, options, state=state, return_state=True), tokens)
    repeated = {name: x.expand(-1, 2, -1, -1) for name, x in inputs.items()}
    close(found, definition(repeated, "causal-self", options, set(range(Config(**options).global_tokens))), 1e-11)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_with_the_role_of_a_class_token_are_global(options):
    inputs, roles = sample(21, batch=3), torch.zeros(3, 21, dtype=torch.long)
    roles[0, [4, 5, 20]] = int(Role.CLS)
    roles[1, 0] = int(Role.CLS)
    roles[2, 3] = int(Role.LANDMARK)  # a role of other mechanisms
    for form in (None, "reference"):
        found = run(inputs, options, pattern="noncausal-self", roles=roles, form=form).output
        for row, chosen in enumerate(({4, 5, 20}, {0}, set())):
            alone = {name: x[row : row + 1] for name, x in inputs.items()}
            chosen |= set(range(Config(**options).global_tokens))
            close(found[row : row + 1], definition(alone, "noncausal-self", options, chosen), 1e-11)


def make_layer(**options: object) -> torch.nn.Module:
    return create_layer("longformer", 8, 2, pattern="noncausal-self", window=2, **options).double()


def test_a_layer_has_projections_of_its_own_for_global_tokens():
    layer, shared = make_layer(), make_layer(separate_projections=False)
    shared.load_state_dict({name: x for name, x in layer.state_dict().items() if "projection" not in name})
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    first, second = layer(x).output, shared(x).output
    close(first[:, 1:], second[:, 1:], 1e-11)
    assert not torch.allclose(first[:, 0], second[:, 0])
    assert copy_projections(layer) is layer  # the paper's initialisation
    close(layer(x).output, second, 1e-11)


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
    close(copy_projections(model)(ids).output, expected, 1e-11)


def test_parity_with_transformers():
    arrays = load("longformer_transformers")
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


def copy_into_a_swapped_module() -> None:
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    swap(model, "longformer", window=2)
    copy_projections(model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_layer("longformer", 8, 2, dilation=(1, 2, 3)), "3 dilations for 2 heads"),
        (lambda: run(sample(3), {"dilation": (1, 2, 3)}), "3 dilations for 2 heads"),
        (lambda: run(sample(3), roles=torch.zeros(2, 3, dtype=torch.long)), "roles in causal-self"),
        (copy_into_a_swapped_module, "swapped module"),
    ],
)
def test_what_it_lacks_is_refused_with_the_reason(call, message):
    refused(message, call)
