"""Every mechanism in models of other libraries: equal to the project's own layers on the same weights, or refused."""

from __future__ import annotations

import pytest
from support import ALL

from regard import list_mechanisms
from regard.integrations import heads
from regard.workbench.verification import swapped
from regard.workbench.verification.swap_hosts import HOSTS, hosts
from regard.workbench.verification.swapped import check_swap, swap_cells, swap_variants


def tried():
    """Yield two models for each mechanism, different ones for different mechanisms, with varying sets of options."""
    models = list(hosts())
    for turn, name in enumerate(list_mechanisms()):
        options = ("", *swap_variants(name))
        for place in range(len(models)) if ALL else (turn % len(models), (turn + 1 + turn // 8 % 7) % len(models)):
            yield from (
                (models[place], name, variant) for variant in (options if ALL else (options[place % len(options)],))
            )


CELLS = list(dict.fromkeys(tried()))


@pytest.mark.filterwarnings("ignore")  # from transformers and timm, about small configs
@pytest.mark.parametrize(("model", "name", "variant"), CELLS, ids=[" ".join(cell) for cell in CELLS])
def test_a_swapped_model_computes_what_own_layers_do_or_is_refused(model, name, variant):
    cell = check_swap(model, name, variant)
    assert cell.refused or cell.errors
    assert not cell.failures, cell


REFUSALS = {
    ("llama", "mamba"): "is a mixer",
    ("llama", "aaren"): "learns its own query",
    ("gpt2", "landmark"): "inserts tokens",
    ("llama", "long_short"): "landmarks are mixtures of keys",
    ("llama", "bigbird"): "causal-self",
    ("cross", "local"): "noncausal-cross",
    ("bert", "transformer_xl"): "keys of its earlier inputs",
}


@pytest.mark.parametrize(("model", "name"), REFUSALS)
def test_a_refusal_says_why(model, name):
    if model not in hosts():
        pytest.skip("needs another library")
    assert REFUSALS[model, name] in check_swap(model, name).refused


def test_a_swap_that_computes_something_else_fails(monkeypatch):
    whole = heads.apply
    monkeypatch.setattr(heads, "apply", lambda *args, **given: whole(*args, **{**given, "scale": 0.2}))
    cell = check_swap("encoder", "softmax", checks=("float64", "training"))
    assert cell.failures == ["float64", "training"]


def test_losses_that_are_lost_fail(monkeypatch):
    monkeypatch.setattr("regard.integrations.torch_modules.hand_back", lambda *_: None)
    assert check_swap("decoder", "mixture_of_heads", checks=("training",)).failures == ["training"]


def test_cells_are_named_once_and_say_what_they_hold():
    found = [cell.row() for cell in swap_cells(["encoder"], ["linear", "mamba"], variants=False)]
    assert [(row["model"], row["mechanism"]) for row in found] == [("encoder", "linear"), ("encoder", "mamba")]
    assert set(found[0]["errors"]) == set(swapped.MEANINGS) - {"cache"}
    assert "mixer" in found[1]["refused"] and "errors" not in found[1]
    assert set(hosts()) <= set(HOSTS)
