"""Layers as they are timed: built as in a model, and decoding as in real use."""

import pytest
import torch

from regard import Pattern, Unsupported, get_mechanism, list_mechanisms
from regard.workbench.advice.layer_work import MIXING, LayerSettings, LayerWork
from regard.workbench.profile import ProfileSettings, measure_memory, profile

CAUSAL = Pattern.CAUSAL_SELF


def small(pattern=CAUSAL, **options):
    return LayerSettings(pattern, dim=32, heads=2, **options)


@pytest.mark.parametrize("pattern", Pattern)
def test_every_mechanism_that_mixes_tokens_can_be_timed(pattern):
    for name in list_mechanisms(pattern=pattern, where=lambda card: card.kind in MIXING):
        work = LayerWork(get_mechanism(name), small(pattern))
        for what in ("forward", "training", *(["decode"] if work.decodes else [])):
            memory, backend = measure_memory(work.action(what, 24))
            assert memory > 0 and backend
        if pattern is CAUSAL:
            assert work.decodes


def test_a_layer_has_the_positions_that_a_model_gives_it():
    assert small().options(get_mechanism("softmax")) == {"positions": "rotary"}
    assert small().options(get_mechanism("mamba2")) == {}
    assert small(Pattern.CAUSAL_CROSS).options(get_mechanism("softmax")) == {}


def test_a_head_width_is_passed_on_only_where_it_says_something():
    assert LayerSettings(dim=32, heads=2, head_dim=16).head_dim is None
    wide = LayerSettings(dim=32, heads=2, head_dim=64)
    assert wide.options(get_mechanism("softmax"))["head_dim"] == 64
    assert "head_dim" not in wide.options(get_mechanism("mamba"))
    assert LayerWork(get_mechanism("softmax"), wide).layer.head_dim == 64


def test_a_layer_with_a_greatest_length_is_timed_as_made_for_the_length():
    work = LayerWork(get_mechanism("linformer"), small(Pattern.NONCAUSAL_SELF))
    most = get_mechanism("linformer").options().length
    for length in (10, most + 5, 20):
        work.action("forward", length)()
        assert work.layer.config.length == length


def test_decoding_goes_on_beyond_a_greatest_length():
    card = get_mechanism("sea")
    work = LayerWork(card, small())
    longest = card.options().length
    action = work.action("decode", longest)
    for _ in range(3):
        action()
    assert int(action.state.length.max()) == longest + 4


def test_inserted_tokens_come_on_top():
    card = get_mechanism("landmark")
    x, _, context = LayerWork(card, small()).inputs(100)
    assert x.shape[1] == 100 + 100 // card.options().block and context.roles.shape == x.shape[:2]
    x, memory, context = LayerWork(card, small(Pattern.CAUSAL_CROSS)).inputs(100)
    assert (x.shape[1], memory.shape[1], context.roles.shape[1]) == (100, 102, 102)


def test_decoding_goes_on_from_its_own_state():
    action = LayerWork(get_mechanism("softmax"), small(batch=3)).action("decode", 40)
    before = action.state_bytes
    for _ in range(4):
        action()
    assert int(action.state.length[0]) == 45 and action.state.nbytes > before


def test_training_reaches_every_weight_and_the_memory():
    work = LayerWork(get_mechanism("softmax"), small(Pattern.NONCAUSAL_CROSS))
    action = work.action("training", 8)
    seen, original = [], torch.autograd.grad
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *a, **k: seen.append(a[1]) or original(*a, **k))
        action()
    assert len(seen[0]) == 2 + len(list(work.layer.parameters()))


def test_memory_does_not_depend_on_what_ran_before():
    card = get_mechanism("softmax")
    first, _ = measure_memory(LayerWork(card, small()).action("forward", 64))
    measure_memory(LayerWork(card, small()).action("training", 1024))
    again, _ = measure_memory(LayerWork(card, small()).action("forward", 64))
    assert again == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 30, "heads": 4}, "try dim=32"),
        ({"dim": 0}, "dim=0"),
        ({"heads": 0}, "heads=0"),
        ({"batch": 0}, "batch=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"dtype": "float31"}, "try float32"),
        ({"device": "gpu"}, "try cpu"),
        ({"pattern": "causal"}, "causal-self"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options, message):
    with pytest.raises(Unsupported, match=message):
        LayerSettings(**options)


def test_profile_measures_layers_of_every_kind_beside_softmax():
    names = ("mamba2", "large_kernel", "mixture_of_heads")
    found = profile(ProfileSettings(names, lengths=(16, 48), heads=2, head_dim=8, seconds=0.01, layer=True))
    assert {m.mechanism for m in found.measurements} == {"softmax", *names}
    decoded = {(m.mechanism, m.length): m.state_bytes for m in found.measurements if m.what == "decode"}
    assert decoded["softmax", 48] > 2 * decoded["softmax", 16]
    assert decoded["mamba2", 48] == decoded["mamba2", 16] > 0
    assert all(m.gflops is None for m in found.measurements)
