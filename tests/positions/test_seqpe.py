"""Sequential position encoding: digits, encoder, losses, the four places, and models with it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from regard import Context, Mask, create_layer, get_mechanism, list_mechanisms
from regard.contract import Pattern, Unsupported
from regard.models import (
    Encoder,
    EncoderConfig,
    EncoderDecoder,
    EncoderDecoderConfig,
    ForecasterConfig,
    LanguageModel,
    LanguageModelConfig,
)
from regard.models.blocks import auxiliary_loss
from regard.positions import create_positions
from regard.positions.seqpe import SequentialEncoding, closest_loss, digit_count, to_digits, transfer_loss
from regard.tasks import create_task
from regard.training import TrainConfig, train

FIXTURES = Path(__file__).parents[1] / "parity" / "fixtures"
INSIDE = ("seqpe_mul", "seqpe_add", "seqpe_scalar")
ALL = ("seqpe", *INSIDE)
SMALL = {"encoder_dim": 8, "pivots": 4, "candidates": 5, "offsets": 4}
SIZES = {"dim": 12, "heads": 3, "head_dim": 4, "max_length": 1000}


def load(name: str) -> dict[str, Tensor]:
    with np.load(FIXTURES / f"{name}.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def make(name: str = "seqpe", **options) -> SequentialEncoding:
    """A scheme with weights large enough for its vectors to differ."""
    torch.manual_seed(len(str(options)))
    scheme = create_positions(name, **{**SIZES, **SMALL, **options}).double().eval()
    for parameter in scheme.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return scheme


def language_model(positions: str, **options) -> LanguageModel:
    torch.manual_seed(3)
    sizes = {"dim": 12, "num_heads": 3, "num_layers": 2, "max_length": 200}
    chosen = {**sizes, "positions": positions, "position_options": SMALL, **options}
    model = LanguageModel(LanguageModelConfig(11, **chosen)).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * max(1.0, float(expected.detach().abs().max())))


@pytest.mark.parametrize(("base", "count"), [(10, 3), (2, 7), (16, 2)])
def test_digits_come_back_and_padding_is_on_the_left(base, count):
    positions = torch.arange(base**count)
    digits, written = to_digits(positions, count, base)
    assert torch.equal((digits * base ** torch.arange(count - 1, -1, -1)).sum(-1), positions)
    lengths = written.sum(-1)
    assert lengths.tolist() == [max(1, math.ceil(math.log(p + 1, base) - 1e-9)) for p in positions.tolist()]
    assert (written.long().diff(dim=-1) >= 0).all()
    assert digits.unique(dim=0).shape[0] == base**count  # 12 and 120 are told apart without a mask


def test_digits_of_the_example():
    digits, written = to_digits(torch.tensor([123, 0]), 5)
    assert digits.tolist() == [[0, 0, 1, 2, 3], [0, 0, 0, 0, 0]]
    assert written.long().tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]
    assert to_digits(torch.tensor([12]), 4, pad=7)[0].tolist() == [[7, 7, 1, 2]]
    assert [digit_count(n) for n in (1, 10, 11, 100, 20_000)] == [1, 1, 2, 2, 5]
    assert digit_count(17, 16) == 2


def test_two_axes_are_read_row_by_row_within_a_bound_for_each():
    scheme = make(axes=2, max_length=10_000)
    assert (scheme.bound, scheme.encoder.count) == (100, 2)
    assert make(axes=2, max_length=9_999).bound == 99
    assert make(axes=3, max_length=1000).bound == 10
    places = scheme.locate(torch.arange(15)[None], (3, 5))
    assert places[0].tolist() == [[i // 5, i % 5] for i in range(15)]
    volume = scheme.locate(torch.arange(24)[None], (4, 6))
    assert volume[0, 23].tolist() == [3, 5]
    box = make(axes=3).locate(torch.arange(24)[None], (2, 3, 4))
    assert box[0, 23].tolist() == [1, 2, 3] and box[0, 12].tolist() == [1, 0, 0]


@pytest.mark.parametrize("direction", ["causal", "both"])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_a_vector_depends_on_its_position_alone(direction, mask_padding):
    scheme = make(direction=direction, mask_padding=mask_padding)
    positions = torch.randint(0, 1000, (40,))
    together = scheme.vectors(torch.cat([positions, positions.flip(0)]))
    close(together[:40], together[40:].flip(0))
    close(together[7], scheme.vectors(positions[7:8])[0])
    every = scheme.vectors(torch.arange(1000))
    assert torch.cdist(every, every).fill_diagonal_(1.0).min() > 1e-6


@pytest.mark.parametrize("direction", ["causal", "both"])
def test_hidden_padding_has_no_value(direction):
    positions = torch.tensor([0, 7, 42, 999])
    for mask_padding in (True, False):
        first, other = (
            make(direction=direction, mask_padding=mask_padding, pad=pad).vectors(positions) for pad in (0, 5)
        )
        same = (first - other).abs().amax(-1) < 1e-12
        assert same.tolist() == [mask_padding] * 3 + [True]


def test_the_last_token_has_no_place_and_sees_every_digit():
    scheme = make()
    e = scheme.vectors(torch.tensor([123, 923, 193, 129]))
    assert ((e[1:] - e[0]).abs().amax(-1) > 1e-3).all()
    assert scheme.encoder.place.shape[0] == 3  # none for the last


@pytest.mark.parametrize("name", ["seqpe_encoder", "seqpe_encoder_masked_padding", "seqpe_encoder_two_axes"])
def test_parity_of_the_encoder(name):
    f = load(name)
    axes = f["positions"].ndim
    options = {"encoder_dim": 12, "encoder_heads": 3, "temperature": 2.0, "axes": axes}
    options |= {"mask_padding": "masked" in name, "pad": 7 if "masked" in name else 0}
    options |= {"direction": "both", "max_length": 10_000} if axes == 2 else {"max_length": 100_000}
    scheme = create_positions("seqpe", **{**SIZES, "dim": 10, **options}).double().eval()
    w = {key.removeprefix("weight_"): t for key, t in f.items() if key.startswith("weight_")}
    state = {
        "token": w["token_of_seqpe_embed_weight"],
        "place": w["pos_of_seqpe_embed_weight"],
        "last": w["cls_token_embed"].flatten(),
        "norm.weight": w["layernorm_weight"],
        "norm.bias": w["layernorm_bias"],
        "output.weight": w["out_proj_weight"],
        "output.bias": w["out_proj_bias"],
    }
    if axes == 2:
        state["axis"] = w["dim_token_embed"][:, 0]
    names = {"attention_norm": "layernorm_1", "feed_forward_norm": "layernorm_2", "qkv": "attn_c_attn"}
    names |= {"attention": "attn_c_proj", "wide": "mlp_c_fc", "narrow": "mlp_c_proj"}
    for i in range(2):
        for own, other in names.items():
            weight, bias = (w[f"transformers_{i}_{other}_{part}"] for part in ("weight", "bias"))
            state |= {
                f"blocks.{i}.{own}.weight": weight.mT if weight.ndim == 2 else weight,
                f"blocks.{i}.{own}.bias": bias,
            }
    scheme.encoder.load_state_dict(state)
    digits, written = to_digits(f["positions"], scheme.encoder.count, pad=scheme.encoder.pad)
    assert torch.equal(digits.flatten(1), f["digits"]) and torch.equal(written.flatten(1), f["pad_mask"].bool())
    e = scheme.vectors(f["positions"])
    close(e, f["out"], 1e-10)
    gradients = torch.autograd.grad((e * f["grad_out"]).sum(), [scheme.encoder.token, scheme.encoder.last])
    close(gradients[0], f["grad_token"], 1e-10)
    close(gradients[1], f["grad_cls"].flatten(), 1e-10)


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
            assert found[1] is None  # the teacher learns nothing
        else:
            close(found[1], f["grad_block_beta"], 1e-10)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_the_label_of_the_contrast_is_the_closest_candidate(axes):
    scheme = make(axes=axes)
    pivots, candidates = (torch.randint(0, scheme.bound, shape) for shape in ((6, axes), (6, 9, axes)))
    candidates[0, 3], candidates[1, 4] = pivots[0], candidates[1, 2]  # the pivot itself, and a repetition
    total, count = scheme.contrast(pivots, candidates, None)

    def vector(p: Tensor) -> Tensor:
        return scheme.vectors(p[None, 0] if axes == 1 else p[None])[0]

    nats = []
    for pivot, row in zip(pivots, candidates, strict=True):
        kept = []
        for c in row:
            if not torch.equal(c, pivot) and not any(torch.equal(c, k) for k in kept):
                kept.append(c)
        distances = torch.stack([(c - pivot).square().sum() for c in kept])
        logits = torch.stack([vector(c) @ vector(pivot) for c in kept])
        nats.append(F.cross_entropy(logits, distances.argmin()))
    close(total, torch.stack(nats).sum())
    assert count == 6


def test_a_contrast_with_one_candidate_teaches_nothing_and_equal_vectors_give_log_c():
    e, others = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), torch.randn(4, 1, 6, dtype=torch.float64)
    visible = torch.zeros(4, 1, dtype=torch.bool)
    total, _ = closest_loss(e, others, torch.ones(4, 1, dtype=torch.long), visible)
    (gradient,) = torch.autograd.grad(total, e)
    assert total == 0 and (gradient == 0).all()
    same = torch.ones(4, 9, 6, dtype=torch.float64)
    total, count = closest_loss(same[:, 0], same, torch.arange(9).expand(4, -1), torch.zeros(4, 9, dtype=torch.bool))
    close(total / count, torch.tensor(math.log(9), dtype=torch.float64))
    total, count = closest_loss(e, others, torch.ones(4, 1, dtype=torch.long), ~visible)
    assert total == 0 and count == 0
    assert torch.autograd.grad(total, e)[0].isfinite().all()


def test_nothing_is_transferred_between_vectors_that_differ_by_a_rotation_of_each_head():
    a = torch.randn(7, 12, dtype=torch.float64)
    turn = torch.block_diag(*[torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q for _ in range(3)])
    b = (a @ turn).requires_grad_()
    loss = transfer_loss(a, b, heads=3, beta=1.0)
    (gradient,) = torch.autograd.grad(loss, b)
    assert loss.item() < 1e-15 and gradient.abs().max().item() < 1e-12
    mixed = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64)).Q
    assert float(transfer_loss(a, a @ mixed, heads=3, beta=1.0)) > 1e-3  # across heads it does


def test_the_divergence_is_the_mean_over_all_elements_of_both_directions():
    a, b = torch.randn(2, 5, 8, dtype=torch.float64)
    p, q = ((x @ x.mT).log_softmax(-1) for x in (a, b))
    kl = F.kl_div(q, p, log_target=True, reduction="sum") + F.kl_div(p, q, log_target=True, reduction="sum")
    close(transfer_loss(a, b, heads=1, beta=1.0), kl / 25)


def edit_distance(a: str, b: str) -> int:
    """Additions, deletions and substitutions; an exchange of any two digits counts as two substitutions."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row, before = [i], row
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y)))
    return row[-1]


