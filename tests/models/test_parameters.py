from __future__ import annotations

import pytest

from regard.contract import Unsupported
from regard.models import (
    EncoderConfig,
    FunnelEncoderConfig,
    LanguageModelConfig,
    build_model,
    count_parameters,
    match_parameters,
)

CONFIGS = {
    "softmax": LanguageModelConfig(50, dim=32, num_heads=2, plan="softmax", num_layers=2),
    "mixer": LanguageModelConfig(50, dim=16, num_heads=2, plan="mamba2", num_layers=2),
    "hybrid": LanguageModelConfig(50, dim=32, num_heads=2, plan=["linear", ("softmax", {"feed_forward": 40})]),
    "encoder": EncoderConfig(3, features=2, dim=32, num_heads=2, plan="linear", num_layers=2),
    "funnel": FunnelEncoderConfig(3, features=2, dim=16, num_heads=2, num_layers=1, funnel={"blocks": 1}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_count_without_storage_equals_the_built_model(config):
    assert count_parameters(config) == sum(p.numel() for p in build_model(config).parameters())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("target", [20_011, 33_333, 123_456])
def test_matched_models_are_nearest_to_the_target(config, target):
    matched = match_parameters(config, target)
    found = abs(count_parameters(matched) - target)
    step = count_parameters(matched) - count_parameters(
        type(matched)(**{**vars(matched), "feed_forward": matched.feed_forward - 1})
    )
    assert found <= max(step / 2, 0.005 * target if matched.feed_forward % 8 == 0 else 0)
    assert found <= 0.02 * target


def test_a_target_out_of_reach_is_refused_with_the_smallest_count():
    smallest = count_parameters(LanguageModelConfig(50, dim=32, num_heads=2, feed_forward=1))
    with pytest.raises(Unsupported, match=f"{smallest:,}"):
        match_parameters(LanguageModelConfig(50, dim=32, num_heads=2), smallest // 2)
    with pytest.raises(Unsupported, match="fixes feed_forward"):
        match_parameters(LanguageModelConfig(50, dim=32, num_heads=2, plan=[("softmax", {"feed_forward": 8})]), 10_000)
    with pytest.raises(Unsupported, match="config of type"):
        count_parameters(object())
