"""Sequential position encoding: digits, encoder, losses, the four places, and models with it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from support import close, load, read_in_pieces, shaken
from torch import Tensor

from regard import Context, Mask, create_layer, get_mechanism, list_mechanisms
from regard.contract import Unsupported
from regard.models import (
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    ForecasterConfig,
    LanguageModel,
    LanguageModelConfig,
)
from regard.models.losses import auxiliary_loss
from regard.positions import create_positions
from regard.positions.seqpe import SequentialEncoding, closest_loss, digit_count, to_digits, transfer_loss

INSIDE = ("seqpe_mul", "seqpe_add", "seqpe_scalar")
ALL = ("seqpe", *INSIDE)
SMALL = {"encoder_dim": 8, "pivots": 4, "candidates": 5, "offsets": 4}
SIZES = {"dim": 12, "heads": 3, "head_dim": 4, "max_length": 1000}
BOTH_LOSSES = {"position_contrast", "position_transfer"}


def make(**options) -> SequentialEncoding:
    """A scheme with weights large enough for its vectors to differ, the same for the same options."""
    torch.manual_seed(len(str(options)))
    return shaken(create_positions("seqpe", **{**SIZES, **SMALL, **options}), 0.2).eval()


def language_model(positions: str, **options) -> LanguageModel:
    sizes = {"dim": 12, "num_heads": 3, "num_layers": 2, "max_length": 200}
    chosen = {**sizes, "positions": positions, "position_options": SMALL, **options}
    return shaken(LanguageModel(LanguageModelConfig(11, **chosen))).eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# digits and vectors


@pytest.mark.parametrize(("base", "count"), [(10, 3), (2, 7), (16, 2)])
def test_digits_come_back_and_padding_is_on_the_left(base, count):
    positions = torch.arange(base**count)
    digits, written = to_digits(positions, count, base)
    assert torch.equal((digits * base ** torch.arange(count - 1, -1, -1)).sum(-1), positions)
    lengths = written.sum(-1)
    assert lengths.tolist() == [max(1, math.ceil(math.log(p + 1, base) - 1e-9)) for p in positions.tolist()]
    assert (written.long().diff(dim=-1) >= 0).all()
    assert digits.unique(dim=0).shape[0] == base**count  # 12 and 120 differ even without a mask
    assert [digit_count(base**count + more, base) for more in (0, 1)] == [count, count + 1]
    assert torch.equal(to_digits(positions, count, base, pad=7)[0], torch.where(written, digits, 7))


def test_axes_are_read_row_by_row_within_a_bound_for_each():
    scheme = make(axes=2, max_length=10_000)
    assert (scheme.bound, scheme.encoder.count) == (100, 2)
    assert make(axes=2, max_length=9_999).bound == 99
    assert make(axes=3, max_length=1000).bound == 10
    assert scheme.locate(torch.arange(15)[None], (3, 5))[0].tolist() == [[i // 5, i % 5] for i in range(15)]
    box = make(axes=3).locate(torch.arange(24)[None], (2, 3, 4))[0]
    assert box.tolist() == [[i // 12, i // 4 % 3, i % 4] for i in range(24)]


@pytest.mark.parametrize("direction", ["causal", "both"])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_a_vector_depends_on_its_position_alone_and_not_on_hidden_padding(direction, mask_padding):
    options = {"direction": direction, "mask_padding": mask_padding}
    scheme, positions = make(**options), torch.randint(0, 1000, (40,))
    together = scheme.vectors(torch.cat([positions, positions.flip(0)]))
    close(together[:40], together[40:].flip(0))
    close(together[7], scheme.vectors(positions[7:8])[0])
    every = scheme.vectors(torch.arange(1000))
    assert torch.cdist(every, every).fill_diagonal_(1.0).min() > 1e-6
    first, other = (make(pad=pad, **options).vectors(torch.tensor([0, 7, 42, 999])) for pad in (0, 5))
    assert ((first - other).abs().amax(-1) < 1e-12).tolist() == [mask_padding] * 3 + [True]


@pytest.mark.parametrize("name", ["seqpe_encoder", "seqpe_encoder_masked_padding", "seqpe_encoder_two_axes"])
def test_parity_of_the_encoder(name):
    f = load(name)
    axes = f["positions"].ndim
    options = {"encoder_dim": 12, "encoder_heads": 3, "temperature": 2.0, "axes": axes}
    options |= {"mask_padding": "masked" in name, "pad": 7 if "masked" in name else 0}
    options |= {"direction": "both", "max_length": 10_000} if axes == 2 else {"max_length": 100_000}
    scheme = create_positions("seqpe", **{**SIZES, "dim": 10, **options}).double().eval()
    inside = {"attention_norm": "layernorm_1", "feed_forward_norm": "layernorm_2", "qkv": "attn_c_attn"}
    inside |= {"attention": "attn_c_proj", "wide": "mlp_c_fc", "narrow": "mlp_c_proj"}
    modules = {f"blocks.{i}.{own}": f"transformers_{i}_{name}" for i in range(2) for own, name in inside.items()}
    modules |= {"norm": "layernorm", "output": "out_proj"}
    names = {f"{own}.{part}": f"{name}_{part}" for own, name in modules.items() for part in ("weight", "bias")}
    names |= {"token": "token_of_seqpe_embed_weight", "place": "pos_of_seqpe_embed_weight"}
    names |= {"last": "cls_token_embed", "axis": "dim_token_embed"}
    state = scheme.encoder.state_dict()
    for own, weight in state.items():
        theirs = f[f"weight_{names[own]}"]
        state[own] = theirs.mT if own.startswith("blocks") and theirs.ndim == 2 else theirs.view_as(weight)
    scheme.encoder.load_state_dict(state)
    digits, written = to_digits(f["positions"], scheme.encoder.count, pad=scheme.encoder.pad)
    assert torch.equal(digits.flatten(1), f["digits"]) and torch.equal(written.flatten(1), f["pad_mask"].bool())
    e = scheme.vectors(f["positions"])
    close(e, f["out"], 1e-10)
    gradients = torch.autograd.grad((e * f["grad_out"]).sum(), [scheme.encoder.token, scheme.encoder.last])
    close(gradients[0], f["grad_token"], 1e-10)
    close(gradients[1], f["grad_cls"].flatten(), 1e-10)


def test_positions_up_to_the_bound_have_vectors_and_others_are_refused():
    scheme = make(max_length=120)
    assert scheme.vectors(torch.tensor([0, 63, 64, 119])).isfinite().all()
    for position, nearest in ((120, "max_length=121"), (-1, "position 0")):
        with pytest.raises(Unsupported, match=nearest):
            scheme.vectors(torch.tensor([3, position]))
    with pytest.raises(Unsupported, match="0 to 9 on each"):
        make(axes=2, max_length=120).vectors(torch.tensor([[0, 10]]))


@pytest.mark.parametrize("axes", [1, 2])
def test_interpolated_positions_are_those_between(axes):
    whole, half = make(axes=axes), make(axes=axes, interpolation=2.0)
    half.load_state_dict(whole.state_dict())
    positions = torch.randint(0, 15, (5, axes))
    one = torch.tensor([0, 1][-axes:])  # one step along the last axis
    shape = (5,) if axes == 1 else (5, 2)
    here, after = (whole.vectors(p.view(shape)) for p in (positions, positions + one))
    close(half.vectors(2 * positions.view(shape)), here)
    close(half.vectors((2 * positions + one).view(shape)), (here + after) / 2)
    assert half.vectors(torch.full(shape, 2 * (half.bound - 1))).isfinite().all()
    with pytest.raises(Unsupported, match="0 to"):
        half.vectors(torch.full(shape, 2 * half.bound))


# losses


def test_parity_of_the_losses():
    f = load("seqpe_losses")
    distances = torch.randint(1, 9, f["candidates"].shape[:2]) + 1
    distances.scatter_(1, f["labels"][:, None], 1)
    total, count = closest_loss(f["pivots"], f["candidates"], distances, torch.zeros_like(distances, dtype=torch.bool))
    close(total / count, f["contrast"], 1e-10)
    for beta, tag in ((1.0, ""), (0.7, "_beta")):
        block, elsewhere = f["block"].clone().requires_grad_(), f["elsewhere"].clone().requires_grad_()
        loss = transfer_loss(block[f["offsets"]], elsewhere, heads=3, beta=beta)
        close(loss, f[f"transfer{tag}"], 1e-10)
        found = torch.autograd.grad(loss, [elsewhere, block], allow_unused=True)
        close(found[0], f[f"grad_elsewhere{tag}"], 1e-10)
        if beta == 1:
            assert found[1] is None  # the teacher gets no gradient
        else:
            close(found[1], f["grad_block_beta"], 1e-10)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_label_of_the_contrast_is_the_closest_candidate(axes):
    scheme = make(axes=axes)
    pivots, candidates = (torch.randint(0, scheme.bound, shape) for shape in ((6, axes), (6, 9, axes)))
    candidates[0, 3], candidates[1, 4] = pivots[0], candidates[1, 2]  # the pivot itself, and a duplicate
    total, count = scheme.contrast(pivots, candidates, None)
    nats = []
    for pivot, row in zip(pivots, candidates, strict=True):
        kept = [list(c) for c in dict.fromkeys(map(tuple, row.tolist())) if list(c) != pivot.tolist()]
        e, *others = scheme.encoder(torch.tensor([pivot.tolist(), *kept]))
        distances = (torch.tensor(kept) - pivot).square().sum(-1)
        nats.append(F.cross_entropy(torch.stack(others) @ e, distances.argmin()))
    close(total, torch.stack(nats).sum())
    assert count == 6
    nothing = torch.ones(6, 9, dtype=torch.bool)  # masks all candidates
    e = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    total, count = closest_loss(e, e[:, None].expand(-1, 9, -1), torch.ones(6, 9, dtype=torch.long), nothing)
    assert total == 0 and count == 0 and torch.autograd.grad(total, e)[0].isfinite().all()


def edit_distance(a: str, b: str) -> int:
    """Number of insertions, deletions and substitutions; a swap of two digits counts as two substitutions."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def test_hard_negatives_are_one_to_three_edits_of_the_digits():
    pivots = torch.randint(0, 100_000, (2000, 1))
    edited = make(max_length=100_000).edit_digits(pivots, seeded(0))
    assert (edited >= 0).all()
    strings = [str(e) for e in edited[:, 0].tolist()]
    found = [
        min(edit_distance(str(p), e.rjust(width, "0")) for width in range(len(e), 9))
        for p, e in zip(pivots[:, 0].tolist(), strings, strict=True)
    ]
    assert max(found) <= 6 and 1.5 < sum(found) / len(found) < 3
    assert {3, 4, 5} <= {len(e) for e in strings} <= {1, 2, 3, 4, 5}  # possible lengths of strings


