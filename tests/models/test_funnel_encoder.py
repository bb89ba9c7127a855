from __future__ import annotations

import pytest
import torch

from regard.contract import BlockMask, Context, Mask, Pattern, Unsupported
from regard.models import FunnelEncoder, FunnelEncoderConfig
from regard.tasks.protocol import Batch, Task, absolute_error, counter_generator
from regard.training import TrainConfig, evaluate, train

FUNNELS = [
    {},
    {"blocks": 3, "truncate": True},
    {"separate_first": False},
    {"separate_first": False, "pool": "max", "blocks": 1, "layers": 2},
    {"query_only": False, "positions": False, "blocks": 4},
]


def make_model(**options) -> FunnelEncoder:
    config = {"num_classes": 3, "features": 2, "dim": 16, "num_heads": 2, "num_layers": 1, **options}
    return FunnelEncoder(FunnelEncoderConfig(**config)).double().eval()


def features(rows=1, n=9):
    return torch.randn(rows, n, 2, dtype=torch.float64)


@pytest.mark.parametrize("funnel", FUNNELS, ids=str)
def test_rows_of_every_length_equal_the_same_rows_alone(funnel):
    model = make_model(funnel=funnel, plan="linear", decoder_plan=["softmax", "linear"])
    x, lengths = features(14, 13), torch.arange(14)
    padded = torch.arange(13) >= lengths[:, None]
    x[padded] = torch.nan
    output = model(x, context=Context(mask=Mask(lengths=lengths))).output
    assert output.shape == (14, 13, 3)
    assert (output[padded] == 0).all()
    for row in range(14):
        torch.testing.assert_close(output[row : row + 1, :row], model(x[row : row + 1, :row]).output)


STACKS = [{"reversible": True}, {"layer_scale": 0.3, "branch_norm": "all"}]


@pytest.mark.parametrize("options", [{}, {"positions": "learned"}, *({"stack": stack} for stack in STACKS)], ids=str)
@pytest.mark.parametrize("funnel", FUNNELS[:3], ids=str)
def test_padding_anywhere_equals_no_padding(funnel, options):
    model, x = make_model(funnel=funnel, norm="layer", **options), features(4, 11)
    for name, parameter in model.named_parameters():
        if "_end" in name:
            torch.nn.init.normal_(parameter)
    valid = torch.rand(4, 11) < 0.6
    valid[:, 5] = True
    x[~valid] = torch.nan
    output = model(x, context=Context(mask=Mask(valid=valid))).output
    for row in range(4):
        alone = model(x[row][valid[row]][None]).output[0]
        torch.testing.assert_close(output[row][valid[row]], alone)


def test_packed_equals_separate():
    model = make_model(features=None, vocab_size=5, funnel={"truncate": True})
    ids = torch.randint(5, (1, 11))
    output = model(ids, context=Context(mask=Mask(cu_seqlens=torch.tensor([0, 4, 4, 11])))).output
    torch.testing.assert_close(output, torch.cat([model(ids[:, :4]).output, model(ids[:, 4:]).output], 1))


def test_compiled_whole_equals_eager():
    model, x = make_model(decoder_layers=1, funnel={"blocks": 1}), features(2, 7)
    context = Context(mask=Mask(lengths=torch.tensor([7, 4])))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, context=context).output, model(x, context=context).output)


def test_far_tokens_are_seen_through_the_funnel_alone():
    window = ("local", {"window": 1})
    model, x = make_model(plan=[window], decoder_plan=[window], num_layers=None), features(n=30)
    changed = x.clone()
    changed[:, 20] += 1
    difference = (model(x).output - model(changed).output).abs().sum(-1)[0]
    assert (difference > 0).all()
    for name in ("norm_weight", "norm_bias"):
        model.funnel.weights[name].data.zero_()  # nothing comes back
    difference = (model(x).output - model(changed).output).abs().sum(-1)[0]
    assert (difference[:15] == 0).all() and difference[20] > 0


