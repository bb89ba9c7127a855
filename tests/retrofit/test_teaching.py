"""In both stages of a retrofit, a mechanism with a loss from a teacher's attention learns from the original's."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from kills import undisturbed_and_killed
from small_encoders import bert
from small_llama import SIZES, WORK, llama, tokens

from regard.integrations import collect_losses
from regard.retrofit import hosts, transfer, tune
from regard.retrofit.teaching import original_attention, with_attention_of

transformers = pytest.importorskip("transformers")
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv  # noqa: E402

SEA = "sea:top_k=3,estimate_length=8,length=64,jitter=0,redraw_every=0"
CLOSE = {"rtol": 2e-6, "atol": 1e-8}  # eager attention takes its softmax in float32


def gpt2():
    sizes = {"vocab_size": SIZES["vocab_size"], "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


KINDS = {
    "llama": (lambda: llama(2), "model.layers.{}.self_attn.o_proj"),
    "gpt2": (gpt2, "transformer.h.{}.attn.c_proj"),
    "bert": (bert, "bert.encoder.layer.{}.attention.output.dense"),
}


@torch.no_grad()
def eagerly(model, after_heads, ids):
    """Weights (B, H, N, N) of each layer of a model, and the outputs of its heads (B, H, N, V)."""
    model.set_attn_implementation("eager")
    heads, hooks = [], []
    for number in range(model.config.num_hidden_layers):
        part = model.get_submodule(after_heads.format(number))
        hooks.append(part.register_forward_pre_hook(lambda _, given: heads.append(given[0])))
    maps = model(ids, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    return maps, [x.unflatten(-1, (4, -1)).transpose(1, 2) for x in heads]


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_teaches_its_weights_and_heads_in_the_call_of_a_layer_and_of_all(kind):
    make, after_heads = KINDS[kind]
    model, ids = make().double(), torch.randint(5, 40, (2, 9))
    host, found = hosts.open_host(model), {}
    teaches = {layer.number: original_attention(host, layer.number) for layer in host.layers}
    for number in teaches:
        host.attention(number).register_forward_hook(
            lambda _, args, given, output, n=number: found.update({n: teaches[n](args, given)}), with_kwargs=True
        )
    with torch.no_grad():
        host.body(ids)
    answers, some = with_attention_of(host, [1], lambda: host.by_regard(ids).logits)
    torch.testing.assert_close(answers, model(ids).logits)
    assert set(found) == {0, 1} and set(some) == {1}
    maps, heads = eagerly(model, after_heads, ids)
    for number, its in (*found.items(), *some.items()):
        torch.testing.assert_close(its["weights"], maps[number], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(its["output"], heads[number], rtol=1e-5, atol=1e-6)


def definition(weights, heads, q, k, estimate, output):
    """The loss of a causal layer: spec 21, section 2f."""
    n, pixels = q.shape[2], estimate.shape[3]
    t, j = torch.arange(n)[:, None], torch.arange(n)
    pixel = ((j + 0.5) / (t + 1) * pixels - 1e-4).floor().long().clamp(0, pixels - 1)
    loss = (output - heads).square().mean()
    for scores in (estimate.gather(-1, pixel.expand(*estimate.shape[:3], n)), q @ k.mT * q.shape[3] ** -0.5):
        told = scores.masked_fill(j > t, -torch.inf).log_softmax(-1)
        kl = (weights * (weights.log() - told)).masked_fill((j > t) | (weights == 0), 0)
        loss = loss + 0.1 * kl.sum(-1).mean() + (weights - told.exp()).square().mean()
    return loss


class Student:
    """A Llama with sea in some layers, with queries unlike the original's, and a record of its calls."""

    def __init__(self, monkeypatch, stage, numbers):
        self.host = hosts.open_host(llama(3).double())
        self.model, _ = self.host.copy_with(numbers, SEA, 0)
        self.model.train()
        self.paths = {n: self.host.layers[n].path for n in numbers}
        self.modules = {n: self.model.get_submodule(path) for n, path in self.paths.items()}
        self.calls, self.collected = {n: [] for n in numbers}, []
        for number, module in self.modules.items():
            with torch.no_grad():
                module.q_proj.weight.add_(torch.randn_like(module.q_proj.weight) / 5)
            calls = self.calls[number]
            module.register_forward_pre_hook(self._keep_tokens(calls), with_kwargs=True)
            module.regard.projection.register_forward_hook(self._keep_estimate(calls))
            module.o_proj.register_forward_pre_hook(
                lambda _, given, calls=calls: calls[-1].update(output=given[0].unflatten(-1, (4, -1)).transpose(1, 2))
            )

        @contextmanager
        def collecting(*args, **options):
            with collect_losses(*args, **options) as collected:
                self.collected.append(collected)
                yield collected

        monkeypatch.setattr(stage, "collect_losses", collecting)

    @staticmethod
    def _keep_tokens(calls):
        return lambda _, args, given: calls.append({"x": given["hidden_states"]})

    @staticmethod
    def _keep_estimate(calls):
        def keep(_, args, made):
            calls[-1]["estimate"] = made[0]["estimate"]
            made[0]["estimate"].retain_grad()

        return keep

    def expected(self, number, call, maps, heads):
        """The loss of a call, and its gradient for the estimated map."""
        module, x, estimate = self.modules[number], call["x"].detach(), call["estimate"].detach().requires_grad_()
        q, k = (part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (module.q_proj, module.k_proj))
        q, k = apply_rotary_pos_emb(q, k, *self.host.model.model.rotary_emb(x, torch.arange(x.shape[1])[None]))
        loss = definition(maps[number], heads[number], q, repeat_kv(k, 2), estimate, call["output"].detach())
        return loss.detach(), torch.autograd.grad(loss, estimate)[0]

    def learns_everywhere(self):
        """Whether all parts of the estimators have gradients."""
        parts = [p for module in self.modules.values() for p in module.regard.projection.parameters()]
        return all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parts)


