"""Parameter counts of layers, as in their papers, and the parameters that they keep in float32."""

from __future__ import annotations

import pytest
import torch

from regard import Context, create_layer, get_mechanism

SQUARES = 4 * 16 * 16
COUNTS = [
    ("aaren", 64, 4, {"bias": True}, 4 * 65 * 64 + 64),
    (
        "bidirectional_mamba",
        64,
        None,
        {},
        2 * (128 * 4 + 128 + 128 * 36 + 128 * 4 + 128 + 128 * 16 + 128) + 3 * 128 * 64,
    ),
    ("complex_rotary", 32, 4, {}, 4 * 32 * 32 + 32),
    ("complex_rotary", 32, 4, {"per_head": False}, 4 * 32 * 32 + 8),
    ("complex_rotary", 32, 4, {"learn_phase": False}, 4 * 32 * 32 + 16),
    ("complex_rotary", 32, 4, {"position": "learned"}, 4 * 32 * 32 + 48),
    ("complex_rotary", 32, 4, {"num_kv_heads": 2}, 3 * 32 * 32 + 8 + 16),
    ("delta_rule", 64, 4, {}, 4 * 64**2 + 64 * 4 + 3 * 64 * 4 + 16),
    ("differential", 16, 4, {"num_kv_heads": 2, "value_dim": 6}, 16 * (16 + 8 + 12 + 24) + 4 * 4 + 2 * 6),
    ("fnet", 8, None, {}, 0),
    (
        "funnel",
        8,
        2,
        {"head_dim": 3, "feed_forward": 5, "blocks": 2, "layers": 3},
        6 * (240 + 18 + 8 + 80 + 5 + 8 + 32),
    ),
    ("gated_linear", 64, 4, {}, 4 * 64**2 + 16 * (64 + 32) + 32 + 16),
    ("gated_softmax", 16, 2, {"predictor": "linear"}, SQUARES + 2 * 9),
    ("gated_softmax", 16, 2, {"predictor": "mlp"}, SQUARES + 2 * (9 * 2 + 3)),
    ("gated_softmax", 16, 2, {"predictor": "mlp2"}, SQUARES + 2 * (9 * 8 + 9)),
    ("gated_softmax", 16, 2, {"predictor": "all_features"}, SQUARES + 2 * 17),
    ("gated_softmax", 16, 2, {"predictor": "head"}, SQUARES + 2),
    ("kernelized_rpe", 16, 4, {"max_offset": 8}, SQUARES + 4 * 17),
    ("kernelized_rpe", 16, 4, {"max_offset": 8, "share_offsets": True, "learn_temperature": True}, SQUARES + 17 + 4),
    ("large_kernel", 64, None, {"pattern": "noncausal-self"}, 64**2 + 74 * 64 + 3 * 64 + 2 * 64**2 + 2 * 64),
    ("low_rank_pooling", 300, 10, {}, 6300),
    ("low_rank_pooling", 300, 10, {"context": "mean"}, 6000),
    ("low_rank_pooling", 8, 2, {"slots": 5, "rank": 3, "temperature": True}, 2 * 8 * 5 * 3 + 8 + 5),
    ("mamba", 32, None, {}, 32 * 128 + 64 * (4 + 1) + 64 * (2 + 2 * 16) + 2 * 64 + 64 + 64 * 16 + 64 + 64 * 32),
    ("mamba2", 32, 4, {"d_state": 16, "groups": 2}, 32 * (64 + 128 + 4) + 128 * (4 + 1) + 3 * 4 + 64 + 64 * 32),
    ("selective_temperature", 16, 2, {}, SQUARES + 2 * 16 + 2),
    ("selective_temperature", 16, 2, {"k_temperature": "both"}, SQUARES + 3 * 16 + 2),
    ("selective_temperature", 16, 2, {"q_temperature": "position", "v_temperature": "position"}, SQUARES + 2),
    ("selective_temperature", 16, 2, {"q_temperature": "token", "v_temperature": "none"}, SQUARES + 16),
    ("selective_temperature", 16, 2, {"share_heads": True}, SQUARES + 2 * 8 + 2),
    ("selective_temperature", 16, 2, {"position_granularity": "layer"}, SQUARES + 2 * 16 + 1),
    ("selective_temperature", 16, 2, {"token_features": "tokens", "hidden": 5}, SQUARES + 2 * (85 + 5 * 2) + 2),
    ("selective_temperature", 16, 2, {"token_features": "tokens", "v_temperature": "none"}, SQUARES + 272 + 32 + 2),
    ("selective_temperature", 16, 2, {"num_kv_heads": 1}, SQUARES - 2 * 16 * 8 + 16 + 8 + 2),
    ("token_parameter", 6, None, {"out_features": 5, "num_tokens": 8}, 8 * (6 + 5)),
]


@pytest.mark.parametrize(("name", "dim", "heads", "options", "count"), COUNTS)
def test_a_layer_learns_as_many_numbers_as_its_paper_counts(name, dim, heads, options, count):
    patterns = get_mechanism(name).patterns
    pattern = "causal-self" if "causal-self" in patterns else patterns[0]
    layer = create_layer(name, dim, heads, **{"pattern": pattern, **options})
    assert sum(p.numel() for p in layer.parameters()) == count


@pytest.mark.parametrize(("name", "options"), [("mamba", {}), ("mamba2", {"skip_kind": "channel"}), ("s4d", {})])
def test_time_constants_keep_float32_and_have_no_weight_decay(name, options):
    layer = create_layer(name, 16, 2, **options)
    before = {constant: getattr(layer, constant).detach().clone() for constant in layer.FLOAT32}
    layer = layer.to(torch.bfloat16)
    for constant, value in before.items():
        parameter = getattr(layer, constant)
        assert parameter.dtype == torch.float32 and torch.equal(parameter, value)
        assert (name, constant) == ("s4d", "D") or parameter._no_weight_decay
    assert layer.out_proj.weight.dtype == torch.bfloat16
    result = layer(torch.randn(1, 5, 16).bfloat16(), context=Context(want=frozenset({"state"})))
    assert result.output.dtype == torch.bfloat16 and result.output.isfinite().all()
    memory = next(x for name, x in result.state.tensors().items() if name.endswith("memory"))
    assert memory.dtype == torch.float32
    assert getattr(layer.double(), constant).dtype == torch.float64
