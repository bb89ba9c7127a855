"""The work of each of several real processes in a test: its part of a sequence, compared with the whole."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import close, refused

from regard.apply import apply
from regard.catalogue import get_mechanism
from regard.contract import Pattern
from regard.distributed import ContextParallel, DistributedAttention, DistributedRecurrence, train_together
from regard.distributed.measure import Attention, Training, compare_ranks
from regard.distributed.together import WAYS
from regard.measurement.budget import Budget
from regard.models import LanguageModel, LanguageModelConfig
from regard.models.weights import distinct_tensors
from regard.tasks.protocol import IGNORED, Batch, Task, counter_generator
from regard.training import TrainConfig, train
from regard.workbench.comparison.settings import CompareSettings
from regard.workbench.trained.run import train_model
from regard.workbench.verification.subjects import Subject


def join(rank: int, ranks: int, store: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.manual_seed(0)  # all ranks draw the same sequence
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
    """Compare two training steps of a model whose sequences are split over ranks with those of a copy on each rank."""
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


class Repeating(Task):
    """Sequences that repeat their beginning; some targets are ignored, a different number in each item."""

    name, pattern, objective, length, vocab_size = "repeating", Pattern.CAUSAL_SELF, "next-token", 12, 7

    def describe(self):
        return "sequences that repeat"

    def training_batch(self, step, seed, batch_size):
        draws = counter_generator(seed, step)
        ids = torch.from_numpy(draws.integers(7, size=(batch_size, 4))).repeat(1, 4)[:, :13]
        targets = ids[:, 1:].clone()
        targets[0, 2:] = IGNORED
        return Batch(ids[:, :-1].contiguous(), targets)

    def evaluation_batches(self, batch_size):
        return [self.training_batch(0, 99, 6)]


class Stopped(Exception):
    """Interrupts a run midway."""


def stop(point):
    if point.step == 3:
        raise Stopped


def run_together(way, folder, model, config, *, stopped=False):
    together = train_together(way, model) if way else None
    path = folder / "run.safetensors"
    if not stopped:
        return train(model, Repeating(), config, checkpoint=path, together=together)
    with contextlib.suppress(Stopped):
        train(model, Repeating(), config, checkpoint=path, together=together, on_step=stop)
    return None


def train_in_every_way(rank: int, folder: Path) -> None:
    """Losses equal those of one process, also if a run begins in two processes and continues in one, or vice versa."""
    plan = ["softmax", "gated_linear"]
    config = TrainConfig(steps=6, batch_size=3, learning_rate=1e-2, checkpoint_every=2, measure_memory=False)

    def fresh(**options):
        torch.manual_seed(0)
        return LanguageModel(LanguageModelConfig(7, dim=16, plan=plan, num_heads=2, **options)).double()

    def losses(history):
        assert history.finished
        return torch.tensor([(point.loss, point.gradient_norm) for point in history.curve], dtype=torch.float64)

    alone = fresh()
    expected = losses(train(alone, Repeating(), config))
    for way in WAYS:
        own = folder / f"{way}-{rank}"  # runs of a single process
        shared = folder / way
        whole = fresh()
        close(losses(run_together(way, folder / f"{way}-whole", whole, config)), expected, 1e-10)
        for name, tensor in distinct_tensors(whole).items():
            close(tensor, alone.state_dict()[name], 1e-9)
        run_together(way, shared, fresh(), config, stopped=True)
        dist.barrier()
        own.mkdir()
        shutil.copy(shared / "run.safetensors", own)
        close(losses(run_together("", own, fresh(), config)), expected, 1e-10)
        begun = folder / f"{way}-begun-alone"
        if rank == 0:
            run_together("", begun, fresh(), config, stopped=True)
        dist.barrier()
        close(losses(run_together(way, begun, fresh(), config)), expected, 1e-10)
    normed = torch.nn.Sequential(torch.nn.BatchNorm1d(3))
    refused("batch norms", train_together, "ddp", normed)
    refused(
        "an item or more for each",
        train,
        fresh(),
        Repeating(),
        replace(config, batch_size=1),
        together=train_together("ddp", fresh()),
    )
    refused("without exits", train_together, "context", fresh(stack={"exits": (1,)}))
    refused("left out by chance", train_together, "fsdp", fresh(stack={"stochastic_depth": 0.1}))
    refused("try ddp", train_together, "ddpp", fresh())


def train_a_folder(rank: int, folder: Path) -> None:
    """Train a `regard train` folder with sharding: only the first rank writes, and the last weights are not the best."""
    settings = CompareSettings(
        ("softmax",), Budget.parse("24 steps"), seeds=1, frames=("bare",), dim=16, layers=1, heads=2, rates=(3e-2,)
    )
    settings = replace(settings, batch_tokens=64, lengths=(12,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regard.workbench.comparison.planning.CALIBRATION_SECONDS", 0.4)
        patch.setattr("regard.workbench.comparison.work.LEAST_SECONDS", 0.02)
        found = train_model(Repeating(), settings, folder / "sharded", best_of=4, parallel="fsdp")
        expected = train_model(Repeating(), settings, folder / f"alone-{rank}", best_of=4)
    assert found.record["score"] == pytest.approx(expected.record["score"], abs=1e-5)
    assert found.record["loss"] == pytest.approx(expected.record["loss"], rel=1e-5)
    assert (
        not list((folder / "sharded").glob("*.safetensors.*"))
        and not (folder / "sharded" / "best.safetensors").exists()
    )
    one, other = (made.model().state_dict() for made in (found, expected))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


def measure(rank: int) -> None:
    for work in (Attention(37, heads=2, head_dim=8), Training(length=32, dim=16, layers=1, heads=2)):
        found = compare_ranks(work, seconds=0.0)
        assert found["memory"] > 0 and found["together"]["repeats"] >= 3
        assert found["error"] < 1e-5 and (found["speedup"] is not None) == (rank == 0)


def both(rank: int, ranks: int, folder: Path) -> None:
    join(rank, ranks, str(folder / "store"))
    try:
        compare_attention(rank, ranks)
        compare_recurrence(rank, ranks)
        compare_training()
        measure(rank)
        train_in_every_way(rank, folder)
        train_a_folder(rank, folder)
    finally:
        dist.destroy_process_group()
