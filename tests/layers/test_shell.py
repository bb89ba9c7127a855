"""The shell of attention mechanisms: its options, the four patterns, caches and refusals."""

import copy
import itertools
import pickle

import pytest
import torch

from regard import Context, Mask, Unsupported, create_layer
from regard.contract import Pattern

DIM = 24


def double(name, pattern=Pattern.CAUSAL_SELF, heads=4, **options):
    layer = create_layer(name, DIM, heads, pattern=pattern, **options).double().eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def x(n=11, batch=2, dim=DIM):
    return torch.randn(batch, n, dim, dtype=torch.float64)


OPTIONS = [
    {},
    {"head_dim": 5},
    {"head_dim": 6, "value_dim": 3},
    {"num_kv_heads": 2},
    {"num_kv_heads": 1, "positions": "rotary"},
    {"positions": "rotary", "position_options": {"fraction": 0.5, "base": 100.0}},
    {"positions": "alibi"},
    {"positions": "relative"},
    {"positions": "toeplitz", "position_options": {"max_distance": 3}},
    {"positions": "sinusoidal"},
    {"positions": "learned", "max_length": 11},
    {"positions": "seqpe", "position_options": {"encoder_dim": 8}},
    {"positions": "seqpe_mul", "num_kv_heads": 2, "position_options": {"encoder_dim": 8}},
    {"positions": "seqpe_scalar", "position_options": {"encoder_dim": 8, "per_head": False}},
    {"output_gate": "swish", "output_norm": "rms", "output_gate_rank": 3},
    {"output_gate": "sigmoid", "query_key_norm": "layer"},
    {"value_norm": "rms", "head_dim": 6, "value_dim": 3, "num_kv_heads": 2, "short_convolution": 3},
    {"short_convolution": 3, "bias": True},
    {"linear": "token_parameter", "linear_options": {"theta": "gelu_l2_norm", "num_tokens": 7}},
    {"short_convolution": 4, "positions": "rotary", "num_kv_heads": 2, "output_norm": "layer"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_prefill_then_steps_equals_whole_under_every_option(options):
    layer = double("softmax", **options)
    sequence = x()
    expected = layer(sequence).output
    result = layer(sequence[:, :5], context=Context(want=frozenset({"state"})))
    outputs, state = [result.output], result.state
    for t in range(5, 11):
        output, state = layer.step(sequence[:, t], state)
        outputs.append(output[:, None])
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_anywhere_equals_none_under_every_option(options):
    layer = double("softmax", **options)
    valid = torch.stack([torch.rand(11).argsort() < 7, torch.rand(11).argsort() < 4])
    sequence = x().masked_fill(~valid[..., None], float("nan"))
    output = layer(sequence, context=Context(mask=Mask(valid=valid))).output
    for row in range(2):
        alone = layer(sequence[row : row + 1, valid[row]]).output
        torch.testing.assert_close(output[row : row + 1, valid[row]], alone, rtol=0, atol=1e-12)
    assert (output[~valid] == 0).all()


CROSS = [o for o in OPTIONS if "max_length" not in o]


@pytest.mark.parametrize(
    ("pattern", "options"), [*itertools.product(["noncausal-cross", "causal-cross"], CROSS)], ids=str
)
def test_memory_absorbed_once_then_steps_equals_whole(pattern, options):
    layer = double("softmax", pattern, memory_dim=10, **options)
    sequence, memory = x(), x(7, dim=10)
    memory_mask = Mask(valid=torch.tensor([[True] * 7, [False, True, True, False, True, True, False]]))
    expected = layer(sequence, memory, context=Context(memory_mask=memory_mask)).output
    state = layer.encode_memory(memory, context=Context(memory_mask=memory_mask))
    outputs = []
    for t in range(11):
        output, state = layer.step(sequence[:, t], state)
        outputs.append(output)
    torch.testing.assert_close(torch.stack(outputs, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["softmax", "linear", "gated_linear", "delta_rule"])
def test_memory_may_stream_in_pieces(name):
    layer = double(name, "causal-cross", short_convolution=0)
    sequence, memory = x(), x(9)
    state = layer.encode_memory(memory[:, :4])
    state = layer.encode_memory(memory[:, 4:], state=state)
    torch.testing.assert_close(layer(sequence, state=state).output, layer(sequence, memory).output, rtol=0, atol=1e-12)


def test_a_bias_reaches_the_scores_wherever_the_padding_is():
    layer = double("softmax", "noncausal-self")
    bias = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    bias[..., 2] = -torch.inf
    sequence = x(6)
    expected = layer(sequence, context=Context(mask=Mask(bias=bias))).output
    valid = torch.tensor([[False, True, True, False, True, True, True, True]])
    padded = torch.full((2, 8, DIM), float("nan"), dtype=torch.float64)
    padded[:, valid[0]] = sequence
    wide = torch.zeros(1, 4, 8, 8, dtype=torch.float64)
    places = valid[0].nonzero()[:, 0]
    wide[..., places[:, None], places] = bias
    found = layer(padded, context=Context(mask=Mask(valid=valid.expand(2, -1), bias=wide))).output
    torch.testing.assert_close(found[:, valid[0]], expected, rtol=0, atol=1e-12)


def test_explicit_positions_shift_rotary_scores_only_by_differences():
    layer = double("softmax", positions="rotary")
    sequence = x()
    where = torch.arange(11)[None].expand(2, -1)
    moved = layer(sequence, context=Context(positions=where + 100)).output
    torch.testing.assert_close(moved, layer(sequence).output, rtol=0, atol=1e-10)
    stretched = layer(sequence, context=Context(positions=3 * where)).output
    assert (stretched - layer(sequence).output).abs().max() > 1e-3


@pytest.mark.parametrize("pattern", Pattern)
def test_a_value_norm_acts_on_each_head_of_the_projected_values(pattern):
    layer = double("softmax", pattern, value_norm="layer", num_kv_heads=2)
    sequence, memory = x(), (x(7),) if pattern.cross else ()
    found = layer(sequence, *memory).output
    norm, project, layer.value_norm = layer.value_norm, layer.value, None
    layer.value = torch.nn.Sequential(project, torch.nn.Unflatten(-1, (2, layer.value_dim)), norm, torch.nn.Flatten(-2))
    torch.testing.assert_close(found, layer(sequence, *memory).output, rtol=0, atol=1e-12)
    layer.value = project
    assert (found - layer(sequence, *memory).output).abs().max() > 1e-3


def test_dropout_acts_in_training_only_and_follows_the_generator():
    for name in ("softmax", "linear"):
        layer = double(name, dropout=0.5)
        sequence = x()
        still = layer(sequence).output
        torch.testing.assert_close(layer(sequence).output, still)
        layer.train()
        torch.manual_seed(0)
        first = layer(sequence).output
        assert (first - still).abs().max() > 1e-3
        torch.manual_seed(0)
        torch.testing.assert_close(layer(sequence).output, first)


def test_weights_are_returned_where_they_are_exact():
    layer = double("softmax")
    result = layer(x(), context=Context(want=frozenset({"weights"})))
    torch.testing.assert_close(result.extras["weights"].sum(-1), torch.ones(2, 4, 11, dtype=torch.float64))
    with pytest.raises(Unsupported, match="weights"):
        double("linear")(x(), context=Context(want=frozenset({"weights"})))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"heads": 5}, "head_dim"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"dropout": 1.5}, "dropout"),
        ({"positions": "rotery"}, "rotery"),
        ({"output_gate": "swich"}, "swich"),
        ({"output_gate_rank": 4}, "without an output gate"),
        ({"output_gate": "swish", "output_gate_rank": 0}, "output_gate_rank >= 1"),
        ({"memory_dim": 8}, "memory_dim"),
        ({"nosuch": 1}, "nosuch"),
        ({"query_key_norm": "rmss"}, "rmss"),
        ({"value_norm": "rmss"}, "rmss"),
        ({"linear": "dens"}, "dens"),
    ],
)
def test_bad_options_are_refused_with_what_is_accepted(arguments, words):
    with pytest.raises(Unsupported, match=words) as caught:
        double("softmax", **arguments)
    assert caught.value.supported


