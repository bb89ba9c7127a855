"""Native attention to retrieved blocks and its step against the torch form in float64, and the cases left to torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from regard import Context, create_layer
from regard.backends import only
from regard.backends.native import library
from regard.contract import Mask, Role, Unsupported
from regard.engines import retrieved_attention
from regard.engines.retrieved_attention import Problem, native_form, torch_form

from .kernels import RETRIEVED, Tensors, retrieved_of, rotary


def in_float64(x: Tensors) -> Tensors:
    return {name: t.double() if t is not None and t.is_floating_point() else t for name, t in x.items()}


def problem(x: Tensors, block: int = 9, top_k: int = 3, rotate=None, **more) -> Problem:
    state = (x[name] for name in ("marks", "closed", "landmark", "cached", "length"))
    return Problem(*state, block, top_k, 0.3, rotate=rotate, chosen=x.get("chosen"), **more)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("n", "m", "block", "top_k", "width", "values", "heads", "groups"),
    [
        (1, 104, 9, 3, 8, 6, 4, 2),
        (70, 104, 9, 3, 8, 6, 4, 2),
        (33, 60, 1, 5, 18, 33, 3, 1),
        (5, 300, 40, 2, 64, 64, 2, 2),
        (90, 47, 3, 20, 6, 130, 2, 1),
        (3, 8, 9, 3, 8, 6, 2, 1),
        (0, 104, 9, 3, 8, 6, 2, 1),
    ],
)
def test_given_blocks_give_what_float64_does(
    instruction_set, dtype, turned, n, m, block, top_k, width, values, heads, groups
):
    sizes = {"heads": heads, "groups": groups, "width": width, "values": values}
    x = retrieved_of(n, m, block=block, top_k=top_k, choose=True, dtype=dtype, **sizes)
    given = {"block": block, "top_k": top_k, "rotate": rotary(width) if turned else None}
    found, expected = RETRIEVED.run(x, **given), RETRIEVED.call(torch_form, **in_float64(x), **given)
    for name, y in found.items():
        seen = expected[name] > -torch.inf
        assert y.dtype == torch.float32 and torch.equal(y > -torch.inf, seen)
        RETRIEVED.close(y[seen], expected[name][seen], name)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("n", "m", "top_k"), [(70, 104, 3), (9, 900, 4), (20, 47, 4)])
def test_blocks_are_chosen_as_in_float64(threads, turned, n, m, top_k):
    x, rotate = retrieved_of(n, m, top_k=top_k), rotary(8) if turned else None
    exact = in_float64(x)
    scores = torch_form.landmark_scores(
        exact["q"], (told := problem(exact, top_k=top_k, rotate=rotate)), torch_form.blocks_of(told)
    )
    order = scores.sort(-1, descending=True).values.clamp(min=-1e9)
    gap = order[..., top_k - 1] - order[..., top_k] if order.shape[-1] > top_k else torch.ones_like(order[..., 0])
    sure = gap > 1e-5
    assert sure.float().mean() > 0.95
    found = RETRIEVED.run(x, top_k=top_k, rotate=rotate)
    expected = RETRIEVED.call(torch_form, **exact, top_k=top_k, rotate=rotate)
    for name, y in found.items():
        seen = sure & (expected["lse"] > -torch.inf)
        RETRIEVED.close(y[seen], expected[name][seen], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("n", [1, 70])
def test_of_blocks_that_tie_the_newest_are_chosen(threads, dtype, turned, n):
    """Landmarks are the same but for rounding, and for a few that score much higher or lower."""
    x, rotate = retrieved_of(n, 2003, top_k=4, dtype=dtype), rotary(8) if turned else None
    blocks, eps = x["marks"].shape[2], 2e-7 if dtype == torch.float32 else 0.0
    same = x["marks"][:, :, :1] * (1 + eps * torch.randn(blocks, 8))
    size = torch.ones(blocks, 1).index_fill(0, torch.tensor([40, 99]), 3.0).to(dtype)
    x["marks"] = (same * size).to(dtype)
    slots = x["closed"].clamp(min=0) + (2003 - x["length"])[:, None]
    x["k"] = x["k"].scatter(2, slots[:, None, :, None].expand(-1, 2, -1, 8), x["marks"])
    found = RETRIEVED.run(x, top_k=4, rotate=rotate)
    packed = problem(in_float64(x), top_k=4, rotate=rotate)
    scores = torch_form.landmark_scores(x["q"].double(), packed, torch_form.blocks_of(packed))
    margin = torch_form.margin_of(x["q"].double(), replace(packed, marks=x["marks"]), torch_form.blocks_of(packed))
    chosen = torch_form.best(scores, margin, 4)
    if not turned:
        assert {int(c) for c in chosen.unique()} <= {40, 99, *range(blocks - 4, blocks)}
    expected = RETRIEVED.run(x | {"chosen": chosen}, top_k=4, rotate=rotate)
    for name, y in found.items():
        RETRIEVED.close(y, expected[name].double(), name)


def test_queries_in_parts_and_shared_choices_are_the_same(monkeypatch):
    x = retrieved_of(70, choose=True)
    found = RETRIEVED.run(x, rotate=rotary(8))
    shared = x | {"chosen": x["chosen"][:, :, :1]}
    expected = RETRIEVED.run(x | {"chosen": shared["chosen"].expand(-1, -1, 70, -1)})
    monkeypatch.setattr(native_form, "NUMBERS_AT_ONCE", 4000)
    for name, y in RETRIEVED.run(x, rotate=rotary(8)).items():
        torch.testing.assert_close(y, found[name], rtol=2e-6, atol=2e-6)
    for name, y in RETRIEVED.run(shared).items():
        torch.testing.assert_close(y, expected[name], rtol=2e-6, atol=2e-6)


def test_empty_blocks_and_dropped_ones_are_not_read():
    """Landmarks that close empty blocks precede a block, and the cache has dropped the first row's oldest tokens."""
    x = retrieved_of(30, choose=True)
    x["landmark"][0, 10] = x["landmark"][0, 11] = True  # the start of the second block
    x["cached"] = torch.tensor([96, 71])  # only the last token of the first block
    spoiled = in_float64(x)
    for name in "kv":
        spoiled[name][0, :, :8] = torch.nan
        spoiled[name][0, :, 10:12] = torch.nan
    expected = RETRIEVED.call(torch_form, **in_float64(x))
    found = RETRIEVED.run(x | {name: spoiled[name].float() for name in "kv"})
    RETRIEVED.close(found["o"], expected["o"])


