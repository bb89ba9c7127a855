"""What is peculiar to routing attention: who is in a cluster, no leak through it, its bounded state, its centroids, parity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, scaled_dot_product_attention

from regard.apply import absorb, apply
from regard.backends import only
from regard.catalogue import get_mechanism
from regard.contract import ALL_PATTERNS, Context, Mask, Shape, Unsupported
from regard.create import create_layer
from regard.mechanisms.routing import MECHANISM, Config, cost
from regard.models import LanguageModel, LanguageModelConfig

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
PATTERNS = [p.value for p in ALL_PATTERNS]
OPTIONS = [
    {"window": 3},
    {"window": 1},
    {"window": 5, "local_heads": 1},
    {"window": 5, "local_heads": 2},
    {"window": 100},
]


def inputs(n: int, m: int | None = None, clusters: int = 4, *, batch: int = 2, null: bool = True) -> dict[str, Tensor]:
    m = n if m is None else m
    shapes = {"q": (batch, 2, n, 4), "k": (batch, 2, m, 4), "v": (batch, 2, m, 5), "centroids": (2, clusters, 4)}
    if null:
        shapes |= {"null_k": (2, clusters, 4), "null_v": (2, clusters, 5)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", options: dict | None = None, **call: Any) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call).output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def one_row_in_words(t: dict[str, Tensor], pattern: str, w: int, *, local: bool) -> Tensor:
    """One head of one row: q (n, d), k (m, d), v (m, v), centroids (c, d), perhaps a null memory."""
    n, m, clusters = len(t["q"]), len(t["k"]), len(t["centroids"])
    of_q, of_k = (normalize(t[x], dim=-1) @ t["centroids"].mT for x in "qk")
    output = torch.zeros(n, t["v"].shape[-1], dtype=torch.float64)
    for i in range(n):
        end = i + 1 + m - n
        if local:
            near = (
                range(max(0, end - w), max(0, end))
                if pattern == "causal-self"
                else range(max(0, i - w // 2), min(n, i + w // 2 + 1))
            )
            groups = [(None, list(near))]
        elif pattern == "causal-self":
            c = int(of_q[i].argmax())
            groups = [(c, [j for j in range(max(0, end)) if int(of_k[j].argmax()) == c][-w:])]
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
    for b in range(tensors["q"].shape[0]):
        heads = []
        for h in range(2):
            one = {n: x[b, h] if n in "qkv" else x[h] for n, x in tensors.items()}
            heads.append(one_row_in_words(one, pattern, config.window, local=h < config.local_heads))
        rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("null", [True, False])
def test_each_form_equals_the_definition_in_words(options, pattern, null):
    cross = "cross" in pattern
    if cross and "local_heads" in options:
        pytest.skip("refused")
    for n, m in ((1, 1), (20, 20), (7, 18)) if cross else ((1, 1), (20, 20)):
        tensors = inputs(n, m, null=null)
        expected = in_words(tensors, pattern, options)
        close(run(tensors, pattern, options), expected)
        close(run(tensors, pattern, options, form="reference"), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_cluster_with_a_window_of_the_whole_row_is_dense_attention(pattern):
    tensors = inputs(13, clusters=1, null=False)
    expected = scaled_dot_product_attention(*(tensors[n] for n in "qkv"), is_causal=pattern == "causal-self")
    close(run(tensors, pattern, {"window": 13}), expected)


def test_a_later_token_pushes_no_earlier_one_out_of_its_cluster():
    """The highest scores of a whole row would belong to the later tokens alone."""
    tensors = inputs(30)
    before = run(tensors, options={"window": 3})
    altered = {name: x.clone() for name, x in tensors.items()}
    for c in range(4):
        for name in "qk":
            altered[name][:, :, 12:] = 5 * tensors["centroids"][:, None, c]
        close(run(altered, options={"window": 3})[:, :, :12], before[:, :, :12])


def test_the_state_does_not_grow_and_is_enough():
    config, tensors = Config(window=3), inputs(80)

    def cut(start: int, stop: int) -> dict[str, Tensor]:
        return {n: x[:, :, start:stop] if n in "qkv" else x for n, x in tensors.items()}

    whole, state, outputs = run(tensors, options={"window": 3}), None, []
    for start, stop in ((0, 2), (2, 50), (50, 51), (51, 80)):
        result = apply(MECHANISM, cut(start, stop), config=config, state=state, return_state=True)
        outputs.append(result.output)
        state = result.state
        kept = sum(x[0].numel() for n, x in state.tensors().items() if n != "length")
        assert kept == 2 * 4 * 3 * (4 + 5 + 1)
    close(torch.cat(outputs, 2), whole)
    shape = Shape(1, 2, 1, 80, 4, 5)
    assert cost(shape, Config(window=3, clusters=4)).state == kept
    assert MECHANISM.recurrent


def test_memory_may_come_in_any_order():
    tensors, config = inputs(6, 20), Config(window=3)
    expected = run(tensors, "causal-cross", {"window": 3})
    state, memory = None, {n: tensors[n] for n in ("k", "v", "centroids")}
    for part in torch.randperm(20).split(7):
        piece = {n: x[:, :, part] if n in "kv" else x for n, x in memory.items()}
        state = absorb(MECHANISM, piece, pattern="causal-cross", config=config, state=state)
    read = {n: x for n, x in tensors.items() if n not in "kv"}
    close(apply(MECHANISM, read, pattern="causal-cross", config=config, state=state).output, expected)


def test_a_query_that_no_centroid_takes_gives_zero():
    tensors = inputs(40, clusters=2)
    output = run(tensors, "noncausal-self", {"window": 5})
    assert int((output == 0).all(-1).sum()) >= 2 * 2 * (40 - 2 * 5)


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
    x, memory = (torch.randn(1, 12, 8, dtype=torch.float64) for _ in range(2))
    weights = {name: t.clone() for name, t in layer.state_dict().items()}
    short = [memory[:, :7]] if "cross" in pattern else []
    layer(x[:, :7], *short)
    expected = layer.projection.centroids.clone()
    for mask in (Mask(lengths=torch.tensor([7])), Mask(valid=torch.arange(12)[None] < 7)):
        layer.load_state_dict(weights)
        context = Context(mask=mask, memory_mask=mask if short else None)
        layer(x, *([memory] if short else []), context=context)
        close(layer.projection.centroids, expected)
    if not short:
        layer.load_state_dict(weights)
        layer(torch.cat([x[:, :7]] * 2, 1), context=Context(mask=Mask(cu_seqlens=torch.tensor([0, 7, 14]))))
        close(layer.projection.centroids, expected)


def test_the_commitment_loss_is_the_squared_distance_to_the_nearest_centroid():
    tensors = inputs(9, null=False)
    result = apply(MECHANISM, tensors, pattern="noncausal-self", training=True, mask=Mask(lengths=torch.tensor([9, 4])))
    total, count = result.losses["commitment"]
    expected = []
    for b, n in ((0, 9), (1, 4)):
        for h in range(2):
            for x in "qk":
                unit = normalize(tensors[x][b, h, :n], dim=-1)
                nearest = tensors["centroids"][h][(unit @ tensors["centroids"][h].mT).argmax(-1)]
                expected.append((unit - nearest).square().mean(-1))
    close(total / count, torch.cat(expected).mean())
    assert int(count) == 2 * 2 * 13
    assert not apply(MECHANISM, tensors, pattern="noncausal-self").losses


def test_a_model_weighs_the_commitment_as_public_code_does():
    config = LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=[("routing", {"window": 3, "decay": 1.0})])
    model, ids = LanguageModel(config).double().train(), torch.randint(11, (2, 20))
    result = model(ids)
    total, count = result.losses["commitment"]
    task = cross_entropy(result.output[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    close(model.loss(ids), task + 1e-4 * total / count)


def test_a_model_decodes_as_it_reads():
    plan = [("routing", {"window": 3, "clusters": 4, "local_heads": heads}) for heads in (0, 1)]
    model = LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan)).double().eval()
    ids = torch.randint(11, (2, 20))
    assert torch.equal(model.generate(ids, 20), model.generate(ids, 20, use_state=False))


def test_parity_with_a_third_partys_code():
    with np.load(FIXTURES / "routing_transformer.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files}
    tensors = {name: arrays[name] for name in ("q", "k", "v", "centroids", "null_k", "null_v")}
    leaves = [tensors[name].requires_grad_() for name in "qkv"]
    result = apply(MECHANISM, tensors, pattern="noncausal-self", config=Config(window=9), training=True)
    close(result.output, arrays["out"], 1e-10)
    total, count = result.losses["commitment"]
    close(1e-4 * total / count, arrays["commitment"], 1e-10)
    for name, gradient in zip("qkv", torch.autograd.grad(result.output, leaves, arrays["grad_out"]), strict=True):
        close(gradient, arrays[f"grad_{name}"], 1e-10)


def test_the_native_kernel_runs_the_blocks():
    tensors = {name: x.float() for name, x in inputs(70, clusters=6).items()}
    for pattern in ("causal-self", "noncausal-self"):
        with only("native"):
            found = run(tensors, pattern, {"window": 8})
        expected = run({n: x.double() for n, x in tensors.items()}, pattern, {"window": 8}, form="reference")
        close(found.double(), expected, 2e-6)


def test_what_it_lacks_is_refused_with_the_reason():
    assert get_mechanism("routing_transformer") is MECHANISM
    for options in ({"window": 0}, {"clusters": 0}, {"decay": 1.5}, {"decay": -0.1}, {"local_heads": -1}):
        with pytest.raises(Unsupported):
            Config(**options)
    with pytest.raises(Unsupported, match="no place near a query"):
        run(inputs(5), "causal-cross", {"local_heads": 1})
    with pytest.raises(Unsupported, match="local_heads=3"):
        run(inputs(5), "causal-self", {"local_heads": 3})
    tensors = inputs(5)
    del tensors["null_v"]
    with pytest.raises(Unsupported, match="null memory"):
        run(tensors)
    with pytest.raises(Unsupported):
        run(inputs(5), mask=Mask(bias=torch.zeros(1, 1, 5, 5)))
