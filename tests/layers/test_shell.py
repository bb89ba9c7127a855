"""The shell of attention mechanisms: its options, the four patterns, caches and refusals."""

import copy
import dataclasses
import pickle

import pytest
import torch
from support import close, shaken

from regard import Context, Mask, Unsupported, create_layer, get_mechanism
from regard.contract import Pattern
from regard.workbench.verification.properties.layers import LAYER_PROPERTIES
from regard.workbench.verification.verify import Place, check

DIM = 24


def double(name, pattern=Pattern.CAUSAL_SELF, heads=4, **options):
    return shaken(create_layer(name, DIM, heads, pattern=pattern, **options)).eval()


def x(n=11, batch=2, dim=DIM):
    return torch.randn(batch, n, dim, dtype=torch.float64)


OPTIONS = [
    {"num_kv_heads": 2},
    {"head_dim": 6, "value_dim": 3, "num_kv_heads": 2, "value_norm": "rms", "short_convolution": 3},
    {"positions": "rotary", "num_kv_heads": 1, "short_convolution": 4, "output_norm": "layer"},
    {"positions": "rotary", "position_options": {"fraction": 0.5, "base": 100.0}},
    {"positions": "alibi"},
    {"positions": "relative"},
    {"positions": "toeplitz", "position_options": {"max_distance": 3}},
    {"positions": "sinusoidal", "bias": True},
    {"positions": "learned", "max_length": 15},
    {"positions": "seqpe", "position_options": {"encoder_dim": 8}},
    {"positions": "seqpe_mul", "num_kv_heads": 2, "position_options": {"encoder_dim": 8}},
    {"positions": "seqpe_scalar", "position_options": {"encoder_dim": 8, "per_head": False}},
    {"output_gate": "swish", "output_norm": "rms", "output_gate_rank": 3},
    {"output_gate": "sigmoid", "query_key_norm": "layer"},
    {"linear": "token_parameter", "linear_options": {"theta": "gelu_l2_norm", "num_tokens": 7}},
]
KEPT = ("layer_causality", "layer_decoding", "layer_padding", "layer_packing", "layer_ragged")


@pytest.mark.parametrize(
    ("options", "pattern"),
    [(o, p) for o in OPTIONS for p in Pattern if not p.cross or "max_length" not in o],
    ids=str,
)
def test_a_layer_is_causal_resumes_and_ignores_padding_under_every_option(options, pattern):
    """Self patterns continue after a padded prompt; cross patterns absorb padded memory once."""
    card = get_mechanism("softmax")
    card = dataclasses.replace(card, variants={**card.variants, "these": {"num_heads": 4, **options}})
    properties = (p for p in LAYER_PROPERTIES if p.name in KEPT)
    cells = [check(Place(card, pattern, prop, torch.float64, variant="these")) for prop in properties]
    assert [cell for cell in cells if cell is not None and cell.status != "pass"] == []


@pytest.mark.parametrize("name", ["softmax", "gated_linear"])
def test_memory_may_stream_in_pieces(name):
    layer = double(name, "causal-cross", short_convolution=0)
    sequence, memory = x(), x(9)
    state = layer.encode_memory(memory[:, :4])
    state = layer.encode_memory(memory[:, 4:], state=state)
    close(layer(sequence, state=state).output, layer(sequence, memory).output)


def test_a_bias_reaches_the_scores_wherever_the_padding_is():
    layer = double("softmax", "noncausal-self", bias=True)
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
    close(found[:, valid[0]], expected)
    assert not found[:, ~valid[0]].any()


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
    close(found, layer(sequence, *memory).output)
    layer.value = project
    assert (found - layer(sequence, *memory).output).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["softmax", "linear", "gated_linear"])
def test_dropout_acts_in_training_alone_and_follows_the_generator(name):
    layer, sequence = double(name, dropout=0.5), x()
    still = layer(sequence).output
    assert torch.equal(layer(sequence).output, still)
    layer.train()

    def run(seed):
        return layer(sequence, context=Context(generator=torch.Generator().manual_seed(seed))).output

    assert torch.equal(run(1), run(1))
    for other in (run(2), still):
        assert (run(1) - other).abs().max() > 1e-3
    torch.manual_seed(0)
    first = layer(sequence).output
    torch.manual_seed(0)
    assert torch.equal(layer(sequence).output, first)


def test_weights_are_returned_where_they_are_exact():
    layer = double("softmax")
    result = layer(x(), context=Context(want=frozenset({"weights"})))
    torch.testing.assert_close(result.extras["weights"].sum(-1), torch.ones(2, 4, 11, dtype=torch.float64))


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


def test_torch_exports_softmax_for_any_batch_and_length():
    layer = double("softmax", positions="rotary", plain=True)
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(layer, (x(11),), dynamic_shapes=(sizes,)).module()
    other = x(29, batch=3)
    close(program(other), layer(other))


