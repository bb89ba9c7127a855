from __future__ import annotations

from ast import literal_eval

import pytest
import torch
from model_checks import made
from support import close, refused

from regard.contract import Context, Mask, Result, Unsupported
from regard.layers.pooling import make_pooling
from regard.models import Encoder, config_for, models_for, set_exit_rule
from regard.models.losses import auxiliary_loss
from regard.tasks import create_task


def make_encoder(**options) -> Encoder:
    return made("encoder", **{"plan": ["softmax", "linear"], **options})


def test_a_token_sees_later_ones():
    model = make_encoder(pool="first", plan=["softmax"])
    x = torch.randn(1, 5, 2, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4] += 1
    assert not torch.allclose(model(x).output, model(changed).output)


@pytest.mark.parametrize("name", ["softmax", "gated_linear", "mamba2"])
def test_a_token_of_a_causal_encoder_sees_none_that_come_later(name):
    model = make_encoder(pool="none", causal=True, plan=[name, name])
    x = torch.randn(2, 7, 2, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = model(x).output, model(changed).output
    close(after[:, :4], before[:, :4])
    assert (after[:, 4:] != before[:, 4:]).any(-1).all()
    left_padded = torch.nn.functional.pad(x, (0, 0, 2, 0))
    valid = (torch.arange(9) >= 2).expand(2, -1)
    close(model(left_padded, context=Context(mask=Mask(valid=valid))).output[:, 2:], before)


def test_an_encoder_is_causal_for_causal_tasks_and_refuses_what_has_no_such_pattern():
    task = create_task("in_context_functions", length=16, evaluation_items=4)
    assert models_for(task) == ["Encoder"]
    config = config_for(task, "softmax", dim=16, num_layers=1, num_heads=2)
    assert (config.causal, config.pool, config.num_classes, config.features) == (True, "none", 1, 8)
    refused("causal-self", Encoder, config_for(task, "fnet", dim=16, num_layers=1, num_heads=2))


@pytest.mark.parametrize(
    ("pool", "options"),
    [("last", {}), ("additive", {"hidden": 5}), ("structured", {"slots": 3, "hidden": 5, "diversity": True})],
)
def test_the_head_reads_the_pool_of_the_last_layer(pool, options):
    model, plain = make_encoder(pool=pool, pool_options=options), make_encoder(pool="none", num_classes=16)
    shared = {k: v for k, v in model.state_dict().items() if not k.startswith(("head.", "pooling."))}
    plain.load_state_dict(shared, strict=False)
    with torch.no_grad():
        plain.head.weight.copy_(torch.eye(16))
        plain.head.bias.zero_()
    x, context = torch.randn(3, 6, 2, dtype=torch.float64), Context(mask=Mask(lengths=torch.tensor([6, 0, 2])))
    hidden, layer = plain(x, context=context).output, make_pooling(pool, 16, 2, **options).double()
    layer.load_state_dict(model.pooling.state_dict())
    found, pooled = model(x, context=context), layer(hidden, context=context)
    torch.testing.assert_close(found.output, model.head(pooled.output.flatten(1)))
    assert set(found.losses) == set(pooled.losses)
    if "diversity" in options:
        torch.testing.assert_close(found.losses["diversity"], pooled.losses["diversity"])
        assert auxiliary_loss(found.losses, {"diversity": 1.0}) == found.losses["diversity"][0] / 2


@pytest.mark.parametrize("rule", [None, "confidence:1"])
def test_the_pool_draws_from_the_generator_of_the_call_and_knows_the_progress(rule):
    class Noise(torch.nn.Module):
        def forward(self, x, *, context):
            assert context.progress == 0.3
            return Result(torch.randn(x[:, :1].shape, dtype=x.dtype, generator=context.generator))

    model, x = make_encoder(stack={"exits": (1,)}), torch.randn(2, 5, 2, dtype=torch.float64)
    model.pooling = Noise()
    set_exit_rule(model, rule)
    before = torch.random.get_rng_state()
    one, same, other = (
        model(x, context=Context(generator=torch.Generator().manual_seed(seed), progress=0.3)).output
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, same) and not torch.allclose(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


GRID_LAYERS = [
    ("large_kernel", {"kernel": 9}),
    ("bidirectional_mamba", {"scan": "snake"}),
    ("bidirectional_mamba", {"axes": 2, "convolution": "grid", "conv_width": 3}),
]


@pytest.mark.parametrize("entry", GRID_LAYERS)
def test_layers_for_grids_are_refused_without_one_and_beside_others_with_an_entry_for_sequences(entry):
    model = make_encoder(plan=["softmax", entry])
    x = torch.randn(2, 6, 2, dtype=torch.float64)
    assert model(x, context=Context(grid=(2, 3))).output.isfinite().all()
    with pytest.raises(Unsupported, match=f"{entry[0]} for grids of 2 axes .* without a grid") as caught:
        model(x)
    proposed = literal_eval(caught.value.nearest.partition(" in the plan")[0])
    assert make_encoder(plan=["softmax", proposed])(x).output.isfinite().all()
    alone = ("large_kernel", {"axes": 1})
    for plan in ([entry, alone], [alone, entry], [("large_kernel", {"axes": 3}), entry]):
        with pytest.raises(Unsupported, match="next to a layer of") as caught:
            make_encoder(plan=plan)
        assert "'axes': 1" in caught.value.nearest


def test_inputs_of_the_wrong_kind_are_refused():
    with pytest.raises(Unsupported, match="floats"):
        make_encoder()(torch.zeros(2, 3, dtype=torch.long))
    grid = Context(mask=Mask(valid=torch.tensor([[False, True, True, True]])), grid=(2, 2))
    with pytest.raises(Unsupported, match="grid"):
        make_encoder()(torch.zeros(1, 4, 2, dtype=torch.float64), context=grid)