def test_tokens_that_were_pooled_together_keep_their_own_answers():
    model = make_model(funnel={"blocks": 3}, positions="none")  # what tells them apart is not their place
    output = model(features()).output[0]
    assert torch.pdist(output).min() > 1e-6


@pytest.mark.parametrize("funnel", FUNNELS, ids=str)
def test_gradients_reach_every_parameter(funnel):
    model = make_model(funnel=funnel).train()
    model(features(2, 23)).output.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_weights_of_all_layers_at_full_length_are_given_when_wanted():
    model = make_model(num_layers=2, decoder_layers=3)
    weights = model(features(), context=Context(want=frozenset({"weights"}))).extras["weights"]
    assert [tuple(w.shape) for w in weights] == [(1, 2, 9, 9)] * 5


def test_losses_of_all_layers_at_full_length_are_added_up():
    moh = ("mixture_of_heads", {"shared_heads": 1, "active_heads": 1})
    model = make_model(num_heads=4, plan=[moh], decoder_plan=[moh] * 2, num_layers=None).train()
    losses = model(features()).losses
    assert {name: int(count) for name, (_, count) in losses.items()} == {"load_balance": 3}


class Parity(Task):
    """Whether the token before is even."""

    name, pattern, objective, length = "parity", Pattern.NONCAUSAL_SELF, "regression", 11
    vocab_size, num_targets, metric, higher_is_better = 6, 1, "MAE", False

    def training_batch(self, step, seed, batch_size):
        ids = torch.from_numpy(counter_generator(seed, step).integers(0, 6, (batch_size, 11)))
        targets = (ids.roll(1, 1) % 2).float()[..., None]
        targets[:, 0] = torch.nan
        return Batch(ids, targets)

    def evaluation_batches(self, batch_size):
        yield self.training_batch(0, 99, batch_size)

    def score(self, output, batch):
        return absolute_error(output, batch)


def test_it_learns_an_answer_for_each_token():
    torch.manual_seed(0)
    task = Parity()
    model = make_model(num_classes=1, features=None, vocab_size=6, funnel={"blocks": 1}, decoder_layers=1).float()
    before = evaluate(model, task, 64).score
    train(model, task, TrainConfig(steps=100, batch_size=16, learning_rate=1e-2))
    assert evaluate(model, task, 64).score < 0.3 * before


def test_the_decoder_has_two_layers_unless_told_otherwise():
    assert len(make_model().decoder_blocks) == 2
    assert len(make_model(decoder_layers=1).decoder_blocks) == 1
    assert len(make_model(decoder_plan=["linear"] * 3).decoder_blocks) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab_size": 4}, "None for the other"),
        ({"funnel": {"block": 2}}, "try blocks"),
        ({"funnel": {"blocks": 0}}, "blocks"),
        ({"decoder_layers": 0}, "0 layers"),
        ({"decoder_layers": 2, "decoder_plan": ["linear"]}, "1 layers"),
        ({"decoder_plan": "landmark"}, "inserts tokens"),
        ({"stack": {"exits": (1,)}, "num_layers": 2}, "exits"),
    ],
)
def test_bad_configs_are_refused(options, words):
    with pytest.raises(Unsupported, match=words):
        make_model(**options)


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (Context(mask=Mask(bias=torch.zeros(1, 1, 9, 9))), "a bias"),
        (Context(mask=Mask(blocks=BlockMask(torch.ones(1, 1, 1, 1, dtype=torch.bool), 16))), "block mask"),
        (Context(grid=(3, 3)), "grid"),
        (Context(roles=torch.zeros(1, 9, dtype=torch.long)), "roles"),
        (Context(positions=torch.arange(9)[None]), "explicit positions"),
    ],
)
def test_what_the_funnel_cannot_honour_is_refused(context, words):
    with pytest.raises(Unsupported, match=words):
        make_model()(features(), context=context)


def test_inputs_of_the_wrong_kind_are_refused():
    with pytest.raises(Unsupported, match="floats"):
        make_model()(torch.zeros(2, 3, dtype=torch.long))