def test_hard_negatives_are_one_to_three_edits_of_the_digits():
    scheme = make(max_length=100_000)
    pivots = torch.randint(0, 100_000, (2000, 1))
    edited = scheme.edit_digits(pivots, torch.Generator().manual_seed(0))
    assert (edited >= 0).all()
    found = [
        min(edit_distance(str(p), str(e).rjust(width, "0")) for width in range(len(str(e)), 9))
        for p, e in zip(pivots[:, 0].tolist(), edited[:, 0].tolist(), strict=True)
    ]
    assert max(found) <= 6 and 1.5 < sum(found) / len(found) < 3
    lengths = torch.tensor([len(str(e)) for e in edited[:, 0].tolist()])
    assert {3, 4, 5} <= set(lengths.tolist()) <= {1, 2, 3, 4, 5}  # as long as strings may be


@pytest.mark.parametrize(("axes", "bound"), [(1, 20_000), (2, 100), (3, 30)])
def test_pivots_cover_the_range_and_candidates_stay_in_it(axes, bound):
    scheme = make(axes=axes, max_length=bound**axes, pivots=400, candidates=32)
    assert scheme.bound == bound
    pivots, candidates = scheme.draw_candidates(torch.Generator().manual_seed(1))
    assert pivots.shape == (400, axes) and candidates.shape == (400, 32, axes)
    for drawn in (pivots, candidates):
        assert (drawn >= 0).all() and (drawn < bound).all()
    flat = (pivots * bound ** torch.arange(axes - 1, -1, -1)).sum(-1)
    part = bound**axes / 400
    assert ((flat - part * torch.arange(400) + 1 > 0) & (flat < part * torch.arange(1, 401))).all()  # one in each part
    spread = (candidates.amax(1) - candidates.amin(1)).amax(-1)
    side = max(int(256 ** (1 / axes) + 1e-9), math.ceil(160 ** (1 / axes)))
    share = {1: 0.6, 2: 0.2, 3: 0.2}[axes]
    assert abs(float((spread < side).double().mean()) - share) < 0.08  # drawn from windows


