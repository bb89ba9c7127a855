"""GPT-2's Conv1D are compressed as linear layers, and are Conv1D again where they keep floating-point weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, refused
from torch import Tensor, nn

import regard
from regard.compression import load_compressed, quantize
from regard.compression.layers import run_batch
from regard.layers.quantized import QuantizedLinear

transformers = pytest.importorskip("transformers")
from transformers.pytorch_utils import Conv1D  # noqa: E402

import regard.integrations.transformers  # noqa: E402

VOCABULARY = 40
NAMES = [
    f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
ROUNDED = ("int8", "int4:symmetric=false", "w8a8", "gptq", "awq", "smoothquant", "llm_int8:threshold=1", "lsq:steps=2")
MASKED = ("magnitude", "wanda", "sparsegpt:pattern=2:4", "wanda + distil:steps=1")


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": None}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=VOCABULARY, **sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def windows() -> list[Tensor]:
    return [torch.randint(0, VOCABULARY, (2, 40)) for _ in range(3)]


def same(model: Any, modules: list[Any], parameters: list[Any]) -> bool:
    """Whether a model consists of these very modules and parameters."""
    pairs = zip((*model.modules(), *model.parameters()), (*modules, *parameters), strict=True)
    return all(now is before for now, before in pairs)


@pytest.mark.parametrize("recipe", [*ROUNDED, *MASKED, "wanda + int8"])
@torch.no_grad()
def test_the_conv1d_of_gpt2_are_compressed_saved_loaded_and_undone(recipe, tmp_path):
    model, data = gpt2(), windows()
    modules, parameters, before = list(model.modules()), list(model.parameters()), model(data[0]).logits
    regard.compress(model, recipe, data).undo()
    assert same(model, modules, parameters)
    close(model(data[0]).logits, before, 0.0)
    small = regard.compress(model, recipe, data)
    assert set(NAMES) <= {layer.name for layer in small.report.layers} and not small.report.kept
    kind = Conv1D if recipe in MASKED else QuantizedLinear
    assert all(type(model.get_submodule(name)) is kind for name in NAMES)
    after = model(data[0]).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.5
    small.save(tmp_path)
    close(load_compressed(tmp_path)(data[0]).logits, after, 0.0)
    loaded, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    close(loaded(data[0]).logits, after, 0.0)
    assert all(type(loaded.get_submodule(name)) is kind for name in NAMES)


def test_zeros_in_a_conv1d_are_where_they_would_be_in_a_linear_layer():
    model, data = gpt2(), windows()
    regard.compress(model, "magnitude:pattern=2:4", data)
    for name in NAMES:
        zeros = model.get_submodule(name).weight.T == 0  # a row for each output
        assert bool((zeros.unflatten(1, (-1, 4)).sum(-1) == 2).all())


def test_recipes_that_fail_leave_the_conv1d_as_they_were():
    model, data = gpt2(), windows()
    modules, parameters, before = list(model.modules()), list(model.parameters()), model(data[0]).logits

    def stop(name: str, done: int, count: int) -> None:
        raise KeyboardInterrupt

    for recipe in ("gptq", "lsq:steps=2"):
        with pytest.raises(KeyboardInterrupt):
            regard.compress(model, recipe, data, on_layer=stop)
    refused("multiple of 5", regard.compress, model, "magnitude:pattern=2:5", data)
    assert same(model, modules, parameters)
    close(model(data[0]).logits, before, 0.0)


def test_a_conv1d_that_is_kept_stays_and_is_named():
    model = gpt2()
    first, last = (model.get_submodule(name) for name in (NAMES[0], NAMES[-1]))
    last.register_forward_hook(lambda *given: None)
    small = regard.compress(model, "int8", keep=lambda name, module: name == NAMES[0])
    assert small.report.kept[NAMES[0]] == "as asked" and "has hooks" in small.report.kept[NAMES[-1]]
    assert model.get_submodule(NAMES[0]) is first and model.get_submodule(NAMES[-1]) is last


@torch.no_grad()
def test_the_simulation_rounds_conv1d_in_its_copy():
    model, data = gpt2(), windows()
    expected, modules = model(data[0]).logits, list(model.modules())
    found = quantize(model, data, run=run_batch)
    assert set(NAMES) < found.weights.keys() and same(model, modules, [*model.parameters()])
    assert 0 < float((found.model(data[0]).logits - expected).norm() / expected.norm()) < 0.1
