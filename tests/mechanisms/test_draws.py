"""Random draws of layers: only in training, from the call's generator; random features are kept for several calls."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support import close

from regard import Context, create_layer, get_mechanism
from regard.layers.attention_map import orthogonal_features
from regard.mechanisms import kernelized_rpe, performer

DRAWING = [
    *(("agent", {"agent_source": source, "dropout": 0.5, "dwc": "none"}) for source in ("pool_q", "conv", "learned")),
    ("agent", {"agent_source": "token_merge", "dropout": 0.5, "dwc": "none"}),
    ("diagonal", {"dropout": 0.5, "activation": "relu", "output_norm": "none"}),
    ("kernelized_rpe", {"redraw": 1}),
    ("lara", {"landmarks": 3}),
    ("mixture_of_heads", {"noise": 5.0, "shared_heads": 0, "active_heads": 1}),
    ("performer", {"redraw": 1}),
    ("performer", {"fresh": True}),
    ("probsparse", {"factor": 1}),
    ("reformer", {"chunk": 4, "rounds": 2, "buckets": 6}),
    ("sea", {"jitter": 1.0, "top_k": 2, "redraw_every": 1}),
    ("sinkhorn", {"block": 4}),
    ("stochastic_subsampling", {"ratio": 0.3}),
]
FEATURES = [
    ("kernelized_rpe", {"redraw": 3}, "random_features"),
    ("performer", {"redraw": 3}, "features"),
    ("sea", {"redraw_every": 3}, "random_features"),
]


def layer_of(name, options):
    return create_layer(name, 16, 2, pattern=get_mechanism(name).patterns[0], **options).double()


@pytest.mark.parametrize(("name", "options"), DRAWING, ids=str)
def test_a_layer_draws_in_training_alone_from_the_generator_of_the_call(name, options):
    layer, x = layer_of(name, options), torch.randn(2, 60, 16, dtype=torch.float64)

    def output(seed):
        return layer(x, context=Context(generator=torch.Generator().manual_seed(seed))).output

    assert torch.equal(output(0), output(0)) and not torch.equal(output(0), output(1))
    assert (output(2) != 0).all()  # weights are dropped, not outputs
    layer.eval()
    assert torch.equal(output(0), output(1))


@pytest.mark.parametrize(("name", "options", "features"), FEATURES)
def test_random_features_are_drawn_anew_after_some_calls_in_training_only_and_saved(name, options, features):
    layer, x = layer_of(name, options), torch.randn(2, 6, 16, dtype=torch.float64)
    drawn, outputs = [getattr(layer.projection, features).clone()], []
    for _ in range(6):
        outputs.append(layer(x).output)
        drawn.append(getattr(layer.projection, features).clone())
    assert [torch.equal(one, other) for one, other in pairwise(drawn)] == [True, True, False, True, True, False]
    sum(outputs).sum().backward()  # the graph keeps the features of its forward pass
    layer.eval()
    for _ in range(3):
        layer(x)
    again = layer_of(name, options).eval()
    again.load_state_dict(layer.state_dict())
    assert torch.equal(getattr(again.projection, features), drawn[-1])
    assert torch.equal(again(x).output, layer(x).output)


ORTHOGONAL = [
    orthogonal_features,
    performer.draw_features,
    lambda count, width, generator: kernelized_rpe.draw_features(
        count, width, heads=1, orthogonal=True, generator=generator
    )[0],
]


@pytest.mark.parametrize("draw", ORTHOGONAL, ids=["sea", "performer", "kernelized_rpe"])
def test_blocks_of_features_are_orthogonal_with_the_norms_of_gaussian_vectors(draw):
    rows, again = (draw(19, 8, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(rows, again)
    for block in rows.split(8):
        directions = torch.nn.functional.normalize(block, dim=1)
        close(directions @ directions.mT, torch.eye(len(block)), 1e-5)
    many = draw(40_000, 4, generator=torch.Generator().manual_seed(2))
    square = many.square().sum(-1)
    assert abs(float(square.mean()) - 4) < 0.1 and abs(float(square.var()) - 8) < 0.6
    assert (many.mean(0).abs() < 0.05).all()
