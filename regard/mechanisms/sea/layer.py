"""The estimator of sea's layer: computes the estimated map and the gates from the heads."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from regard.contract import (
    LayerCall,
    LayerSpec,
    Pattern,
    Projection,
    State,
    Tensors,
    Unsupported,
    lengths_after,
    state_field,
)
from regard.core.precision import wide, without_autocast
from regard.engines.linear_attention import Rule, divide, linear_attention, map_memory, map_queries
from regard.engines.recomputed import recomputed
from regard.layers.attention_map import CausalMap, CodebookMap, NoncausalMap, orthogonal_features, softmax_features
from regard.layers.linear import Linear
from regard.mechanisms.sea.definition import Config

if TYPE_CHECKING:
    from jaxtyping import Float, Int


QUERIES_AT_ONCE = 512
"""Number of queries estimated at once in causal-self."""


@dataclass(frozen=True)
class EstimatorState(State):
    """The state of an estimator for each sequence.

    Attributes:
        memory: sums of the linear attention and its normaliser, in at least float32.
        rows: the last input rows of each of the two convolutions.
        length: number of keys in the sums.
    """

    memory: Float[Tensor, "b h r c"] = state_field()
    length: Int[Tensor, " b"] = state_field()
    rows: tuple[Tensor, ...] = ()


class Estimator(Projection):
    """Computes the estimated map and the gates for a layer's queries: a stateful projection of the shell."""

    random_features: Tensor | None
    mixes_tokens = True
    reads_unrotated = ("queries and keys", "")
    # In these patterns the map only selects keys, which has no gradient.
    learns_from_losses = (Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_CROSS, Pattern.CAUSAL_CROSS)
    EPS = 1e-6
    COSFORMER, PERFORMER = Rule("identity", 1.0, EPS), Rule("relu", 1.0, EPS, 1e-3)

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        config, d, v, heads = spec.config, spec.head_dim, spec.value_dim, spec.heads
        self.config, self.pattern, self.heads = config, spec.pattern, heads
        self.whole = spec.pattern is Pattern.NONCAUSAL_SELF
        self.check(config, spec.pattern)
        features = max(1, int(d * math.log(d) / config.feature_divisor)) if config.kernel == "performer" else 0
        self.register_buffer("random_features", orthogonal_features(features, d) if features else None)
        self.positions = None if self.whole else nn.Parameter(torch.randn(config.length, d))
        if self.positions is not None:
            self.positions._no_weight_decay = True  # type: ignore[attr-defined]
        width = d + v + (d if spec.pattern.cross else v)
        joint = heads if config.joint_encoder else 1
        self.encode = nn.Sequential(Linear(joint * width, joint * 2 * d), nn.LayerNorm(joint * 2 * d), nn.GELU())
        maps = {"codebook": CodebookMap, "cnn": NoncausalMap if self.whole else CausalMap}
        self.map = maps[config.estimator](2 * d, heads, config.estimate_length)
        self.gates = Linear(2 * d, 1 + config.row_scale)
        self.training_calls = 0

    @staticmethod
    def check(config: Config, pattern: Pattern) -> None:
        """Raise Unsupported for options that the pattern's estimator does not support."""
        factor = 2 if pattern is Pattern.NONCAUSAL_SELF else 4
        factor = CodebookMap.PATCH if config.estimator == "codebook" else factor
        if config.estimate_length % factor:
            raise Unsupported(
                f"estimate_length={config.estimate_length} of a layer in {pattern.value}",
                supported=f"a multiple of {factor}",
                nearest=f"estimate_length={config.estimate_length + -config.estimate_length % factor}",
            )
        if config.kernel == "cosformer" and pattern.cross:
            raise Unsupported(
                f"kernel='cosformer' in {pattern.value}, where queries have no place among the keys",
                supported="performer",
                nearest="kernel='performer'",
            )

    def redraw(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features."""
        if self.random_features is not None:
            number, width = self.random_features.shape
            drawn = orthogonal_features(number, width, generator)
            self.random_features = drawn.to(self.random_features)

    def forward(self, heads: Tensors, call: LayerCall) -> tuple[Tensors, EstimatorState | None]:
        """The heads with the queries' estimate and gates added, and the new state."""
        compiling = torch.compiler.is_compiling()
        if self.training and self.config.redraw_every and not compiling:
            self.training_calls += 1
            if self.training_calls % self.config.redraw_every == 0:
                self.redraw(call.context.generator)
        causal = self.pattern is Pattern.CAUSAL_SELF and not compiling
        if causal and heads["q"].shape[2] > QUERIES_AT_ONCE:
            return self._in_parts(heads, call)
        return self._estimated(heads, call, self.random_features)

    def _in_parts(self, heads: Tensors, call: LayerCall) -> tuple[Tensors, EstimatorState | None]:
        """Like :meth:`_estimated`, for some queries at a time to save memory; gradients recompute it."""
        n, state = heads["q"].shape[2], call.state
        learning = torch.is_grad_enabled()
        cut = [
            x.split(QUERIES_AT_ONCE, 2) for x in heads.values()
        ]  # each slice's gradient would be as long as the whole
        parts: dict[str, list[Tensor]] = {}
        for start, pieces in zip(range(0, n, QUERIES_AT_ONCE), zip(*cut, strict=True), strict=True):
            lengths = None if call.lengths is None else (call.lengths - start).clamp(0, QUERIES_AT_ONCE)
            part = dataclasses.replace(call, lengths=lengths, memory_lengths=lengths, state=state)
            inputs = dict(zip(heads, pieces, strict=True))
            told, state = recomputed(self._estimated, inputs, part, self.random_features)
            for name in told.keys() - heads.keys():
                x = told[name]
                if learning:
                    parts.setdefault(name, []).append(x)
                    continue
                if name not in parts:  # keeping all parts and the whole would double memory
                    parts[name] = [x.new_empty(*x.shape[:2], n, *x.shape[3:])]
                parts[name][0][:, :, start : start + QUERIES_AT_ONCE] = x
        return heads | {
            name: found[0] if len(found) == 1 else torch.cat(found, 2) for name, found in parts.items()
        }, state

    def _estimated(
        self, heads: Tensors, call: LayerCall, features: Tensor | None
    ) -> tuple[Tensors, EstimatorState | None]:
        """Estimate with the given random features; others may be drawn before this is recomputed for gradients."""
        x, memory, lengths, memory_lengths, state = (
            call.x,
            call.memory,
            call.lengths,
            call.memory_lengths,
            call.state,
        )
        config: Config = self.config
        c = None
        with without_autocast(next(iter(heads.values())).device):
            if self.pattern.cross:
                if memory is not None:
                    state = self._absorb(heads, memory_lengths, state, features)
                if x is not None and state is not None:
                    q = map_queries(self._project(wide(heads["q"]), features), self.rule)
                    c = divide(q @ state.memory, self.rule)
            elif self.whole:
                c = self._attend_all(heads, lengths, features)
            else:
                c, state = self._attend_causal(heads, lengths, state, features)
        if c is None:
            return heads, state
        own = heads["q"] if self.pattern.cross else self._repeat(heads["v"])
        encoded = torch.cat([c.to(own.dtype), own], -1)  # (b, h, n, 3 d)
        if config.joint_encoder:
            joint = self.encode(encoded.transpose(1, 2).flatten(2))
            z = joint.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        else:
            z = self.encode(encoded)
        gates = self.gates(z)
        found = heads | {"mix_logit": gates[..., 0]}
        if config.row_scale:
            found["row_logit"] = gates[..., 1]
        rows = self.map.start(z) if state is None else state.rows
        if z.shape[2] == 0:
            found["estimate"] = z.new_zeros(*z.shape[:3], config.estimate_length)
        else:
            found["estimate"], rows = self.map(z, lengths, rows)
        return found, None if state is None else dataclasses.replace(state, rows=rows)

    def _repeat(self, x: Float[Tensor, "b g n d"]) -> Float[Tensor, "b h n d"]:
        return x if x.shape[1] == self.heads else x.repeat_interleave(self.heads // x.shape[1], 1)

    @property
    def rule(self) -> Rule:
        """The rule of the linear attention in causal and cross patterns."""
        return self.COSFORMER if self.random_features is None else self.PERFORMER

    def _project(
        self, x: Float[Tensor, "b h n d"], features: Tensor | None, turn: Float[Tensor, "#b 1 n 1"] | None = None
    ) -> Tensor:
        """Inputs of the feature map; `turn` is the angle of each token in cosFormer."""
        if features is None:
            assert turn is not None
            return torch.cat([x.relu() * turn.cos(), x.relu() * turn.sin()], -1)
        return x @ (x.shape[-1] ** -0.25 * features.to(x.dtype)).mT

    def _turn(
        self, places: Int[Tensor, "#b n"], longest: int | Tensor, dtype: torch.dtype
    ) -> Float[Tensor, "#b 1 n 1"]:
        return (math.pi / 2 * places.to(dtype) / longest)[:, None, :, None]

    def _keys(
        self, heads: Tensors, state: EstimatorState | None, features: Tensor | None
    ) -> tuple[Float[Tensor, "b h n r"], Float[Tensor, "b h n d+v"], Int[Tensor, "#b n"]]:
        """Keys before their feature map, values concatenated with learned position codes, and the positions."""
        assert self.positions is not None
        k, v = (wide(heads[name]) for name in ("k", "v"))  # repeated for shared heads only after mapping
        places = torch.arange(k.shape[2], device=k.device)[None]
        if state is not None:
            places = state.length[:, None] + places
        table = self.positions.to(v.dtype)
        codes = table[places.clamp(max=table.shape[0] - 1)][:, None]
        values = torch.cat([codes.expand(*v.shape[:3], -1), v], -1)
        k = self._project(k, features, self._turn(places, table.shape[0], k.dtype))
        return self._repeat(k), self._repeat(values), places

    def _after(self, heads: Tensors, lengths: Tensor | None, state: EstimatorState | None) -> Int[Tensor, " b"]:
        """The number of keys in each row after this call; refused beyond the table of positions."""
        assert self.positions is not None
        k, most = heads["k"], self.positions.shape[0]
        length = lengths_after(None if state is None else state.length, lengths, k.shape[0], k.shape[2], k.device)
        longest = k.shape[2] if lengths is None and state is None else 0
        if (lengths is not None or state is not None) and not torch.compiler.is_compiling() and length.numel():
            longest = int(length.max())
        if longest > most:
            raise Unsupported(
                f"sea with a sequence of {longest} keys",
                supported=f"up to length={most}",
                nearest=f"length={longest}",
            )
        return length

    def _absorb(
        self, heads: Tensors, lengths: Tensor | None, state: EstimatorState | None, features: Tensor | None
    ) -> EstimatorState:
        length = self._after(heads, lengths, state)
        k, values, _ = self._keys(heads, state, features)
        k, values = map_memory(k, values, self.rule, lengths)
        memory = k.mT @ values
        if state is None:
            return EstimatorState(memory, length, self.map.start(heads["k"]))
        return dataclasses.replace(state, memory=state.memory + memory, length=length)

    def _attend_causal(
        self, heads: Tensors, lengths: Tensor | None, state: EstimatorState | None, features: Tensor | None
    ) -> tuple[Float[Tensor, "b h n d+v"], EstimatorState]:
        length = self._after(heads, lengths, state)
        k, values, places = self._keys(heads, state, features)
        assert self.positions is not None
        q = self._project(wide(heads["q"]), features, self._turn(places, self.positions.shape[0], values.dtype))
        before = None if state is None else state.memory
        c, memory = linear_attention(q, k, values, self.rule, state=before, valid=lengths)
        rows = self.map.start(heads["v"]) if state is None else state.rows
        return c, EstimatorState(memory, length, rows)

    def _attend_all(
        self, heads: Tensors, lengths: Tensor | None, features: Tensor | None
    ) -> Float[Tensor, "b h n d+v"]:
        """Noncausal-self: the softmax kernel, and as codes the identity matrix stretched over the valid tokens."""
        q, k, v = (wide(self._repeat(heads[name])) for name in ("q", "k", "v"))
        n, d = q.shape[2:]
        if n == 0:
            return v.new_zeros(*v.shape[:3], d + v.shape[3])
        count = torch.full((1,), n, device=q.device) if lengths is None else lengths
        places = torch.arange(n, device=q.device)[None]
        at = (places.to(q.dtype) / (count[:, None] - 1).clamp(min=1) * (d - 1))[..., None]
        codes = (1 - (at - torch.arange(d, device=q.device)).abs()).clamp(min=0)[:, None]
        valid = (places < count[:, None])[:, None, :, None]
        values = torch.cat([codes.expand(*v.shape[:3], -1), v], -1)
        if features is None:
            turn = self._turn(places, count.clamp(min=1)[:, None], q.dtype)
            q, k = self._project(q, features, turn), self._project(k, features, turn)
        else:
            q, k = softmax_features(q, k, features.to(q.dtype), valid)
        k = torch.where(valid, k, 0)
        return (q @ (k.mT @ values)) / (q @ k.sum(2)[..., None] + self.EPS)
