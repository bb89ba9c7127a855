"""Retrofits with a mixture of heads that shares the heads on which the original depends most."""

from __future__ import annotations

import pytest
import torch
from kills import undisturbed_and_killed
from small_encoders import bert, tokenizer
from small_encoders import tokens as words
from small_llama import WORK, llama, tokens

import regard
from regard import Unsupported
from regard.integrations.swap import mechanism_in
from regard.integrations.transformers import AutoModelForCausalLM
from regard.models import from_transformers
from regard.retrofit import important, open_host, read_record
from regard.retrofit.important import head_importance, most_important, sharing
from regard.retrofit.run import read_settings
from regard.retrofit.sensitivity import Known
from regard.retrofit.settings import RetrofitSettings
from regard.training import head_importance as of_regards_own
from regard.workbench.reports.retrofit_report import render_retrofit

MIXED = "mixture_of_heads"
WIDTH = 8
"""Of a head of the small Llama, of which two share their keys each."""
PLANTED = {0: [1, 3], 1: [0, 3], 2: [1, 2]}
"""The heads that matter in each layer; of both groups."""


def planted(layers):
    """A model in which the output of each layer's attention comes almost from two heads alone."""
    model = llama(layers, loud=range(layers))
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            for head in set(range(4)) - set(PLANTED[number]):
                layer.self_attn.o_proj.weight[:, head * WIDTH : (head + 1) * WIDTH] *= 1e-3
    return model


def begun(host, mechanism=MIXED, **settings):
    return host.begun(read_settings(mechanism, "none", "60 steps", {**WORK, "shared_heads": "important", **settings}))


def measured(host, data, settings):
    return head_importance(host, host.read(data, None, settings), settings, lambda progress: None, 0.0)


def shared_in(module):
    return list(mechanism_in(module).chosen.wrapper_config.shared_heads)


def test_heads_matter_as_much_as_in_regards_own_model_with_the_same_weights(tmp_path):
    model = llama(2).double()
    model.save_pretrained(tmp_path)
    host = open_host(model)
    settings, data = begun(host), tokens()
    read = host.read(data, None, settings)
    batches = [host.batch(read, step, settings.seed + 3, settings).inputs for step in range(important.BATCHES)]
    own = from_transformers(tmp_path, dtype=torch.float64)
    expected = of_regards_own(own, [row[None] for rows in batches for row in rows])
    found = measured(host, data, settings)
    assert all(not parameter.requires_grad for parameter in host.model.parameters())
    for number in (0, 1):
        torch.testing.assert_close(
            torch.tensor(found[number], dtype=torch.float64), expected[number], rtol=1e-4, atol=1e-8
        )


@torch.no_grad()
def test_with_all_heads_active_the_untrained_model_is_the_original():
    host, ids = open_host(planted(2).double()), tokens(40).view(2, 20)
    heads = most_important(MIXED + ":shared_heads=2", {n: torch.rand(4).tolist() for n in (0, 1)})
    for options, equal in (("shared_heads=2,active_heads=2", True), ("shared_heads=2,active_heads=1", False)):
        made, new = host.copy_with([0, 1], sharing(f"{MIXED}:router=query_norm,{options}", heads), 0)
        assert torch.allclose(made(ids).logits, host.model(ids).logits, rtol=1e-10, atol=1e-12) is equal and not new
    assert [shared_in(made.model.layers[n].self_attn) for n in (0, 1)] == [heads[0], heads[1]]
    assert most_important(f"{MIXED}:shared_heads=4", {0: [0.2, 0.1, 0.3, 0.0]}) == {0: [0, 1, 2, 3]}
    assert most_important(f"{MIXED}:shared_heads=2", {0: [0.1, 0.3, 0.1, 0.1]}) == {0: [0, 1]}


