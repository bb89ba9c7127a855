"""Aliases of mechanisms mean what they say, wherever a name is accepted."""

from __future__ import annotations

import pytest
import torch

from regard import Unsupported, create_layer, functional, get_mechanism, list_mechanisms
from regard.catalogue import resolve
from regard.contract import Kind
from regard.models import LanguageModel, LanguageModelConfig

CARDS = [get_mechanism(name) for name in list_mechanisms()]
ALIASES = {alias: card for card in CARDS for alias in card.aliases}
VARIANTS = [alias for alias, card in ALIASES.items() if alias in card.alias_options]


@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_makes_the_layer_of_its_mechanism_with_its_options(alias):
    card, (found, options) = ALIASES[alias], resolve(alias)
    assert found is card and options == card.alias_options.get(alias, {})
    torch.manual_seed(0)
    made = create_layer(alias, 16, 2, pattern=card.patterns[0])
    torch.manual_seed(0)
    expected = create_layer(card.name, 16, 2, pattern=card.patterns[0], **options)
    assert repr(made) == repr(expected)
    for one, other in zip(made.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert getattr(made, "config", None) == getattr(expected, "config", None)


@pytest.mark.parametrize("alias", VARIANTS)
def test_a_variant_is_refused_where_its_options_would_be_lost_and_where_they_are_contradicted(alias):
    card = ALIASES[alias]
    with pytest.raises(Unsupported, match=f"try '{card.name}' with "):
        get_mechanism(alias)
    for option, value in card.alias_options[alias].items():
        other = {"gate": "none", "kinds": ("dot",), "form": "window", "positions": "none"}.get(option, not value)
        with pytest.raises(Unsupported, match=f"of {alias}, which is {card.name}"):
            create_layer(alias, 16, 2, pattern=card.patterns[0], **{option: other})


def test_options_behind_a_name_are_those_of_a_call():
    for written, name, options in (
        ("local:window=3,output_norm=rms", "local", {"window": 3, "output_norm": "rms"}),
        ("gated_delta_rule:gate=diagonal", "delta_rule", {"gated": True, "gate": "diagonal"}),
        ("mixture_of_heads:mechanism=local:window=2", "mixture_of_heads", {"mechanism": "local:window=2"}),
    ):
        assert repr(create_layer(written, 16, 2)) == repr(create_layer(name, 16, 2, **options))
    assert create_layer("local:window=3", 16, 2, window=3).config.window == 3
    config = LanguageModelConfig(vocab_size=8, dim=16, num_heads=2, plan=[("local:window=3", {"dropout": 0.1})])
    assert config.plan == (("local", {"window": 3, "dropout": 0.1}),)
    for refused, words in (
        ("local:windw=3", "try window"),
        ("local:window", "option=value"),
        ("locl:window=3", "mechanism 'locl'.*try local"),
        ("local:", "mechanism 'local:'"),
    ):
        with pytest.raises(Unsupported, match=words):
            create_layer(refused, 16, 2)
    with pytest.raises(Unsupported, match="window=4 of local:window=3, which is local with window=3"):
        create_layer("local:window=3", 16, 2, window=4)


@pytest.mark.parametrize(
    ("alias", "options"),
    [
        ("deltanet", {}),
        ("gated_delta_rule", {"gated": True}),
        ("kda", {"gated": True, "gate": "diagonal", "output_gate": "sigmoid"}),
        ("gla", {}),
        ("simple_gla", {"gate": "scalar"}),
        ("retention", {"gate": "fixed", "positions": "rotary"}),
        ("random_synthesizer", {"kinds": ("random",)}),
        ("dense_synthesizer", {"kinds": ("dense",)}),
        ("block_local", {"form": "block"}),
        ("masformer", {"form": "block", "block": 512}),
        ("vim", {}),
        ("vmamba", {"scan": "cross", "combine": "sum", "convolution": "grid", "conv_width": 3, "norm": "layer"}),
        ("eulerformer", {"score_scale": "rsqrt", "delta": "zeros", "per_head": False}),
    ],
)
def test_names_of_papers_mean_their_options(alias, options):
    assert resolve(alias)[1] == options


@pytest.mark.parametrize(("name", "gated"), [("deltanet", False), ("gated_delta_rule", True)])
def test_a_name_means_the_same_in_a_layer_a_plan_and_a_wrapper(name, gated):
    model = LanguageModel(LanguageModelConfig(vocab_size=9, dim=16, num_heads=2, plan=[name]))
    layers = (create_layer(name, 16, 2), model.blocks[0].mixer, create_layer("moh", 16, 2, mechanism=name).attention)
    assert [layer.config.gated for layer in layers] == [gated] * 3


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("sofmax", "`regard list` tells; try softmax$"),
        ("locl:window=3", "`regard list` tells; try local$"),
        (3, "of type int; .*a name, as text"),
    ],
)
def test_an_unknown_name_is_told_the_nearest_in_one_line(asked, told):
    with pytest.raises(Unsupported, match=told) as refusal:
        create_layer(asked, 16, 2)
    assert len(str(refusal.value)) < 160


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("gla", "try gated_linear_attention"),
        ("sofmax_attention", "try softmax_attention"),
        ("retention", r"try regard.create_layer\('retention', ...\), or gated_linear_attention"),
        ("zzz", "see dir"),
    ],
)
def test_a_function_that_is_not_there_is_told_the_nearest(asked, told):
    with pytest.raises(AttributeError, match=f"no function '{asked}'; {told}"):
        getattr(functional, asked)


def test_randomized_attention_is_no_lara():
    with pytest.raises(Unsupported, match="mechanism 'randomized_attention'"):
        get_mechanism("randomized_attention")


def test_projections_have_no_variants():
    """Their names also serve as `linear` kinds, where a name cannot carry options."""
    assert all(not card.alias_options for card in CARDS if card.kind is Kind.PROJECTION)