def test_positions_that_a_mechanism_cannot_take_are_refused():
    with pytest.raises(Unsupported, match="alibi"):
        double("linear", positions="alibi")


def test_a_norm_of_what_a_mechanism_has_not_is_refused():
    with pytest.raises(Unsupported, match="nothing to normalise"):
        double("synthesizer", query_key_norm="rms")


def test_calls_that_make_no_sense_are_refused():
    cross, own = double("softmax", "causal-cross"), double("softmax")
    with pytest.raises(Unsupported, match="without memory"):
        cross(x())
    with pytest.raises(Unsupported, match="memory in causal-self"):
        own(x(), x())
    with pytest.raises(Unsupported, match="encode_memory"):
        own.encode_memory(x())
    state = cross.encode_memory(x())
    with pytest.raises(Unsupported, match="beside a state"):
        cross(x(), x(), state=state)
    with pytest.raises(Unsupported, match="explicit positions"):
        double("softmax", positions="alibi")(x(), context=Context(positions=torch.zeros(2, 11, dtype=torch.long)))


def test_a_first_step_without_a_state_starts_one():
    for name in ("softmax", "gated_linear", "mamba2"):
        layer, sequence = double(name), x(4)
        outputs, state = [], None
        for t in range(4):
            output, state = layer.step(sequence[:, t], state)
            outputs.append(output)
        torch.testing.assert_close(torch.stack(outputs, 1), layer(sequence).output, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gated_linear", "softmax"])
def test_every_dropout_follows_the_generator(name):
    layer = double(name, dropout=0.5).train()
    sequence = x()

    def run(seed):
        return layer(sequence, context=Context(generator=torch.Generator().manual_seed(seed))).output

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_a_bias_on_absorbed_memory_reaches_its_pairs_wherever_queries_are_padded():
    layer = double("softmax", "noncausal-cross")
    queries, memory = x(7), x(7)
    valid = torch.stack([torch.arange(7) >= 3, torch.arange(7) != 2])
    mask = Mask(valid=valid, bias=torch.randn(1, 4, 7, 7, dtype=torch.float64))
    expected = layer(queries, memory, context=Context(mask=mask)).output
    found = layer(queries, context=Context(mask=mask), state=layer.encode_memory(memory)).output
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_a_prompt_read_under_autocast_goes_on_without_it():
    layer = create_layer("softmax", DIM, 4).eval()
    sequence = torch.randn(2, 6, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        state = layer(sequence[:, :5], context=Context(want=frozenset({"state"}))).state
    found, _ = layer.step(sequence[:, 5], state)
    torch.testing.assert_close(found, layer(sequence).output[:, 5], rtol=0, atol=0.02)


def test_a_layer_can_be_pickled_and_copied():
    layer, sequence = double("delta_rule"), x()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(sequence).output, layer(sequence).output)


class Step(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x_t, state):
        return self.layer.step(x_t, state)


@pytest.mark.parametrize("name", ["softmax", "gated_linear"])
def test_a_step_with_its_state_can_be_exported(name):
    layer, sequence = double(name), x()
    state = layer(sequence[:, :5], context=Context(want=frozenset({"state"}))).state.detach()
    program = torch.export.export(Step(layer), (sequence[:, 5], state)).module()
    found, after = program(sequence[:, 5], state)
    expected, expected_after = layer.step(sequence[:, 5], state)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert type(after) is type(expected_after)
    for name, tensor in after.tensors().items():
        torch.testing.assert_close(tensor, expected_after.tensors()[name], rtol=0, atol=1e-12)


class Output(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).output


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_softmax_is_exported_for_any_length(pattern):
    layer = double("softmax", pattern, positions="rotary")
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Output(layer), (x(11),), dynamic_shapes=(sizes,)).module()
    other = x(29, batch=3)
    torch.testing.assert_close(program(other), layer(other).output, rtol=0, atol=1e-12)