def test_draws_come_from_the_generator():
    scheme = make(dropout=0.3).train()

    def losses(seed: int) -> list[float]:
        torch.manual_seed(torch.randint(1000, ()).item())
        e, found = scheme.prepare(torch.arange(9)[None], None, torch.Generator().manual_seed(seed))
        return [t.detach().item() for t in (e.sum(), *(total for total, _ in found.values()))]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)


def test_a_moved_block_transfers_nothing_and_stays_in_the_range():
    scheme = make(shift=1.0, max_length=36, dropout=0.0).train()
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        start, moved = scheme.moved((30,), generator)
        assert moved and 0 <= int(start) <= 6
        e, losses = scheme.prepare(torch.arange(30)[None], None, torch.Generator().manual_seed(seed))
        close(e, scheme.vectors(int(start) + torch.arange(30)[None]))
        assert "position_transfer" not in losses  # no room: 30 + 8 > 36
    wide = make(shift=1.0).train()
    _, losses = wide.prepare(torch.arange(30)[None])
    assert losses["position_transfer"][0] == 0 and losses["position_transfer"][1] == 0
    _, losses = wide.prepare(torch.arange(30)[None], movable=False)
    assert losses["position_transfer"][0] > 0 and losses["position_transfer"][1] == 1
    still = make(shift=0.0, dropout=0.0).train()
    e, losses = still.prepare(torch.arange(30)[None])
    close(e, still.eval().vectors(torch.arange(30)[None]))
    assert losses["position_transfer"][1] == 1
    assert set(make(pivots=0, offsets=0).train().prepare(torch.arange(3)[None])[1]) == set()