def test_a_state_keeps_its_dtypes_when_it_moves():
    layer = double("softmax")
    state = layer(x(), context=Context(want=frozenset({"state"}))).state
    moved = state.to("meta")
    assert {n: t.dtype for n, t in moved.tensors().items()} == {n: t.dtype for n, t in state.tensors().items()}
    with pytest.raises(TypeError):
        state.to(torch.bfloat16)


PAIRS = Mask(bias=torch.zeros(1, 1, 11, 11, dtype=torch.float64))
MASKED, FAR = {"memory_mask": Mask(lengths=torch.tensor([3, 5]))}, {"memory_positions": torch.arange(11).expand(2, -1)}
WEIGHTS, MISSPELLED = ({"want": frozenset({name})} for name in ("weights", "weight"))
PLACES = {"positions": torch.zeros(2, 11, dtype=torch.long)}
CROSS, CAUSAL_CROSS = Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS


def called(name="softmax", given=(), context=None, **options):
    """Call a layer on tokens, and on the further inputs `given`, such as a memory."""
    return double(name, **options)(x(), *given, context=Context(**(context or {})))


def absorbed(context=None, **options):
    return double("softmax", **options).encode_memory(x(), context=Context(**(context or {})))


def read_again():
    layer = double("softmax", CAUSAL_CROSS)
    return layer(x(), x(), state=layer.encode_memory(x()))


REFUSED = [
    # options
    (lambda: double("softmax", heads=5), "over num_heads=5; supported.*head_dim"),
    (lambda: double("softmax", num_kv_heads=3), "num_kv_heads"),
    (lambda: double("softmax", dropout=1.5), "dropout"),
    (lambda: double("softmax", positions="rotery"), "rotery.*supported"),
    (lambda: double("softmax", output_gate="swich"), "swich.*supported"),
    (lambda: double("softmax", output_gate_rank=4), "without an output gate"),
    (lambda: double("softmax", output_gate="swish", output_gate_rank=0), "output_gate_rank >= 1"),
    (lambda: double("softmax", memory_dim=8), "memory_dim"),
    (lambda: double("softmax", nosuch=1), "nosuch.*supported"),
    (lambda: double("softmax", query_key_norm="rmss"), "rmss.*supported"),
    (lambda: double("softmax", value_norm="rmss"), "rmss.*supported"),
    (lambda: double("softmax", linear="dens"), "dens.*supported"),
    (lambda: double("synthesizer", query_key_norm="rms"), "nothing to normalise"),
    # arguments that would be ignored
    (lambda: called(context=MASKED), "memory_mask without memory"),
    (lambda: called("gated_linear", context=MASKED), "memory_mask without memory"),
    (lambda: called(context=FAR), "without memory"),
    (lambda: called("gated_linear", context=FAR), "without memory"),
    (lambda: called(context=MISSPELLED), "try weights"),
    (lambda: called("gated_linear", context=MISSPELLED), "try weights"),
    (lambda: called(given=[x()], context={"memory_mask": PAIRS}, pattern=CROSS), "bias and blocks on mask"),
    (lambda: absorbed({"memory_mask": PAIRS}, pattern=CROSS), "bias and blocks on mask"),
    (lambda: called(given=[x()], context=FAR, pattern=CROSS, positions="alibi"), "positions of the memory"),
    (lambda: absorbed(FAR, pattern=CROSS, positions="alibi"), "positions of the memory"),
    (lambda: called(given=[x()], context=FAR, pattern=CROSS, positions="sinusoidal"), "positions of the memory"),
    (lambda: absorbed(FAR, pattern=CROSS, positions="sinusoidal"), "positions of the memory"),
    # calls that make no sense
    (lambda: called(pattern=CAUSAL_CROSS), "without memory"),
    (read_again, "together with a state"),
    (lambda: called(given=[x()]), "memory in causal-self"),
    (absorbed, "encode_memory"),
    (lambda: called("linear", context=WEIGHTS), "weights"),
    (lambda: called(context=PLACES, positions="alibi"), "explicit positions"),
    (lambda: called("token_parameter", context={"mask": PAIRS}), "on pairs"),
]


@pytest.mark.parametrize(("call", "words"), REFUSED)
def test_what_makes_no_sense_or_would_be_ignored_is_refused(call, words):
    with pytest.raises(Unsupported, match=words):
        call()


@pytest.mark.parametrize("name", ["softmax", "mamba2", "token_parameter"])
def test_inputs_that_are_no_tokens_of_the_layer_are_refused(name):
    for wrong in (torch.zeros(2, 5, DIM + 1), torch.zeros(5, DIM), torch.zeros(2, 5, DIM, dtype=torch.long)):
        with pytest.raises(Unsupported, match=rf"floats \(B, N, {DIM}\)"):
            double(name)(wrong)
