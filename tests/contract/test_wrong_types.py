"""Values of a wrong type are refused with Unsupported, wherever a user can pass one."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect

import pytest
import torch

from regard import BlockMask, Context, Kind, Mask, Pattern, Unsupported, create_layer, functional, get_mechanism
from regard.catalogue import list_mechanisms
from regard.create import build_layer
from regard.functional import function_name
from regard.models import Encoder, EncoderConfig, LanguageModel, LanguageModelConfig
from regard.models.vision.van import VANConfig
from regard.workbench.verification.subjects import Subject

WRONG = [3, -1, 2.5, float("nan"), "x", (1, 2), [1], {}, {"weights"}, True, None, object()]
WRONG += [torch.ones(2), torch.ones(2, 2)]
X, Q = torch.randn(2, 5, 16), torch.randn(2, 2, 5, 4)


def refuses_or_accepts(call, *args, **options):
    """Call; the only exception that may be raised is Unsupported."""
    with contextlib.suppress(Unsupported):
        call(*args, **options)


@pytest.mark.parametrize("name", list_mechanisms())
def test_functions_layers_and_their_options(name):
    card = get_mechanism(name)
    pattern, function = card.patterns[0], getattr(functional, function_name(card))
    own = {field.name for field in dataclasses.fields(card.config)}
    inputs = Subject(card, pattern).inputs(5)
    roles = {"roles": inputs.pop("roles")} if "roles" in inputs else {}
    layer = create_layer(name, 16, 2, pattern=pattern)
    shell = set(inspect.signature(type(layer).__init__).parameters) - {"self", "card", "config", "create"}
    for wrong in WRONG:
        for option in own:
            refuses_or_accepts(card.options, **{option: wrong})
        for option in set(inspect.signature(function).parameters) - own:
            refuses_or_accepts(function, **{"pattern": pattern, **inputs, **roles, option: wrong})
        for option in shell:
            refuses_or_accepts(build_layer, card, **{"dim": 16, "num_heads": 2, "pattern": pattern, option: wrong})
        refuses_or_accepts(layer, wrong)
        for argument in ("memory", "context", "state"):
            refuses_or_accepts(layer, X, **{argument: wrong})
        if hasattr(layer, "encode_memory"):
            refuses_or_accepts(layer.encode_memory, wrong)


def test_masks_and_contexts():
    layer = create_layer("softmax", 16, 2)
    for wrong in WRONG:
        for field in dataclasses.fields(Mask):
            refuses_or_accepts(lambda given: layer(X, context=Context(mask=Mask(**given))), {field.name: wrong})
        for field in dataclasses.fields(Context):
            refuses_or_accepts(lambda given: layer(X, context=Context(**given)), {field.name: wrong})
        refuses_or_accepts(BlockMask, wrong, 2)
        refuses_or_accepts(BlockMask, torch.ones(1, 1, 1, 1, dtype=torch.bool), wrong)
    with pytest.raises(Unsupported, match=r"a set of names; try want={.weights.}"):
        Context(want="weights")


@pytest.mark.parametrize(
    ("mask", "meant"),
    [
        (torch.ones(2, 5, dtype=torch.bool), r"Mask\(valid=mask\)"),
        (torch.ones(2, 5), r"Mask\(valid=mask.bool\(\)\)"),
        (torch.tensor([5, 3]), r"Mask\(lengths=mask\)"),
        (torch.zeros(2, 1, 5, 5), r"Mask\(bias=mask\)"),
        (torch.ones(2, 1, 5, 5, dtype=torch.bool), r"masked_fill\(~mask"),
    ],
)
def test_a_tensor_for_a_mask_is_refused_with_the_mask_that_was_meant(mask, meant):
    with pytest.raises(Unsupported, match=meant):
        functional.softmax_attention(Q, Q, Q, mask=mask)
    with pytest.raises(Unsupported, match=meant):
        Context(mask=mask)


@pytest.mark.parametrize(
    ("argument", "meant"),
    [
        ({"is_causal": True}, 'pattern="causal-self"'),
        ({"attn_mask": None}, "mask=Mask"),
        ({"key_padding_mask": None}, "mask=Mask"),
        ({"dropout_p": 0.0}, "dropout"),
        ({"dropuot": 1}, "try dropout"),
        ({"windw": 1}, "try window"),
    ],
)
@pytest.mark.parametrize("name", ["softmax", "local"])
def test_misspelled_arguments_and_those_of_other_libraries_are_answered_with_the_ones_meant(name, argument, meant):
    with pytest.raises(Unsupported, match=meant):
        getattr(functional, f"{name}_attention")(Q, Q, Q, **argument)


def test_softmax_attention_says_that_it_is_causal():
    q, k, v = (torch.randn(2, 2, 5, 4) for _ in range(3))
    torch.testing.assert_close(
        functional.softmax_attention(q, k, v),
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    )
    assert "unlike torch.nn.functional.scaled_dot_product_attention" in functional.softmax_attention.__doc__


@pytest.mark.parametrize("name", list_mechanisms(kind=Kind.ATTENTION))
def test_attention_layers_need_a_number_of_heads(name):
    with pytest.raises(Unsupported, match="num_heads"):
        create_layer(name, 16, pattern=get_mechanism(name).patterns[0])


def test_ids_that_are_none_of_the_vocabulary_are_refused():
    model = LanguageModel(LanguageModelConfig(vocab_size=9, dim=16, num_heads=2, plan=["softmax"]))
    encoder = Encoder(EncoderConfig(num_classes=2, vocab_size=9, dim=16, num_heads=2, plan=["softmax"]))
    for call in (model, encoder, lambda ids: model.generate(ids, 2)):
        for ids in (torch.tensor([[1, 9]]), torch.tensor([[1, -1]])):
            with pytest.raises(Unsupported, match="0 to 8"):
                call(ids)
    for call in (model, lambda ids: model.generate(ids, 2)):
        for ids in ([[1]], "x", None, torch.tensor([1]), torch.tensor([[1.0]]), torch.tensor([[True]])):
            with pytest.raises(Unsupported, match="integers"):
                call(ids)


@pytest.mark.parametrize("name", list_mechanisms(pattern="causal-self"))
def test_a_step_without_a_state_is_the_first_token(name):
    layer = create_layer(name, 16, 2, pattern=Pattern.CAUSAL_SELF).eval()
    if hasattr(layer, "step"):
        with contextlib.suppress(Unsupported):  # mechanisms without a state
            torch.testing.assert_close(layer.step(X[:, 0])[0], layer(X[:, :1]).output[:, 0], rtol=1e-4, atol=1e-5)


def test_a_step_takes_one_token_a_row():
    with pytest.raises(Unsupported, match=r"step on x_t of shape \(2, 5, 16\); supported: one token per row, \(B, C\)"):
        create_layer("gated_linear", 16, 2).step(X)


@pytest.mark.parametrize(("option", "wanted"), [("widths", "a tuple of int"), ("image_size", "int")])
def test_the_type_that_an_option_takes_is_said_in_words(option, wanted):
    with pytest.raises(Unsupported, match=rf"{option}='x' of a VANConfig; supported: {wanted}"):
        VANConfig(**{option: "x"})
