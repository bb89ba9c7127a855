"""Checks that refuse invalid calls of landmark and name what is supported instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from regard.contract import Call, Pattern, Unsupported

if TYPE_CHECKING:
    from regard.mechanisms.landmark.definition import Config


def check_miss(call: Call, miss: Tensor | None) -> None:
    """Refuse a miss key anywhere but in causal-self with grouped softmax."""
    if miss is not None and (call.pattern is not Pattern.CAUSAL_SELF or call.config.softmax != "grouped"):
        raise Unsupported(
            f"a miss key in {call.pattern.value} with softmax={call.config.softmax!r}",
            supported="causal-self with softmax='grouped'",
        )


def check_choice(call: Call) -> None:
    """Refuse patterns and options in which no blocks can be chosen or dropped."""
    config: Config = call.config
    if call.pattern is Pattern.NONCAUSAL_SELF and config.bounded:
        raise Unsupported(
            "landmark with top_k or cache_blocks in noncausal-self, where nothing is cached",
            supported="causal-self and cross patterns",
            nearest="top_k=None, cache_blocks=None",
        )
    if call.pattern.cross and config.selection == "max_over_tokens":
        raise Unsupported(
            f"landmark with selection='max_over_tokens' in {call.pattern.value}",
            supported="per_token_and_head or max_over_heads",
            nearest="selection='per_token_and_head'",
        )
    if call.pattern.cross and config.top_k is not None and config.softmax != "grouped":
        raise Unsupported(
            f"landmark with top_k and softmax={config.softmax!r} in {call.pattern.value}",
            supported="softmax='grouped'",
            nearest="top_k=None",
        )


def check(call: Call, miss: Tensor | None) -> None:
    """Refuse calls that landmark cannot answer: invalid uses of the miss key or of block choice (:func:`check_choice`),
    cross patterns with rotation or with grouping but no roles, and position jumps without rotary positions."""
    config: Config = call.config
    check_miss(call, miss)
    check_choice(call)
    if call.rotate is not None and call.pattern.cross:
        raise Unsupported(
            f"landmark with rotate in {call.pattern.value}", supported="queries and keys rotated beforehand"
        )
    if call.pattern.cross and call.roles is None and config.softmax == "grouped":
        raise Unsupported(
            f"landmark in {call.pattern.value} without roles: no key could be reached",
            supported="roles with a landmark after each block",
        )
    if config.position_jump and call.training and call.rotate is None:
        raise Unsupported("position_jump without rotary positions", supported="causal-self with rotary positions")


def check_plain(call: Call) -> None:
    """Refuse features that are not supported when blocks are chosen or dropped."""
    if call.bias is not None or call.blocks is not None or call.position_bias is not None or "weights" in call.want:
        raise Unsupported(
            "landmark with a bias, a block mask, position biases or weights under top_k or cache_blocks",
            supported="these with top_k=None and cache_blocks=None, or in causal-self without a state",
        )


def check_continued(call: Call, miss: Tensor | None) -> None:
    """Refuse features that are not supported in calls that keep a state."""
    if call.state is not None and (call.bias is not None or call.blocks is not None):
        raise Unsupported("landmark with a bias or a block mask together with a state", supported="whole calls")
    if call.config.position_jump and call.training:
        raise Unsupported("position_jump in training with a state", supported="whole calls")
    if miss is not None and call.training:
        raise Unsupported("a miss key in training with a state", supported="whole calls")
