"""Distillation: copied weights, learning rates of the parts, and the parts of the loss."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import regard
from regard.contract import Context, Mask, Unsupported
from regard.models import LanguageModel, LanguageModelConfig
from regard.training import DistillationWeights, begin_as, distillation_groups, distillation_loss


def model(name="softmax", layers=2, dim=16, **options):
    config = LanguageModelConfig(vocab_size=11, dim=dim, plan=[(name, options)] * layers, num_heads=2)
    return LanguageModel(config).double()


def student(**options):
    return model("sea", **{"estimate_length": 16, "top_k": 2, "jitter": 0.0, **options})


def ids(batch=2):
    return torch.randint(11, (batch, 14))


def test_a_student_that_reads_every_key_begins_as_its_teacher():
    teacher, own = model(), student(top_k=14)
    report = begin_as(own, teacher)
    assert set(report.copied) == {name for name, _ in teacher.named_parameters()}
    assert report.new
    assert all(".projection." in name for name in report.new)
    with torch.no_grad():
        for block in own.blocks:
            block.mixer.projection.gates.weight.zero_()
            block.mixer.projection.gates.bias.fill_(60.0)
    tokens = ids()
    torch.testing.assert_close(own(tokens).output, teacher(tokens).output, rtol=0, atol=1e-11)
    loss = distillation_loss(own, teacher, tokens, weights=DistillationWeights(task=0.0, layers=0.0))
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)


def test_a_teacher_that_does_not_fit_is_refused():
    shared = LanguageModel(dataclasses.replace(model().config, stack={"share": "all"})).double()
    for call, message in (
        (lambda: begin_as(model(layers=1), model(layers=2)), "where the student has none"),
        (lambda: begin_as(model(dim=32), model()), "shape"),
        (lambda: distillation_loss(student(), torch.nn.Linear(2, 2), ids()), "between layers of a Linear"),
        (lambda: distillation_loss(student(), model("linear"), ids()), "linear with weights"),
        (lambda: distillation_loss(student(layers=1), model(), ids()), "student of 1"),
        (lambda: distillation_loss(student(), shared, ids()), "share='all'"),
    ):
        with pytest.raises(Unsupported, match=message):
            call()


def test_new_parameters_learn_faster():
    own = student()
    report = begin_as(own, model())
    groups = distillation_groups(own, report.new, learning_rate=1e-4, weight_decay=0.1)
    assert sum(len(group["params"]) for group in groups) == len(list(own.parameters()))
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in own.named_parameters():
        assert rate[id(parameter)] == pytest.approx(1e-3 if ".projection." in name else 1e-4)
        assert (decay[id(parameter)] > 0) == (parameter.ndim >= 2 and not name.endswith("projection.positions"))


def begun(**options):
    """A teacher, a student initialised from it, and tokens."""
    teacher, own = model(), student(**options)
    begin_as(own, teacher)
    return teacher, own, ids()


def test_the_parts_add_up_and_the_teacher_learns_nothing():
    teacher, own, tokens = begun()

    def loss(*weights):
        return distillation_loss(own, teacher, tokens, weights=DistillationWeights(*weights))

    parts = task, _, kl, _ = [loss(*row) for row in torch.eye(4).tolist()]
    logits, expected = (m(tokens).output.log_softmax(-1)[:, :-1] for m in (own, teacher))
    torch.testing.assert_close(task, F.nll_loss(logits.flatten(0, 1), tokens[:, 1:].flatten()), rtol=0, atol=1e-12)
    divergence = F.kl_div(logits, expected, log_target=True, reduction="sum") / expected[..., 0].numel()
    torch.testing.assert_close(kl, divergence, rtol=0, atol=1e-12)
    together = 0.5 * parts[0] + 2 * parts[1] + 3 * parts[2] + 4 * parts[3]
    torch.testing.assert_close(loss(0.5, 2.0, 3.0, 4.0), together, rtol=1e-12, atol=0)
    assert all(float(part.detach()) > 0 for part in parts)
    together.backward()
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    assert any(p.grad.any() for p in own.parameters() if p.grad is not None)


def test_each_layer_learns_from_its_own_teacher():
    teacher, own, tokens = begun()
    weights = teacher(tokens, context=Context(want=frozenset({"weights"}))).extras["weights"]
    only_layers = DistillationWeights(task=0.0, hidden=0.0, logits=0.0, layers=1.0)
    assert float(distillation_loss(own, teacher, tokens, weights=only_layers).detach()) > 0
    block = own.blocks[0]
    x = block.mixer_norm(own.embedding(tokens))
    first, second = (
        float(block.mixer(x, context=Context(teacher={"weights": w})).losses["distillation"][0].detach())
        for w in weights[:2]
    )
    assert not math.isclose(first, second)
    assert block.mixer(x).losses.keys() == {"distillation"}, "the hooks are gone: it is its own teacher again"


def test_padding_has_no_part_in_it():
    teacher, own, tokens = begun()
    mask = Mask(valid=torch.arange(20).expand(2, -1) >= 6)
    padded = F.pad(tokens, (6, 0), value=3)
    for weights in (DistillationWeights(), DistillationWeights(0.0, 1.0, 0.0, 0.0)):
        found = distillation_loss(own, teacher, padded, context=Context(mask=mask), weights=weights)
        torch.testing.assert_close(found, distillation_loss(own, teacher, tokens, weights=weights), rtol=1e-11, atol=0)


class TestTransformers:
    """Students that are swapped transformers models."""

    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("transformers")
        pytest.importorskip("regard.integrations.transformers")

    @staticmethod
    def llama(**options):
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=2, **options)
        return transformers.LlamaForCausalLM(config).double()

    def pair(self, mechanism="sea", **options):
        teacher = self.llama(attn_implementation="regard:softmax")
        own = self.llama()
        if mechanism == "sea":
            options = {"estimate_length": 16, "top_k": 2, "jitter": 0.0, **options}
        regard.swap(own, mechanism, **options)
        report = begin_as(own, teacher)
        assert all(".regard." in name for name in report.new)
        return own, teacher

    def test_a_student_that_reads_every_key_loses_nothing(self):
        own, teacher = self.pair("local", window=14)
        loss = distillation_loss(own, teacher, ids(), weights=DistillationWeights(task=0.0, layers=0.0))
        assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)

    def test_the_map_learns_from_the_teacher_s_weights_alone(self):
        own, teacher = self.pair()
        only_layers = DistillationWeights(task=0.0, hidden=0.0, logits=0.0)
        tokens, optimizer = ids(), torch.optim.Adam(own.parameters(), 1e-2)
        found = []
        for _ in range(8):
            loss = distillation_loss(own, teacher, tokens, weights=only_layers)
            optimizer.zero_grad()
            loss.backward()
            gradients = {name for name, p in own.named_parameters() if p.grad is not None and p.grad.any()}
            optimizer.step()
            found.append(float(loss.detach()))
        assert found[-1] < found[0]
        assert any(".regard.projection.map." in name for name in gradients)
        assert not teacher.training or all(p.grad is None for p in teacher.parameters())

    def test_padding_changes_nothing(self):
        own, teacher = self.pair()
        tokens, garbage = ids(), ids()
        mask = torch.zeros(2, 28, dtype=torch.bool)
        mask[0, 3:17] = True
        mask[1, 14:] = True
        padded = torch.cat([garbage, garbage], 1)
        padded[0, 3:17], padded[1, 14:] = tokens
        own.eval()
        found = distillation_loss(own, teacher, padded, context=Context(mask=Mask(valid=mask)))
        torch.testing.assert_close(found, distillation_loss(own, teacher, tokens), rtol=1e-6, atol=0)

    def test_what_does_not_fit_is_refused_with_what_would(self):
        own, teacher = self.pair()
        plain = self.llama()
        with pytest.raises(Unsupported, match=r'set_attn_implementation\("regard:softmax"\)'):
            distillation_loss(own, plain, ids())
        with pytest.raises(Unsupported, match="has its own attention"):
            distillation_loss(plain, teacher, ids())
        with pytest.raises(Unsupported, match="between layers of a Llama"):
            distillation_loss(own, model(), ids())
        with pytest.raises(Unsupported, match="a context with grid"):
            distillation_loss(own, teacher, ids(), context=Context(grid=(2, 7)))
        with pytest.raises(Unsupported, match="gives no logits"):
            distillation_loss(own.model, teacher.model, ids(), targets=ids())
        with pytest.raises(Unsupported, match="predicts no next token, without targets"):
            distillation_loss(own.model, teacher.model, ids())
