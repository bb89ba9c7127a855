"""Layers dropped in training, and learned gates."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import close, load, refused
from test_cuts import NARROW, batch, bert, distilbert, encoder, gpt2, language_model, llama, open_gpt2, output
from torch.nn import functional as F

import regard
from regard.compression.folders import load_compressed
from regard.compression.pruning.anatomy import Cut, find_host
from regard.compression.pruning.gates import LearnedGates, chance_to_stay, final_gates, learn_gates, sample_gates
from regard.compression.pruning.layer_drop import even_layers, layer_drop
from regard.compression.pruning.masks import masked, stream_gated
from regard.models import LanguageModel
from regard.tasks.protocol import Batch


@pytest.mark.parametrize("make", [language_model, llama, bert])
def test_layers_are_left_out_of_training_calls_alone_as_often_as_asked(make):
    model, ids = make(), batch()
    host = find_host(model)
    before = output(model, ids)
    calls = [0] * 4
    for i, layer in enumerate(host.layers):
        next(layer.module.children()).register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    with layer_drop(host, 0.3):
        close(output(model, ids), before, 0.0)
        calls[:] = [0] * 4
        model.train()
        for _ in range(40):
            model(ids[:1, :2])
        model.eval()
    assert 85 < sum(calls) < 140, "of 160 calls 112 on average"
    close(output(model, ids), before, 0.0)


def test_a_call_without_a_layer_is_the_model_without_it():
    draws = iter([0.1, 0.1, 0.1, 0.9] * 3)
    for model in (language_model(), llama(), bert()):
        ids, host = batch(), find_host(model)
        with masked(host, [Cut(layer=True)] * 3 + [Cut()]):
            expected = output(model, ids)
        with pytest.MonkeyPatch.context() as patch, layer_drop(host, 0.5):
            for layer in host.layers:
                layer.module.training = True
            patch.setattr(torch, "rand", lambda *_, **__: torch.tensor(next(draws)))
            close(output(model, ids), expected)


def test_the_same_draws_leave_out_the_layers_that_fairseq_leaves_out():
    found = load("compression_layer_drop")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 6, "num_attention_heads": 2}
    model: Any = transformers.BertModel(transformers.BertConfig(vocab_size=9, **sizes)).train()
    ran: list[int] = []
    for i, layer in enumerate(model.encoder.layer):
        layer.attention.register_forward_hook(lambda *_, i=i: ran.append(i))
    with layer_drop(find_host(model), 0.35), pytest.MonkeyPatch.context() as patch:
        for draws, kept in zip(found["draws"], found["kept"], strict=True):
            left = iter(draws)
            patch.setattr(torch, "rand", lambda *_, left=left, **__: next(left))
            ran.clear()
            model(torch.zeros(1, 2, dtype=torch.int64))
            assert ran == kept.nonzero()[:, 0].tolist()


def test_layers_at_even_distances_go_without_data():
    assert even_layers(6, 3) == [1, 3, 5] and even_layers(12, 3) == [2, 6, 10]
    for count in range(1, 15):
        for gone in range(count):
            found = even_layers(count, gone)
            assert len(set(found)) == gone and all(0 < i < count for i in found)
    model = language_model().float()
    first, third = model.blocks[0], model.blocks[2]
    regard.compress(model, "structured:layers=2,layers_by=even")
    assert list(model.blocks) == [first, third]
    refused("layers=4 of 4", even_layers, 4, 4)
    refused("probability", layer_drop(find_host(model), 1.0).__enter__)


def test_the_chance_that_a_gate_stays_is_that_of_its_draws():
    generator = torch.Generator().manual_seed(3)
    for alpha in (-3.0, -0.5, 0.0, 1.0, 3.0):
        log_alpha = torch.full((40_000,), alpha, dtype=torch.float64)
        drawn = sample_gates(log_alpha, generator)
        chance = float(chance_to_stay(log_alpha)[0])
        error = 4 * (chance * (1 - chance) / 40_000) ** 0.5
        assert abs(float((drawn > 0).double().mean()) - chance) < error
        assert float(drawn.min()) >= 0 and float(drawn.max()) <= 1
    ends = final_gates(torch.tensor([-5.0, 0.0, 5.0]))
    assert ends.tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("make", [encoder, llama, bert, open_gpt2, distilbert])
def test_finished_gates_leave_the_model_that_had_them(make):
    model, ids = make(), batch()
    before = output(model, ids)
    gates = LearnedGates(find_host(model)).double().eval()
    with torch.no_grad():
        for name, alpha in gates.log_alpha.items():
            alpha.copy_(torch.randn(alpha.shape) * 2.5 if name != "1 attention" else torch.tensor(-9.0))
        gates.log_alpha["0 attention"].fill_(0.3)
    with gates.applied():
        expected = output(model, ids)
    undo = gates.finish()
    close(output(model, ids), expected)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in make().parameters())
    undo()
    close(output(model, ids), before)


@pytest.mark.parametrize("name", NARROW)
def test_finished_gates_of_the_stream_leave_the_model_that_had_them(name):
    model, ids = NARROW[name](), batch()
    before, numbers = output(model, ids), sum(p.numel() for p in model.parameters())
    gates = LearnedGates(find_host(model), hidden=True).double().eval()
    with torch.no_grad():
        for alpha in gates.log_alpha.values():
            alpha.copy_(torch.randn(alpha.shape) * 2)
        gates.log_alpha["hidden"][torch.randperm(16)[:6]] = torch.tensor([-9.0, -9.0, -9.0, 0.3, -0.5, 9.0]).double()
    assert len(gates.closed()) >= 3
    with gates.applied():
        expected = output(model, ids)
    close(output(model, ids), before, 0.0)
    undo = gates.finish()
    close(output(model, ids), expected)
    assert sum(p.numel() for p in model.parameters()) < 0.9 * numbers
    undo()
    close(output(model, ids), before, 0.0)
    assert sum(p.numel() for p in model.parameters()) == numbers


def test_branches_without_a_last_projection_have_no_gates_and_the_rest_is_cut():
    model, ids = language_model(plan=["mamba2", ("softmax", {"learn_sink": True}), "softmax", "mamba2"]), batch()
    gates = LearnedGates(find_host(model)).double().eval()
    assert {name for name in gates.log_alpha if "attention" in name} == {"1 attention", "2 attention"}
    assert [name for name in gates.log_alpha if "heads" in name] == ["2 heads"]
    with torch.no_grad():
        for alpha in gates.log_alpha.values():
            alpha.copy_(torch.randn(alpha.shape) * 2)
        gates.log_alpha["1 attention"].fill_(0.3)
    with gates.applied():
        expected = output(model, ids)
    gates.finish()
    close(output(model, ids), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "opt", "learned positions"])
def test_gates_multiply_the_sum_that_the_stream_starts_with(name):
    model, ids, factors = NARROW[name](), batch(), torch.rand(16, dtype=torch.float64)
    host, seen = find_host(model), list[torch.Tensor]()
    host.layers[0].module.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    model(ids)
    with stream_gated(host, factors):
        model(ids)
    close(seen[1], seen[0] * factors)


@pytest.mark.parametrize("make", [llama, bert])
def test_norms_under_gates_are_over_the_dimensions_that_are_open(make):
    host = find_host(make())
    norm: Any = host.stream().norms[0]
    x, factors = torch.randn(3, 16, dtype=torch.float64), torch.rand(16, dtype=torch.float64) + 0.1
    factors[:5] = 0.0
    with stream_gated(host, factors):
        found = norm(x).detach()
    if make is bert:
        expected = F.layer_norm(x[:, 5:], (11,), norm.weight[5:], norm.bias[5:], norm.eps)
    else:
        expected = F.rms_norm(x[:, 5:], (11,), norm.weight[5:], norm.variance_epsilon)
    close(found[:, 5:], (expected * factors[5:]).detach(), 1e-6)  # Llama's norm computes in float32
    assert not bool(found[:, :5].any())


def test_gates_of_the_stream_and_the_weights_under_them_have_gradients():
    for model in (language_model(), llama(), bert()):
        gates = LearnedGates(find_host(model), hidden=True).double()
        with gates.applied(torch.Generator().manual_seed(1)):
            found = model(batch())
            (found.output if isinstance(model, LanguageModel) else found.logits).square().sum().backward()
        assert bool(gates.log_alpha["hidden"].grad.any())
        assert all(bool(norm.weight.grad.any()) for norm in gates.host.stream().norms)


def test_gates_of_the_stream_are_learned_and_refused_before_anything_is_done():
    pytest.importorskip("transformers")
    model: Any = encoder(num_layers=1, dim=8).float()
    ids = torch.randint(30, (16, 7))
    data = Batch(ids, model(ids).output.argmax(-1))
    gates = learn_gates(find_host(model), lambda step: data, 0.5, 150, hidden=True)
    assert float(gates.expected_share().detach()) == pytest.approx(0.5, abs=0.1)
    refused(
        "sinusoidal", learn_gates, find_host(encoder(positions="sinusoidal")), lambda step: data, 0.5, 1, hidden=True
    )
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    other = llama().float()
    other.model.norm = GemmaRMSNorm(16)
    refused("under a GemmaRMSNorm", LearnedGates, find_host(other), hidden=True)


@pytest.mark.parametrize("name", ["tied", "llama", "bert", "gpt2", "distilbert"])
def test_a_recipe_of_gates_writes_a_smaller_model_that_loads_and_can_be_undone(name, tmp_path):
    model = (gpt2 if name == "gpt2" else NARROW[name])().float()
    ids, numbers = torch.randint(30, (8, 7)), sum(p.numel() for p in model.parameters())
    data: Any = [ids, ids.flip(0)]
    if name in ("bert", "distilbert"):
        data = [{"input_ids": ids, "labels": torch.randint(3, (8,))}]
    before, recipe = output(model, ids), "gates:share=0.4,steps=12,learning_rate=0.9,hidden=true"
    regard.compress(model, recipe, data).undo()
    close(output(model, ids), before, 0.0)
    small = regard.compress(model, recipe, data)
    assert sum(p.numel() for p in model.parameters()) < numbers
    left = next(int(note.split()[4]) for note in small.report.notes if "the residual stream has" in note)
    assert {m.embedding_dim for m in model.modules() if isinstance(m, torch.nn.Embedding)} <= {left, 5} and left < 16
    small.save(tmp_path)
    close(output(load_compressed(tmp_path), ids), output(model, ids), 1e-5)


def test_a_recipe_of_gates_that_cannot_be_done_is_refused():
    model = language_model(positions="sinusoidal").float()
    data = [torch.randint(30, (2, 7))]
    refused("sinusoidal", regard.compress, model, "gates:hidden=true", data)
    refused("without data", regard.compress, model, "gates")
    refused("layers to keep", regard.compress, model, "gates", data, keep=lambda name, module: name == "blocks.1")
    for options in ("share=0", "share=1", "steps=0", "learning_rate=0"):
        refused(options, regard.compress, model, f"gates:{options}", data)


@pytest.mark.parametrize("hidden", [False, True])
def test_the_expected_share_is_that_of_the_parameters_that_are_left(hidden):
    model = encoder()
    gates = LearnedGates(find_host(model), hidden=hidden)
    with torch.no_grad():
        for name, alpha in gates.log_alpha.items():
            alpha.fill_(40.0)
            if name.endswith(("heads", "neurons", "hidden")):
                alpha[: len(alpha) // 4] = -40.0
        gates.log_alpha["2 feed_forward"].fill_(-40.0)
    host = find_host(model)
    whole = sum(layer.parameters(branch) for layer in host.layers for branch in layer.branches)
    host.compact(gates.cuts(), gates.closed())
    left = find_host(model).layers
    found = sum(layer.parameters(branch) for layer in left for branch in layer.branches)
    assert float(gates.expected_share().detach()) == pytest.approx(found / whole, abs=1e-6)


def test_gates_are_learned_until_the_share_that_was_asked_for_stays():
    model: Any = encoder(num_layers=2).float()
    ids = torch.randint(30, (32, 11))
    data = Batch(ids, model(ids).output.argmax(-1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shares: list[float] = []
    gates = learn_gates(
        find_host(model), lambda step: data, 0.6, 250, on_step=lambda step, found: shares.append(found.share)
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert shares[0] > 0.9 and float(gates.expected_share().detach()) == pytest.approx(0.6, abs=0.1)

    def loss() -> float:
        with torch.no_grad(), gates.applied():
            return float(F.cross_entropy(model(ids).output, data.targets))

    learned, elsewhere = loss(), []
    for _ in range(5):
        with torch.no_grad():
            for alpha in gates.log_alpha.values():
                alpha.copy_(alpha[torch.randperm(len(alpha))] if alpha.ndim else alpha)
        elsewhere.append(loss())
    assert learned < sum(elsewhere) / 5, "the same gates for other parts"
    refused("share=1", learn_gates, find_host(model), lambda step: data, 1.0, 3)
    refused("norms what a branch adds", LearnedGates, find_host(language_model(stack={"branch_norm": "all"})))


def test_gates_whose_learning_was_stopped_go_on_to_the_same_gates(tmp_path):
    start: Any = encoder(num_layers=1).float()
    ids = torch.randint(30, (4, 7))
    data = Batch(ids, start(ids).output.argmax(-1))

    def learn(on_step: Any = lambda step, found: None, **given: Any) -> tuple[Any, dict[str, torch.Tensor]]:
        model = copy.deepcopy(start)
        gates = learn_gates(
            find_host(model), lambda step: data, 0.5, 6, hidden=True, model_rate=0.01, on_step=on_step, **given
        )
        return gates, model.state_dict()

    def stop(step: int, found: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    file, seen = tmp_path / "gates.safetensors", list[int]()
    whole, weights = learn()
    with pytest.raises(KeyboardInterrupt):
        learn(stop, file=file)
    again, resumed = learn(lambda step, found: seen.append(step), file=file)
    assert seen == [4, 5]
    assert all(torch.equal(alpha, again.log_alpha[name]) for name, alpha in whole.log_alpha.items())
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in weights.items())
