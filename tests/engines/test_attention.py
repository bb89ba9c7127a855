"""The attention engine against its definition, under every mask, in every way that it cuts the work into blocks."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard.engines.attention.torch_form as backend
from regard.apply import apply
from regard.backends.native import library
from regard.catalogue import get_mechanism
from regard.contract import BlockMask, Call, Mask, Pattern, Unsupported
from regard.core.visibility import block_numbers
from regard.engines.attention import (
    Visibility,
    attention,
    attention_reference,
    masked_scores_bias,
    ranks,
)
from regard.engines.cache import extend, extend_window
from regard.positions import create_positions

ACTIVATIONS = {
    "softmax": lambda s: s.softmax(-1),
    "sigmoid": lambda s: (s - 0.5).sigmoid(),
    "relu": lambda s: (s - 0.5).relu(),
    "relu_squared": lambda s: (s - 0.5).relu() ** 2,
    "clipped": lambda s: (1.4 * s.softmax(-1) - 0.2).clamp(0, 1),
}


@dataclass
class Problem:
    """A random problem: heads shared or not, widths that differ, any visibility rule, any mask."""

    seed: int
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.random = pick = random.Random(self.seed)
        self.batch, self.heads, groups = pick.choice([1, 2, 3]), 4, pick.choice([1, 2, 4])
        self.n, n = pick.choice([1, 5, 13, 37, 64]), 0
        n = self.n
        self.m = m = pick.choice([n, n, n, 1, 7, 40])
        self.pattern = pick.choice([Pattern.CAUSAL_SELF, Pattern.NONCAUSAL_SELF, Pattern.NONCAUSAL_CROSS])
        if self.pattern is Pattern.NONCAUSAL_SELF:
            self.m = m = n
        self.q, self.k = self.normal(self.batch, 4, n, 5), self.normal(self.batch, groups, m, 5)
        self.v = self.normal(self.batch, groups, m, pick.choice([5, 3, 8]))
        self.lengths = memory_lengths = None
        if pick.random() < 0.5:
            self.lengths = torch.randint(0, n + 1, (self.batch,))
            together = n == m and pick.random() < 0.7
            memory_lengths = self.lengths if together else torch.randint(0, m + 1, (self.batch,))
        self.ranks = ranks(Call(self.pattern, lengths=self.lengths, memory_lengths=memory_lengths), n, m, self.q.device)
        self.visibility = self._visibility()
        self.bias = self._bias() if pick.random() < 0.4 else None
        self.scheme = None
        if pick.random() < 0.4:
            name = pick.choice(["alibi", "relative"])
            self.scheme = create_positions(name, dim=20, heads=4, head_dim=5).double()
        self.blocks = None
        if pick.random() < 0.3:
            self.blocks = BlockMask(torch.rand(pick.choice([1, self.batch]), pick.choice([1, 4]), 3, 4) > 0.4, 5)
        self.rule = pick.choice(["softmax", "softmax", "clipped", "sigmoid", "relu", "relu_squared"])
        self.want_weights = pick.random() < 0.2
        self.want_lse = self.rule == "softmax" and pick.random() < 0.3

    @staticmethod
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    def _visibility(self) -> Visibility:
        causal, choice = self.pattern is Pattern.CAUSAL_SELF, self.random.choice
        if self.pattern.cross:
            return Visibility()
        kind = choice(["none", "left", "both", "block", "block", "all"])
        left = choice([0, 1, 4, 9, 50]) if kind in ("left", "both", "all") else None
        right = choice([0, 2, 5, 60]) if kind in ("both", "all") else None
        if kind not in ("block", "all"):
            return Visibility(causal, left, right)
        return Visibility(causal, left, right, choice([1, 3, 8, 50]), choice([0, 1, 2]), choice([0, 1]))

    def _bias(self) -> Tensor:
        choice = self.random.choice
        shape = [choice([1, self.batch]), choice([1, self.heads]), choice([1, self.n]), choice([1, 1, self.m])]
        bias = torch.randn(shape, dtype=torch.float64)
        bias[torch.rand(shape) < 0.2] = -torch.inf
        return bias.requires_grad_()

    def position_bias(self, i: Tensor, j: Tensor) -> Tensor:
        return self.scheme.bias(i, j, self.pattern.causal)

    def differentiable(self) -> list[Tensor]:
        extra = [] if self.scheme is None else list(self.scheme.parameters())
        return [self.q, self.k, self.v, *extra, *([] if self.bias is None else [self.bias])]

    def found(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return attention(
            self.q,
            self.k,
            self.v,
            self.ranks,
            visibility=self.visibility,
            scale=0.7,
            rule="softmax" if self.rule == "clipped" else self.rule,
            shift=0.0 if self.rule in ("softmax", "clipped") else -0.5,
            stretch=(-0.2, 1.2) if self.rule == "clipped" else None,
            bias=self.bias,
            position_bias=None if self.scheme is None else self.position_bias,
            blocks=self.blocks,
            want_weights=self.want_weights,
            want_lse=self.want_lse,
        )

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        position_bias = None if self.scheme is None else self.position_bias
        visible, added = masked_scores_bias(
            self.ranks, self.visibility, self.bias, position_bias, self.blocks, torch.float64
        )
        visible = visible.expand(self.batch, self.heads, self.n, self.m)
        rule = ACTIVATIONS[self.rule]
        output = attention_reference(self.q, self.k, self.v, visible, rule, 0.7, added)
        eye = torch.eye(self.m, dtype=torch.float64).expand(self.batch, self.k.shape[1], -1, -1)
        weights = attention_reference(self.q, self.k, eye, visible, rule, 0.7, added)
        some = visible.any(-1, keepdim=True)
        scores = 0.7 * self.q @ self.k.repeat_interleave(self.heads // self.k.shape[1], 1).mT
        scores = scores if added is None else scores + added
        lse = torch.where(visible | ~some, scores, -torch.inf).logsumexp(-1)
        return output, weights, torch.where(some[..., 0], lse, -torch.inf)

    def check(self) -> None:
        output, weights, lse = self.found()
        expected, expected_weights, expected_lse = self.expected()
        valid = torch.ones(self.batch, 1, self.n, 1, dtype=torch.bool)
        if self.lengths is not None:
            valid = (torch.arange(self.n) < self.lengths[:, None])[:, None, :, None]
        close(output * valid, expected * valid)
        weight = torch.randn_like(output) * valid
        total, expected_total = (output * weight).sum(), (expected * weight).sum()
        if weights is not None:
            close(weights, expected_weights)
        if lse is not None:
            close(lse.exp(), expected_lse.exp())
            some = expected_lse > -torch.inf
            total = total + torch.where(some, lse, 0).sum()
            expected_total = expected_total + torch.where(some, expected_lse, 0).sum()
        first, wanted = gradients(total, self), gradients(expected_total, self)
        directions = [torch.randn_like(g) for g in first]
        for a, b in zip(
            first + second(first, directions, self), wanted + second(wanted, directions, self), strict=True
        ):
            close(a, b, 1e-11)


def gradients(total: Tensor, problem: Problem) -> list[Tensor]:
    tensors = problem.differentiable()
    found = torch.autograd.grad(total, tensors, allow_unused=True, create_graph=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, tensors, strict=True)]


def second(first: list[Tensor], directions: list[Tensor], problem: Problem) -> list[Tensor]:
    """Gradients of the gradients' product with some directions."""
    total = sum((g * d).sum() for g, d in zip(first, directions, strict=True))
    return gradients(total + sum(0 * x.sum() for x in problem.differentiable()), problem)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def cut_small(monkeypatch: pytest.MonkeyPatch, pairs: int, smallest: int, band: int) -> None:
    monkeypatch.setattr(backend, "PAIRS_AT_ONCE", pairs)
    monkeypatch.setattr(backend, "SMALLEST_BLOCK", smallest)
    monkeypatch.setattr(backend, "LARGEST_BAND", band)


