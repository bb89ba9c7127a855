"""A user's module as a mechanism: what it was found to keep out is handed on, and the rest is refused."""

from pathlib import Path

import pytest
import torch

import regard
from regard.catalogue import unregister
from regard.contract import Context, Mask, Pattern, Unsupported
from regard.models import EncoderDecoder, EncoderDecoderConfig, LanguageModel, LanguageModelConfig
from regard.workbench.detection.adopted import adopt

FILE = Path(__file__).with_name("somebodys_modules.py")
NS, CS, NC, CC = Pattern


@pytest.fixture
def layer():
    """The layer of a class of the file, which is in the catalogue for the duration of a test."""
    names = []

    def make(name, pattern):
        if name not in names:
            names.append(adopt(str(FILE), name).name)
        return regard.create_layer(name, 32, 4, pattern=pattern).double()

    yield make
    for name in names:
        unregister(name)


def masks(lengths, n):
    """The same padding in both of its forms."""
    return Mask(lengths=torch.tensor(lengths)), Mask(valid=torch.arange(n) < torch.tensor(lengths)[:, None])


def test_padded_queries_are_handed_on_to_a_module_that_keeps_them_out(layer):
    x, memory = torch.randn(2, 7, 32).double(), torch.randn(2, 5, 32).double()
    one = layer("HonoursQueryMask", NC)
    for mask, memory_mask in zip(masks([4, 7], 7), masks([5, 2], 5), strict=True):
        found = one(x, memory, context=Context(mask=mask, memory_mask=memory_mask)).output
        alone = one(x[:1, :4], memory[:1]).output, one(x[1:], memory[1:, :2]).output
        torch.testing.assert_close(found[:1, :4], alone[0])
        torch.testing.assert_close(found[1:], alone[1])
    own = layer("HonoursQueryMask", NS)
    found = own(x, context=Context(mask=masks([4, 7], 7)[0])).output
    torch.testing.assert_close(found[:1, :4], own(x[:1, :4]).output)


def test_a_module_that_keeps_queries_apart_needs_no_mask_for_them(layer):
    x, memory = torch.randn(2, 7, 32).double(), torch.randn(2, 5, 32).double()
    one = layer("Right", NC)
    found = one(x, memory, context=Context(mask=masks([4, 7], 7)[0])).output
    torch.testing.assert_close(found[:1, :4], one(x[:1, :4], memory[:1]).output)


@pytest.mark.parametrize("name", ["MixesQueries", "IgnoresQueryMask", "FutureMean"])
def test_padded_queries_that_a_module_sees_are_refused(layer, name):
    x, memory = torch.randn(2, 7, 32).double(), torch.randn(2, 5, 32).double()
    one = layer(name, NC)
    for mask in masks([4, 7], 7):
        with pytest.raises(Unsupported, match=f"{name} with padded queries.*query_padding_mask"):
            one(x, memory, context=Context(mask=mask))
    assert one(x, memory).output.shape == x.shape
    assert not type(one).keeps_padding_out(NC)


def test_what_a_module_raises_is_said_of_it(layer):
    layer("EightChannels", NS)
    with pytest.raises(Unsupported, match="EightChannels, which raises AssertionError when it is made: heads of 8"):
        regard.create_layer("EightChannels", 16, 4, pattern=NS)
    with pytest.raises(Unsupported, match="EightChannels, which raises AssertionError when it is called with 2 tokens"):
        layer("EightChannels", NS)(torch.randn(1, 2, 32).double())


def test_a_mask_of_pairs_is_refused(layer):
    x = torch.randn(2, 7, 32).double()
    with pytest.raises(Unsupported, match="Right with a mask of pairs"):
        layer("Right", CS)(x, context=Context(mask=Mask(bias=torch.zeros(1, 1, 7, 7).double())))


def test_a_module_that_mixes_the_rows_of_a_batch_does_not_enter():
    with pytest.raises(Unsupported, match=r"MeanOfTheBatch, which has none of the patterns .*other rows of a batch"):
        adopt(str(FILE), "MeanOfTheBatch")


def test_models_of_a_module_without_a_state_generate_by_reading_again(layer):
    layer("Right", CS)
    ids = torch.randint(11, (2, 3))
    one = LanguageModel(LanguageModelConfig(vocab_size=11, dim=32, num_layers=1, num_heads=4, plan="Right")).double()
    read = ids
    for _ in range(5):
        read = torch.cat([read, one(read).output[:, -1:].argmax(-1)], 1)
    assert torch.equal(one.eval().generate(ids, 5), read[:, 3:])
    with pytest.raises(Unsupported, match="a state of Right"):
        one.generate(ids, 5, use_state=True)
    config = EncoderDecoderConfig(11, 11, dim=32, num_layers=1, num_heads=4, cross_plan="Right")
    both, memory = EncoderDecoder(config).double().eval(), torch.randint(11, (2, 4))
    assert both.generate(ids, 4, memory=memory).shape == (2, 4)
    assert torch.equal(
        both.generate(ids, 4, memory=memory, beams=2), both.generate(ids, 4, memory=memory, beams=2, use_state=False)
    )