def test_a_state_keeps_its_dtypes_when_it_moves():
    layer = double("softmax")
    state = layer(x(), context=Context(want=frozenset({"state"}))).state
    moved = state.to("meta")
    assert {n: t.dtype for n, t in moved.tensors().items()} == {n: t.dtype for n, t in state.tensors().items()}
    with pytest.raises(TypeError):
        state.to(torch.bfloat16)


LENGTHS = Mask(lengths=torch.tensor([3, 5]))
IGNORED = {
    "a mask of no memory": ({"memory_mask": LENGTHS}, "memory_mask without memory"),
    "positions of no memory": ({"memory_positions": torch.zeros(2, 11, dtype=torch.long)}, "without memory"),
    "an unknown extra": ({"want": frozenset({"weight"})}, "try weights"),
}


@pytest.mark.parametrize("name", ["softmax", "gated_linear"])
@pytest.mark.parametrize("case", IGNORED.values(), ids=IGNORED)
def test_a_context_that_would_be_ignored_is_refused(name, case):
    context, words = case
    with pytest.raises(Unsupported, match=words):
        double(name)(x(), context=Context(**context))


def test_pairs_on_the_side_of_the_memory_are_refused():
    layer, bias = double("softmax", "noncausal-cross"), torch.zeros(1, 1, 11, 11, dtype=torch.float64)
    context = Context(memory_mask=Mask(bias=bias))
    with pytest.raises(Unsupported, match="bias and blocks on mask"):
        layer(x(), x(), context=context)
    with pytest.raises(Unsupported, match="bias and blocks on mask"):
        layer.encode_memory(x(), context=context)


def test_positions_of_the_memory_that_a_scheme_cannot_use_are_refused():
    for scheme in ("alibi", "sinusoidal"):
        layer = double("softmax", "noncausal-cross", positions=scheme)
        context = Context(memory_positions=torch.arange(11).expand(2, -1))
        with pytest.raises(Unsupported, match="positions of the memory"):
            layer(x(), x(), context=context)
        with pytest.raises(Unsupported, match="positions of the memory"):
            layer.encode_memory(x(), context=context)


@pytest.mark.parametrize("name", ["softmax", "mamba2", "token_parameter"])
def test_inputs_that_are_no_tokens_of_the_layer_are_refused(name):
    layer = create_layer(name, DIM, 4)
    for wrong in (torch.zeros(2, 5, DIM + 1), torch.zeros(5, DIM), torch.zeros(2, 5, DIM, dtype=torch.long)):
        with pytest.raises(Unsupported, match=rf"floats \(B, N, {DIM}\)"):
            layer(wrong)


def test_a_projection_refuses_pairs():
    with pytest.raises(Unsupported, match="on pairs"):
        create_layer("token_parameter", DIM)(x().float(), context=Context(mask=Mask(bias=torch.zeros(1, 1, 11, 11))))