@pytest.mark.parametrize(
    ("pairs", "smallest", "band"),
    [(1, 5, 4), (1 << 10, 4, 512), (1 << 22, 4, 8), (1 << 22, 64, 512)],
)
def test_every_cut_equals_the_definition(monkeypatch, pairs, smallest, band):
    cut_small(monkeypatch, pairs, smallest, band)
    for seed in range(20):
        Problem(seed * 100 + smallest).check()


def test_the_random_problems_reach_bands_and_blocks(monkeypatch):
    cut_small(monkeypatch, 1 << 10, 4, 8)
    kinds = set()
    in_bands = backend._in_bands
    monkeypatch.setattr(backend, "_in_bands", lambda *a: (kinds.add("bands"), in_bands(*a))[1])
    again = backend._maybe_again
    monkeypatch.setattr(backend, "_maybe_again", lambda f, t, a: (kinds.add(f"again={a}"), again(f, t, a))[1])
    for seed in range(40):
        Problem(seed).found()
    assert kinds == {"bands", "again=True", "again=False"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_second_derivatives_of_softmax_exist_where_the_native_kernels_send_for_them(dtype, causal):
    q, k, v, direction = (torch.randn(2, 2, 9, 4, dtype=torch.float64) for _ in range(4))

    def second_of(dtype: torch.dtype, asked: str | None) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        where = ranks(Call(Pattern.CAUSAL_SELF), 9, 9, q.device)
        output = attention(*leaves, where, visibility=Visibility(causal=causal), scale=0.5, backend=asked)[0]
        (first,) = torch.autograd.grad(output.square().sum(), leaves[:1], create_graph=True)
        return list(torch.autograd.grad((first * direction.to(dtype)).sum(), leaves))

    expected = second_of(torch.float64, None)
    found = second_of(dtype, "torch")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=0, atol=float(b.abs().max()) * {4: 1e-5, 2: 3e-2}[dtype.itemsize]
        )
    if library.why_missing() is None:
        with pytest.raises(Unsupported, match="try backend='torch'"):
            second_of(dtype, "native")


