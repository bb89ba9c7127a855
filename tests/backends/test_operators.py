"""Operators are visible to everything that observes calls, with and without the fast path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from regard.backends.operators import operator
from regard.contract import Unsupported


@operator("scaled_rows_for_tests")
def scaled_rows(x: Tensor, by: Tensor | None, factor: float, axes: list[int]) -> tuple[Tensor, Tensor]:
    return factor * x if by is None else factor * x * by, x.new_empty(0)


@scaled_rows.register_fake
def _(x, by, factor, axes):
    return x.new_empty(x.shape), x.new_empty(0)


@operator("scaled_rows_backward_for_tests")
def scaled_rows_backward(grad: Tensor, x: Tensor, by: Tensor | None, factor: float) -> list[Tensor]:
    return [factor * grad if by is None else factor * grad * by, factor * (grad * x).sum(-1, keepdim=True)]


@scaled_rows_backward.register_fake
def _(grad, x, by, factor):
    return [x.new_empty(x.shape), x.new_empty((*x.shape[:-1], 1))]


def _save(ctx, inputs, output):
    x, by, ctx.factor, _ = inputs
    ctx.save_for_backward(x, by)


def _differentiate(ctx, grad, _):
    x, by = ctx.saved_tensors
    grad_x, grad_by = scaled_rows_backward(grad, x, by, ctx.factor)
    return grad_x, None if by is None else grad_by, None, None


scaled_rows.register_autograd(_differentiate, setup_context=_save)
scaled_rows_backward.refuse_gradient("second derivatives of scaled rows", supported="first derivatives")


def rows(x: Tensor, by: Tensor | None = None) -> Tensor:
    return scaled_rows(x, by, 3.0, [0, 1])[0]


def leaves(learning: bool = True) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 5, requires_grad=learning), torch.randn(4, 1, requires_grad=learning)


with_and_without_gradients = pytest.mark.parametrize("learning", [False, True])


def test_values_and_gradients_are_those_of_the_function_also_of_checkpointed_calls():
    x, by = leaves()
    expected = 3 * x * by
    checkpointed = torch.utils.checkpoint.checkpoint(rows, x, by, use_reentrant=False)
    for found in (rows(x, by), checkpointed):
        torch.testing.assert_close(found, expected)
        one, other = (torch.autograd.grad(y.square().sum(), (x, by), retain_graph=True) for y in (found, expected))
        torch.testing.assert_close(one, other)


def test_nothing_is_recorded_where_no_gradient_is_wanted():
    x, by = leaves()
    assert not rows(x.detach(), by.detach()).requires_grad
    with torch.no_grad():
        assert not rows(x, by).requires_grad
    with torch.inference_mode():
        assert rows(x, by).is_inference()


def test_a_second_derivative_is_refused():
    x, by = leaves()
    (grad,) = torch.autograd.grad(rows(x, by).square().sum(), x, create_graph=True)
    with pytest.raises(Unsupported, match="second derivatives of scaled rows; supported: first derivatives"):
        grad.sum().backward()


def test_transforms_and_forward_derivatives_are_refused_and_functionalization_is_not():
    x, by = leaves(False)
    for other in (by, by.clone().requires_grad_()):
        with torch.autograd.forward_ad.dual_level(), pytest.raises(Unsupported, match="forward-mode"):
            rows(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)), other)
    for transformed in (
        lambda: torch.func.jvp(lambda y: rows(y, by), (x,), (x,)),
        lambda: torch.func.grad(lambda y: rows(y, by).sum())(x),
        lambda: torch.func.vmap(rows)(x, by),
    ):
        with pytest.raises(Unsupported, match="of the operator scaled_rows_for_tests"):
            transformed()
    torch.testing.assert_close(torch.func.functionalize(rows)(x, by), 3 * x * by)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@with_and_without_gradients
def test_modes_profiles_and_traces_see_one_operator(learning):
    x, by = leaves(learning)
    name = "regard::scaled_rows_for_tests"
    with Seen() as seen:
        rows(x, by)
    assert seen.names.count(name) == 1
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        rows(x, by)
    assert name in [event.name for event in recorded.events()]
    assert [str(n.target) for n in make_fx(rows)(x, by).graph.nodes].count(f"{name.replace('::', '.')}.default") == 1
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        traced = torch.jit.trace(rows, (x, by))
    assert name in str(traced.graph)


@with_and_without_gradients
def test_fake_and_meta_tensors_are_never_computed_on(learning):
    with FakeTensorMode():
        fake = rows(*leaves(learning))
    assert fake.shape == (4, 5) and fake.requires_grad == learning
    outside = rows(fake, None)  # a fake tensor used outside its mode
    meta = rows(*(torch.empty_like(t, device="meta", requires_grad=learning) for t in leaves()))
    assert type(outside) is type(fake) and meta.is_meta and meta.shape == (4, 5)


@with_and_without_gradients
def test_compiles_and_exports_whole(learning):
    x, by = leaves(learning)
    found = torch.compile(rows, fullgraph=True, backend="aot_eager")(x, by)
    torch.testing.assert_close(found, rows(x, by))
    if learning:
        torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], (3 * by).expand_as(x))

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, by: Tensor) -> Tensor:
            return rows(x, by)

    for strict in (False, True):
        program = torch.export.export(Module(), (x, by), strict=strict)
        assert "regard.scaled_rows_for_tests" in program.graph_module.code
        torch.testing.assert_close(program.module()(x, by), rows(x, by))


def test_a_kernel_is_given_numbers_as_they_lie_in_memory():
    @operator("plain_memory_for_tests")
    def plain_memory(x: Tensor) -> Tensor:
        assert not x.is_neg() and not x._is_zerotensor()
        return x.clone()

    x = torch.randn(4, 5)
    for given in (torch._neg_view(x), torch.complex(x, x).conj().imag, torch._efficientzerotensor(4, 5)):
        torch.testing.assert_close(plain_memory(given), given + 0)
