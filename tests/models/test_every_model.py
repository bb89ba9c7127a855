"""Properties of models of every kind, whatever they read."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from itertools import pairwise

import pytest
import torch
from model_checks import FUNNELS, KINDS, made, ragged, randomize_ends, read_by, small, without_gradient
from support import GRAPH
from torch.nn.functional import cross_entropy

from regard import models
from regard.catalogue import get_mechanism, list_mechanisms
from regard.contract import Context, Mask, Unsupported, types_of

MIXED = ["softmax", "linear"]
POOLS = ("mean", "first", "last", "max", "additive", "structured", "low_rank_pooling")
CROSSING = [n for n in list_mechanisms(pattern="causal-cross") if get_mechanism(n).prepare is None]
LANGUAGE_MODELS = [
    {"plan": ["softmax"] * 2},
    {"plan": ["linear"] * 2},
    {"plan": ["mamba2", "gated_linear"]},
    {"plan": ["linear", ("softmax", {"positions": "none", "num_heads": 4, "feed_forward": 0})]},
]
PADDED = [
    *(("language model", options) for options in LANGUAGE_MODELS),
    *(("encoder", {"pool": p, "positions": x, "plan": MIXED}) for p in POOLS for x in ("auto", "learned")),
    ("encoder", {"pool": "none", "plan": MIXED}),
    *(("encoder-decoder", {"cross_plan": name, "num_layers": 2}) for name in CROSSING),
    *(
        ("forecaster", {"cross_plan": ["linear", "softmax"], "patch": patch, "normalize": normalize})
        for patch in (1, 3)
        for normalize in ("mean", "last", "none")
    ),
    *(
        ("algorithmic network", {"plan": plan, "encoding": "one_hot", "places": 11})
        for plan in (MIXED, "positional_attention")
    ),
    *(
        ("funnel encoder", {"funnel": funnel, "norm": "layer", **options})
        for funnel in FUNNELS[:3]
        for options in (
            {},
            {"positions": "learned"},
            {"stack": {"reversible": True}},
            {"stack": {"layer_scale": 0.3, "branch_norm": "all"}},
        )
    ),
]


def masked(valid):
    """A context with the inputs' mask, and the memory's if there is one."""
    return Context(mask=Mask(valid=valid[0]), memory_mask=Mask(valid=valid[1]) if len(valid) > 1 else None)


@pytest.mark.parametrize(("kind", "options"), PADDED, ids=str)
def test_padding_anywhere_equals_no_padding(kind, options):
    model = randomize_ends(made(kind, **options))
    inputs = read_by(model.config, rows=4, n=11)
    valid = [ragged(x.shape[:2]) for x in inputs]
    for x, kept in zip(inputs, valid, strict=True):
        x[~kept] = torch.nan if x.is_floating_point() else 0
    output = model(*inputs, context=masked(valid)).output
    pooled = output.ndim == 2
    for row in range(4):
        alone = model(*(x[row][kept[row]][None] for x, kept in zip(inputs, valid, strict=True))).output[0]
        torch.testing.assert_close(output[row] if pooled else output[row][valid[0][row]], alone)
    assert pooled or (output[~valid[0]] == 0).all()


PACKED = [
    *(("language model", options) for options in LANGUAGE_MODELS),
    *(("encoder", {"pool": pool, "features": None, "vocab_size": 5, "plan": MIXED}) for pool in POOLS),
    ("encoder-decoder", {"cross_plan": "linear", "num_layers": 2}),
    ("forecaster", {"patch": 3, "num_layers": 2}),
    ("algorithmic network", {"plan": MIXED}),
    ("funnel encoder", {"funnel": {"truncate": True}, "features": None, "vocab_size": 5}),
]


@pytest.mark.parametrize(("kind", "options"), PACKED, ids=str)
def test_packed_equals_separate(kind, options):
    model = made(kind, **options)
    inputs = read_by(model.config, rows=1, n=11, m=13)
    borders = [[0, 4, 4, 5, 11], [0, 7, 7, 10, 13]][: len(inputs)]
    masks = [Mask(cu_seqlens=torch.tensor(ends)) for ends in borders]
    output = model(*inputs, context=Context(mask=masks[0], memory_mask=masks[-1] if len(masks) > 1 else None)).output
    for i, parts in enumerate(zip(*(pairwise(ends) for ends in borders), strict=True)):
        alone = model(*(x[:, start:end] for x, (start, end) in zip(inputs, parts, strict=True))).output[0]
        found = output[i] if output.ndim == 2 else output[0, slice(*parts[0])]
        torch.testing.assert_close(found, alone)
    assert output.isfinite().all()


LEARNING = [
    ("language model", {"plan": MIXED, "positions": "learned", "max_length": 9}),
    *(("encoder", {"pool": pool, "plan": MIXED}) for pool in POOLS),
    ("encoder-decoder", {"positions": "learned", "max_length": 9, "num_layers": 2}),
    ("forecaster", {"patch": 3, "quantiles": (0.1, 0.9), "num_layers": 2}),
    ("algorithmic network", {"plan": MIXED}),
    *(("funnel encoder", {"funnel": funnel}) for funnel in FUNNELS),
]


@pytest.mark.parametrize(("kind", "options"), LEARNING, ids=str)
def test_gradients_reach_every_parameter(kind, options):
    model = made(kind, **options).train()
    inputs = read_by(model.config, n=23 if kind == "funnel encoder" else 9, m=9)
    model(*inputs).output.square().sum().backward()
    assert without_gradient(model) == []


COMPILED = {
    "encoder-decoder": {"cross_plan": "gated_linear"},
    "forecaster": {"quantiles": (0.1, 0.9), "patch": 3},
    "funnel encoder": {"decoder_layers": 1, "funnel": {"blocks": 1}},
}


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_whole_equals_eager(kind):
    model = made(kind, num_layers=1, **COMPILED[kind])
    inputs = read_by(model.config)
    context = masked([ragged(x.shape[:2]) for x in inputs])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=GRAPH)
    with torch.no_grad():
        expected = model(*inputs, context=context).output
        torch.testing.assert_close(compiled(*inputs, context=context).output, expected)


@pytest.mark.parametrize("kind", ["language model", "encoder-decoder"])
def test_loss_is_the_mean_over_valid_next_tokens(kind):
    model = made(kind, num_layers=1)
    ids, *memory = read_by(model.config)
    valid = ragged(ids.shape)
    nats = []
    for row in range(3):
        tokens = ids[row][valid[row]][None]
        logits = model(tokens, *(x[row : row + 1] for x in memory)).output[0, :-1]
        nats.append(cross_entropy(logits, tokens[0, 1:], reduction="none"))
    found = model.loss(ids, *memory, context=Context(mask=Mask(valid=valid)))
    torch.testing.assert_close(found, torch.cat(nats).mean())
    assert model.loss(ids[:, :0], *memory) == 0


@pytest.mark.parametrize("kind", ["encoder-decoder", "forecaster"])
def test_an_encoder_layer_for_grids_is_refused_when_the_model_is_built(kind):
    with pytest.raises(Unsupported, match=r"large_kernel for grids of 2 axes .* which has no grids") as caught:
        made(kind, encoder_plan=["softmax", "large_kernel"])
    assert caught.value.nearest.startswith("('large_kernel', {'axes': 1})")
    made(kind, encoder_plan=["softmax", ("large_kernel", {"axes": 1})])


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_of_another_type_is_refused_and_its_config_named(kind):
    with pytest.raises(Unsupported, match=r"dim=10\.5 of an? \w+Config; supported: int"):
        small(kind, dim=10.5)


def configs():
    """Yield all dataclasses of the package whose names end in Config."""
    for module in pkgutil.walk_packages(models.__path__, "regard.models."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and dataclasses.is_dataclass(value) and value.__name__.endswith("Config"):
                yield value


@pytest.mark.parametrize("config", sorted(set(configs()), key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_the_types_of_all_options_are_known_when_they_are_checked(config):
    """A type that is imported only for type checkers would be unknown, and its option unchecked."""
    assert {option.name for option in dataclasses.fields(config)} <= types_of(config).hints.keys()


REFUSED = [
    ("language model", {"plan": "sofmax"}, "try softmax"),
    ("language model", {"plan": [("softmax", 3)]}, "plan entry"),
    ("language model", {"plan": "token_parameter"}, "softmax.*linear.*token_parameter"),
    ("language model", {"plan": "low_rank_pooling"}, "pool="),
    ("language model", {"plan": []}, "0 layers"),
    ("language model", {"plan": ["softmax"], "num_layers": 2}, "num_layers=1"),
    ("language model", {"positions": "rotry"}, "try rotary"),
    ("language model", {"plan": [("softmax", {"positions": "learned"})]}, "for one layer"),
    ("language model", {"plan": [("softmax", {"windw": 3})]}, "windw"),
    ("language model", {"norm": "batch"}, "norm"),
    ("language model", {"dropout": 1.5}, "dropout"),
    ("encoder", {"vocab_size": 4}, "None for the other"),
    ("encoder", {"features": None}, "None for the other"),
    ("encoder", {"pool": "meen"}, "try mean"),
    ("encoder", {"pool": "aditive"}, "last, additive, structured, none, .*low_rank_pooling; try additive"),
    ("encoder", {"pool_options": {"slots": 2}}, "pool_options"),
    ("encoder", {"pool": "last", "pool_options": {"slots": 2}}, "pool_options with pool='last'"),
    ("encoder", {"pool": "additive", "pool_options": {"slots": 2}}, "supported: hidden"),
    ("encoder", {"pool": "structured", "pool_options": {"slots": 0}}, "slots=0"),
    ("encoder-decoder", {"cross_plan": "flow_attention"}, "causal-cross.*queries"),
    ("encoder-decoder", {"cross_plan": "landmark"}, "inserts tokens"),
    ("encoder-decoder", {"decoder_plan": "landmark"}, "inserts tokens"),
    ("encoder-decoder", {"cross_plan": [("mixture_of_heads", {"mechanism": "flow_attention"})]}, "causal-cross"),
    ("encoder-decoder", {"cross_plan": "token_parameter"}, "softmax.*linear"),
    ("encoder-decoder", {"cross_plan": ["softmax"], "num_layers": 2}, "num_layers=1"),
    ("encoder-decoder", {"cross_plan": ["softmax"], "decoder_plan": ["softmax"] * 2}, "layers"),
    ("encoder-decoder", {"memory_vocab_size": None}, "None for the other"),
    ("encoder-decoder", {"memory_features": 2}, "None for the other"),
    ("forecaster", {"cross_plan": "local"}, "noncausal-cross.*memory"),
    ("forecaster", {"cross_plan": "landmark"}, "inserts tokens"),
    ("forecaster", {"encoder_plan": "landmark"}, "inserts tokens"),
    ("forecaster", {"target_features": (3,)}, "from 0 to 2"),
    ("forecaster", {"target_features": (0, 0)}, "different numbers"),
    ("forecaster", {"target_features": ()}, "at least one; or num_targets"),
    ("forecaster", {"num_targets": 2}, "target_features for values that the memory holds"),
    ("forecaster", {"target_features": (), "num_targets": 0}, "num_targets"),
    ("forecaster", {"quantiles": (0.5, 0.1)}, "rising"),
    ("forecaster", {"quantiles": (0.5, 1.0)}, "between 0 and 1"),
    ("forecaster", {"normalize": "median"}, "mean, last, none"),
    ("forecaster", {"patch": 0}, "patch"),
    ("forecaster", {"positions": "learned"}, "learned positions"),
    ("forecaster", {"positions": "rotry"}, "try rotary"),
    ("algorithmic network", {"plan": "sofmax"}, "try softmax"),
    ("algorithmic network", {"encoding": "onehot"}, "try one_hot"),
    ("algorithmic network", {"places": 0}, "places"),
    ("algorithmic network", {"features": 0}, "features"),
    ("algorithmic network", {"feed_forward": 0}, "feed_forward"),
    ("algorithmic network", {"positions": "learned"}, "try encoding='sinusoidal'"),
    ("algorithmic network", {"plan": "large_kernel"}, "no grids"),
    ("funnel encoder", {"vocab_size": 4}, "None for the other"),
    ("funnel encoder", {"funnel": {"block": 2}}, "try blocks"),
    ("funnel encoder", {"funnel": {"blocks": 0}}, "blocks"),
    ("funnel encoder", {"decoder_layers": 0}, "0 layers"),
    ("funnel encoder", {"decoder_layers": 2, "decoder_plan": ["linear"]}, "1 layers"),
    ("funnel encoder", {"decoder_plan": "landmark"}, "inserts tokens"),
    ("funnel encoder", {"stack": {"exits": (1,)}, "num_layers": 2}, "exits"),
]


@pytest.mark.parametrize(("kind", "options", "words"), REFUSED)
def test_what_cannot_be_built_is_refused(kind, options, words):
    by_the_config = kind in ("encoder-decoder", "forecaster")
    with pytest.raises(Unsupported, match=words):
        small(kind, **options) if by_the_config else made(kind, **options)
