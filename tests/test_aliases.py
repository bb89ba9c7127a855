"""Other names of mechanisms mean what they say, wherever a name is taken."""

from __future__ import annotations

import pytest
import torch
from support import close

from regard import Context, Unsupported, create_layer, get_mechanism, list_mechanisms
from regard.catalogue import resolve
from regard.contract import Kind
from regard.layers.parts import LayerCall
from regard.models import LanguageModel, LanguageModelConfig

CARDS = [get_mechanism(name) for name in list_mechanisms()]
ALIASES = [(alias, card) for card in CARDS for alias in card.aliases]
VARIANTS = [(alias, card) for alias, card in ALIASES if alias in card.alias_options]


@pytest.mark.parametrize(("alias", "card"), ALIASES, ids=[alias for alias, _ in ALIASES])
def test_an_alias_makes_the_layer_of_its_mechanism_with_its_options(alias, card):
    found, options = resolve(alias)
    assert found is card and options == card.alias_options.get(alias, {})
    torch.manual_seed(0)
    made = create_layer(alias, 16, 2, pattern=card.patterns[0])
    torch.manual_seed(0)
    expected = create_layer(card.name, 16, 2, pattern=card.patterns[0], **options)
    assert repr(made) == repr(expected)
    for one, other in zip(made.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert getattr(made, "config", None) == getattr(expected, "config", None)


@pytest.mark.parametrize(("alias", "card"), VARIANTS, ids=[alias for alias, _ in VARIANTS])
def test_a_variant_is_refused_where_its_options_would_be_lost_and_where_they_are_contradicted(alias, card):
    with pytest.raises(Unsupported, match=f"try '{card.name}' with "):
        get_mechanism(alias)
    for option, value in card.alias_options[alias].items():
        other = {"gate": "none", "kinds": ("dot",), "form": "window", "positions": "none"}.get(option, not value)
        with pytest.raises(Unsupported, match=f"of {alias}, which is {card.name}"):
            create_layer(alias, 16, 2, pattern=card.patterns[0], **{option: other})


def layer_of(name, pattern="causal-self", **options):
    return create_layer(name, 16, 2, pattern=pattern, **options).double().eval()


def random_input():
    return torch.randn(2, 12, 16, dtype=torch.float64)


def log_decay(layer):
    x, k = random_input(), torch.zeros(2, 2, 12, layer.head_dim)
    return layer.projection.inputs({"k": k}, LayerCall(x, x, Context()))["log_decay"]


@pytest.mark.parametrize(("name", "gated"), [("deltanet", False), ("gated_delta_rule", True)])
def test_the_gated_delta_rule_forgets_and_the_delta_rule_does_not(name, gated):
    model = LanguageModel(LanguageModelConfig(vocab_size=9, dim=16, num_heads=2, plan=[name]))
    wrapped = create_layer("moh", 16, 2, mechanism=name)
    assert [layer.config.gated for layer in (layer_of(name), model.blocks[0].mixer, wrapped.attention)] == [gated] * 3


def test_retention_turns_its_queries_and_decays_at_fixed_rates():
    layer, same = layer_of("retention"), layer_of("gated_linear", gate="fixed")
    assert layer.positions.name == "rotary"
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in same.named_parameters()]
    close(log_decay(layer).exp()[0, :, 0, 0], 1 - 2.0 ** -torch.arange(5.0, 7).double())


def test_a_simple_gla_has_one_gate_a_head():
    assert log_decay(layer_of("simple_gla")).shape[-1] == 1
    assert log_decay(layer_of("gla")).shape[-1] == layer_of("gla").head_dim > 1


@pytest.mark.parametrize(("name", "fixed"), [("random_synthesizer", True), ("dense_synthesizer", False)])
def test_scores_of_a_random_synthesizer_do_not_depend_on_its_input_and_those_of_a_dense_one_do(name, fixed):
    layer, x, y = layer_of(name, "noncausal-self"), random_input(), random_input()
    assert torch.allclose(layer(x).output + layer(y).output, layer(x + y).output) is fixed


def test_local_attention_in_blocks_begins_anew_with_each_block():
    layer, x = layer_of("block_local", block=4, lookback=0), random_input()
    changed = x.clone()
    changed[:, :4] = 0
    found, expected = layer(changed).output, layer(x).output
    close(found[:, 4:], expected[:, 4:])
    assert not torch.allclose(found[:, :4], expected[:, :4])


@pytest.mark.parametrize(("name", "scan"), [("vmamba", "cross"), ("ss2d", "cross"), ("vim", "bidirectional")])
def test_vmamba_scans_a_grid_in_four_directions_and_vim_in_two(name, scan):
    assert create_layer(name, 16, 2, pattern="noncausal-self").config.scan == scan


def test_randomized_attention_is_no_lara():
    with pytest.raises(Unsupported, match="mechanism 'randomized_attention'"):
        get_mechanism("randomized_attention")


def test_projections_have_no_variants():
    """They are named as a `linear` kind too, which has no place for options of a name."""
    assert all(not card.alias_options for card in CARDS if card.kind is Kind.PROJECTION)
