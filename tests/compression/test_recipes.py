"""Recipes as people write them, and combinations that are refused."""

from __future__ import annotations

import json

import pytest
from support import refused

from regard.compression.recipes import ALL, STEPS, Gptq, read_recipe, read_recipes
from regard.contract import Unsupported
from regard.layers.quantized import Format


def test_a_recipe_is_written_as_text_as_a_list_and_in_files(tmp_path):
    text = read_recipe("awq + gptq:bits=3,group=64,symmetric=false")
    assert text.needs == {"second"} and text.rounding == Gptq(bits=3, group=64, symmetric=False)
    assert text.rounding.format == Format(3, 64, False)
    assert read_recipe(["awq", {"gptq": {"bits": 3, "group": 64, "symmetric": False}}]) == text
    (tmp_path / "a.json").write_text(json.dumps(text.as_list()))
    (tmp_path / "a.yaml").write_text("steps:\n- awq:\n- gptq: {bits: 3, group: 64, symmetric: false}\n")
    assert read_recipe(str(tmp_path / "a.json")) == read_recipe(str(tmp_path / "a.yaml")) == text
    assert read_recipe(text.name) == text


@pytest.mark.parametrize(
    "name",
    [
        *ALL,
        "gptq:bits=8",
        "smoothquant + llm_int8:threshold=4",
        "sparsegpt:pattern=2:4",
        'structured:heads=0.5,by="magnitude" + wanda:ratio=0.3 + awq + gptq',
        "axformer:focus=size,slack=0.1",
        "axformer:focus=size,slack=0",
        "axformer:focus=speed,fraction=0.5",
        "axformer:focus=speed,fraction=0,ties=true,hard=0",
        "axformer:fraction=0.7,groups=3",
        "axformer:factor=2",
        "axformer",
        "gates:share=0.6,hidden=true",
        "lsq:bits=8,steps=3",
        "lsq:bits=2,group=64",
        "gptq:bits=2,calibrate=kl,head=keep",
        "int4:bits=3,symmetric=false",
        "tokens:method=tome,remove=[4,2,1]",
        "distil:layers=2,kind=features + wanda + distil:steps=5,budget=30s + int8 + tokens:keep=0.5 + export",
        "distil:kind=patient,weight=100 + structured:layers=1 + distil:kind=relation",
        "tokens:method=snapkv,capacity=64",
        "tokens:remove=4 + export:format=torch",
        "tokens:threshold=0.01",
    ],
)
def test_a_recipe_reads_back_from_its_name(name):
    recipe = read_recipe(name)
    assert read_recipe(recipe.name) == recipe == read_recipe(recipe.as_list())


def test_a_name_has_no_options_that_go_with_others():
    for name in ("axformer:focus=size", "axformer:focus=speed", "gptq:bits=8", "lsq:bits=8"):
        assert read_recipe(name).name == name


def test_a_step_that_does_not_round_gets_the_usual_one_that_does():
    assert read_recipe("awq").name == "awq + int4:calibrate=mse"
    assert read_recipe("smoothquant:alpha=0.7").name == "smoothquant:alpha=0.7 + w8a8"


def test_the_order_that_is_suggested_keeps_the_options_and_is_accepted():
    with pytest.raises(Unsupported) as refused:
        read_recipe("gptq:bits=4,order=columns + structured:layers=1")
    suggested = refused.value.nearest.strip('"')
    assert [name for name, _ in read_recipe(suggested).steps] == ["structured", "gptq"]
    assert suggested == "structured:layers=1 + gptq:order=columns"


def test_a_list_of_recipes_keeps_options_with_their_step():
    names = [recipe.name for recipe in read_recipes("int8, int4:group=64,symmetric=false,gptq,int8")]
    assert names == ["int8", "int4:group=64,symmetric=false", "gptq"]
    lists = read_recipes("tokens:method=tome,remove=[4,2,1],int8,tokens:remove=[3, 1],method=tome")
    assert [recipe.as_list()[0].get("tokens", {}).get("remove") for recipe in lists] == [[4, 2, 1], None, [3, 1]]
    assert [recipe.name for recipe in read_recipes("all")] == [read_recipe(name).name for name in ALL]
    others = {
        "structured",
        "axformer",
        "gates",
        "magnitude",
        "wanda",
        "sparsegpt",
        "lsq",
        "distil",
        "export",
    }  # they prune, train or pack
    assert {name for recipe in read_recipes("all") for name, _ in recipe.steps} == set(STEPS) - others


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("int9", "try int"),
        ("structured + int8", "takes nothing away"),
        ("gptq:bit=4", "try bits"),
        ("gptq:bits=5", "bits=5"),
        ("gptq:bits=8,group=32", "8 bits in groups"),
        ("gptq:damping=0", "damping"),
        ("gptq:order=rows", "order"),
        ("int4:group=48", "group=48"),
        ("int4:bits=8", "try int8"),
        ("int8:calibrate=max", "calibrate"),
        ("int8:head=float", "head"),
        ("smoothquant:alpha=2 + w8a8", "alpha"),
        ("int8 + int4", "both round"),
        ("awq + smoothquant + int4", "both scale"),
        ("int4 + awq", 'try "awq'),
        ("smoothquant + int4", "leaves inputs"),
        ("awq + w8a8", "rounds inputs"),
        ("int8 + wanda", 'try "wanda'),
        ("wanda + magnitude", "both make weights 0"),
        ("wanda + axformer", 'try "axformer'),
        ("wanda:ratio=1", "ratio=1"),
        ("wanda:pattern=4:2", "N < M"),
        ("wanda:pattern=2:4,ratio=0.3", "already sets the share"),
        ("wanda + int4:symmetric=false", "would not stay 0"),
        ("sparsegpt:damping=0", "damping"),
        ("structured:layers=1.5", "a number of layers"),
        ("structured:layers=1,layers_by=odd", "layers_by"),
        ("structured:heads=2", "heads"),
        ("axformer:focus=sizes", "try size"),
        ("axformer:slack=0.1", "focus=size"),
        ("distil:kind=answers", "kind"),
        ("distil:kind=features,weight=0", "weight=0"),
        ("distil:budget=5 steps", "a time"),
        ("distil:learning_rate=0", "learning_rate"),
        ("int8 + distil:layers=2", "layers where distil comes first"),
        ("awq + distil + int4", "distil after awq.*directly after a step"),
        ("distil + distil", "distil after distil"),
        ("int8 + tokens + distil", "distil after tokens"),
        ("w8a8 + distil", "no gradients"),
        ("export + int8", 'try "int8'),
        ("tokens + wanda", 'try "wanda'),
        ("tokens:method=tome + tokens:method=evit", "both let tokens go"),
        ("tokens:method=tomes", "try tome"),
        ("tokens:method=ltp", "threshold="),
        ("tokens:method=tome,capacity=5", "keep or remove"),
        ("tokens:keep=0.5,remove=3", "one of them"),
        ("tokens:keep=1", "keep"),
        ("tokens:capacity=64 + export", "keeps no cache"),
        ("tokens:threshold=0.1 + export", "power_bert"),
        ("export:format=tflite", "format"),
        ("missing.yaml", "does not exist"),
        ("", "recipe"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(recipe, words):
    refused(words, read_recipe, recipe)


def test_a_file_with_something_else_is_refused(tmp_path):
    for text, words in (("a: [", "cannot be read"), ("5", "other contents"), ("- 5", "step 5")):
        (tmp_path / "a.yaml").write_text(text)
        refused(words, read_recipe, str(tmp_path / "a.yaml"))
