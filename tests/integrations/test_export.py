"""Exported layers and models: saved and loaded, decoding step by step, in ONNX Runtime, and refused with a reason."""

from __future__ import annotations

import io
import logging

import onnxruntime
import pytest
import torch
from support import close

from regard import Context, Mask, Unsupported, create_layer, get_mechanism, list_mechanisms
from regard.engines import scan
from regard.integrations.export import export, export_onnx, without_warnings
from regard.models import LanguageModel, LanguageModelConfig
from regard.models.vision import create_backbone
from regard.models.vision.segmentation import create_segmenter

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # from torch itself
STATE = frozenset({"state"})


def small_model(plan):
    torch.manual_seed(0)
    return LanguageModel(LanguageModelConfig(vocab_size=11, dim=16, plan=plan, num_heads=2)).eval()


def ids(n, batch=2):
    return torch.randint(11, (batch, n), generator=torch.Generator().manual_seed(n))


def padded(n):
    return Context(mask=Mask(lengths=torch.tensor([n, 4])), want=STATE)


def test_saved_programs_read_prompts_and_steps_of_any_length():
    model, file = small_model(["softmax", "linear"]).double(), io.BytesIO()
    torch.export.save(export(model, ids(9), context=padded(9)), file)
    prompt = torch.export.load(io.BytesIO(file.getvalue())).module()
    state = prompt(ids(9), context=padded(9)).state
    step = export(model, ids(1), state=state).module()
    for n in (5, 70):
        expected = model(ids(n), context=padded(n))
        found = prompt(ids(n), context=padded(n))
        torch.testing.assert_close(found.output, expected.output)
        for _ in range(2):
            found, expected = step(ids(1), state=found.state), model(ids(1), state=expected.state)
            torch.testing.assert_close(found.output, expected.output)


def test_onnx_runtime_continues_a_state_of_any_length(monkeypatch):
    logged = []
    for name in ("torch.onnx._internal.exporter._core", "torch.export.dynamic_shapes"):
        monkeypatch.setattr(logging.getLogger(name), "handle", logged.append)
    model = small_model(["softmax"])
    program = export_onnx(model, ids(1), state=model(ids(6), context=Context(want=STATE)).state, optimize=False)
    assert not logged  # messages about the exporter's internals must not reach callers
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    state = model(ids(50), context=Context(want=STATE)).state
    names = [x.name for x in session.get_inputs()]
    given = dict(zip(names, (ids(1), *state.tensors().values()), strict=True))
    found = session.run(None, {name: tensor.detach().numpy() for name, tensor in given.items()})
    expected = model(ids(1), state=state)
    torch.testing.assert_close(torch.from_numpy(found[0]), expected.output)


REFUSED = [
    (name, waiver)
    for name in list_mechanisms()
    for waiver in get_mechanism(name).waivers
    if waiver.property in ("layer_lengths", "layer_onnx")
]


@pytest.mark.parametrize(("name", "waiver"), REFUSED, ids=[f"{n}-{w.property}" for n, w in REFUSED])
def test_what_a_card_waives_is_refused_with_its_reason(name, waiver):
    card = get_mechanism(name)
    options, patterns = {}, card.patterns
    if waiver.variants:
        options, patterns = card.variants[waiver.variants[0]], card.patterns_of(waiver.variants[0])
    layer = create_layer(name, 16, 2, pattern=(waiver.patterns or patterns)[0], **options).eval()
    make = export if waiver.property == "layer_lengths" else export_onnx
    with pytest.raises(Unsupported, match=waiver.reason):
        make(layer, torch.randn(2, 20, 16))


@pytest.mark.parametrize("name", ["gated_linear", "delta_rule"])
def test_a_recurrence_of_many_chunks_is_exported_by_torch_alone_without_gradients_and_refused_with_them(
    name, monkeypatch
):
    monkeypatch.setattr(scan, "MOST_IN_A_ROW", 0)
    layer, x = create_layer(name, 8, 2).eval(), torch.randn(1, 5, 8)
    with pytest.raises(Unsupported, match=r"a program of a recurrence with gradients.*no_grad"):
        torch.export.export(layer, (x,), strict=False)
    with torch.no_grad():
        found = torch.export.export(layer, (x,), strict=False).module()(x).output
        torch.testing.assert_close(found, layer(x).output)