def test_evaluation_has_neither_dropout_nor_losses():
    scheme = make(dropout=0.5)
    e, losses = scheme.prepare(torch.arange(9)[None])
    assert losses == {}
    assert torch.equal(e, scheme.vectors(torch.arange(9)[None]))
    scheme.train()
    assert not torch.equal(scheme.vectors(torch.arange(9)), scheme.vectors(torch.arange(9)))


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
    shape = (5,) if axes == 1 else (5, 2)
    positions = torch.randint(0, 15, shape)
    close(half.vectors(2 * positions), whole.vectors(positions))
    between = 2 * positions
    between[..., *([-1] if axes == 2 else [])] += 1
    after = positions.clone()
    after[..., *([-1] if axes == 2 else [])] += 1
    close(half.vectors(between), (whole.vectors(positions) + whole.vectors(after)) / 2)
    assert half.vectors(torch.full(shape, 2 * (half.bound - 1))).isfinite().all()
    with pytest.raises(Unsupported, match="0 to"):
        half.vectors(torch.full(shape, 2 * half.bound))


def set_vectors(layer, value: float) -> None:
    """e^q and e^k of every position."""
    for projection in (layer.positions.query_projection, layer.positions.key_projection):
        projection.weight.data.zero_()
        projection.bias.data.fill_(value)