def test_memory_is_that_of_the_choices_and_not_of_the_cache():
    peaks = []
    for m in (2000, 20000):
        x = retrieved_of(40, m)
        library.workspace_peak(reset=True)
        RETRIEVED.run(x)
        peaks.append(library.workspace_peak())
    assert peaks[1] - peaks[0] < 0.05 * (20000 - 2000) * 2 * 2 * 14 * 4  # bytes of the additional keys and values


def test_what_it_lacks_is_left_to_torch():
    x = retrieved_of(5)
    q, k, v = (x[name] for name in "qkv")
    for told in (problem(x, softmax="ignore"), problem(x, rotate=lambda y, positions: y)):
        retrieved_attention.retrieved_attention(q, k, v, told)
        with pytest.raises(Unsupported, match="try torch"):
            retrieved_attention.retrieved_attention(q, k, v, told, "native")
    with pytest.raises(Unsupported, match="no gradient"):
        retrieved_attention.retrieved_attention(q.requires_grad_(), k, v, problem(x), "native")


def streams(n: int, block: int) -> tuple[Tensor, Tensor]:
    """Roles and lengths of two rows whose first blocks lack different numbers of tokens."""
    places = torch.arange(n) + torch.tensor([0, 2])[:, None]
    return (places % (block + 1) == block).long() * int(Role.LANDMARK), torch.tensor([n, n - 5])


@pytest.mark.parametrize("positions", ["none", "rotary"])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.float32),
        ({"cache_blocks": 4}, torch.float32),  # blocks may be shorter here
        ({"selection": "max_over_heads"}, torch.float32),  # has no fast path
        ({"selection": "max_over_tokens", "offload": "disk"}, torch.float32),
        ({"top_k": 20}, torch.bfloat16),  # more than exist, as rounded scores would change the choice
    ],
    ids=["best blocks", "bounded", "heads together", "on disk", "all blocks"],
)
def test_a_step_is_that_of_float64(monkeypatch, positions, options, dtype):
    """The states have unequal rows, steps pass landmarks, and the fast path is taken."""
    options = {"block": 3, "top_k": 2, **options}
    layer = create_layer("landmark", 32, 4, num_kv_heads=2, positions=positions, **options).eval().to(dtype)
    exact = create_layer("landmark", 32, 4, num_kv_heads=2, positions=positions, **options).eval().double()
    exact.load_state_dict(layer.state_dict())
    x, (roles, lengths), taken = torch.randn(2, 40, 32).to(dtype), streams(40, 3), []
    step = native_form.step
    monkeypatch.setattr(native_form, "step", lambda *a: taken.append(step(*a)) or taken[-1])
    whole = streams(60, 3)[0]
    following = torch.stack([whole[r, length : length + 12] for r, length in enumerate(lengths.tolist())])
    if "cache_blocks" in options:
        following = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0]).expand(2, -1) * int(Role.LANDMARK)
    context = Context(roles=roles, mask=Mask(lengths=lengths), want=frozenset({"state"}))
    with torch.no_grad():
        state, expected = layer(x, context=context).state, exact(x.double(), context=context).state
        for t in range(12):
            token = torch.randn(2, 1, 32).to(dtype)
            now = Context(roles=following[:, t : t + 1], want=context.want)
            found, wanted = layer(token, context=now, state=state), exact(token.double(), context=now, state=expected)
            state, expected = found.state, wanted.state
            size = float(wanted.output.abs().max())
            assert (found.output.double() - wanted.output).abs().max() < (
                1e-5 if dtype == torch.float32 else 0.05
            ) * size
            for name, y in expected.mechanism.tensors().items():
                assert state.mechanism.tensors()[name].shape == y.shape, name
    assert sum(x is not None for x in taken) == (0 if options.get("selection") == "max_over_heads" else 12)


def test_a_step_does_what_the_general_way_does():
    layer = create_layer("landmark", 64, 4, num_kv_heads=2, positions="rotary", block=3, top_k=2).eval()
    x, (roles, _) = torch.randn(2, 50, 64), streams(50, 3)
    context = Context(roles=roles, want=frozenset({"state"}))
    with torch.no_grad():
        state = layer(x, context=context).state
        short = layer.step(x[:, 0], state)[0]
        with only("torch"):
            general = layer.step(x[:, 0], state)[0]
        torch.testing.assert_close(short, general, rtol=0, atol=1e-5)


def test_a_step_that_overfills_its_block_is_refused():
    layer = create_layer("landmark", 64, 4, positions="rotary", block=3, top_k=2).eval()
    x, (roles, _) = torch.randn(2, 23, 64), streams(23, 3)
    with torch.no_grad():
        state = layer(x[:1], context=Context(roles=roles[:1], want=frozenset({"state"}))).state
        with pytest.raises(Unsupported, match="a block of 4 tokens"):
            layer.step(x[:1, 0], state)