def test_the_heads_that_matter_are_shared_and_the_folder_says_so(tmp_path):
    model, told = planted(2), {"0": [1, 3], "1": [0, 3]}
    settings = {"keep_layers": "none", "data": tokens(), "budget": "28 steps", "shared_heads": "important", **WORK}
    made = regard.retrofit(model, MIXED, output=tmp_path / "out", **settings)
    record = read_record(tmp_path / "out")
    assert record["shared_heads"] == made.record["shared_heads"] == told
    assert record["settings"]["shared_heads"] == "important" and set(record["head_importance"]) == {"0", "1"}
    sentence = "most important ones on the training data: layer 0: 1, 3; layer 1: 0, 3."
    assert sentence in (tmp_path / "out" / "README.md").read_text() and sentence in render_retrofit(record)
    loaded, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens(20)[None]
    assert [shared_in(layer.self_attn) for layer in loaded.model.layers] == list(told.values())
    assert torch.equal(loaded(ids).logits, made.model(ids).logits)
    assert loaded.generate(ids, min_new_tokens=3, max_new_tokens=3, do_sample=False).shape == (1, 23)


def test_by_default_the_first_heads_are_shared_and_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("regard.retrofit.run.head_importance", None)
    settings = {"keep_layers": "none", "data": tokens(), "budget": "28 steps", **WORK}
    made = regard.retrofit(planted(1), MIXED, output=tmp_path / "out", **settings)
    assert made.record["shared_heads"] is None and "shared_heads" not in made.record["settings"]
    assert mechanism_in(made.model.model.layers[0].self_attn).chosen.wrapper_config.shared_heads == 2
    assert "always active" not in (tmp_path / "out" / "README.md").read_text() + render_retrofit(made.record)


def test_killed_at_any_stage_and_resumed_it_equals_one_that_was_not(tmp_path, monkeypatch):
    stages = (("importance", 3), ("first steps", 2), ("sensitivity", 1), ("attention transfer", 3), ("training", 5))
    settings = {"keep_layers": "auto:1", "data": tokens(), "budget": "54 steps", "shared_heads": "important", **WORK}
    whole, again = undisturbed_and_killed(monkeypatch, tmp_path, planted(2), MIXED, stages, **settings)
    assert again.record["shared_heads"] == whole.record["shared_heads"]
    assert again.record["shared_heads"] == {str(n): PLANTED[n] for n in again.swapped}


def test_an_encoder_is_measured_on_its_masked_tokens():
    model = bert()
    layers = model.bert.encoder.layer
    heads = model.config.num_attention_heads
    width = model.config.hidden_size // heads
    with torch.no_grad():
        for number, layer in enumerate(layers):
            layer.attention.output.dense.weight *= 10.0
            for head in set(range(heads)) - {heads - 1 - number}:
                layer.attention.output.dense.weight[:, head * width : (head + 1) * width] *= 1e-3
    host = open_host(model, tokenizer())
    settings = begun(host, f"{MIXED}:shared_heads=1,active_heads=1")
    found = most_important(settings.mechanism, measured(host, words(), settings))
    assert found == {0: [heads - 1], 1: [heads - 2]}


def test_sensitivity_is_kept_apart_for_other_shared_heads():
    host = open_host(llama(1))
    first, chosen = (begun(host, shared_heads=heads).identity() for heads in ("first", "important"))
    given = {"model": "0123", "data": "4567"}
    assert Known({**given, **first}, [0]).path != Known({**given, **chosen}, [0]).path


@pytest.mark.parametrize(
    ("mechanism", "heads", "message"),
    [
        ("gated_linear", "important", "with gated_linear, which shares no heads"),
        (f"{MIXED}:shared_heads=[0,2]", "important", "which names its shared heads"),
        (MIXED, "last", "shared_heads='last'; supported: first, important"),
    ],
)
def test_heads_that_cannot_be_chosen_are_refused(mechanism, heads, message):
    with pytest.raises(Unsupported) as refused:
        RetrofitSettings(mechanism, shared_heads=heads)
    assert message in str(refused.value)


def test_without_right_answers_there_is_no_importance(tmp_path):
    settings = {"data": words(), "budget": "60 steps", "length": 24, "batch_size": 1, "lengths": (32,)}
    with pytest.raises(Unsupported, match="on data without right answers"):
        regard.retrofit(
            bert("BertModel"),
            MIXED,
            tokenizer=tokenizer(),
            shared_heads="important",
            output=tmp_path / "out",
            **settings,
        )
    assert not (tmp_path / "out").exists()
