"""Norms, projections, feed-forward networks, short convolution, patches, and the ragged layouts beneath them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from support import close
from torch import Tensor, nn
from torch.nn import functional as F

from regard.contract import Mask, Unsupported
from regard.core.ragged import (
    flip_rows,
    gather_pairs,
    gathering,
    gathering_in_place,
    place_queries,
    take_queries,
)
from regard.core.visibility import Visibility
from regard.layers import linear
from regard.layers.convolution import ShortConvolution
from regard.layers.feed_forward import MLP, SwiGLU, dropout, make_feed_forward
from regard.layers.linear import list_linears, make_linear, register_linear
from regard.layers.norms import LayerNorm, LayerScale, RMSNorm, make_norm
from regard.layers.patches import FeatureEmbedding, PatchEmbedding

float64 = torch.float64

# Masks over (batch, 7): (mask, batch, the sequences it describes as (row, columns)).
VALID = torch.tensor([[0, 0, 1, 1, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
MASKS: dict[str, tuple[Mask | None, int, list[tuple[int, list[int]]]]] = {
    "none": (None, 2, [(0, list(range(7))), (1, list(range(7)))]),
    "lengths": (Mask(lengths=torch.tensor([3, 0, 7])), 3, [(0, [0, 1, 2]), (1, []), (2, list(range(7)))]),
    "valid": (Mask(valid=VALID), 3, [(0, [2, 3, 4, 6]), (1, []), (2, list(range(7)))]),
    "packed": (
        Mask(cu_seqlens=torch.tensor([0, 0, 2, 2, 6, 7, 7], dtype=torch.int32), max_length=4),
        1,
        [(0, []), (0, [0, 1]), (0, []), (0, [2, 3, 4, 5]), (0, [6]), (0, [])],
    ),
    "roomy": (Mask(cu_seqlens=torch.tensor([0, 3, 7]), max_length=6), 1, [(0, [0, 1, 2]), (0, [3, 4, 5, 6])]),
}
ragged_masks = pytest.mark.parametrize("name", MASKS)


@ragged_masks
@pytest.mark.parametrize(
    ("shape", "axis", "batch_axis"), [("bhnd", -2, 0), ("bn", 1, 0), ("nbd", 0, 1), ("hbdn", -1, 1)]
)
def test_gather_puts_each_sequence_in_a_row_and_scatter_brings_it_back_without_what_is_in_the_padding(
    name: str, shape: str, axis: int, batch_axis: int
) -> None:
    mask, batch, sequences = MASKS[name]
    layout, axes = gathering(mask, batch, 7), (batch_axis, axis)
    x = torch.randn(*({"b": batch, "n": 7, "h": 2, "d": 3}[letter] for letter in shape), dtype=float64)
    source = x.movedim(axes, (0, 1)).clone()
    expected = source.new_zeros(len(sequences), layout.length, *source.shape[2:])
    noise, back = torch.full_like(expected, torch.nan), torch.zeros_like(source)
    for row, (origin, columns) in enumerate(sequences):
        expected[row, : len(columns)] = back[origin, columns] = source[origin, columns]
        noise[row, : len(columns)] = 0
        assert layout.ranks[origin, columns].tolist() == list(range(len(columns)))
    assert layout.whole == (mask is None) and gathering(None, 2, 7).whole
    lengths = [len(columns) for _, columns in sequences]
    assert layout.lengths is None if mask is None else layout.lengths.tolist() == lengths
    given = source.where(back != 0, torch.nan).movedim((0, 1), axes).requires_grad_()
    dense = layout.gather(given, axis, batch_axis)
    assert torch.equal(dense.movedim(axes, (0, 1)), expected)
    found = layout.scatter(dense.square() + noise.movedim((0, 1), axes), axis, batch_axis)
    assert torch.equal(found.movedim(axes, (0, 1)), back.square())
    weights = torch.randn_like(found)
    (gradient,) = torch.autograd.grad((found * weights).sum(), given)
    assert torch.equal(gradient, 2 * back.movedim((0, 1), axes) * weights)


@ragged_masks
def test_ragged_layout_compiles_whole(name: str) -> None:
    mask, batch, _ = MASKS[name]

    def function(x: Tensor, mask: Mask | None) -> tuple[Tensor, ...]:
        layout = gathering(mask, batch, x.shape[-2], x.device)
        dense = layout.gather(x)
        pairs = gather_pairs(x @ x.mT, layout, layout)
        flipped = flip_rows(dense, layout.lengths)
        placed = take_queries(place_queries(dense, 9, layout.lengths), 5, None, layout.lengths)
        return flipped, layout.scatter(flipped), pairs, placed

    x = torch.randn(batch, 2, 7, 3, dtype=float64)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(x, mask), function(x, mask), strict=True):
        close(found, expected)


def test_ranks_of_padding_and_a_layout_without_any_token() -> None:
    assert gathering(Mask(lengths=torch.tensor([2, 0])), 2, 4).ranks.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
    empty = gathering(Mask(cu_seqlens=torch.tensor([0, 0, 0])), 1, 0)
    assert empty.gather(torch.randn(1, 2, 0, 5)).shape == (2, 2, empty.length, 5)
    assert empty.scatter(torch.randn(2, 2, empty.length, 5)).shape == (1, 2, 0, 5)
    assert not empty.gather(torch.randn(1, 2, 0, 5)).any()


def test_a_limit_goes_where_it_hides_no_pair_and_stays_where_it_hides_one() -> None:
    for seed in range(60):
        draws = random.Random(seed)
        first, n, m = draws.randint(0, 3), draws.randint(1, 4), draws.randint(1, 6)
        limits = {name: draws.choice([None, *range(7)]) for name in ("left", "right")}
        block = draws.choice([None, 1, 2, 5, 8])
        rule = Visibility(draws.random() < 0.5, **limits, block=block)
        queries, keys = torch.arange(first, first + n)[None], torch.arange(m)[None]
        within = rule.within(first, n, m)
        seen = rule.mask(queries, keys)
        assert torch.equal(within.mask(queries, keys).expand_as(seen), seen)
        for name in ("left", "right"):
            alone = Visibility(False, **{name: limits[name]})
            hides = not alone.mask(queries, keys).all()
            if limits[name] is not None:
                assert (getattr(alone.within(first, n, m), name) is None) == (not hides), (seed, name)


@ragged_masks
def test_pairs_follow_their_tokens(name: str) -> None:
    mask, batch, sequences = MASKS[name]
    layout = gathering(mask, batch, 7)
    bias = torch.randn(batch, 2, 7, 7, dtype=float64)
    found = gather_pairs(bias, layout, layout)
    assert found.shape == (layout.batch, 2, layout.length, layout.length)
    for row, (origin, columns) in enumerate(sequences):
        size = len(columns)
        assert torch.equal(found[row, :, :size, :size], bias[origin][:, columns][..., columns])
        assert not found[row, :, size:].any() and not found[row, :, :, size:].any()
    shared, expanded = bias[:1, :, :1], bias[:1, :, :1].expand(batch, 2, 7, 7)
    alike = gather_pairs(expanded, layout, layout)
    assert torch.equal(gather_pairs(shared, layout, layout).expand_as(alike), alike)


@pytest.mark.parametrize(
    ("mask", "batch", "message"),
    [
        (Mask(lengths=torch.tensor([3, 8])), 2, "0 to 7"),
        (Mask(lengths=torch.tensor([3, -1])), 2, "0 to 7"),
        (Mask(lengths=torch.tensor([3])), 2, r"\(2,\)"),
        (Mask(valid=torch.ones(2, 6, dtype=torch.bool)), 2, r"\(2, 7\)"),
        (Mask(cu_seqlens=torch.tensor([1, 7])), 1, "from 0 to 7"),
        (Mask(cu_seqlens=torch.tensor([0, 6])), 1, "from 0 to 7"),
        (Mask(cu_seqlens=torch.tensor([], dtype=torch.long)), 1, "from 0 to 7"),
        (Mask(cu_seqlens=torch.tensor([0, 5, 3, 7])), 1, "decrease"),
        (Mask(cu_seqlens=torch.tensor([0, 3, 7]), max_length=3), 1, "at least 4"),
        (Mask(cu_seqlens=torch.tensor([0, 7])), 2, "batch 1"),
    ],
)
def test_masks_that_do_not_fit_are_refused(mask: Mask, batch: int, message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        gathering(mask, batch, 7)


def test_the_valid_part_of_each_row_is_reversed_and_its_padding_stays() -> None:
    x, lengths = torch.randn(3, 2, 7, 3), torch.tensor([3, 0, 7])
    found = flip_rows(x, lengths)
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(found[row], torch.cat([x[row, :, :length].flip(1), x[row, :, length:]], 1))
    assert torch.equal(flip_rows(found, lengths), x)


def test_tokens_on_a_grid_stay_in_their_places_without_what_is_in_the_padding() -> None:
    for mask in (Mask(valid=VALID), Mask(lengths=torch.tensor([3, 0, 7])), None):
        layout = gathering_in_place(mask, 3, 7, (7, 1))
        valid = torch.ones(3, 7, dtype=torch.bool) if mask is None else gathering(mask, 3, 7).valid
        x = torch.randn(3, 7, 2, dtype=float64).where(valid[..., None], torch.nan)
        assert layout.whole == (mask is None)
        for found in (layout.gather(x), layout.scatter(x)):
            assert torch.equal(found, x.nan_to_num())
    with pytest.raises(Unsupported, match="product is 7"):
        gathering_in_place(None, 3, 7, (2, 4))
    with pytest.raises(Unsupported, match="on a grid"):
        gathering_in_place(MASKS["packed"][0], 1, 7, (7, 1))


def test_tensors_that_do_not_fit_a_layout_are_refused() -> None:
    layout = gathering(MASKS["packed"][0], 1, 7)
    with pytest.raises(Unsupported, match="1 rows of 7 tokens"):
        layout.gather(torch.zeros(1, 6, 2))
    with pytest.raises(Unsupported, match="6 rows of 4 tokens"):
        layout.scatter(torch.zeros(1, 7, 2))


@pytest.mark.parametrize("name", ["rms", "rms_nonparametric", "rms:0.3", "layer", "layer_nonparametric:1e-1", "none"])
def test_norms_equal_their_definitions(name: str) -> None:
    norm = make_norm(name, 5).double()
    name, _, number = name.partition(":")
    eps = float(number or {"rms": 1e-6}.get(name[:3], 1e-5))
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, dtype=float64, requires_grad=True)
    expected: Tensor = x
    if name.startswith("rms"):
        expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    elif name.startswith("layer"):
        expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + eps).sqrt()
    for parameter_name, parameter in norm.named_parameters():
        expected = expected * parameter if parameter_name == "weight" else expected + parameter
    assert bool(list(norm.parameters())) == (name in ("rms", "layer"))
    close(norm(x), expected)
    assert torch.autograd.gradcheck(norm, x)


def test_a_layer_scale_multiplies_each_feature_in_the_dtype_of_what_comes_in() -> None:
    scale, x = LayerScale(5, initial=0.5), torch.randn(2, 3, 5, dtype=float64)
    nn.init.normal_(scale.factors)
    close(scale(x), x * scale.factors.double())
    assert scale(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", [RMSNorm(64), LayerNorm(64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_of_low_precision_are_computed_in_float32(norm: nn.Module, dtype: torch.dtype) -> None:
    x = (300 * torch.randn(4, 64)).to(dtype)
    low = norm.to(dtype)(x)
    assert torch.equal(low, norm.float()(x.float()).to(dtype))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "FACTORIES", {"dense": linear.FACTORIES["dense"]})
    monkeypatch.setattr(linear, "SOURCES", [])


def low_rank(in_features: int, out_features: int, *, bias: bool, rank: int = 2) -> nn.Module:
    return nn.Sequential(nn.Linear(in_features, rank, bias=False), nn.Linear(rank, out_features, bias=bias))


@pytest.mark.usefixtures("registry")
def test_a_registered_kind_builds_every_projection() -> None:
    assert make_linear(3, 2).bias is None
    for _ in range(2):
        register_linear("low_rank", low_rank)
    assert list_linears() == ["dense", "low_rank"]
    made = make_linear(4, 6, bias=True, kind="low_rank", rank=3)
    assert made(torch.randn(2, 4)).shape == (2, 6)
    mlp = MLP(4, linear=lambda i, o, bias: make_linear(i, o, bias=bias, kind="low_rank"))
    assert isinstance(mlp.up, nn.Sequential)
    with pytest.raises(Unsupported, match="try rank"):
        make_linear(4, 6, kind="low_rank", rnk=3)
    with pytest.raises(Unsupported, match="second factory"):
        register_linear("low_rank", lambda i, o, bias: nn.Linear(i, o))


def test_swiglu_has_about_the_size_of_an_mlp_by_default() -> None:
    sizes = [sum(p.numel() for p in network(384).parameters()) for network in (SwiGLU, MLP)]
    assert sizes[0] == sizes[1]


def test_dropout_is_active_in_training_alone_and_follows_the_generator() -> None:
    network = MLP(8, dropout=0.5).double()
    x = torch.randn(4, 8, dtype=float64)
    first = network(x, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, network(x, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(first, network(x, generator=torch.Generator().manual_seed(2)))
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))
    ones = dropout(torch.ones(100_000), 0.25, training=True, generator=torch.Generator().manual_seed(0))
    assert set(ones.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert ones.mean().item() == pytest.approx(1, abs=0.01)


def convolution_of_row(layer: ShortConvolution, x: Tensor) -> Tensor:
    """The definition for one unpadded sequence (n, c)."""
    before = layer.width - 1 if layer.causal else layer.width // 2
    y = torch.zeros_like(x)
    for t in range(x.shape[0]):
        for j in range(layer.width):
            if 0 <= t - before + j < x.shape[0]:
                y[t] += layer.weight[:, j] * x[t - before + j]
    y = y if layer.bias is None else y + layer.bias
    return F.silu(y) if layer.activation else y


LAYERS: list[dict[str, Any]] = [
    {},
    {"width": 1},
    {"width": 3, "bias": True},
    {"activation": None},
    {"causal": False, "width": 3},
    {"causal": False, "width": 4, "bias": True},
    {"causal": False, "width": 1},
]


def make_convolution(options: dict[str, Any]) -> ShortConvolution:
    layer = ShortConvolution(3, **options).double()
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    return layer


@pytest.mark.parametrize("options", LAYERS)
def test_convolution_of_padded_rows_equals_each_row_alone(options: dict[str, Any]) -> None:
    layer, lengths = make_convolution(options), torch.tensor([0, 1, 2, 5, 9])
    x = torch.randn(5, 9, 3, dtype=float64)
    x = torch.where((torch.arange(9) < lengths[:, None])[..., None], x, torch.nan).requires_grad_()
    y, cache = layer(x, lengths)
    expected = torch.zeros_like(y)
    for row, length in enumerate(lengths.tolist()):
        expected[row, :length] = convolution_of_row(layer, x[row, :length])
        if layer.causal:
            kept = F.pad(x[row, :length], (0, 0, layer.width, 0))[length + 1 :]
            assert cache is not None
            assert torch.equal(cache[row], kept)
    close(y, expected)
    weights = torch.randn_like(y)
    (gradient,) = torch.autograd.grad((y * weights).sum(), x, retain_graph=True)
    (exact,) = torch.autograd.grad((expected * weights).sum(), x)
    close(gradient, exact)
    assert not gradient[0].any()
    assert not gradient[1, 1:].any()
    close(layer(x[4:])[0], expected[4:])


@pytest.mark.parametrize(
    ("patch", "stride", "padding", "height", "width"), [(2, None, 0, 4, 6), (3, 2, 1, 8, 5), (7, 4, 3, 32, 32)]
)
def test_patch_embedding_equals_a_strided_convolution(
    patch: int, stride: int | None, padding: int, height: int, width: int
) -> None:
    embed = PatchEmbedding(3, 5, patch, stride=stride, padding=padding).double()
    image = torch.randn(2, 3, height, width, dtype=float64)
    weight = embed.projection.weight.view(5, 3, patch, patch)
    expected = F.conv2d(image, weight, embed.projection.bias, stride=stride or patch, padding=padding)
    for given in (image, image.contiguous(memory_format=torch.channels_last)):
        close(embed(given), expected.flatten(2).mT)
    assert embed.grid(height, width) == tuple(expected.shape[2:])


X = torch.zeros(2, 5, 3)
REFUSED = [
    (lambda: make_norm("rmsnorm", 5), "norm 'rmsnorm'"),
    (lambda: make_norm("rms:", 5), "norm 'rms:'"),
    (lambda: make_norm("rms:small", 5), "norm 'rms:small'"),
    (lambda: make_norm("rms:-1", 5), "eps"),
    (lambda: make_norm("none:1e-5", 5), "norm 'none:1e-5'"),
    (lambda: LayerScale(5, -1.0), "initial"),
    (lambda: make_linear(3, 2, kind="dence"), "try dense"),
    (lambda: make_linear(3, 2, rank=4), "no options"),
    (lambda: make_linear(0, 2), "in_features >= 1"),
    (lambda: RMSNorm(5)(X[0, :, :3]), "a norm over 3 features"),
    (lambda: make_feed_forward("swigly", 4), "try swiglu"),
    (lambda: make_feed_forward("token_parametre", 4), "try token_parameter"),
    (lambda: make_feed_forward("gelu", 4, bais=True), "try bias"),
    (lambda: make_feed_forward("token_parameter", 4, num_token=3), "try num_tokens"),
    (lambda: make_feed_forward("token_parameter", 4, 8), "a hidden width"),
    (lambda: make_feed_forward("token_parameter", 4, dropout=0.1), "dropout"),
    (lambda: MLP(4, dropout=1.0), "dropout"),
    (lambda: SwiGLU(4, 0), "hidden"),
    (lambda: ShortConvolution(3)(X[..., :2]), "3 channels"),
    (lambda: ShortConvolution(3)(X, cache=X), r"\(2, 3, 3\)"),
    (lambda: ShortConvolution(3, causal=False)(X, cache=X[:, :3]), "noncausal"),
    (lambda: ShortConvolution(3, activation="sily"), "try silu"),
    (lambda: ShortConvolution(3, 0), "width >= 1"),
    (lambda: FeatureEmbedding(3, 5)(X[..., :2]), "3 features"),
    (lambda: PatchEmbedding(1, 2, 2)(torch.zeros(1, 1, 4, 5)), "try width 6"),  # would lose pixels
    (lambda: PatchEmbedding(1, 2, 8).grid(7, 8), "try height 8"),
    (lambda: PatchEmbedding(1, 2, 2, stride=3), "skips pixels"),
    (lambda: PatchEmbedding(1, 2, 2)(torch.zeros(1, 3, 4, 4)), r"\(B, 1, H, W\)"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_mistakes_are_refused_with_what_is_accepted(call, words) -> None:
    with pytest.raises(Unsupported, match=words):
        call()