@pytest.mark.parametrize(("axes", "bound", "share"), [(1, 20_000, 0.6), (2, 100, 0.2), (3, 30, 0.2)])
def test_pivots_cover_the_range_and_candidates_stay_in_it(axes, bound, share):
    scheme = make(axes=axes, max_length=bound**axes, pivots=400, candidates=32)
    assert scheme.bound == bound
    pivots, candidates = scheme.draw_candidates(seeded(1))
    assert pivots.shape == (400, axes) and candidates.shape == (400, 32, axes)
    for drawn in (pivots, candidates):
        assert (drawn >= 0).all() and (drawn < bound).all()
    flat = (pivots * bound ** torch.arange(axes - 1, -1, -1)).sum(-1)
    part = bound**axes / 400
    assert ((flat - part * torch.arange(400) + 1 > 0) & (flat < part * torch.arange(1, 401))).all()  # one per interval
    spread = (candidates.amax(1) - candidates.amin(1)).amax(-1)
    side = max(int(256 ** (1 / axes) + 1e-9), math.ceil(160 ** (1 / axes)))
    assert abs(float((spread < side).double().mean()) - share) < 0.08  # share drawn from windows


def test_training_draws_from_the_generator_and_evaluation_has_neither_dropout_nor_losses():
    scheme, positions = make(dropout=0.3), torch.arange(9)[None]
    e, losses = scheme.prepare(positions)
    assert losses == {}
    assert torch.equal(e, scheme.vectors(positions))
    scheme.train()
    assert not torch.equal(scheme.vectors(positions), scheme.vectors(positions))

    def drawn(seed: int) -> list[float]:
        e, found = scheme.prepare(positions, None, seeded(seed))
        return [t.detach().item() for t in (e.sum(), *(total for total, _ in found.values()))]

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_a_moved_block_transfers_nothing_and_stays_in_the_range():
    block = torch.arange(30)[None]
    scheme = make(shift=1.0, max_length=36, dropout=0.0).train()
    for seed in range(30):
        start, moved = scheme.moved((30,), seeded(seed))
        assert moved and 0 <= int(start) <= 6
        e, losses = scheme.prepare(block, None, seeded(seed))
        close(e, scheme.vectors(int(start) + block))
        assert "position_transfer" not in losses  # no room, as 30 + 8 > 36
    total, count = make(shift=1.0).train().prepare(block)[1]["position_transfer"]
    assert total == 0 and count == 0
    total, count = make(shift=1.0).train().prepare(block, movable=False)[1]["position_transfer"]
    assert total > 0 and count == 1
    still = make(shift=0.0, dropout=0.0).train()
    e, losses = still.prepare(block)
    close(e, still.vectors(block))
    assert losses["position_transfer"][1] == 1
    assert make(pivots=0, offsets=0).train().prepare(block)[1] == {}