@pytest.mark.parametrize(("name", "value"), [("seqpe_mul", 1.0), ("seqpe_add", 0.0), ("seqpe_scalar", 0.0)])
def test_neutral_vectors_are_no_positions(name, value):
    torch.manual_seed(0)
    layer = create_layer("softmax", 12, 3, positions=name, position_options=SMALL).double().eval()
    plain = create_layer("softmax", 12, 3).double().eval()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("positions")})
    x = torch.randn(2, 7, 12, dtype=torch.float64)
    assert float((layer(x).output - plain(x).output).detach().abs().max()) > 1e-9
    set_vectors(layer, value)
    close(layer(x).output, plain(x).output)


ACCEPTING = [
    (name, scheme)
    for name in list_mechanisms()
    for scheme in ALL
    if scheme in get_mechanism(name).accepts_positions and get_mechanism(name).module is None
]


@pytest.mark.parametrize(("name", "scheme"), ACCEPTING)
def test_every_mechanism_that_says_so_takes_it(name, scheme):
    card = get_mechanism(name)
    torch.manual_seed(0)
    for pattern in card.patterns:
        if pattern.cross and scheme == "seqpe":
            continue  # of the queries' input alone, which some mechanisms do not read
        layer = create_layer(name, 16, 2, pattern=pattern, positions=scheme, position_options=SMALL).double().eval()
        x, memory = torch.randn(2, 16, 16, dtype=torch.float64), torch.randn(2, 16, 16, dtype=torch.float64)
        output = layer(x, memory if pattern.cross else None).output
        assert output.isfinite().all()
        for parameter in layer.positions.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        changed = layer(x, memory if pattern.cross else None).output
        assert float((changed - output).detach().abs().max()) > 1e-9


BIASED = [n for n, scheme in ACCEPTING if scheme == "seqpe_scalar" and n not in ("diagonal", "bigbird")]
BIASED.remove("selective_temperature")  # its temperature divides added scores too, but not a bias


@pytest.mark.parametrize("name", BIASED)
@pytest.mark.parametrize("options", [{}, {"per_head": False, "scale": 0.3}, {"projection": "none"}], ids=str)
def test_added_scores_are_a_bias_on_pairs_scaled_once(name, options):
    torch.manual_seed(0)
    layer = create_layer(
        name, 16, 4, pattern="noncausal-self", positions="seqpe_scalar", position_options=SMALL | options
    )
    layer = layer.double().eval()
    for parameter in layer.positions.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    plain = create_layer(name, 16, 4, pattern="noncausal-self", positions="none").double().eval()
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if not k.startswith("positions")})
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    e = layer.positions.encode(torch.arange(9))
    q, k = (e, e) if options.get("projection") == "none" else e.chunk(2, -1)
    q, k = (t.unflatten(-1, (-1, 4)).transpose(0, 1) for t in (q, k))
    bias = (options.get("scale", 1.0) * q @ k.mT / 2)[None].expand(1, 4, -1, -1)  # sqrt(4)
    close(layer(x).output, plain(x, context=Context(mask=Mask(bias=bias))).output)


def test_keys_in_groups_have_vectors_of_their_own():
    torch.manual_seed(0)
    for scheme in INSIDE:
        options = {"positions": scheme, "num_kv_heads": 2, "position_options": SMALL}
        layer = create_layer("softmax", 16, 4, **options).double().eval()
        x = torch.randn(2, 7, 16, dtype=torch.float64)
        assert layer.positions.key_projection.out_features == 8
        first = layer(x[:, :4], context=Context(want=frozenset({"state"})))
        y, _ = layer.step(x[:, 4], first.state)
        close(y, layer(x[:, :5]).output[:, 4])
    with pytest.raises(Unsupported, match="projection='none'"):
        create_layer(
            "softmax", 16, 4, positions="seqpe_mul", num_kv_heads=2, position_options={"projection": "none", **SMALL}
        )