@pytest.mark.parametrize("name", ["gated_linear", "mamba"])
def test_a_program_for_one_length_has_few_chunks_one_after_the_other(name):
    layer, x = create_layer(name, 8, 2).eval(), torch.randn(1, 70, 8)
    program = export(layer, x, lengths=False)
    assert not [node for node in program.graph.nodes if node.target is torch.ops.higher_order.scan]
    torch.testing.assert_close(program.module()(x).output, layer(x).output)


def test_onnx_of_torch_alone_solves_the_equations_of_the_delta_rule():
    layer, x = create_layer("delta_rule", 8, 2).eval(), torch.randn(1, 5, 8)
    with torch.no_grad(), without_warnings():
        program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False, optimize=False)
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        close(torch.from_numpy(found), layer(x).output, 1e-5)


def test_a_dilated_window_is_a_program_for_every_length_above_its_dilation():
    layer = create_layer("longformer", 8, 2, window=2, dilation=(1, 4)).double().eval()
    program = export(layer, torch.randn(2, 20, 8).double()).module()
    for n in (9, 23, 64):
        x = torch.randn(2, n, 8).double()
        close(program(x).output, layer(x).output, 1e-12)


def test_training_is_not_exported():
    with pytest.raises(Unsupported, match="training mode"):
        export(create_layer("softmax", 16, 2), torch.randn(2, 20, 16))


def test_inputs_in_a_tuple_as_torch_takes_them_are_refused_with_the_call_that_was_meant():
    with pytest.raises(Unsupported, match=r"type tuple.*export\(module, x\)"):
        export(create_layer("softmax", 16, 2).eval(), (torch.randn(2, 20, 16),))


def test_a_plain_layer_is_one_of_a_sequence():
    layer = create_layer("gated_linear", 16, 2, plain=True).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    found = torch.nn.Sequential(torch.nn.Identity(), layer, torch.nn.Identity())(x)
    torch.testing.assert_close(found, layer.layer(x).output)


def test_a_plain_layer_drops_nothing():
    with pytest.raises(Unsupported, match="state of a plain layer"):
        create_layer("softmax", 16, 2, plain=True)(torch.randn(2, 9, 16), context=Context(want=STATE))
    gated = create_layer("mixture_of_heads", 16, 4, plain=True)
    with pytest.raises(Unsupported, match="load_balance"):
        gated(torch.randn(2, 9, 16))
    assert gated.eval()(torch.randn(2, 9, 16)).shape == (2, 9, 16)


ONE_STAGE = {"widths": (8,), "depths": (1,), "heads": (2,)}
BACKBONES = [
    ("vit_nano", 1, {"dim": 8, "num_layers": 1, "num_heads": 2}),
    ("pvt_nano", 3, {**ONE_STAGE, "reductions": (1,), "expansions": (1,)}),  # with a class token
    ("swin_nano", 1, {**ONE_STAGE, "depths": (2,), "window": 2}),  # with shifted windows
]


@pytest.mark.parametrize(("name", "batch", "options"), BACKBONES, ids=[name for name, *_ in BACKBONES])
def test_a_program_of_a_backbone_takes_batches_of_any_size(name, batch, options):
    model = create_backbone(name, image_size=16, num_classes=4, **options).eval()
    program = export(model, torch.randn(batch, 3, 16, 16)).module()
    for size in (1, 5):
        images = torch.randn(size, 3, 16, 16)
        torch.testing.assert_close(program(images), model(images))
    with pytest.raises(Exception, match=r"size\(\)\[2\] == 16"):
        program(torch.randn(1, 3, 32, 32))


def test_onnx_runtime_segments_as_the_network_does():
    model = create_segmenter("unet_nano", widths=(4, 8)).eval()
    program = export_onnx(model, torch.randn(1, 1, 16, 16), optimize=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    images = torch.randn(3, 1, 16, 16)
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        close(torch.from_numpy(found), model(images), 1e-4)


def test_an_operator_that_onnx_lacks_is_named_in_one_sentence():
    class Orthogonal(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.qr(x).Q

    with pytest.raises(Unsupported, match=r"an ONNX program of an Orthogonal \(.*qr.*\); supported: torch.export"):
        export_onnx(Orthogonal().eval(), torch.randn(2, 5, 3), lengths=False)
