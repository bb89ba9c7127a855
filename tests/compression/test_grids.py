"""Merging tokens of a grid around a module: the official matching, and invariants of merging and unmerging."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import close, load, refused
from torch import Tensor, nn

from regard import Context, create_layer
from regard.compression.tokens.grids import match_on_grid, merge_on_grid
from regard.models import Encoder, EncoderConfig

GRID = (4, 6)
N, C = 24, 8


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, N, C, dtype=torch.float64)


class DiffusionBlock(nn.Module):
    """A block whose submodules are named as in diffusers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(C) for _ in range(3))
        self.attn1, self.attn2 = (
            create_layer("softmax", C, 2, pattern=p) for p in ("noncausal-self", "noncausal-cross")
        )
        self.ff = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.attn1(self.norm1(x)).output
        x = x + self.attn2(self.norm2(x), memory).output
        return x + self.ff(self.norm3(x))


def diffusion() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    block, memory = DiffusionBlock().double(), torch.randn(1, 3, C, dtype=torch.float64)
    return block, lambda x: block(x, memory.expand(len(x), -1, -1))


def torch_encoder() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    layer = nn.TransformerEncoderLayer(C, 2, 2 * C, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double().eval()
    return model, model


def torch_decoder() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    model = nn.TransformerDecoderLayer(C, 2, 2 * C).double().eval()
    memory = torch.randn(3, 1, C, dtype=torch.float64)
    return model, lambda x: model(x.transpose(0, 1), memory.expand(-1, len(x), -1)).transpose(0, 1)


def own_encoder() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    config = EncoderConfig(num_classes=3, features=C, dim=C, num_layers=2, num_heads=2, positions="sinusoidal")
    model = Encoder(config).double().eval()
    return model, lambda x: model(x, context=Context(grid=GRID)).output


MODELS = [diffusion, torch_encoder, torch_decoder, own_encoder]


def test_the_official_matching() -> None:
    recording = load("vision_tomesd")
    for name, grid, removed in (("even", (6, 8), 24), ("ragged", (7, 5), 17), ("most", (6, 8), 40)):
        x = recording[f"{name}_x"].double()
        found = match_on_grid(x, grid, ratio=(removed + 0.5) / x.shape[1], random=False)
        assert found is not None and found.merge(x).shape[1] == recording[f"{name}_count"]
        close(found.unmerge(found.merge(x)), recording[f"{name}_output"])


def test_merging_what_was_unmerged_is_nothing_new_and_equal_tokens_stay_what_they_are() -> None:
    x = tokens()
    found = match_on_grid(x, GRID)
    assert found is not None and found.sizes.shape == (2, N // 2) and (found.sizes.sum(1) == N).all()
    y = torch.randn(2, N // 2, 5, dtype=torch.float64)
    close(found.merge(found.unmerge(y)), y)
    assert found.unmerge(y).shape == (2, N, 5)
    close((found.merge(x) * found.sizes[..., None]).sum(1), x.sum(1))
    alike = x.gather(1, found.places[..., None].expand(-1, -1, C))  # constant within each group
    close(found.unmerge(found.merge(alike)), alike)


def destinations(batch: int, seed: int, **options: Any) -> list[int]:
    """Tokens that keep the same merged token in all of many rows."""
    found = match_on_grid(tokens(batch), GRID, ratio=1.0, generator=torch.Generator().manual_seed(seed), **options)
    assert found is not None
    return (found.places == found.places[:1]).all(0).nonzero()[:, 0].tolist()


def test_each_cell_has_one_destination_the_same_in_all_rows_and_odd_batches_take_the_first() -> None:
    drawn = [destinations(64, seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len({tuple(one) for one in drawn}) == 3
    for one in drawn:
        assert sorted((t // 12, t % 6 // 2) for t in one) == [(i, j) for i in range(2) for j in range(3)]
    first = [0, 2, 4, 12, 14, 16]
    assert destinations(63, 0) == destinations(64, 0, random=False) == first
    assert destinations(63, 0, cell=(4, 3)) == [0, 3]


def test_the_tokens_most_like_a_destination_go_first_and_more_of_them_with_a_larger_ratio() -> None:
    x = tokens(3)
    few, more = (match_on_grid(x, GRID, ratio=ratio) for ratio in (0.25, 0.5))
    assert few is not None and more is not None
    for row in range(3):
        alone = [set((m.sizes[row] == 1).nonzero()[:, 0].tolist()) for m in (few, more)]
        kept = [{t for t in range(N) if int(m.places[row, t]) in a} for m, a in zip((few, more), alone, strict=True)]
        assert kept[1] < kept[0]
    assert match_on_grid(x, GRID, ratio=0.0) is None
    assert match_on_grid(x[:, :3], (1, 3), ratio=0.5) is None  # less than a cell


@pytest.mark.parametrize("make", MODELS)
def test_where_nothing_is_merged_the_output_is_the_same_and_undo_gives_the_model_back(make: Any) -> None:
    model, call = make()
    x = tokens()
    with torch.no_grad():
        whole = call(x)
        with merge_on_grid(model, GRID, ratio=0.0, parts=("attention", "cross", "feed_forward")):
            assert torch.equal(call(x), whole)
        with merge_on_grid(model, GRID, random=False) as merging:
            merged = call(x)
            assert merged.shape == whole.shape and not torch.allclose(merged, whole)
            assert all(m is not None and m.sizes.shape[1] == N // 2 for m in merging.merges)
        assert torch.equal(call(x), whole)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_copies_of_a_model_that_merges_are_independent_of_it() -> None:
    model, _ = torch_encoder()
    x = tokens()
    with torch.no_grad():
        whole = model(x)
        merging = merge_on_grid(model, GRID, random=False)
        merged = model(x)
        for copied, own in (copy.deepcopy((model, merging)), pickle.loads(pickle.dumps((model, merging)))):
            assert torch.equal(copied(x), merged) and len(own.merges) == 2
            own.undo()
            assert torch.equal(copied(x), whole)
        assert torch.equal(model(x), merged)


def test_attention_of_a_block_is_that_of_its_merged_tokens() -> None:
    model, _ = diffusion()
    x = tokens()
    memory = torch.randn(2, 3, C, dtype=torch.float64)
    found = match_on_grid(x, GRID, random=False)
    assert found is not None
    for parts in (("attention",), ("attention", "cross", "feed_forward")):
        with merge_on_grid(model, GRID, parts=parts, random=False):
            output = model(x, memory)
        y = x + found.unmerge(model.attn1(found.merge(model.norm1(x))).output)
        if "cross" in parts:
            y = y + found.unmerge(model.attn2(found.merge(model.norm2(y)), memory).output)
            y = y + found.unmerge(model.ff(found.merge(model.norm3(y))))
        else:
            y = y + model.attn2(model.norm2(y), memory).output
            y = y + model.ff(model.norm3(y))
        close(output, y)


@pytest.mark.parametrize("make", [diffusion, torch_encoder])
def test_equal_tokens_merged_with_proportional_attention_are_what_they_were_alone(make: Any) -> None:
    model, call = make()
    cells = torch.randn(2, 2, 3, C, dtype=torch.float64)
    x = cells.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1, 2)  # tokens of a cell are equal
    x = x * torch.tensor([1.0, 2.0], dtype=torch.float64)[:, None, None]
    x[:, -1] = torch.randn(C, dtype=torch.float64)
    ratio = 17.5 / N  # merges all but the last
    with torch.no_grad():
        whole = call(x)
        with merge_on_grid(model, GRID, ratio=ratio, random=False, proportional=True):
            close(call(x), whole)
        with merge_on_grid(model, GRID, ratio=ratio, random=False):
            assert not torch.allclose(call(x), whole)


def test_levels_below_the_first_are_merged_only_where_they_are_asked_for() -> None:
    model, call = diffusion()
    small = torch.randn(2, 6, C, dtype=torch.float64)
    with torch.no_grad():
        whole = call(small)
        with merge_on_grid(model, GRID):
            assert torch.equal(call(small), whole)
        with merge_on_grid(model, GRID, levels=2) as merging:
            call(small)
        assert merging.merges[0] is not None and merging.merges[0].sizes.shape[1] == 3
        with merge_on_grid(model, GRID):
            refused("made smaller", call, torch.randn(2, 7, C, dtype=torch.float64))


def test_gradients_reach_every_token() -> None:
    model, call = diffusion()
    x = tokens().requires_grad_()
    with merge_on_grid(model, GRID, parts=("attention", "cross", "feed_forward")):
        (gradient,) = torch.autograd.grad(call(x).square().sum(), x)
    assert gradient.isfinite().all() and (gradient.abs().amax(-1) > 0).all()


def test_what_cannot_be_merged_is_refused() -> None:
    model, _ = torch_encoder()
    refused("ratio", merge_on_grid, model, GRID, ratio=1.5)
    refused("ratio", match_on_grid, tokens(), GRID, ratio="half")
    refused("grid=24", match_on_grid, tokens(), 24)
    refused("cell", merge_on_grid, model, GRID, cell=(0, 2))
    refused("parts", merge_on_grid, model, GRID, parts=("mlp",))
    refused("without a block", merge_on_grid, nn.Linear(C, C), GRID)
    refused("4 x 6", match_on_grid, torch.randn(2, 23, C), GRID)
    with merge_on_grid(model, GRID):
        refused("second", merge_on_grid, model, GRID)
        refused("key_padding_mask", model, tokens(), src_key_padding_mask=torch.zeros(2, N, dtype=torch.bool))
    plan = [("softmax", {"positions": "rotary"})]
    placed = Encoder(EncoderConfig(num_classes=3, features=C, dim=C, num_heads=2, plan=plan))
    refused("in its place", merge_on_grid, placed, GRID)
