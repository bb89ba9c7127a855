"""Tests specific to routing attention: cluster members, centroids, the loss that pulls tokens to them, and parity."""

from __future__ import annotations

import itertools

import pytest
import torch
from support import calls, check_recorded, close, load, refused
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from regard.contract import ALL_PATTERNS, Context, Mask, Shape
from regard.create import create_layer
from regard.mechanisms.routing import MECHANISM, Config, cost
from regard.models import LanguageModel, LanguageModelConfig

OPTIONS = [
    {"window": 3},
    {"window": 1},
    {"window": 5, "local_heads": 1},
    {"window": 5, "local_heads": 2},
    {"window": 100},
]
run = calls(MECHANISM)


def inputs(n: int, m: int | None = None, clusters: int = 4, *, null: bool = True) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {"q": (2, 2, n, 4), "k": (2, 2, m, 4), "v": (2, 2, m, 5), "centroids": (2, clusters, 4)}
    if null:
        shapes |= {"null_k": (2, clusters, 4), "null_v": (2, clusters, 5)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def one_row_in_words(t: dict[str, Tensor], pattern: str, w: int, *, local: bool) -> Tensor:
    """The definition for one head and row: q (n, d), k (m, d), v (m, v), centroids (c, d), optional null memory."""
    n, m, clusters = len(t["q"]), len(t["k"]), len(t["centroids"])
    of_q, of_k = (normalize(t[x], dim=-1) @ t["centroids"].mT for x in "qk")
    output = torch.zeros(n, t["v"].shape[-1], dtype=torch.float64)
    for i in range(n):
        if local:
            first, last = (i + 1 - w, i + 1) if pattern == "causal-self" else (i - w // 2, i + w // 2 + 1)
            groups = [(None, list(range(max(0, first), min(n, last))))]
        elif pattern == "causal-self":
            c = int(of_q[i].argmax())
            groups = [(c, [j for j in range(i + 1) if int(of_k[j].argmax()) == c][-w:])]
        else:
            taken = [of_k[:, c].topk(min(w, m)).indices.tolist() for c in range(clusters)]
            mine = [int(of_q[i].argmax())]
            if pattern == "noncausal-self":
                mine = [c for c in range(clusters) if i in of_q[:, c].topk(min(w, n)).indices.tolist()]
            groups = [(c, taken[c]) for c in mine]
        for c, members in groups:
            if members:
                k, v = t["k"][members], t["v"][members]
                if c is not None and "null_k" in t:
                    k, v = torch.cat([k, t["null_k"][c][None]]), torch.cat([v, t["null_v"][c][None]])
                output[i] += (k @ t["q"][i] / 2).softmax(0) @ v / len(groups)
    return output


def in_words(tensors: dict[str, Tensor], pattern: str, options: dict) -> Tensor:
    config = Config(**options)
    rows = []
    for b, h in itertools.product(range(2), range(2)):
        one = {n: x[b, h] if n in "qkv" else x[h] for n, x in tensors.items()}
        rows.append(one_row_in_words(one, pattern, config.window, local=h < config.local_heads))
    return torch.stack(rows).unflatten(0, (2, 2))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("pattern", ALL_PATTERNS)
@pytest.mark.parametrize("null", [True, False])
def test_each_form_equals_the_definition_in_words(options, pattern, null):
    if pattern.cross and "local_heads" in options:
        pytest.skip("refused")
    for n, m in ((1, 1), (20, 20), *([(7, 18)] if pattern.cross else [])):
        tensors = inputs(n, m, null=null)
        expected = in_words(tensors, pattern, options)
        for form in (None, "reference"):
            close(run(tensors, options, pattern=pattern, form=form).output, expected)


def test_the_state_has_the_size_that_the_card_says():
    state = run(inputs(80), {"window": 3}, return_state=True).state
    kept = sum(x[0].numel() for name, x in state.tensors().items() if name != "length")
    assert kept == 2 * 4 * 3 * (4 + 5 + 1) == cost(Shape(1, 2, 1, 80, 4, 5), Config(window=3, clusters=4)).state
    assert MECHANISM.recurrent


def test_centroids_move_towards_their_tokens_in_training_only():
    layer = create_layer("routing", 8, 2, window=4, clusters=3, decay=0.5).double()
    before = layer.projection.centroids.clone()
    x = torch.randn(2, 40, 8, dtype=torch.float64)
    layer.eval()(x)
    assert torch.equal(layer.projection.centroids, before)
    layer.train()(x)
    q, k = (y.view(2, 40, 2, 4).transpose(1, 2) for y in (layer.query(x), layer.key(x)))
    tokens = normalize(torch.cat([q, k], 2), dim=-1)
    for h in range(2):
        mine = tokens[:, h].flatten(0, 1)
        nearest = (mine @ before[h].mT).argmax(-1)
        for c in range(3):
            expected = before[h, c]
            if (nearest == c).any():
                expected = normalize(0.5 * before[h, c] + 0.5 * normalize(mine[nearest == c].sum(0), dim=0), dim=0)
            close(layer.projection.centroids[h, c], expected)
    assert "projection.centroids" in layer.state_dict()


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-cross"])
def test_padding_moves_no_centroid(pattern):
    options = {"window": 4, "clusters": 3, "decay": 0.5, "pattern": pattern, "bias": True}
    layer = create_layer("routing", 8, 2, **options).double().train()
    weights = {name: t.clone() for name, t in layer.state_dict().items()}

    def centroids_after(x: Tensor, memory: Tensor, **masks: Mask) -> Tensor:
        layer.load_state_dict(weights)
        layer(x, *([memory] if "cross" in pattern else []), context=Context(**masks))
        return layer.projection.centroids.clone()

    x, memory = (torch.randn(1, 12, 8, dtype=torch.float64) for _ in range(2))
    expected = centroids_after(x[:, :7], memory[:, :7])
    for mask in (Mask(lengths=torch.tensor([7])), Mask(valid=torch.arange(12)[None] < 7)):
        close(centroids_after(x, memory, mask=mask, memory_mask=mask if "cross" in pattern else None), expected)
    if "cross" not in pattern:
        twice = Mask(cu_seqlens=torch.tensor([0, 7, 14]))
        close(centroids_after(x[:, :7].repeat(1, 2, 1), memory, mask=twice), expected)


def test_the_commitment_loss_is_the_squared_distance_to_the_nearest_centroid():
    tensors = inputs(9, null=False)
    call = {"pattern": "noncausal-self", "mask": Mask(lengths=torch.tensor([9, 4]))}
    total, count = run(tensors, training=True, **call).losses["commitment"]
    expected = []
    for b, n in ((0, 9), (1, 4)):
        for h in range(2):
            for x in "qk":
                unit = normalize(tensors[x][b, h, :n], dim=-1)
                nearest = tensors["centroids"][h][(unit @ tensors["centroids"][h].mT).argmax(-1)]
                expected.append((unit - nearest).square().mean(-1))
    close(total / count, torch.cat(expected).mean())
    assert int(count) == 2 * 2 * 13
    assert not run(tensors, **call).losses


def test_a_model_weighs_the_commitment_as_public_code_does():
    config = LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=[("routing", {"window": 3, "decay": 1.0})])
    model, ids = LanguageModel(config).double().train(), torch.randint(11, (2, 20))
    result = model(ids)
    total, count = result.losses["commitment"]
    task = cross_entropy(result.output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(model.loss(ids), task + 1e-4 * total / count)


def test_parity_with_a_third_partys_code():
    arrays = load("routing_transformer")
    tensors = {name: arrays[name] for name in ("q", "k", "v", "centroids", "null_k", "null_v")}
    leaves = {name: tensors[name].requires_grad_() for name in "qkv"}
    result = run(tensors, {"window": 9}, pattern="noncausal-self", training=True)
    check_recorded(arrays, result.output, leaves, 1e-10)
    total, count = result.losses["commitment"]
    close(1e-4 * total / count, arrays["commitment"], 1e-10)


def test_what_it_lacks_is_refused_with_the_reason():
    refused("no position relative to a query", run, inputs(5), {"local_heads": 1}, pattern="causal-cross")
    refused("local_heads=3", run, inputs(5), {"local_heads": 3})
    refused("null memory", run, inputs(5) | {"null_v": None})
