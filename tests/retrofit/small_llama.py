from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
WORK = {"length": 32, "batch_size": 2, "lengths": (32,), "evaluation_blocks": 2, "transfer_rate": 0.02, "rate": 0.01}


def llama(layers=4, loud=(1, 2), **options):
    """A model with random weights in which attention matters in the `loud` layers and hardly in the others."""
    config = transformers.LlamaConfig(**{**SIZES, **options}, num_hidden_layers=layers, initializer_range=0.2)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.o_proj.weight.mul_(3.0 if number in loud else 0.05)
    return model


def tokens(n=3000):
    return torch.randint(48, (n,))
