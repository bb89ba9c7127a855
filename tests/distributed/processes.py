"""What each of several real processes does in a test: its part of a sequence, compared with the whole."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from support import close, refused

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Pattern
from regard.distributed import ContextParallel, DistributedAttention, DistributedRecurrence
from regard.models import LanguageModel, LanguageModelConfig
from regard.workbench.subjects import Subject


def join(rank: int, ranks: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)  # all ranks draw the same whole
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)


def compare_attention(rank: int, ranks: int) -> None:
    length = 21
    whole = [torch.randn(2, h, length, w, dtype=torch.float64, requires_grad=True) for h, w in ((4, 6), (2, 6), (2, 5))]
    expected = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True, enable_gqa=True)
    grad = torch.randn_like(expected)
    slopes = torch.autograd.grad(expected, whole, grad)
    mesh = dist.init_device_mesh("cpu", (ranks,))
    square = dist.init_device_mesh("cpu", (1, ranks))
    for scheme, group in (("ring", None), ("head", dist.group.WORLD), ("gather", mesh), ("grid", square)):
        attention = DistributedAttention(scheme, group=group)
        mine = [attention.shard(x).detach().requires_grad_() for x in whole]
        output = attention(*mine, length=length)
        close(output, attention.shard(expected))
        found = torch.autograd.grad(output, mine, attention.shard(grad))
        for one, other in zip(found, slopes, strict=True):
            close(one, attention.shard(other))
        simulated = DistributedAttention(scheme, ranks=ranks, grid=attention.grid if scheme == "grid" else None)
        simulated(*whole).backward(grad)
        assert attention.forward_traffic == [simulated.forward_traffic[rank]]
        assert attention.backward_traffic == [simulated.backward_traffic[rank]]


def compare_recurrence(rank: int, ranks: int) -> None:
    for name, hand_over in (("gated_linear", "scan"), ("delta_rule", "order"), ("local", "order")):
        subject = Subject(get_mechanism(name), Pattern.CAUSAL_SELF)
        whole = {n: x.requires_grad_() for n, x in subject.inputs(13).items()}
        expected = apply(subject.card, whole).output
        grad = torch.randn_like(expected)
        slopes = torch.autograd.grad(expected, list(whole.values()), grad)
        mechanism = DistributedRecurrence(name, hand_over=hand_over)
        mine = {n: x.detach().requires_grad_() for n, x in mechanism.shard(whole).items()}
        output = mechanism(mine, length=13)
        close(output, mechanism.layout(13).take(expected, rank))
        found = torch.autograd.grad(output, list(mine.values()), mechanism.layout(13).take(grad, rank))
        for one, other in zip(found, mechanism.shard(dict(zip(whole, slopes, strict=True))).values(), strict=True):
            close(one, other)
        simulated = DistributedRecurrence(name, ranks=ranks, hand_over=hand_over)
        simulated(whole).backward(grad)
        assert mechanism.forward_traffic == [simulated.forward_traffic[rank]]
        assert mechanism.backward_traffic == [simulated.backward_traffic[rank]]


def compare_training() -> None:
    """Two steps of a model whose sequences the ranks share, and of its copy on each rank alone."""
    for plan in (["softmax"] * 2, ["gated_linear", "delta_rule", "softmax"]):
        config = LanguageModelConfig(11, dim=16, plan=plan, num_heads=2)
        shared, alone = (LanguageModel(config).double() for _ in range(2))
        alone.load_state_dict(shared.state_dict())
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        parallel, ids = ContextParallel(shared, "head", group=mesh), torch.randint(11, (2, 13))
        optimizers = [torch.optim.SGD(model.parameters(), 0.1) for model in (shared, alone)]
        for _ in range(2):
            found, expected = parallel.loss(ids), alone.loss(ids)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
            for loss, optimizer in zip((found, expected), optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
            parallel.add_gradients()
            for one, other in zip(shared.parameters(), alone.parameters(), strict=True):
                torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-11)
            for optimizer in optimizers:
                optimizer.step()
    refused("2 tokens on a rank whose convolutions look 3 back", parallel.loss, ids[:, :4])


def both(rank: int, ranks: int, store: str) -> None:
    join(rank, ranks, store)
    try:
        compare_attention(rank, ranks)
        compare_recurrence(rank, ranks)
        compare_training()
    finally:
        dist.destroy_process_group()