def test_in_the_transfer_a_layer_learns_from_the_weights_and_heads_of_the_old_one(monkeypatch):
    student, ids = Student(monkeypatch, transfer, [0, 2]), tokens(40).view(2, 20)
    transfer.transfer_losses(student.host, student.modules, ids)
    taught = eagerly(student.host.model, KINDS["llama"][1], ids)
    for collected, (number, (call,)) in zip(student.collected, student.calls.items(), strict=True):
        loss, slope = student.expected(number, call, *taught)
        torch.testing.assert_close(collected.total(transfer.LOSS_WEIGHTS).detach(), loss, **CLOSE)
        torch.testing.assert_close(call["estimate"].grad, slope, **CLOSE)
    assert student.learns_everywhere()


@pytest.mark.parametrize("distil", [0.0, 1.0])
def test_in_the_last_stage_the_model_learns_from_the_weights_and_heads_of_its_new_layers_alone(monkeypatch, distil):
    student, ids = Student(monkeypatch, tune, [0, 2]), tokens(40).view(2, 20)
    tune.tune_losses(student.host, student.model, hosts.Batch(ids), distil)
    maps, heads = eagerly(student.host.model, KINDS["llama"][1], ids)
    for row, collected in enumerate(student.collected):
        assert set(collected.teachers) == set(student.paths.values())
        losses = []
        for number, calls in student.calls.items():
            its = [[x[row : row + 1] for x in told] for told in (maps, heads)]
            loss, slope = student.expected(number, calls[row], *its)
            torch.testing.assert_close(calls[row]["estimate"].grad, slope / 4, **CLOSE)  # two layers, two rows
            losses.append(loss)
        torch.testing.assert_close(collected.total(transfer.LOSS_WEIGHTS).detach(), sum(losses) / 2, **CLOSE)
    assert len(student.collected) == 2 and student.learns_everywhere()


def test_for_other_mechanisms_the_original_runs_as_it_is():
    host, ids = hosts.open_host(llama(2)), tokens(40).view(2, 20)
    student, _ = host.copy_with([0, 1], "linear", 0)
    transfer.transfer_losses(host, {0: student.get_submodule(host.layers[0].path)}, ids)
    tune.tune_losses(host, student, hosts.Batch(ids), 1.0)
    assert "by_regard" not in vars(host)


def test_killed_at_any_stage_and_resumed_it_equals_one_that_was_not(tmp_path, monkeypatch):
    settings = {"keep_layers": "auto:1", "data": tokens(), "budget": "54 steps", **WORK}
    undisturbed_and_killed(monkeypatch, tmp_path, llama(2, loud=(1,)), "sea:top_k=3,estimate_length=8", **settings)