def test_the_kernel_s_gradients_are_kept_by_nothing_that_saves_tensors_anew():
    """Under hooks on saved tensors, as of checkpointing, nothing else may hold on to them."""
    q = torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or len(kept) - 1, lambda i: kept[i]):
        output = backend.sdpa(q, q.detach(), q.detach(), torch.ones(5, 5, dtype=torch.bool).tril(), scale=0.5)
    assert len(kept) == 6
    (found,) = torch.autograd.grad(output.square().sum(), q)
    again = F.scaled_dot_product_attention(q, q.detach(), q.detach(), is_causal=True, scale=0.5)
    torch.testing.assert_close(found, *torch.autograd.grad(again.square().sum(), q))


@pytest.mark.parametrize("rule", ["softmax", "sigmoid"])
@pytest.mark.parametrize("want_lse", [False, True])
def test_a_row_that_sees_nothing_gives_zero_and_finite_gradients(rule, want_lse):
    q, k, v = (Problem.normal(2, 2, 6, 4) for _ in range(3))
    bias = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
    bias[..., 2, :] = -torch.inf
    bias.requires_grad_()
    want_lse = want_lse and rule == "softmax"
    where = ranks(Call(Pattern.NONCAUSAL_SELF), 6, 6, q.device)
    output, _, lse = attention(
        q, k, v, where, visibility=Visibility(), scale=1.0, rule=rule, bias=bias, want_lse=want_lse
    )
    assert (output[:, :, 2] == 0).all()
    assert lse is None or (lse[:, :, 2] == -torch.inf).all()
    for gradient in torch.autograd.grad(output.square().sum(), (q, k, v, bias), retain_graph=True):
        assert gradient.isfinite().all()
    close(torch.autograd.grad(output[:, :, 2].sum(), q)[0], torch.zeros_like(q))