# layers


def layer_and_one_without(name: str, dim: int, heads: int, **options):
    """A layer with positions, and a layer without them that has the same weights."""
    layer = create_layer(name, dim, heads, **options).double().eval()
    plain = create_layer(name, dim, heads, pattern=layer.pattern, positions="none").double().eval()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("positions")})
    return layer, plain


@pytest.mark.parametrize(("name", "value"), [("seqpe_mul", 1.0), ("seqpe_add", 0.0), ("seqpe_scalar", 0.0)])
def test_neutral_vectors_are_no_positions(name, value):
    layer, plain = layer_and_one_without("softmax", 12, 3, positions=name, position_options=SMALL)
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    assert float((layer(x).output - plain(x).output).detach().abs().max()) > 1e-9
    for projection in (layer.positions.query_projection, layer.positions.key_projection):
        projection.weight.data.zero_()
        projection.bias.data.fill_(value)
    close(layer(x).output, plain(x).output)


OTHERWISE = ("diagonal", "bigbird", "selective_temperature")  # temperature divides scores, not a bias
BIASED = [
    name
    for name in list_mechanisms()
    for card in [get_mechanism(name)]
    if "seqpe_scalar" in card.accepts_positions and card.module is None and name not in OTHERWISE
]


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("options", [{}, {"per_head": False, "scale": 0.3}, {"projection": "none"}], ids=str)
def test_added_scores_are_a_bias_on_pairs_scaled_once(name, options):
    given = {"positions": "seqpe_scalar", "position_options": SMALL | options}
    layer, plain = layer_and_one_without(name, 16, 4, pattern="noncausal-self", **given)
    shaken(layer.positions, 0.2)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    e = layer.positions.encode(torch.arange(9))
    q, k = (e, e) if options.get("projection") == "none" else e.chunk(2, -1)
    q, k = (t.unflatten(-1, (-1, 4)).transpose(0, 1) for t in (q, k))
    bias = (options.get("scale", 1.0) * q @ k.mT / 2)[None].expand(1, 4, -1, -1)  # 2 = sqrt(4)
    close(layer(x).output, plain(x, context=Context(mask=Mask(bias=bias))).output)


