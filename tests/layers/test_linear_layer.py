"""The linear layer of regard's models, and `regard.accelerate` on other people's models."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import regard
from regard.backends import linear as entry
from regard.backends.linear.choices import Choices
from regard.backends.linear.product import Product
from regard.backends.linear.routes import LOCAL, ROUTES, FrozenWeights, available_routes
from regard.engines.linear import use_route
from regard.layers.linear import Linear, make_linear
from regard.models.language_model import LanguageModel, LanguageModelConfig

FORCED = [name for name, route in ROUTES.items() if route.available() and name != "onednn_packed"]


@pytest.fixture(autouse=True)
def _own_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(entry, "CHOICES", Choices())


class Foreign(nn.Module):
    """A model independent of regard, with tied weights and a layer that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 24)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24)
        self.again = self.up
        self.odd = parametrizations.weight_norm(nn.Linear(24, 24))
        self.head = nn.Linear(24, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(x + self.odd(self.down(self.up(x).relu() + self.again(x))))


def test_dense_is_linear_with_the_numbers_of_torch() -> None:
    for bias in (True, False):
        torch.manual_seed(3)
        ours, after = make_linear(7, 5, bias=bias), torch.rand(())
        torch.manual_seed(3)
        theirs, expected = nn.Linear(7, 5, bias=bias), torch.rand(())
        assert type(ours) is Linear and isinstance(ours, nn.Linear) and repr(ours) == repr(theirs)
        assert after == expected
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", FORCED)
def test_accelerated_model_equals_the_original_and_trains_alike(name: str) -> None:
    model, ids = Foreign(), torch.randint(11, (3, 9))
    original = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, original)]
    parameters = dict(model.named_parameters())
    done = regard.accelerate(model)
    assert done.changed == ("up", "down", "head") and list(done.kept) == ["odd"]
    assert "odd" in str(done) and "3 linear layers" in str(done)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert model.head.weight is model.embedding.weight and model.again is model.up and type(model.up) is Linear
    with use_route(name):
        for _ in range(4):
            for each, optimizer in zip((model, original), optimizers, strict=True):
                optimizer.zero_grad()
                each(ids).square().mean().backward()
                optimizer.step()
    torch.testing.assert_close(model.state_dict(), original.state_dict(), rtol=1e-4, atol=1e-5)
    done.undo()
    assert [type(m) for m in (model.up, model.down, model.head)] == [nn.Linear] * 3
    torch.testing.assert_close(model(ids), original(ids), rtol=1e-4, atol=1e-4)
    assert regard.accelerate(nn.ReLU()).changed == ()


def test_hooks_stay_and_replaced_forwards_are_kept() -> None:
    layer, seen = nn.Linear(4, 4), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    assert regard.accelerate(layer).changed == ("",)
    layer(torch.randn(2, 4))
    assert seen == [1]
    patched = nn.Linear(4, 4)
    patched.forward = lambda x: x * 2  # type: ignore[method-assign]
    assert regard.accelerate(patched).kept == {"": "its forward was replaced"}
    assert torch.equal(patched(torch.ones(4)), torch.full((4,), 2.0))
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    assert set(regard.accelerate(attention).kept) == {"0", "0.out_proj"}


def test_weights_stay_ordinary_parameters(tmp_path: Path) -> None:
    layer, x = Linear(16, 12), torch.randn(70, 16)
    with use_route(FORCED[-1]):
        expected = layer(x)
        assert list(layer.state_dict()) == ["weight", "bias"] and not list(layer.buffers())
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other) is Linear and torch.equal(other(x), expected)
        plain = nn.Linear(16, 12)
        save_model(layer, str(tmp_path / "layer.safetensors"))
        load_model(plain, str(tmp_path / "layer.safetensors"))
        torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-6)
        layer.load_state_dict({"weight": torch.zeros(12, 16), "bias": torch.ones(12)})
        assert torch.equal(layer(x), torch.ones(70, 12))
        layer.weight.data.fill_(1)
        torch.testing.assert_close(layer(x)[:, 0], x.sum(1) + 1)
        assert layer.double()(x.double()).dtype == torch.float64


def language_model(tied: bool) -> LanguageModel:
    return LanguageModel(LanguageModelConfig(vocab_size=37, dim=32, num_layers=2, num_heads=2, tie_embeddings=tied))


@pytest.mark.parametrize("tied", [True, False])
def test_language_model_takes_the_route_in_every_projection(tied: bool) -> None:
    model = language_model(tied)
    exact, ids = copy.deepcopy(model).double(), torch.randint(37, (2, 12))
    products: list[Product] = []

    class Spy(Choices):
        def route(self, product: Product) -> str:
            products.append(product)
            return FORCED[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "CHOICES", Spy(forced=FORCED[-1]))
        logits = model(ids).output
    torch.testing.assert_close(logits.double(), exact(ids).output, rtol=1e-4, atol=1e-4)
    projections = sum(isinstance(m, Linear) for m in model.modules()) + tied
    assert len(products) >= projections and any(p.n == 37 for p in products)


def test_generation_is_the_same_by_every_route(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model(tied=True)
    ids = torch.randint(37, (2, 5))
    packed: list[Tensor] = []
    pack = FrozenWeights.packed
    monkeypatch.setattr(FrozenWeights, "packed", lambda self, w: packed.append(w) or pack(self, w))
    generated = []
    for name in [name for name, route in ROUTES.items() if route.available()]:
        with use_route(name):
            generated.append(model.generate(ids, 8))
    assert all(torch.equal(tokens, generated[0]) for tokens in generated)
    assert LOCAL.frozen is None
    assert bool(packed) == ("onednn_packed" in available_routes())
