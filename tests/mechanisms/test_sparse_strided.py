"""What is peculiar to the Sparse Transformer's patterns: both layouts, their combinations, and the step that reads few.

No parity: the paper's kernels run on GPUs alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Mask, Pattern, Shape, Unsupported
from regard.create import create_layer
from regard.engines.cache import KeyValueState
from regard.mechanisms import sparse_strided
from regard.mechanisms.sparse_strided import MECHANISM, Config, cost, count_pairs
from regard.models import LanguageModel, LanguageModelConfig

OPTIONS = [
    {"stride": 4},
    {"stride": 5, "combine": "heads"},
    {"stride": 3, "combine": "second"},
    {"stride": 1},
    {"layout": "fixed", "stride": 4, "columns": 1},
    {"layout": "fixed", "stride": 6, "columns": 2, "head_columns": True},
    {"layout": "fixed", "stride": 5, "columns": 2, "combine": "heads", "head_columns": True},
    {"layout": "fixed", "stride": 4, "columns": 3, "combine": "second"},
    {"layout": "fixed", "stride": 4, "combine": "first", "columns": 4},
    {"stride": 100},
]
SELF = ["causal-self", "noncausal-self"]


def inputs(n: int, m: int | None = None, batch: int = 2, heads: int = 3) -> dict[str, Tensor]:
    sizes = {"q": n, "k": n if m is None else m, "v": n if m is None else m}
    return {name: torch.randn(batch, heads, size, 4, dtype=torch.float64) for name, size in sizes.items()}


def run(tensors: dict[str, Tensor], pattern: str = "causal-self", options: dict | None = None, **call: Any) -> Tensor:
    return apply(MECHANISM, tensors, pattern=pattern, config=Config(**(options or {})), **call).output


def close(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def allowed(options: dict, pattern: str, n: int, heads: int = 3) -> Tensor:
    """Visible pairs (heads, n, n), from the definition in words."""
    config = Config(**options)
    s, c = config.stride, config.columns
    seen = torch.zeros(heads, n, n, dtype=torch.bool)
    for h in range(heads):
        for i in range(n):
            for j in range(n):
                if config.layout == "strided":
                    first, second = abs(i - j) < s, (i - j) % s == 0
                else:
                    back = c * (1 + (h % (s // c) if config.head_columns else 0))
                    first, second = i // s == j // s, s - back <= j % s < s - back + c
                kind = config.combine
                if kind == "heads":
                    kind = "first" if h < (heads + 1) // 2 else "second"
                both = {"first": first, "second": second, "union": first or second}[kind]
                seen[h, i, j] = both and (pattern == "noncausal-self" or j <= i)
    return seen


def masked(tensors: dict[str, Tensor], seen: Tensor) -> Tensor:
    scores = (tensors["q"] @ tensors["k"].mT / 2).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ tensors["v"]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("n", [1, 4, 13, 30])
def test_equals_masked_dense_attention(options, pattern, n):
    tensors = inputs(n)
    expected = masked(tensors, allowed(options, pattern, n))
    close(run(tensors, pattern, options), expected)
    close(run(tensors, pattern, options, form="reference"), expected)


@pytest.mark.parametrize("pattern", SELF)
@pytest.mark.parametrize("layout", ["strided", "fixed"])
def test_a_stride_of_the_whole_sequence_is_softmax_attention(layout, pattern):
    tensors = inputs(23)
    softmax = apply(get_mechanism("softmax"), tensors, pattern=pattern).output
    close(run(tensors, pattern, {"layout": layout, "stride": 23}), softmax)
    close(run(tensors, pattern, {"stride": 1, "combine": "second"}), softmax)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_causal_query_does_not_see_later_tokens(options):
    tensors = {name: x.requires_grad_() for name, x in inputs(19, batch=1).items()}
    output = run(tensors, options=options)
    for i in (0, 3, 11, 17):
        for gradient in torch.autograd.grad(output[0, :, i].sum(), list(tensors.values()), retain_graph=True):
            assert (gradient[0, :, i + 1 :] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("pattern", SELF)
def test_padding_moves_no_pattern(options, pattern):
    tensors, valid = inputs(26, batch=4), torch.rand(4, 26) < torch.tensor([0.1, 0.5, 0.9, 1.0])[:, None]
    found = run(tensors, pattern, options, mask=Mask(valid=valid))
    for row in range(4):
        alone = {name: x[row : row + 1, :, valid[row]] for name, x in tensors.items()}
        count = int(valid[row].sum())
        close(found[row : row + 1, :, valid[row]], masked(alone, allowed(options, pattern, count)))
        assert (found[row, :, ~valid[row]] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("n", "m"), [(9, 14), (14, 9), (1, 12)])
def test_uneven_calls_align_at_the_end(options, n, m):
    tensors = inputs(n, m)
    seen = allowed(options, "causal-self", max(n, m))[:, max(n, m) - n :, :m] if m >= n else None
    if seen is None:
        seen = torch.cat([torch.zeros(3, n - m, m, dtype=torch.bool), allowed(options, "causal-self", m)], 1)
    close(run(tensors, options=options), masked(tensors, seen))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", [[1] * 23, [23], [1, 7, 1, 0, 14]])
def test_decoding_equals_the_whole(options, sizes):
    tensors, state, outputs = inputs(23), None, []
    for part in torch.arange(23).split(sizes):
        piece = {name: x[:, :, part] for name, x in tensors.items()}
        result = apply(MECHANISM, piece, state=state, return_state=True, config=Config(**options))
        outputs.append(result.output)
        state = result.state
    close(torch.cat(outputs, 2), run(tensors, options=options))


@pytest.mark.parametrize("options", OPTIONS)
def test_rows_of_different_lengths_step_each_from_its_own_place(options):
    tensors, lengths = inputs(17, batch=3), torch.tensor([16, 5, 0])
    config = Config(**options)
    start = {name: x[:, :, :16] for name, x in tensors.items()}
    state = apply(MECHANISM, start, mask=Mask(lengths=lengths), return_state=True, config=config).state
    token = {name: torch.stack([x[b, :, lengths[b] : lengths[b] + 1] for b in range(3)]) for name, x in tensors.items()}
    found = apply(MECHANISM, token, state=state, config=config).output
    whole = run(tensors, options=options)
    close(found, torch.stack([whole[b, :, lengths[b] : lengths[b] + 1] for b in range(3)]))


@pytest.mark.parametrize("options", [{"stride": 20}, {"layout": "fixed", "stride": 20, "columns": 3}])
def test_a_step_reads_the_keys_that_it_sees(options, monkeypatch):
    """After 400 tokens: a window or block of 20, and 20 others or 20 times 3."""
    config, n = Config(**options), 400
    state = apply(MECHANISM, inputs(n, batch=1), return_state=True, config=config).state
    read = []
    attend = sparse_strided.attention
    monkeypatch.setattr(
        sparse_strided, "attention", lambda q, k, *rest, **kw: read.append(k.shape[2]) or attend(q, k, *rest, **kw)
    )
    apply(MECHANISM, inputs(1, batch=1), state=state, config=config)
    assert isinstance(state, KeyValueState)
    assert len(read) == 1 and read[0] <= 20 + 21 * (3 if config.layout == "fixed" else 1)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("n", [0, 1, 7, 12, 31])
def test_the_cost_counts_visible_pairs(options, n):
    config = Config(**options)
    seen = allowed(options, "causal-self", n).sum()
    assert count_pairs(config, n, 3) == pytest.approx(float(seen) / 3)
    assert cost(Shape(2, 3, n, n, 4, 5), config).flops == pytest.approx(2 * 2 * 9 * float(seen))
    last = allowed(options, "causal-self", n + 1)[:, -1].sum()
    assert cost(Shape(2, 3, 1, n, 4, 5), config).step_flops == 2 * 2 * 9 * last


@pytest.mark.parametrize("layout", ["strided", "fixed"])
def test_two_layers_connect_any_two_tokens(layout):
    """With one column of each block, as the paper has it."""
    layers = [create_layer("sparse_strided", 6, 1, layout=layout, stride=5, columns=1).double() for _ in range(2)]
    x = torch.randn(1, 30, 6, dtype=torch.float64, requires_grad=True)
    once = layers[0](x).output
    (near,) = torch.autograd.grad(once[0, 29].sum(), x, retain_graph=True)
    (far,) = torch.autograd.grad(layers[1](once).output[0, 29].sum(), x)
    assert (near[0].abs().sum(-1) > 0).sum() == 10
    assert (far[0].abs().sum(-1) > 0).all()


def test_a_model_of_alternating_patterns_decodes_as_it_reads():
    plan = [("sparse_strided", {"stride": 4, "combine": kind}) for kind in ("first", "second")]
    model = LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, num_heads=2, plan=plan)).double().eval()
    ids = torch.randint(11, (2, 6))
    assert torch.equal(model.generate(ids, 12), model.generate(ids, 12, use_state=False))


def test_what_it_lacks_is_refused_with_the_reason():
    for pattern in (Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS):
        with pytest.raises(Unsupported, match="no place near a query"):
            create_layer("sparse_strided", 8, 2, pattern=pattern)
    for options in (
        {"layout": "random"},
        {"stride": 0},
        {"combine": "alternate"},
        {"layout": "fixed", "stride": 4, "columns": 5},
        {"layout": "fixed", "columns": 0},
        {"head_columns": True},
    ):
        with pytest.raises(Unsupported):
            Config(**options)
