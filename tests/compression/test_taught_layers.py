"""Distillation from what a teacher's layers compute: hidden states, attention weights, relations of values."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from command_line import answer, run
from support import close, refused
from torch import Tensor, nn

import regard
from regard.compression.distillation import (
    AnswerCache,
    Taught,
    attention_transfer_loss,
    feature_loss,
    patient_layers,
    patient_loss,
    read_method,
    relation_loss,
)
from regard.compression.distillation.reading import (
    KINDS,
    OF_STATES,
    SOFTMAX,
    Seen,
    first_projection,
    layer_pairs,
    layers_loss,
    reading,
)
from regard.compression.distillation.recovery import teaching_loss
from regard.compression.distillation.teaching import LOSS
from regard.compression.layers import run_batch
from regard.compression.steps import Distil
from regard.contract import Context
from regard.models import Encoder, EncoderConfig, LanguageModel, LanguageModelConfig
from regard.tasks import Batch, create_task
from regard.training import TrainConfig, train

transformers = pytest.importorskip("transformers")
VOCABULARY, HEADS = 30, 4
OF_LAYERS = [kind for kind in KINDS if kind != "response"]


def language_model(layers: int = 2, dim: int = 32, plan: Any = "softmax", **options: Any) -> LanguageModel:
    config = LanguageModelConfig(VOCABULARY, dim, plan, num_heads=HEADS, num_layers=layers, **options)
    return LanguageModel(config).double().eval()


def encoder(layers: int = 2, dim: int = 32, **options: Any) -> Encoder:
    config = EncoderConfig(3, VOCABULARY, dim=dim, num_layers=layers, num_heads=HEADS, **options)
    return Encoder(config).double().eval()


def llama(layers: int = 2, dim: int = 32) -> Any:
    sizes = {"hidden_size": dim, "intermediate_size": 40, "num_hidden_layers": layers, "num_attention_heads": HEADS}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)
    return transformers.LlamaForCausalLM(config).double().eval()


def bert(layers: int = 2, dim: int = 32, kind: str = "BertForSequenceClassification") -> Any:
    sizes = {"hidden_size": dim, "intermediate_size": 40, "num_hidden_layers": layers, "num_attention_heads": HEADS}
    config = transformers.BertConfig(vocab_size=VOCABULARY, initializer_range=0.3, **sizes)
    return getattr(transformers, kind)(config).double().eval()


MODELS = [language_model, encoder, llama, bert]


def tokens(rows: int = 3, length: int = 11) -> Tensor:
    return torch.randint(0, VOCABULARY, (rows, length))


def padded(model: nn.Module, ids: Tensor, lengths: list[int]) -> Any:
    """A batch of rows of these lengths; of a regard model with the padding before the tokens."""
    valid = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    if isinstance(model, LanguageModel | Encoder):
        targets = torch.zeros(len(ids), dtype=torch.long)
        return Batch(ids.flip(1), targets, valid=valid.flip(1))
    return {"input_ids": ids, "attention_mask": valid.long()}


def loss_on(batch: Any, kind: str, own: nn.Module, told: nn.Module) -> Tensor:
    seen = []
    for model in (own, told):
        with reading(model, kind) as layers:
            run_batch(model, batch)
        seen.append(layers)
    return torch.as_tensor(layers_loss(kind, *seen, first_projection(kind, *seen)))


@torch.no_grad()
def computed(model: Any, ids: Tensor) -> Seen:
    """What a model's layers compute, from its own outputs and the weights of its projections."""
    if isinstance(model, LanguageModel | Encoder):
        states: list[Tensor] = []
        hooks = [
            block.register_forward_hook(lambda _, __, result: states.append(result.output)) for block in model.blocks
        ]
        weights = model(ids, context=Context(want=frozenset({"weights"}))).extras["weights"]
        for hook in hooks:
            hook.remove()
        before = [model.embedding(ids), *states[:-1]]
        values = [b.mixer.value(b.mixer_norm(x)) for b, x in zip(model.blocks, before, strict=True)]
        return Seen(states, weights, [x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in values])
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    states = []
    layers = model.model.layers if hasattr(model, "model") else model.bert.encoder.layer
    for layer in layers:
        layer.register_forward_hook(lambda _, __, x: states.append(x[0] if isinstance(x, tuple) else x))
    found = model(ids, output_attentions=True, output_hidden_states=True)
    before = found.hidden_states[:-1]
    if hasattr(model, "model"):
        values = [x.self_attn.v_proj(x.input_layernorm(h)) for x, h in zip(layers, before, strict=True)]
    else:
        values = [x.attention.self.value(h) for x, h in zip(layers, before, strict=True)]
    heads = [x.unflatten(-1, (-1, model.config.hidden_size // HEADS)).transpose(1, 2) for x in values]
    return Seen(states, list(found.attentions), heads, first=hasattr(model, "bert"))


@pytest.mark.parametrize("make", MODELS)
def test_the_losses_are_those_of_what_the_models_themselves_return(make):
    """Of students of 2 layers and teachers of 4, so that layers are those of :func:`patient_layers`."""
    own, told, ids = make(2), make(4), tokens()
    ours, theirs = computed(own, ids), computed(told, ids)
    expected = {
        "features": sum(
            feature_loss(x, y) / y.square().mean() / 2 for x, y in zip(ours.hidden, theirs.hidden[1::2], strict=True)
        ),
        "attention": sum(
            attention_transfer_loss(x, y) / 2 for x, y in zip(ours.weights, theirs.weights[1::2], strict=True)
        ),
        "relation": attention_transfer_loss(ours.weights[-1], theirs.weights[-1])
        + relation_loss(ours.values[-1], theirs.values[-1]),
    }
    (number,) = patient_layers(2, 4)
    pair = [ours.hidden[0], theirs.hidden[number - 1]]
    expected["patient"] = patient_loss(*([x[:, 0] if ours.first else x.flatten(0, 1)] for x in pair))
    assert set(expected) == set(OF_LAYERS)
    for kind, loss in expected.items():
        assert float(loss) > 1e-6, kind
        close(
            loss_on(ids, kind, own, told), torch.as_tensor(loss), 1e-7
        )  # transformers' softmax and norms are in float32


def test_values_are_those_within_a_projection_to_queries_keys_and_values():
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": HEADS, "vocab_size": VOCABULARY}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).double().eval()
    neox = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes, intermediate_size=40)).double().eval()
    ids = tokens()
    for model, layers in ((gpt2, gpt2.transformer.h), (neox, neox.gpt_neox.layers)):
        with reading(model, "relation") as seen, torch.no_grad():
            found = model(ids, output_attentions=True, output_hidden_states=True)
        for layer, weights, values, before in zip(
            layers, seen.weights, seen.values, found.hidden_states[:-1], strict=True
        ):
            if model is gpt2:
                expected = layer.attn.c_attn(layer.ln_1(before))[..., 64:].unflatten(-1, (HEADS, 8))
            else:
                projected = layer.attention.query_key_value(layer.input_layernorm(before))
                expected = projected.unflatten(-1, (HEADS, 3, 8))[..., 2, :]
            close(values, expected.transpose(1, 2), 1e-9)
            assert weights.shape == (3, HEADS, 11, 11)


@pytest.mark.parametrize("kind", OF_LAYERS)
@pytest.mark.parametrize("make", MODELS)
def test_padding_changes_no_loss_whatever_stands_there(make, kind):
    own, told, ids = make(2), make(3), tokens(1).expand(2, -1)
    alone, garbage = ids[:1, :7], torch.cat([ids[:, :7], tokens(2, 4)], 1)
    if isinstance(own, LanguageModel | Encoder):
        alone = alone.flip(1)
    expected = loss_on(alone, kind, own, told)
    assert float(expected.detach()) > 1e-6
    for rows in (ids, garbage):
        close(loss_on(padded(own, rows, [7, 7]), kind, own, told), expected, 1e-6)
    ragged = [loss_on(padded(own, rows, [7, 4]), kind, own, told) for rows in (ids, garbage)]
    if kind == "features" or (make is bert and kind == "patient"):
        return  # relative to all tokens of the teacher; of one token a row
    short = ids[:1, :4].flip(1) if isinstance(own, LanguageModel | Encoder) else ids[:1, :4]
    close(ragged[0], (7 * expected + 4 * loss_on(short, kind, own, told)) / 11, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [*MODELS, *(lambda name=name: language_model(plan=name) for name in SOFTMAX[1:])])
def test_a_student_equal_to_its_teacher_has_no_loss_and_learns_nothing(make, kind):
    told = make()
    own = copy.deepcopy(told)
    loss = teaching_loss(own, told, Distil(kind=kind), tokens(), run_batch)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-9
    assert max(float(p.grad.abs().max()) for p in own.parameters() if p.grad is not None) < 1e-9
    assert all(p.grad is None for p in told.parameters())


@pytest.mark.parametrize("kind", OF_LAYERS)
@pytest.mark.parametrize("make", MODELS)
def test_training_lowers_the_loss_on_held_out_data_and_models_attend_as_before(make, kind):
    told, own = make(4).float(), make(2).float()
    data, held_out = [tokens() for _ in range(15)], tokens(8)
    before = loss_on(held_out, kind, own, told)
    recipe = f"distil:kind={kind},weight=5,steps=15,learning_rate=0.01"
    small = regard.compress(own, recipe, training=data, teacher=told)
    assert loss_on(held_out, kind, own, told) < before
    assert any(f"{kind} loss" in note for note in small.report.notes)
    for model in (own, told):
        assert getattr(model.config, "_attn_implementation", "sdpa") == "sdpa"
        assert all("mix" not in vars(module) and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", ["patient", "relation"])
@pytest.mark.parametrize("make", [language_model, llama])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(make, kind, tmp_path):
    """The teacher is wider, so that ``patient`` trains a projection next to the model."""
    told, data = make(3, 48).float(), [tokens() for _ in range(2)]
    recipe = f"distil:kind={kind},steps=6,learning_rate=0.003"
    own = make(2).float()
    start = copy.deepcopy(own.state_dict())
    small = regard.compress(own, recipe, training=data, teacher=told)
    expected = copy.deepcopy(own.state_dict())
    small.undo()
    assert any(not torch.equal(expected[name], x) for name, x in own.state_dict().items())
    seen: list[int] = []

    def stop(name: str, done: int, count: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        regard.compress(own, recipe, training=data, teacher=told, work=tmp_path, on_layer=stop)
    assert all(torch.equal(start[name], x) for name, x in own.state_dict().items())
    regard.compress(
        own, recipe, training=data, teacher=told, work=tmp_path, on_layer=lambda name, done, count: seen.append(done)
    )
    assert seen == [5, 6]
    numbers = sum(p.numel() for p in own.parameters()) + (32 * 48 if kind == "patient" else 0)
    assert f"{numbers:,} numbers trained" in small.report.notes[0]
    for name, x in own.state_dict().items():
        close(x, expected[name], 1e-6)


def test_hidden_states_of_another_width_pass_the_map_that_comes_nearest():
    for kind in ("features", "patient"):
        own, told = (Seen(hidden=[torch.randn(3, 40, width, dtype=torch.float64) for _ in "ab"]) for width in (6, 9))
        found = first_projection(kind, own, told)
        assert found is not None and found.shape == (6, 9)
        x, y = (torch.cat(layers.hidden).flatten(0, 1) for layers in (own, told))
        nearest = torch.linalg.lstsq(x, y).solution
        assert (found - nearest).norm() < 0.01 * nearest.norm()
        turned = Seen(hidden=[state @ nearest for state in own.hidden])
        exact = torch.linalg.lstsq(x, x @ nearest).solution
        assert float(torch.as_tensor(layers_loss(kind, own, turned, exact))) < 1e-20
        assert first_projection(kind, own, own) is None
    assert first_projection("attention", own, told) is None


def test_hidden_states_that_cannot_be_compared_name_their_kind_and_another_one():
    rows, wide, fewer, map_ = (2, 6, 8), (2, 6, 9), (2, 5, 8), (2, 8, 3, 2)
    for kind, own, told in (
        ("features", [rows] * 2, [map_] * 2),
        ("features", [rows] * 2, [fewer] * 2),
        ("patient", [rows] * 2, [fewer] * 2),
        ("features", [rows, wide], [rows] * 2),
    ):
        ours, theirs = (Seen(hidden=[torch.randn(shape) for shape in shapes]) for shapes in (own, told))
        words = rf"kind={kind} of hidden states of shape .* to learn from \({told[0][0]}, .*try kind=response"
        refused(words, layers_loss, kind, ours, theirs, first_projection(kind, ours, theirs))


def test_layers_at_the_same_depth_are_every_kth_of_a_deeper_teacher_and_all_exist():
    for student, teacher in ((2, 4), (3, 12), (6, 6)):
        assert [j + 1 for _, j in layer_pairs(student, teacher)[:-1]] == list(patient_layers(student, teacher))
    for student in range(1, 8):
        for teacher in range(1, 8):
            numbers = [j for _, j in layer_pairs(student, teacher)]
            assert numbers == sorted(numbers) and numbers[0] >= 0 and numbers[-1] == teacher - 1


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh()


def test_what_cannot_be_read_is_refused_before_anything_is_trained(tmp_path):
    done: list[str] = []

    def attempt(words: str, model: nn.Module, recipe: str, **options: Any) -> None:
        before = {name: x.clone() for name, x in model.state_dict().items()}
        data = options.pop("data", [tokens()])
        found = {"training": data, "work": tmp_path, "on_layer": lambda name, *_: done.append(name), **options}
        refused(words, regard.compress, model.float(), recipe, data, **found)
        assert not done and all(torch.equal(x, before[name].float()) for name, x in model.state_dict().items())
        assert not list(tmp_path.iterdir())

    other, masks = nn.Sequential(*(Layer() for _ in range(3))).eval(), "magnitude + distil:kind={},steps=3"
    attempt("attention of a Sequential.*try kind=features", other, masks.format("attention"), data=[torch.randn(2, 8)])
    attempt("a vector for each token", other, masks.format("patient"), data=[torch.randn(2, 8)])
    attempt("relation of a LanguageModel.*a layer of linear", language_model(plan="linear"), masks.format("relation"))
    attempt("with reversible", language_model(stack={"reversible": True}), masks.format("attention"))
    attempt("with sinks", language_model(1, plan=[("softmax", {"learn_sink": True})]), masks.format("attention"))
    swapped = llama().float()
    regard.swap(swapped, "linear")
    attempt("attend by regard", swapped, masks.format("relation"))
    attempt("the teacher.*4 heads, to learn from 2", llama(), "distil:kind=relation", teacher=narrow_heads())
    attempt("of one layer", llama(1), masks.format("patient"))
    attempt("takes heads out", llama(), "structured:heads=0.5 + distil:kind=attention")
    attempt("takes heads out", llama(), "gates + distil:kind=relation")
    attempt("for each pair of tokens", llama(), f"distil:kind=attention,cache={tmp_path / 'a'}")
    attempt("answers alone", llama(), "distil:weight=2")


def narrow_heads() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes)).eval()


def test_what_is_left_in_floating_point_of_a_rounded_model_learns_from_attention():
    for model in (language_model().float(), llama().float()):
        data = [tokens() for _ in range(3)]
        small = regard.compress(model, "gptq:bits=2 + distil:kind=relation,steps=8,learning_rate=0.001", data)
        assert any("relation loss" in note and "so the weights stay" not in note for note in small.report.notes)


@pytest.mark.parametrize("kind", OF_LAYERS)
def test_a_student_in_training_learns_from_the_layers_of_a_wider_teacher(kind, tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs\n" * 100)
    task = create_task("text", data=tmp_path / "text.txt", length=16)
    batch = task.training_batch(0, 0, 4)

    def model(dim: int, layers: int, heads: int = 2, **options: Any) -> LanguageModel:
        return LanguageModel(
            LanguageModelConfig.for_task(task, "softmax", num_layers=layers, dim=dim, num_heads=heads, **options)
        )

    student, teacher = model(8, 2, dropout=0.1), model(16, 4)
    taught = Taught(student, teacher, read_method(f"{kind}:layers=5"), task)
    alone = Taught(copy.deepcopy(student), teacher, read_method("response"), task)
    assert (taught.beside is not None) == (kind in OF_STATES)
    kept = {name: x.clone() for name, x in teacher.state_dict().items()}
    history = train(taught, task, TrainConfig(steps=3, batch_size=4, learning_rate=1e-2, measure_memory=False))
    train(alone, task, TrainConfig(steps=3, batch_size=4, learning_rate=1e-2, measure_memory=False))
    assert all(point.auxiliary > 0 for point in history.curve)
    assert all(torch.equal(x, kept[name]) for name, x in teacher.state_dict().items())
    assert any(not torch.equal(x, alone.student.state_dict()[name]) for name, x in student.state_dict().items())
    assert torch.equal(taught.eval()(batch.inputs).output, student.eval()(batch.inputs).output)
    same = Taught(copy.deepcopy(teacher), teacher, read_method(kind), task)
    assert abs(float(same.train()(batch.inputs).losses[LOSS][0].detach())) < 1e-6
    refused(
        "a cache of the teacher's layers",
        Taught,
        student,
        teacher,
        read_method(kind),
        task,
        cache=AnswerCache(tmp_path, teacher),
    )
    if kind not in OF_STATES:
        refused("as many heads", Taught, model(8, 2, heads=4), teacher, read_method(kind), task)


def test_regard_train_takes_the_kinds_of_layers(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog and runs\n" * 400)
    line = f"train {tmp_path / 'text.txt'} --length 32 --batch-tokens 128 --learning-rate 0.01 --frame bare --budget 20steps"
    answer(capsys, f"{line} --heads 2 --dim 16 --layers 2 --output {tmp_path / 'teacher'}")
    small = f"{line} --dim 8 --layers 1 --teacher {tmp_path / 'teacher'} --distil relation:layers=5"
    found = answer(capsys, f"{small} --heads 2 --output {tmp_path / 'student'}")
    assert found["settings"]["distil"] == "relation:layers=5"
    assert answer(capsys, f"evaluate {tmp_path / 'student'}")["score"] == found["score"]
    code, _, messages = run(capsys, f"{small} --heads 4 --output {tmp_path / 'no'}")
    assert code == 2 and "as many heads" in messages and not (tmp_path / "no").exists()


def test_methods_of_layers_have_weights_of_their_own():
    method = read_method("relation:layers=3,weight=0.5,temperature=2")
    assert (method.kind, method.layers, method.weight, method.temperature) == ("relation", 3, 0.5, 2)
    refused("layers=0", read_method, "patient:layers=0")
