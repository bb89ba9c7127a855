from __future__ import annotations

import dataclasses

import pytest
from model_checks import small

from regard.contract import Unsupported
from regard.models import build_model, count_parameters, match_parameters

CONFIGS = [
    small("language model", dim=32, num_layers=2),
    small("language model", plan="mamba2", num_layers=2),
    small("language model", dim=32, plan=["linear", ("softmax", {"feed_forward": 40})]),
    small("encoder", dim=32, plan="linear", num_layers=2),
    small("encoder-decoder", num_layers=2, cross_plan="mamba2"),
    small("forecaster", num_layers=2, cross_plan="mamba2", patch=4),
    small("funnel encoder", num_layers=1, funnel={"blocks": 1}),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_count_without_storage_equals_the_built_model(config):
    assert count_parameters(config) == sum(p.numel() for p in build_model(config).parameters())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("target", [33_333, 123_456])
def test_matched_models_are_nearest_to_the_target(config, target):
    matched = match_parameters(config, target)
    found = abs(count_parameters(matched) - target)
    narrower = dataclasses.replace(matched, feed_forward=matched.feed_forward - 1)
    step = count_parameters(matched) - count_parameters(narrower)
    assert found <= max(step / 2, 0.005 * target if matched.feed_forward % 8 == 0 else 0)
    assert found <= 0.02 * target


def test_what_no_width_makes_is_refused():
    config = small("language model", dim=32)
    smallest = count_parameters(dataclasses.replace(config, feed_forward=1))
    fixed = small("language model", plan=[("softmax", {"feed_forward": 8})])
    for call, message in (
        (lambda: match_parameters(config, smallest // 2), f"{smallest:,}"),
        (lambda: match_parameters(small("encoder-decoder", num_layers=2), 1000), "2 layers"),
        (lambda: match_parameters(fixed, 10_000), "fixes feed_forward"),
        (lambda: count_parameters(object()), "config of type"),
    ):
        with pytest.raises(Unsupported, match=message):
            call()
