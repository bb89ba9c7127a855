"""Tokens of a grid as images."""

import math

import pytest
import torch

from regard.core.grids import image_of, tokens_of


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sides", [(5,), (3, 4), (2, 3, 4)])
def test_tokens_fill_an_image_row_by_row_and_come_back_without_a_copy(batch, sides):
    tokens = torch.randn(batch, math.prod(sides), 6, dtype=torch.float64)
    image = image_of(tokens, sides)
    assert image.shape == (batch, 6, *sides)
    assert torch.equal(image.flatten(2).mT, tokens)
    assert tokens_of(image).data_ptr() == tokens.data_ptr() and torch.equal(tokens_of(image), tokens)


@pytest.mark.parametrize("batch", [1, 3])
def test_an_image_has_the_strides_of_channels_last_even_alone(batch):
    # a batch of one with another stride of its first axis takes PyTorch's slow way through depthwise convolutions
    assert image_of(torch.randn(batch, 12, 6), (3, 4)).stride() == (72, 1, 24, 6)
