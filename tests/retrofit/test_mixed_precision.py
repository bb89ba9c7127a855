"""Retrofits that train in mixed precision: products in bfloat16, and everything else as before."""

from __future__ import annotations

import pytest
import torch
from command_line import run
from kills import undisturbed_and_killed
from small_encoders import bert
from small_llama import WORK, llama, tokens
from torch.utils._python_dispatch import TorchDispatchMode

from regard.contract import Unsupported
from regard.retrofit import hosts, retrofit, transfer, tune
from regard.retrofit.sensitivity import DECIDES
from regard.retrofit.settings import RetrofitSettings
from regard.retrofit.tune import held_out_loss

PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm}


class Products(TorchDispatchMode):
    """Records the dtypes in which matrix products are computed."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function.overloadpacket in PRODUCTS:
            self.dtypes.add(made.dtype)
        return made


def host_and_student(make, mechanism):
    host = hosts.open_host(make())
    student, _ = host.copy_with([0, 1], mechanism, 0)
    return host, student, {n: student.get_submodule(host.layers[n].path) for n in (0, 1)}


@pytest.mark.parametrize("mechanism", ["gated_linear", "sea:top_k=3,estimate_length=8,length=64", "local:window=4"])
def test_products_of_both_stages_are_narrow_and_gradients_are_not(mechanism):
    host, student, modules = host_and_student(lambda: llama(2), mechanism)
    batch = hosts.Batch(tokens(32).view(2, 16))
    student.train()
    for step in (
        lambda: transfer.transfer_losses(host, modules, batch.inputs, precision="bfloat16"),
        lambda: tune.tune_losses(host, student, batch, 1.0, precision="bfloat16"),
    ):
        with Products() as seen:
            step()
        assert torch.bfloat16 in seen.dtypes
        gradients = [p.grad for p in student.parameters() if p.grad is not None]
        assert gradients and {g.dtype for g in gradients} == {torch.float32}
        student.zero_grad()


@pytest.mark.parametrize("make", [lambda: llama(2), lambda: bert("BertModel")], ids=["llama", "bert"])
def test_losses_and_gradients_are_those_of_float32_up_to_rounding(make):
    host, student, modules = host_and_student(make, "linear")
    batch = host.begun(RetrofitSettings("linear", keep_layers="none", **WORK))
    data = host.read(tokens() % 40, None, batch)
    part = host.batch(data, 0, 0, batch)
    for step in (
        lambda **how: transfer.transfer_losses(host, modules, part.inputs, **how),
        lambda **how: tune.tune_losses(host, student, part, 1.0, **how),
    ):
        told = []
        for precision in ("float32", "bfloat16"):
            losses = step(precision=precision)
            told.append((torch.tensor(losses), torch.cat([p.grad.flatten() for p in modules[0].parameters()])))
            student.zero_grad()
        (loss, gradient), (narrow, rounded) = told
        assert not torch.equal(loss, narrow)
        torch.testing.assert_close(narrow, loss, rtol=0.05, atol=1e-3)
        assert torch.cosine_similarity(gradient, rounded, 0) > 0.99


def test_held_out_data_are_read_in_the_weights_own_dtype_while_training_is_narrow(tmp_path, monkeypatch):
    seen = Products()
    read = held_out_loss

    def watched(*args):
        with seen:
            return read(*args)

    monkeypatch.setattr("regard.retrofit.run.held_out_loss", watched)
    retrofit(
        llama(2),
        "gated_linear",
        data=tokens(),
        output=tmp_path / "made",
        keep_layers="none",
        budget="28 steps",
        precision="bfloat16",
        **WORK,
    )
    assert seen.dtypes == {torch.float32}


def test_killed_at_any_stage_and_resumed_it_equals_one_that_was_not(tmp_path, monkeypatch):
    settings = {"keep_layers": "auto:1", "data": tokens(), "budget": "54 steps", "precision": "bfloat16", **WORK}
    whole, again = undisturbed_and_killed(monkeypatch, tmp_path, llama(2), "gated_linear", **settings)
    assert again.record["settings"]["precision"] == whole.record["settings"]["precision"] == "bfloat16"
    assert {p.dtype for p in again.model.parameters()} == {torch.float32}
    assert "matrix products in bfloat16" in (tmp_path / "whole" / "README.md").read_text()


def test_only_another_precision_than_float32_is_part_of_a_folders_identity():
    host = hosts.open_host(llama(2))
    usual, given, narrow = (
        host.begun(RetrofitSettings("linear", **WORK, **how)).identity()
        for how in ({}, {"precision": "float32"}, {"precision": "bfloat16"})
    )
    assert usual == given and "precision" not in usual and narrow == {**usual, "precision": "bfloat16"}
    assert "precision" in DECIDES


def test_a_precision_that_would_need_a_scaled_loss_is_refused():
    with pytest.raises(Unsupported, match="precision='float16'; supported: float32, bfloat16"):
        RetrofitSettings("linear", precision="float16")


def test_the_commands_pass_it_on(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("words " * 500)
    llama(2).save_pretrained(tmp_path / "model")
    how = f"{tmp_path}/text.txt --output {tmp_path}/out --precision half"
    for command in ("retrofit {0} --mechanism linear --data", "compare --from {0} --mechanisms linear"):
        code, _, problem = run(capsys, f"{command.format(tmp_path / 'model')} {how}")
        assert code == 2 and "precision='half'; supported: float32, bfloat16" in " ".join(problem.split())