@pytest.mark.parametrize("positions", ALL)
@pytest.mark.parametrize(
    "options", [{}, {"projection": "layers"}, {"projection": "none"}, {"per_head": False}], ids=str
)
def test_models_decode_through_their_state(positions, options):
    if positions == "seqpe" and options:
        pytest.skip("options of the schemes inside layers")
    model = language_model(positions, position_options=SMALL | options)
    ids = torch.randint(0, 11, (2, 9))
    whole = model(ids).output
    first = model(ids[:, :4], context=Context(want=frozenset({"state"})))
    outputs, state = [first.output], first.state
    for t in range(4, 9):
        result = model(ids[:, t : t + 1], state=state)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 1), whole)


@pytest.mark.parametrize("positions", ALL)
def test_padded_and_packed_sequences_count_their_own_positions(positions):
    model = language_model(positions)
    ids = torch.randint(0, 11, (2, 8))
    valid = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    output = model(ids, context=Context(mask=Mask(valid=valid))).output
    for row in range(2):
        close(output[row, valid[row]], model(ids[row : row + 1, valid[row]]).output[0])
    packed = Mask(cu_seqlens=torch.tensor([0, 3, 8]))
    close(model(ids[:1], context=Context(mask=packed)).output[:, 3:], model(ids[:1, 3:]).output)
    where = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]]).expand(2, -1)
    moved = model(ids, context=Context(positions=where)).output
    assert float((moved - model(ids).output).detach().abs().max()) > 1e-6
    with pytest.raises(Unsupported, match="position 200"):
        model(ids, context=Context(positions=where + 188))


@pytest.mark.parametrize("positions", INSIDE)
def test_a_model_encodes_positions_once_for_all_layers(positions):
    model = language_model(positions).train()
    calls = []
    model.positions.encoder.register_forward_hook(lambda _, given, __: calls.append(given[0].shape[0]))
    result = model(torch.randint(0, 11, (5, 9)))
    assert calls[0] == 9 and len(calls) == 3  # not for each row; then the two losses
    assert set(result.losses) == {"position_contrast", "position_transfer"}
    assert all(block.mixer.positions.shared for block in model.blocks)
    assert sum(isinstance(m, type(model.positions.encoder)) for m in model.modules()) == 1
    named = dict(model.named_parameters())
    assert len([n for n in named if n.endswith("query_projection.weight")]) == 1
    each = language_model(positions, position_options=SMALL | {"projection": "layers"})
    assert len([n for n, _ in each.named_parameters() if n.endswith("query_projection.weight")]) == 2