def test_a_layer_alone_learns_its_own_positions():
    layer = create_layer("softmax", 12, 3, positions="seqpe_scalar", position_options=SMALL).train()
    assert set(layer(torch.randn(2, 9, 12)).losses) == BOTH_LOSSES
    plan = [("softmax", {"positions": "seqpe_mul", "position_options": SMALL}), "softmax"]
    model = LanguageModel(LanguageModelConfig(11, dim=12, num_heads=3, plan=plan)).train()
    assert model.positions is None
    losses = model(torch.randint(0, 11, (2, 9))).losses
    assert int(losses["position_contrast"][1]) == 4  # one layer's loss


# models


@pytest.mark.parametrize(
    ("positions", "options"),
    [
        *[(p, {}) for p in ALL],
        *[("seqpe_scalar", o) for o in ({"projection": "layers"}, {"projection": "none"}, {"per_head": False})],
    ],
    ids=str,
)
def test_decoded_padded_and_packed_sequences_count_their_own_positions(positions, options):
    model, ids = language_model(positions, position_options=SMALL | options), torch.randint(0, 11, (2, 8))
    close(read_in_pieces(model, ids, [4, 1, 1, 1, 1])[0], model(ids).output)
    valid = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    output = model(ids, context=Context(mask=Mask(valid=valid))).output
    for row in range(2):
        close(output[row, valid[row]], model(ids[row : row + 1, valid[row]]).output[0])
    packed = Mask(cu_seqlens=torch.tensor([0, 3, 8]))
    close(model(ids[:1], context=Context(mask=packed)).output[:, 3:], model(ids[:1, 3:]).output)
    where = torch.arange(5, 13).expand(2, -1)
    moved = model(ids, context=Context(positions=where)).output
    assert float((moved - model(ids).output).detach().abs().max()) > 1e-6
    with pytest.raises(Unsupported, match="position 200"):
        model(ids, context=Context(positions=where + 188))


