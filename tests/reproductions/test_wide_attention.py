"""The study of wide attention: what the division of heads changes, and what it does not."""

import pytest
import torch
from command_line import answer, run
from support import close

import regard
from regard.reproductions import wide_attention as study

DIM, WIDTH = 64, 16


def layer(heads):
    options = {"head_dim": WIDTH, "pattern": "noncausal-self", "positions": "none"}
    return regard.create_layer("softmax", DIM, heads, **options).double()


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_attention_has_as_many_weights_however_the_heads_are_divided():
    for layers, heads in (study.DEEP, *study.BETWEEN, study.WIDE):
        assert layers * heads == study.HEADS
        assert layers * count(layer(heads)) == 4 * DIM * WIDTH * study.HEADS


def groups(wide, size):
    """Narrow layers that together have the heads of a wide one."""
    found = []
    for start in range(0, study.HEADS, size):
        rows = slice(start * WIDTH, (start + size) * WIDTH)
        narrow = layer(size)
        weights = dict(wide.named_parameters())
        with torch.no_grad():
            for name, weight in narrow.named_parameters():
                weight.copy_(weights[name][:, rows] if weight.shape[1] == size * WIDTH else weights[name][rows])
        found.append(narrow)
    return found


@pytest.mark.parametrize("size", [1, 2, 6])
def test_a_wide_layer_is_the_sum_of_narrow_ones_on_the_same_input(size):
    """Down to single heads, so that what each adds can be looked at by itself, in whatever order."""
    wide, x = layer(study.HEADS), torch.randn(2, 7, DIM, dtype=torch.float64)
    close(sum(narrow(x).output for narrow in groups(wide, size)), wide(x).output)


def test_the_table_has_means_over_seeds_and_nothing_where_nothing_was_measured():
    deep, wide = (f"documents: linear {study.shape(*ratio)}" for ratio in (study.DEEP, study.WIDE))
    cells = {
        (deep, 0): {"score": 0.6, "parameters": 30.0},
        (deep, 1): {"score": 0.8, "parameters": 30.0},
        (wide, 0): {"score": None, "parameters": 10.0},
        ("time: linear", 0): {"speedup": {"median": 3.0, "low": 2.0, "high": 4.0}},
    }
    row = next(r for r in study.table(cells) if (r["task"], r["attention"]) == ("documents", "linear"))
    scores = {"6x2": pytest.approx(0.7), "3x4": None, "2x6": None, "1x12": None}
    assert row == {"task": "documents", "attention": "linear", **scores, "smaller": 3.0, "faster": 3.0}


def test_the_command_lists_studies_and_shows_what_is_done(capsys, tmp_path):
    assert [one["name"] for one in answer(capsys, "study")["studies"]] == ["wide_attention"]
    code, shown, _ = run(capsys, "study wide-attention --table --output", tmp_path)
    assert code == 0 and "sparse_strided" in shown
    code, _, said = run(capsys, "study wide-atention --output", tmp_path)
    assert code == 2 and "try wide-attention" in said
    assert not list(tmp_path.iterdir())