def test_no_kernel_is_given_a_row_that_sees_nothing(monkeypatch):
    """Some kernels answer such rows with NaN, which no selection afterwards removes from the gradients."""
    masks = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(*tensors: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.dtype == torch.bool else attn_mask > -torch.inf)
        return original(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    bias = torch.zeros(1, 1, 9, 9)
    bias[..., 4, :] = -torch.inf
    tensors = {x: torch.randn(2, 1, 9, 4) for x in "qkv"}
    apply(get_mechanism("softmax"), tensors, mask=Mask(bias=bias), backend="torch")
    lengths = Mask(lengths=torch.tensor([0, 9]))
    apply(get_mechanism("softmax"), tensors, pattern="noncausal-self", mask=lengths, backend="torch")
    apply(get_mechanism("local"), tensors, pattern="noncausal-self", mask=lengths, backend="torch")
    assert len(masks) == 3 and all(mask.any(-1).all() for mask in masks)


def test_large_hidden_scores_leave_gradients_finite():
    q, k, v = (Problem.normal(1, 1, 5, 2) for _ in range(3))
    k.data[..., 4, :] = 1e6 * q.data[..., 0, :]
    where = ranks(Call(Pattern.CAUSAL_SELF), 5, 5, q.device)
    output, _, _ = attention(q, k, v, where, visibility=Visibility(causal=True), scale=1.0, want_weights=True)
    for gradient in torch.autograd.grad(output[:, :, :4].square().sum(), (q, k, v)):
        assert gradient.isfinite().all()


def stored(run: Any) -> int:
    """Bytes of distinct storages that the backward pass of `run()` will need."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    return sum(storages.values())


@pytest.mark.parametrize(
    ("options", "mask"),
    [({}, False), ({"window": 200}, False), ({"form": "block", "block": 100}, False), ({}, True)],
)
@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_a_window_needs_memory_linear_in_length(options, mask, pattern):
    card = get_mechanism("local")

    def run(n: int) -> int:
        tensors = {x: torch.randn(1, 1, n, 8, requires_grad=True) for x in "qkv"}
        given = Mask(lengths=torch.tensor([n - 3])) if mask else None
        return stored(lambda: apply(card, tensors, pattern=pattern, mask=given, config=card.options(**options)))

    assert run(16384) < 4.4 * run(4096)


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
@pytest.mark.parametrize("kind", ["bias", "position_bias", "blocks", "lengths", "dropout"])
def test_no_matrix_of_all_pairs_is_kept_for_backward(monkeypatch, name, kind):
    n = 1024
    monkeypatch.setattr(backend, "PAIRS_AT_ONCE", 1 << 16)
    tensors = {x: torch.randn(1, 2, n, 4, requires_grad=True) for x in "qkv"}
    options: dict[str, Any] = {}
    mask = {
        "bias": Mask(bias=torch.randn(1, 2, 1, n)),
        "blocks": Mask(blocks=BlockMask(torch.rand(1, 2, 16, 16) > 0.3, 64)),
        "lengths": Mask(lengths=torch.tensor([n - 9])),
    }.get(kind)
    if kind == "position_bias":
        scheme = create_positions("relative", dim=8, heads=2, head_dim=4)
        options["position_bias"] = lambda i, j: scheme.bias(i, j, False)
    if kind == "dropout":
        options["dropout"] = 0.1
    kept = stored(lambda: apply(get_mechanism(name), tensors, pattern="noncausal-self", mask=mask, **options))
    assert kept < n * n


@pytest.mark.parametrize("pattern", ["causal-self", "noncausal-self"])
def test_values_of_another_width_need_no_score_matrix(pattern):
    n = 700
    tensors = {x: torch.randn(1, 2, n, 4, requires_grad=True) for x in "qk"}
    tensors["v"] = torch.randn(1, 2, n, 6, requires_grad=True)
    assert stored(lambda: apply(get_mechanism("softmax"), tensors, pattern=pattern)) < 2 * n * n


@pytest.mark.parametrize("name", ["softmax", "local"])
def test_seeded_dropout_is_the_same_when_a_block_is_computed_again(monkeypatch, name):
    torch.manual_seed(3)
    tensors = {x: Problem.normal(1, 2, 48, 4) for x in "qkv"}
    card = get_mechanism(name)

    def run(v: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        return apply(card, tensors | {"v": v}, dropout=0.4, generator=generator).output

    cut_small(monkeypatch, 1 << 8, 4, 8)
    # the output is linear in v: its gradient along a direction is the output of that direction under the same dropout
    direction, weight = torch.randn_like(tensors["v"]), torch.randn(1, 2, 48, 4, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((run(tensors["v"]) * weight).sum(), tensors["v"])
    close((gradient * direction).sum(), (run(direction) * weight).sum(), 1e-11)


def test_dropout_keeps_the_mean_and_drops_the_asked_share():
    tensors = {"q": torch.zeros(1, 1, 300, 4), "k": torch.zeros(1, 1, 300, 4)}
    tensors["v"] = torch.eye(300)[None, None]
    output = apply(get_mechanism("softmax"), tensors, pattern="noncausal-self", dropout=0.25).output
    assert abs((output == 0).float().mean() - 0.25) < 0.01
    assert abs(output.sum(-1).mean() - 1) < 0.01


@pytest.mark.parametrize(("n", "m"), [(3, 8), (8, 3), (1, 6)])
@pytest.mark.parametrize("name", ["softmax", "sigmoid", "local"])
@pytest.mark.parametrize("ragged", [False, True])
def test_uneven_calls_align_bottom_right_with_and_without_state(name, n, m, ragged):
    card = get_mechanism(name)
    torch.manual_seed(n)
    q, k, v = Problem.normal(2, 2, n, 4), Problem.normal(2, 2, m, 4), Problem.normal(2, 2, m, 4)
    config = card.options(window=3) if name == "local" else card.options()
    masks = {"mask": Mask(lengths=torch.tensor([n, n - 1])), "memory_mask": Mask(lengths=torch.tensor([m - 2, m]))}
    given = masks if ragged else {}
    whole = apply(card, {"q": q, "k": k, "v": v}, config=config, **given).output
    stateful = apply(card, {"q": q, "k": k, "v": v}, config=config, return_state=True, **given)
    close(stateful.output, whole)
    more = {x: torch.randn(2, 2, 5, 4, dtype=torch.float64) for x in "qkv"}
    if ragged:
        return
    longer = {"q": torch.cat([q, more["q"]], 2), "k": torch.cat([k, more["k"]], 2), "v": torch.cat([v, more["v"]], 2)}
    expected = apply(card, longer, config=config).output[:, :, -5:]
    close(apply(card, more, config=config, state=stateful.state).output, expected)


def test_cross_queries_count_from_zero_when_memory_is_cached():
    """A position bias must see the same ranks whether the memory is given or was absorbed."""
    q, k, v = Problem.normal(1, 2, 3, 4), Problem.normal(1, 2, 5, 4), Problem.normal(1, 2, 5, 4)
    options = {
        "pattern": "noncausal-cross",
        "position_bias": lambda i, j: 0.3 * (i[:, None, :, None] - j[:, None, None]),
    }
    card = get_mechanism("softmax")
    whole = apply(card, {"q": q, "k": k, "v": v}, **options).output
    absorbed = apply(card, {"q": q, "k": k, "v": v}, return_state=True, **options)
    close(absorbed.output, whole)
    close(apply(card, {"q": q}, state=absorbed.state, **options).output, whole)


def test_the_window_state_holds_the_last_tokens_of_each_row_right_aligned():
    lengths = torch.tensor([0, 2, 7])
    k = torch.arange(1.0, 8).expand(3, 7)[:, None, :, None] * torch.tensor([1.0, 10.0, 100.0])[:, None, None, None]
    k = torch.where(torch.arange(7)[:, None] < lengths[:, None, None, None], k, 0)
    call = Call(Pattern.CAUSAL_SELF, lengths=lengths, memory_lengths=lengths)
    state, *_ = extend_window(call, k, k, 7, 3)
    expected = [[0.0, 0.0, 0.0], [0.0, 10.0, 20.0], [500.0, 600.0, 700.0]]
    assert state.k[:, 0, :, 0].tolist() == expected and state.length.tolist() == [0, 2, 7]
    new = torch.tensor([1, 0, 2])
    call = Call(Pattern.CAUSAL_SELF, lengths=new, memory_lengths=new, state=state)
    state, *_, where = extend_window(call, 5 * torch.ones(3, 1, 2, 1), k[:, :, :2], 2, 3)
    assert state.k[:, 0, :, 0].tolist() == [[0.0, 0.0, 5.0], [0.0, 10.0, 20.0], [700.0, 5.0, 5.0]]
    assert where.keys.clamp(min=-1).tolist() == [[-1, -1, -1, 0, -1], [-1, 0, 1, -1, -1], [4, 5, 6, 7, 8]]
    assert where.offset == 3 and where.queries.tolist() == [[0, 1], [2, 3], [7, 8]]


def test_a_cache_marks_the_empty_slots_of_short_rows():
    lengths = torch.tensor([3, 1])
    k = torch.randn(2, 1, 3, 4)
    call = Call(Pattern.CAUSAL_SELF, lengths=lengths, memory_lengths=lengths)
    state, _ = extend(call, k, k, 3)
    state, where = extend(Call(Pattern.CAUSAL_SELF, state=state), k[:, :, :2], k[:, :, :2], 2)
    assert state.ranks.tolist() == [[0, 1, 2, 3, 4], [0, -1, -1, 1, 2]]
    assert where.queries.tolist() == [[3, 4], [1, 2]] and state.length.tolist() == [5, 3]


@pytest.mark.parametrize("seed", range(30))
def test_counts_and_idle_limits_agree_with_the_mask(seed):
    pick = random.Random(seed)
    n, m, first = pick.randint(1, 12), pick.randint(1, 12), pick.randint(-4, 12)
    rule = Visibility(
        pick.random() < 0.5,
        pick.choice([None, 0, 3, 9]),
        pick.choice([None, 0, 2, 9]),
        pick.choice([None, 1, 4, 20]),
        pick.randint(0, 2),
        pick.randint(0, 2),
    )
    queries, keys = torch.arange(first, first + n)[None], torch.arange(m)[None]
    seen = rule.mask(queries, keys).expand(1, n, m)
    assert torch.equal(rule.count(queries, torch.tensor([[m]])), seen.sum(-1))
    assert torch.equal(rule.within(first, n, m).mask(queries, keys).expand(1, n, m), seen)
    back, ahead = rule.reach()
    distance = (keys[:, None] - queries[..., None])[seen]
    assert back is None or (distance >= -back).all()
    assert ahead is None or (distance <= ahead).all()


def test_blocked_work_compiles_whole(monkeypatch):
    cut_small(monkeypatch, 1 << 7, 4, 4)
    tensors = [torch.randn(1, 1, 16, 4, requires_grad=True) for _ in "qkv"]
    for name, options in (("softmax", {}), ("sigmoid", {"window": (3, None)})):
        card = get_mechanism(name)

        def run(q: Tensor, k: Tensor, v: Tensor, card=card, options=options) -> Tensor:
            found = apply(card, {"q": q, "k": k, "v": v}, config=card.options(**options), dropout=1e-9)
            return found.output

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for a, b in zip(
            torch.autograd.grad(compiled(*tensors).sum(), tensors),
            torch.autograd.grad(run(*tensors).sum(), tensors),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_what_does_not_fit_is_refused():
    q = torch.randn(2, 2, 3, 4)
    where = ranks(Call(Pattern.CAUSAL_SELF), 3, 3, q.device)
    common: dict[str, Any] = {"visibility": Visibility(causal=True), "scale": 1.0}
    with pytest.raises(Unsupported, match="rule"):
        attention(q, q, q, where, rule="softplus", **common)
    with pytest.raises(Unsupported, match="log-sum-exp"):
        attention(q, q, q, where, rule="sigmoid", want_lse=True, **common)
    with pytest.raises(Unsupported, match="shift"):
        attention(q, q, q, where, shift=1.0, **common)
    with pytest.raises(Unsupported, match="bias of shape"):
        attention(q, q, q, where, bias=torch.zeros(1, 1, 3, 4), **common)
    for rule, stretch in (("sigmoid", (-0.1, 1.0)), ("softmax", (0.1, 1.0)), ("softmax", (-0.1, 0.9))):
        with pytest.raises(Unsupported, match="stretch"):
            attention(q, q, q, where, rule=rule, stretch=stretch, **common)


def test_blocks_are_numbered_alike_compiled():
    """By inductor, whose vectors of 16 leave one token over."""

    def numbers():
        return block_numbers(torch.arange(17), 16)

    torch.compiler.reset()
    assert torch.equal(torch.compile(numbers, fullgraph=True)(), numbers())