@pytest.mark.parametrize("positions", INSIDE)
def test_a_model_encodes_positions_once_for_all_layers(positions):
    model = language_model(positions).train()
    calls = []
    model.positions.encoder.register_forward_hook(lambda _, given, __: calls.append(given[0].shape[0]))
    model(torch.randint(0, 11, (5, 9)))
    assert calls[0] == 9 and len(calls) == 3  # once for all rows; then the two losses
    assert all(block.mixer.positions.shared for block in model.blocks)
    assert sum(isinstance(m, type(model.positions.encoder)) for m in model.modules()) == 1
    each = language_model(positions, position_options=SMALL | {"projection": "layers"})
    for made, count in ((model, 1), (each, 2)):
        assert len([n for n, _ in made.named_parameters() if n.endswith("query_projection.weight")]) == count


@pytest.mark.parametrize("positions", ALL)
def test_every_parameter_learns_from_the_loss_of_a_model(positions):
    model, ids = language_model(positions).train(), torch.randint(0, 11, (2, 9))
    model.loss(ids, context=Context(generator=seeded(0))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    result = model(ids)
    assert set(result.losses) == BOTH_LOSSES
    parts = [0.1 * total / count.clamp(min=1) for total, count in result.losses.values()]
    close(auxiliary_loss(result.losses, model.config.loss_weights), sum(parts))
    none = language_model(positions, loss_weights=dict.fromkeys(BOTH_LOSSES, 0.0)).train()
    assert float(torch.as_tensor(auxiliary_loss(none(ids).losses, none.config.loss_weights)).detach()) == 0


@pytest.mark.parametrize("positions", ALL)
def test_routed_heads_share_the_positions_of_their_model(positions):
    model = language_model(positions, plan=["mixture_of_heads", "softmax"]).train()
    assert set(model(torch.randint(0, 11, (2, 9))).losses) >= BOTH_LOSSES
    assert (model.blocks[0].mixer.attention.positions.name == positions) == (positions in INSIDE)


@pytest.mark.parametrize("positions", ALL)
def test_encoders_on_grids_read_rows_and_columns(positions):
    sizes = {"features": 2, "dim": 12, "num_heads": 3, "num_layers": 1, "max_length": 400}
    config = EncoderConfig(3, positions=positions, position_options={**SMALL, "axes": 2}, **sizes)
    model, x = shaken(Encoder(config), 0.3).eval(), torch.randn(2, 15, 2, dtype=torch.float64)
    wide, tall = (model(x, context=Context(grid=grid)).output for grid in ((3, 5), (5, 3)))
    assert float((wide - tall).detach().abs().max()) > 1e-6
    with pytest.raises(Unsupported, match="a grid of 2 axes"):
        model(x)
    with pytest.raises(Unsupported, match="position 20"):
        model(torch.randn(1, 21, 2, dtype=torch.float64), context=Context(grid=(1, 21)))
    assert set(model.train()(x, context=Context(grid=(3, 5))).losses) == BOTH_LOSSES


@pytest.mark.parametrize("positions", ALL)
def test_both_sides_of_an_encoder_decoder_have_positions(positions):
    options = {"positions": positions, "position_options": SMALL, "max_length": 50}
    model = EncoderDecoder(EncoderDecoderConfig(11, 7, dim=12, num_heads=3, num_layers=1, **options))
    losses = model(torch.randint(0, 11, (2, 5)), torch.randint(0, 7, (2, 6))).losses
    assert int(losses["position_contrast"][1]) == 8  # four pivots on each side


# refusals


WRONG = {"axes": 0, "base": 1, "direction": "right", "encoder_layers": 0, "encoder_heads": 3, "dropout": 1.0}
WRONG |= {"temperature": 0.0, "pad": 10, "beta": 1.5, "shift": -0.1, "interpolation": 0.5, "candidates": 0}
WRONG |= {"pivots": -1, "max_length": 0, "width": 3, "scale": 1.0}


@pytest.mark.parametrize(("option", "value"), WRONG.items())
def test_wrong_options_are_refused(option, value):
    with pytest.raises(Unsupported, match=option):
        create_positions("seqpe", **{**SIZES, option: value})


def inside(**options) -> SequentialEncoding:
    return create_positions("seqpe_mul", **SIZES, **options)


def layer_of(**options):
    return create_layer("softmax", 12, 3, positions="seqpe_mul", position_options=options)


def at_the_input(width: int, positions: int) -> Tensor:
    return create_positions("seqpe", **SIZES).embed(torch.randn(1, 4, width), torch.arange(positions)[None])


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: create_positions("seqpe_scalar", **SIZES, scale=0.0), "scale"),
        (lambda: inside(projection="many"), "projection"),
        (lambda: inside(projection="none", kv_heads=1), "projection='none'"),
        (lambda: inside().rotate(torch.randn(1, 3, 4, 5), torch.arange(4)[None]), "heads"),
        (lambda: at_the_input(5, 4), "width"),
        (lambda: at_the_input(12, 3), "positions of shape"),
        (lambda: create_layer("landmark", 12, 3, positions="seqpe_mul"), "seqpe_mul"),
        (lambda: create_layer("linear", 12, 3, positions="seqpe_scalar"), "seqpe_scalar"),
        (lambda: layer_of(part="layer")(torch.randn(1, 4, 12)), "alone"),
        (lambda: language_model("auto"), "auto"),
        (lambda: ForecasterConfig(2, 2, positions="seqpe_scalar"), "forecaster"),
        (lambda: language_model("none", plan=[("softmax", {"positions": "seqpe"})], num_layers=1), "one layer"),
    ],
)
def test_calls_and_models_that_do_not_fit_are_refused(call, reason):
    with pytest.raises(Unsupported, match=reason):
        call()
