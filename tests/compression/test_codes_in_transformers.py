"""Codes written by `regard compress` and read by transformers' own `from_pretrained`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import refused

import regard
from regard.compression import load_compressed
from regard.layers.quantized import QuantizedEmbedding, QuantizedLinear

transformers = pytest.importorskip("transformers")
from small_encoders import bert  # noqa: E402
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING  # noqa: E402

import regard.integrations.transformers  # noqa: E402

VOCABULARY = 64
GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def llama(**options: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, eos_token_id=None, **sizes, **options)
    return transformers.LlamaForCausalLM(config).eval()


def ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 11))


@pytest.mark.parametrize(
    ("recipe", "tied"),
    [
        ("int8", True),
        ("int8:head=keep", True),
        ("gptq:symmetric=false", False),
        ("smoothquant + w8a8", True),
        ("llm_int8:threshold=1.5", False),
    ],
)
@torch.no_grad()
def test_transformers_loads_the_model_that_was_written(recipe, tied, tmp_path):
    data = ids()
    small = regard.compress(llama(tie_word_embeddings=tied), recipe, [data])
    expected, text = small.model(data).logits, small.model.generate(data, **GREEDY)
    small.save(tmp_path)
    model, told = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    torch.testing.assert_close(model(data).logits, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(model.generate(data, **GREEDY), text)
    assert isinstance(model.model.layers[0].mlp.down_proj, QuantizedLinear)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding) == (tied and "keep" not in recipe)
    assert not hasattr(load_compressed(tmp_path).config, "quantization_config")


def test_what_transformers_cannot_do_with_codes_is_refused(tmp_path, monkeypatch):
    regard.compress(llama(), "int8").save(tmp_path / "codes")
    regard.compress(bert(), "structured:heads=0.5,by=magnitude + int8").save(tmp_path / "parts")
    load = transformers.AutoModelForCausalLM.from_pretrained
    refused("in bfloat16", load, tmp_path / "codes", dtype=torch.bfloat16)
    refused("on cuda", load, tmp_path / "codes", device_map={"": "cuda:0"})
    with pytest.raises(ValueError, match="quantized with regard and is not serializable"):
        load(tmp_path / "codes").save_pretrained(tmp_path / "again")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "parts")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "regard")  # as if regard was not imported
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        load(tmp_path / "codes")