@pytest.mark.parametrize("positions", ALL)
def test_every_parameter_learns_from_the_loss_of_a_model(positions):
    model = language_model(positions).train()
    ids = torch.randint(0, 11, (2, 9))
    model.loss(ids, context=Context(generator=torch.Generator().manual_seed(0))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    result = model(ids)
    losses = auxiliary_loss(result.losses, model.config.loss_weights)
    parts = [0.1 * total / count.clamp(min=1) for total, count in result.losses.values()]
    close(losses, sum(parts))
    none = language_model(positions, loss_weights={"position_contrast": 0.0, "position_transfer": 0.0}).train()
    assert float(torch.as_tensor(auxiliary_loss(none(ids).losses, none.config.loss_weights)).detach()) == 0


@pytest.mark.parametrize("positions", ALL)
def test_routed_heads_share_the_positions_of_their_model(positions):
    model = language_model(positions, plan=["mixture_of_heads", "softmax"]).train()
    assert set(model(torch.randint(0, 11, (2, 9))).losses) >= {"position_contrast", "position_transfer"}
    assert (model.blocks[0].mixer.attention.positions.name == positions) == (positions in INSIDE)


def test_a_layer_alone_learns_its_own_positions():
    layer = create_layer("softmax", 12, 3, positions="seqpe_scalar", position_options=SMALL).train()
    result = layer(torch.randn(2, 9, 12))
    assert set(result.losses) == {"position_contrast", "position_transfer"}
    plan = [("softmax", {"positions": "seqpe_mul", "position_options": SMALL}), "softmax"]
    model = LanguageModel(LanguageModelConfig(11, dim=12, num_heads=3, plan=plan)).train()
    assert model.positions is None
    losses = model(torch.randint(0, 11, (2, 9))).losses
    assert int(losses["position_contrast"][1]) == 4  # of one layer


def test_encoders_on_grids_read_rows_and_columns():
    torch.manual_seed(0)
    for positions in ALL:
        options = {**SMALL, "axes": 2}
        config = EncoderConfig(3, features=2, dim=12, num_heads=3, num_layers=1, positions=positions)
        config = EncoderConfig(**{**vars(config), "position_options": options, "max_length": 400})
        model = Encoder(config).double().eval()
        for parameter in model.positions.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        x = torch.randn(2, 15, 2, dtype=torch.float64)
        wide, tall = (model(x, context=Context(grid=grid)).output for grid in ((3, 5), (5, 3)))
        assert float((wide - tall).detach().abs().max()) > 1e-6
        with pytest.raises(Unsupported, match="a grid of 2 axes"):
            model(x)
        model.train()
        losses = model(x, context=Context(grid=(3, 5), generator=torch.Generator().manual_seed(0))).losses
        assert set(losses) == {"position_contrast", "position_transfer"}
        with pytest.raises(Unsupported, match="position 20"):
            model.eval()(torch.randn(1, 21, 2, dtype=torch.float64), context=Context(grid=(1, 21)))


@pytest.mark.parametrize("positions", ALL)
def test_both_sides_of_an_encoder_decoder_have_positions(positions):
    torch.manual_seed(0)
    config = EncoderDecoderConfig(
        11, 7, dim=12, num_heads=3, num_layers=1, positions=positions, position_options=SMALL, max_length=50
    )
    model = EncoderDecoder(config).double()
    ids, memory = torch.randint(0, 11, (2, 5)), torch.randint(0, 7, (2, 6))
    losses = model(ids, memory).losses
    assert int(losses["position_contrast"][1]) == 8  # four pivots a side
    model.eval()
    whole = model(ids, memory).output
    state, outputs = model.encode_memory(memory), []
    for t in range(5):
        result = model(ids[:, t : t + 1], state=state)
        state = result.state
        outputs.append(result.output)
    close(torch.cat(outputs, 1), whole)


def test_training_is_reproducible_and_resumes_from_its_seed():
    task = create_task("copying", length=12, tokens=2, alphabet=3, evaluation_items=4)

    def trained() -> LanguageModel:
        torch.manual_seed(0)
        config = LanguageModelConfig(
            task.vocab_size, dim=12, num_heads=3, num_layers=1, positions="seqpe_scalar", position_options=SMALL
        )
        model = LanguageModel(config)
        history = train(model, task, TrainConfig(steps=4, batch_size=2, measure_memory=False))
        assert all(point.auxiliary > 0 for point in history.curve)
        return model

    first, second = trained(), trained()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, ties at their mean rank."""

    def ranks(x: Tensor) -> Tensor:
        _, group, count = x.unique(return_inverse=True, return_counts=True)
        last = count.cumsum(0).double()
        return (last - (count - 1) / 2)[group]

    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def test_contrast_alone_puts_positions_in_order():
    """Products of vectors fall with the distance, within windows of 50."""
    torch.manual_seed(0)
    options = {"encoder_dim": 32, "pivots": 32, "candidates": 16, "offsets": 0, "dropout": 0.0, "max_length": 100}
    scheme = create_positions("seqpe", **{**SIZES, "dim": 32, "heads": 1, **options})
    generator = torch.Generator().manual_seed(0)

    def order() -> float:
        found, (i, j) = [], torch.triu_indices(50, 50, 1)
        with torch.no_grad():
            for first in (0, 25, 50):
                e = scheme.vectors(torch.arange(first, first + 50))
                found.append(rank_correlation((e @ e.mT)[i, j], i - j))
        return min(found)

    assert order() < 0.5
    optimizer = torch.optim.Adam(scheme.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=250)
    for _ in range(250):
        total, count = scheme.regularize((50,), generator)["position_contrast"]
        optimizer.zero_grad()
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(scheme.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    assert order() > 0.9  # 0.98 with other seeds


def test_initial_values_and_weight_decay():
    scheme = create_positions("seqpe_scalar", dim=768, heads=12, head_dim=64, encoder_dim=768, max_length=20_000)
    encoder = scheme.encoder
    assert encoder.heads == 12 and encoder.place.shape == (5, 768)
    for weight in (encoder.token, encoder.place, encoder.blocks[0]["qkv"].weight, scheme.query_projection.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    without = [encoder.token, encoder.place, encoder.last, encoder.norm.weight, encoder.norm.bias]
    assert all(p._no_weight_decay for p in without)
    assert not hasattr(encoder.output.weight, "_no_weight_decay")
    parameters = sum(p.numel() for p in encoder.parameters())
    assert 14e6 < parameters < 15e6
    assert sum(p.numel() for p in scheme.parameters()) - parameters == 2 * 768 * (768 + 1)


@pytest.mark.parametrize(
    "options",
    [
        {"axes": 0},
        {"base": 1},
        {"direction": "right"},
        {"encoder_layers": 0},
        {"encoder_dim": 10, "encoder_heads": 3},
        {"dropout": 1.0},
        {"temperature": 0.0},
        {"pad": 10},
        {"beta": 1.5},
        {"shift": -0.1},
        {"interpolation": 0.5},
        {"candidates": 0},
        {"pivots": -1},
        {"max_length": 0},
        {"width": 3},
        {"scale": 1.0},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options):
    with pytest.raises(Unsupported):
        create_positions("seqpe", **{**SIZES, **options})


def test_calls_and_models_that_do_not_fit_are_refused():
    x = torch.randn(1, 4, 12)
    refused = [
        (lambda: create_positions("seqpe_scalar", **SIZES, scale=0.0), "scale"),
        (lambda: create_positions("seqpe_mul", **SIZES, projection="many"), "projection"),
        (
            lambda: create_positions("seqpe_mul", **SIZES).rotate(torch.randn(1, 3, 4, 5), torch.arange(4)[None]),
            "heads",
        ),
        (lambda: create_positions("seqpe", **SIZES).embed(torch.randn(1, 4, 5), torch.arange(4)[None]), "width"),
        (lambda: create_positions("seqpe", **SIZES).embed(x, torch.arange(3)[None]), "positions of shape"),
        (lambda: create_layer("landmark", 12, 3, positions="seqpe_mul"), "seqpe_mul"),
        (lambda: create_layer("linear", 12, 3, positions="seqpe_scalar"), "seqpe_scalar"),
        (lambda: create_layer("softmax", 12, 3, positions="seqpe_mul", position_options={"part": "layer"})(x), "alone"),
        (lambda: LanguageModelConfig(5) and language_model("auto"), "auto"),
        (lambda: ForecasterConfig(2, 2, positions="seqpe_scalar"), "forecaster"),
        (lambda: language_model("none", plan=[("softmax", {"positions": "seqpe"})], num_layers=1), "one layer"),
    ]
    for call, reason in refused:
        with pytest.raises(Unsupported, match=reason):
            call()


def test_patterns_of_the_catalogue_say_where_it_goes():
    softmax, linear, mamba, landmark = (get_mechanism(n) for n in ("softmax", "linear", "mamba", "landmark"))
    assert set(ALL) <= set(softmax.accepts_positions)
    assert {*ALL} & set(linear.accepts_positions) == {"seqpe", "seqpe_mul", "seqpe_add"}
    assert {*ALL} & set(mamba.accepts_positions) == {"seqpe"}
    assert {*ALL} & set(landmark.accepts_positions) == {"seqpe"}
    assert Pattern.CAUSAL_SELF in softmax.patterns
