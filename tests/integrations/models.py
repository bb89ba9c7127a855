"""Small transformers models."""

from __future__ import annotations

import torch
import transformers
from torch import nn

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GREEDY = {"do_sample": False, "pad_token_id": 0}
KEPT = torch.ones(3, 9, dtype=torch.long)
KEPT[1, :3] = 0
KEPT[2, 7:] = 0
LEFT = torch.ones_like(KEPT)
LEFT[1, :3] = 0


def llama(**options):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2, **options)).eval()


def mistral():
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=4)
    return transformers.MistralForCausalLM(config).eval()


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_inner=48, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config).eval()


def bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


def bart():
    sizes = {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    sizes |= {name.replace("encoder", "decoder"): size for name, size in sizes.items()}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=64, d_model=32, **sizes)).eval()


def t5():
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def ids(batch=3, length=9):
    return torch.randint(3, 64, (batch, length))


def disturb(model: nn.Module) -> None:
    """Randomise all parameters, so that no initial value hides an effect."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)


def near(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
