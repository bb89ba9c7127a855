import pytest
import torch
from model_checks import small

from regard import Unsupported, get_mechanism, list_mechanisms
from regard.contract import Kind, Pattern
from regard.models import build_model
from regard.models.frames import FRAMES, in_frame, layer_parts

CAUSAL = list_mechanisms(
    where=lambda c: Pattern.CAUSAL_SELF in c.patterns and c.kind in (Kind.ATTENTION, Kind.MIXER, Kind.WRAPPER)
)


def parts(name, frame, **options):
    entry = (name, in_frame(name, options, frame, Pattern.CAUSAL_SELF))
    with torch.device("meta"):
        model = build_model(small("language model", dim=32, plan=[entry]))
    return layer_parts(model.blocks[0].mixer)


@pytest.mark.parametrize("name", CAUSAL)
def test_a_frame_gives_every_layer_the_same_parts_but_what_belongs_to_the_mechanism(name):
    card = get_mechanism(name)
    options = {"length": 16} if "length" in card.config.__dataclass_fields__ else {}
    bare, convolved = parts(name, "bare", **options), parts(name, "convolution", **options)
    unnormed = parts(name, "unnormed", **options)
    assert unnormed == convolved | ({"norm of output heads": "none"} if "norm of output heads" in convolved else {})
    if card.kind is Kind.MIXER:
        assert bare == convolved and "block" in bare
        return
    assert bare["convolution"] == "none" and bare["output gate"] == "none"
    takes = getattr(card.module, "takes_convolutions", True)
    assert convolved == bare | ({"convolution": "over 4 tokens"} if takes else {})
    own = "output_norm" in card.config.__dataclass_fields__ or card.layer_defaults.get("output_norm", "rms") is None
    assert bare["norm of output heads"] == ("none" if own else "RMS")
    rotates = "rotary" in card.accepts_positions and "positions" not in card.layer_defaults
    assert (bare["positions"] == "rotary") == rotates or card.kind is Kind.WRAPPER


@pytest.mark.parametrize("name", ["gated_softmax", "clipped_softmax", "mixture_of_heads"])
def test_a_gate_that_scales_heads_is_not_undone_by_a_norm(name):
    assert parts(name, "bare")["norm of output heads"] == "none"


def test_given_options_go_before_the_frame_and_own_changes_nothing():
    assert in_frame("softmax", {"output_norm": "layer"}, "bare", Pattern.CAUSAL_SELF)["output_norm"] == "layer"
    assert in_frame("gated_linear", {"theta": 1}, "own", Pattern.CAUSAL_SELF) == {"theta": 1}
    assert "positions" not in in_frame("softmax", {}, "bare", Pattern.CAUSAL_CROSS)
    with pytest.raises(Unsupported, match="bare, convolution, unnormed, own"):
        in_frame("softmax", {}, "golden", Pattern.CAUSAL_SELF)
    assert set(FRAMES) == {"bare", "convolution", "unnormed", "own"}
