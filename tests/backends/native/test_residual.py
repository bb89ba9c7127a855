"""Pre-norm branches in one native call: results equal the modules', and only plain modules are fused."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref

import pytest
import torch
from support import close
from torch import nn

from regard import Context, Mask, backends, create_layer
from regard.backends.native import library
from regard.compression.tokens import METHODS, reduce_tokens
from regard.core.ragged import packed
from regard.layers.drop_path import DropPath
from regard.layers.feed_forward import MLP, Bilinear, SwiGLU
from regard.layers.linear import Linear
from regard.layers.norms import LayerNorm, LayerScale, RMSNorm
from regard.layers.quantized import Format, QuantizedLinear
from regard.layers.residual import add_feed_forward, fused_attention, fused_feed_forward
from regard.models.vision import create_backbone

WIDTH = 37


@pytest.fixture
def called(monkeypatch):
    """The names of the kernels that were called."""
    names, call = [], library.call

    def counting(arguments):
        names.append(arguments.kernel)
        call(arguments)

    monkeypatch.setattr(library, "call", counting)
    return names


def _filled(*modules: nn.Module) -> tuple[nn.Module, ...]:
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
    return modules


def _branch(bias: bool = True) -> tuple[nn.Module, ...]:
    return _filled(LayerNorm(WIDTH), MLP(WIDTH, 50, bias=bias), LayerScale(WIDTH))


def _softmax(**options) -> nn.Module:
    return create_layer("softmax", WIDTH, 4, head_dim=5, pattern="noncausal-self", **options).eval()


def _plain(x, norm, inner, *after):
    update = inner(norm(x))
    update = getattr(update, "output", update)
    for module in after:
        update = module(update)
    return x + update


@pytest.mark.parametrize("shape", [(1, 32), (2, 197), (3, 5, 41)])
@pytest.mark.parametrize("network", [MLP, SwiGLU])
@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
@torch.no_grad()
def test_a_feed_forward_network_is_that_of_float64(instruction_set, threads, called, shape, network, norm):
    learned = network is MLP
    parts = _filled(norm(WIDTH, eps=0.1, parametric=learned), network(WIDTH, 50, bias=learned), LayerScale(WIDTH))
    parts = parts if learned else parts[:2]
    x = torch.randn(*shape[:-1], WIDTH, shape[-1]).mT  # not contiguous
    found = add_feed_forward(x, *parts)
    assert called == ["residual_feed_forward"]
    close(found, _plain(x.double(), *(copy.deepcopy(part).double() for part in parts)).float(), 2e-6)


@pytest.mark.parametrize("shape", [(1, 32), (2, 197), (9, 6)])
@pytest.mark.parametrize("options", [{"bias": True}, {"num_kv_heads": 2}])
@torch.no_grad()
def test_attention_is_that_of_float64(instruction_set, threads, called, shape, options):
    parts = *_filled(LayerNorm(WIDTH), _softmax(**options)), nn.Sequential(LayerScale(WIDTH)), nn.Dropout(0.5).eval()
    x = torch.randn(*shape, WIDTH)
    found = fused_attention(x, *parts, context=Context(grid=(1, shape[1])))
    assert called == ["residual_attention"]
    close(found, _plain(x.double(), *(copy.deepcopy(part).double() for part in parts)).float(), 2e-6)


@pytest.mark.parametrize("rows", ["one", "each"])
@pytest.mark.parametrize("shape", [(1, 32), (3, 197), (40, 6)])
@torch.no_grad()
def test_attention_with_a_bias_for_each_key_is_that_of_float64(instruction_set, threads, called, shape, rows):
    norm, layer = _filled(LayerNorm(WIDTH), _softmax(num_kv_heads=2))
    x, bias = torch.randn(*shape, WIDTH), torch.randn(shape[0] if rows == "each" else 1, 1, 1, shape[1])
    bias[..., 1::3] = -torch.inf
    found = fused_attention(x, norm, layer, context=Context(mask=Mask(bias=bias)))
    assert called == ["residual_attention"]
    norm, layer, x = norm.double(), layer.double(), x.double()
    close(found, (x + layer(norm(x), context=Context(mask=Mask(bias=bias.double()))).output).float(), 2e-6)


@pytest.mark.parametrize("lengths", [[32], [5, 0, 1, 60, 33], [7] * 40])
@torch.no_grad()
def test_attention_in_packed_documents_is_that_of_each_alone(instruction_set, threads, called, lengths):
    parts = _filled(LayerNorm(WIDTH), _softmax(num_kv_heads=2), LayerScale(WIDTH))
    x = torch.randn(1, sum(lengths), WIDTH)
    found = fused_attention(x, *parts, context=Context(mask=packed(torch.tensor(lengths), sum(lengths), max(lengths))))
    assert called == ["residual_attention"]
    in_double = [copy.deepcopy(part).double() for part in parts]
    alone = [_plain(document, *in_double) for document in x.double().split(lengths, 1)]
    close(found, torch.cat(alone, 1).float(), 2e-6)


@pytest.mark.parametrize("batch", [0, 1, 9])
@pytest.mark.parametrize("name", ["vit_nano", "tnt", "mixer"])
@torch.no_grad()
def test_backbones_are_what_they_are_in_torch(called, name, batch):
    made = {
        "vit_nano": lambda: create_backbone("vit_nano", num_layers=2, layer_scale=0.5),
        "tnt": lambda: create_backbone("tnt_ti", image_size=48, depth=2),
        "mixer": lambda: create_backbone("mixer_s16", image_size=96, depth=2, width=32, hidden=56),
    }
    model = made[name]().eval()
    images = torch.randn(batch, 3, *model.config.size)
    found = model(images)
    assert (len(called) > 0) == (batch > 0)
    with backends.only("torch"):
        close(found, model(images), 1e-5)


@pytest.mark.parametrize("name", ["vit_nano", "tnt"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_blocks_with_fewer_tokens_are_what_they_are_in_torch(called, method, name):
    made = {
        "vit_nano": lambda: create_backbone("vit_nano", num_layers=3),
        "tnt": lambda: create_backbone("tnt_ti", image_size=64, depth=3),
    }
    model = made[name]().eval()
    images = torch.randn(8, 3, *model.config.size)
    reduction = reduce_tokens(model, method, keep=0.5, blocks=[1], generator=torch.Generator().manual_seed(0))
    found, counts = model(images), reduction.counts
    assert counts[0] > counts[1] == counts[2]
    branches = 3 if name == "vit_nano" else 6  # a block of TNT has two of each kind, one of words
    assert called.count("residual_attention") == called.count("residual_feed_forward") == branches
    with backends.only("torch"):
        reduction.generator.manual_seed(0)
        close(found, model(images), 1e-5)


def _hooked(x, norm, network):
    network.down.register_forward_hook(lambda module, inputs, output: 2 * output)
    return fused_feed_forward(x, norm, network)


def _hooked_before(x, norm, network):
    norm.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    return fused_feed_forward(x, norm, network)


def _hooked_everywhere(x, norm, network):
    with nn.modules.module.register_module_forward_hook(lambda *_: None):
        return fused_feed_forward(x, norm, network)


def _replaced_forward(x, norm, network):
    network.up.forward = lambda x: x @ network.up.weight.T
    return fused_feed_forward(x, norm, network)


class _Adapted(Linear):
    """A different class in place of a layer, as low-rank adapters do."""


def _adapted(x, norm, network):
    network.up.__class__ = _Adapted
    return fused_feed_forward(x, norm, network)


def _quantized(x, norm, network):
    network.up = QuantizedLinear(WIDTH, 50, bias=True, format=Format(8))
    return fused_feed_forward(x, norm, network)


def _parametrized(x, norm, network):
    nn.utils.parametrizations.weight_norm(network.up)
    return fused_feed_forward(x, norm, network)


def _with_gradients(x, norm, network):
    with torch.enable_grad():
        return fused_feed_forward(x, norm, network)


def _input_with_a_gradient(x, norm, network):
    with torch.enable_grad():
        for part in (norm, network):
            part.requires_grad_(False)
        return fused_feed_forward(x.requires_grad_(), norm, network)


def _dropping(x, norm, network):
    network.dropout = 0.5
    return fused_feed_forward(x, norm, network.train())


def _dropping_paths(x, norm, network):
    return fused_feed_forward(x, norm, network, DropPath(0.5).train())


def _unknown_end(x, norm, network):
    return fused_feed_forward(x, norm, network, nn.Tanh())


def _two_ends(x, norm, network):
    return fused_feed_forward(x, norm, network, LayerScale(WIDTH), LayerScale(WIDTH))


def _unknown_network(x, norm, network):
    return fused_feed_forward(x, norm, Bilinear(WIDTH, 50))


def _unknown_norm(x, norm, network):
    return fused_feed_forward(x, nn.LayerNorm(WIDTH), network)


def _doubles(x, norm, network):
    return fused_feed_forward(x.double(), norm.double(), network.double())


def _halves(x, norm, network):
    return fused_feed_forward(x.bfloat16(), norm.bfloat16(), network.bfloat16())


def _double_inputs(x, norm, network):
    return fused_feed_forward(x.double(), norm, network)


def _one_double_weight(x, norm, network):
    network.up.double()
    return fused_feed_forward(x, norm, network)


def _autocast(x, norm, network):
    with torch.autocast("cpu"):
        return fused_feed_forward(x, norm, network)


def _few(x, norm, network):
    return fused_feed_forward(x[:, :31], norm, network)


def _large(x, norm, network):
    return fused_feed_forward(x, norm, MLP(WIDTH, 3 << 14))


def _another_width(x, norm, network):
    return fused_feed_forward(x[..., 1:], norm, network)


def _profiled(x, norm, network):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return fused_feed_forward(x, norm, network)


def _watched(x, norm, network):
    with backends.watch_backends():
        return fused_feed_forward(x, norm, network)


def _in_torch(x, norm, network):
    with backends.only("torch"):
        return fused_feed_forward(x, norm, network)


def _transformed(x, norm, network):
    found = []
    torch.func.vmap(lambda row: found.append(fused_feed_forward(row, norm, network)) or row)(x.expand(2, -1, -1))
    return found[0]


def _on_meta(x, norm, network):
    return fused_feed_forward(x.to("meta"), norm, network)


ELSEWHERE = (
    _hooked,
    _hooked_before,
    _hooked_everywhere,
    _replaced_forward,
    _adapted,
    _quantized,
    _parametrized,
    _with_gradients,
    _input_with_a_gradient,
    _dropping,
    _dropping_paths,
    _unknown_end,
    _two_ends,
    _unknown_network,
    _unknown_norm,
    _doubles,
    _halves,
    _double_inputs,
    _one_double_weight,
    _autocast,
    _few,
    _large,
    _another_width,
    _profiled,
    _watched,
    _in_torch,
    _transformed,
    _on_meta,
)


@pytest.mark.parametrize("way", ELSEWHERE, ids=lambda way: way.__name__)
@torch.no_grad()
def test_what_is_not_plain_is_left_to_the_modules(called, way):
    norm, network, _ = _branch()
    x = torch.randn(1, 40, WIDTH)
    assert fused_feed_forward(x, norm, network) is not None
    assert way(x, norm, network) is None
    assert called == ["residual_feed_forward"]


OTHER_LAYERS = {
    "rotary": {"positions": "rotary", "head_dim": 6},
    "a window": {"window": (2, 2)},
    "a bound": {"softcap": 2.0},
    "a sink": {"learn_sink": True},
    "norms": {"query_key_norm": "rms"},
    "a gate": {"output_gate": "swish"},
    "a convolution": {"short_convolution": 3},
}


@pytest.mark.parametrize("name", OTHER_LAYERS)
@torch.no_grad()
def test_layers_with_more_than_softmax_are_left_to_themselves(name):
    options = {"head_dim": 5, "pattern": "noncausal-self", **OTHER_LAYERS[name]}
    layer = create_layer("softmax", WIDTH, 4, **options).eval()
    assert fused_attention(torch.randn(1, 40, WIDTH), LayerNorm(WIDTH), layer) is None


@torch.no_grad()
def test_calls_that_ask_for_more_than_the_output_are_left_to_the_layer():
    x, norm, layer = torch.randn(2, 40, WIDTH), LayerNorm(WIDTH), _softmax()
    assert fused_attention(x, norm, layer, context=Context()) is not None
    borders = torch.tensor([0, 40])
    for context in (
        Context(mask=Mask(lengths=torch.tensor([40, 7]))),
        Context(mask=Mask(cu_seqlens=borders)),
        Context(mask=dataclasses.replace(packed(borders[1:], 40, 40), bias=torch.zeros(1, 1, 1, 1))),
        Context(mask=Mask(bias=torch.zeros(1, 1, 40, 40))),
        Context(mask=Mask(bias=torch.zeros(1, 1, 1, 40), lengths=torch.tensor([40, 7]))),
        Context(mask=Mask(bias=torch.zeros(1, 1, 1, 40).double())),
        Context(want=frozenset({"weights"})),
        Context(roles=torch.zeros(2, 40).long()),
    ):
        assert fused_attention(x, norm, layer, context=context) is None
    causal = create_layer("softmax", WIDTH, 4, head_dim=5, pattern="causal-self").eval()
    assert fused_attention(x, norm, causal) is None
    layer.mix = lambda *arguments, **options: None
    assert fused_attention(x, norm, layer) is None


def _moved(norm, network):
    network.up.weight.data = torch.randn_like(network.up.weight)


def _another_parameter(norm, network):
    network.down.bias = nn.Parameter(torch.randn(WIDTH))


def _pruned(norm, network):
    network.up.weight.data, network.up.bias.data = network.up.weight.data[:20], network.up.bias.data[:20]
    network.down.weight.data = network.down.weight.data[:, :20].contiguous()


def _another_layer(norm, network):
    network.up = Linear(WIDTH, 50)


def _in_place(norm, network):
    network.up.weight.mul_(2)


def _another_eps(norm, network):
    norm.eps = 3.0


@pytest.mark.parametrize("change", [_moved, _another_parameter, _pruned, _another_layer, _in_place, _another_eps])
@torch.no_grad()
def test_changes_of_the_parts_are_seen(called, change):
    norm, network, scale = _branch()
    x = torch.randn(1, 40, WIDTH)
    before = add_feed_forward(x, norm, network, scale)
    change(norm, network)
    found = add_feed_forward(x, norm, network, scale)
    assert called == ["residual_feed_forward"] * 2 and not torch.allclose(found, before)
    close(found, _plain(x, norm, network, scale), 2e-6)


@torch.no_grad()
def test_other_modules_around_a_network_are_seen(called):
    norm, network, scale = _branch()
    x = torch.randn(1, 40, WIDTH)
    add_feed_forward(x, norm, network)
    (other,) = _filled(LayerNorm(WIDTH))
    for parts in ((other, network), (other, network, scale), (norm, network, nn.Sequential(scale))):
        close(add_feed_forward(x, *parts), _plain(x, *parts), 2e-6)
    assert len(called) == 4


@torch.no_grad()
def test_hooks_of_a_block_are_called_and_see_what_it_makes(called):
    model = create_backbone("vit_nano", num_layers=2).eval()
    images, seen = torch.randn(1, 3, *model.config.size), []
    expected = model(images)
    model.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output.output))
    close(model(images), expected, 0.0)
    close(model.norm(seen[0])[:, 0], model.forward_features(images)[:, 0], 0.0)


@torch.no_grad()
def test_what_is_remembered_of_a_network_ends_with_it():
    norm, network, _ = _branch()
    add_feed_forward(torch.randn(1, 40, WIDTH), norm, network)
    remembered = weakref.ref(network)
    del network
    gc.collect()
    assert remembered() is None


@pytest.mark.usefixtures("_any_memory")
@torch.no_grad()
def test_programs_have_the_operators_of_the_modules():
    parts = _branch()
    x = torch.randn(1, 40, WIDTH)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(parts)

        def forward(self, x):
            return add_feed_forward(x, *self.parts)

    expected = add_feed_forward(x, *parts)
    close(torch.compile(Whole(), fullgraph=True, backend="eager")(x), expected, 2e-6)
    exported = torch.export.export(Whole(), (x,))
    close(exported.module()(x), expected, 2e-6)
    assert any("gelu" in str(node.target) for node in exported.graph.nodes)
