"""Tables of learned positions that are stretched, alone and in a retrofit."""

from __future__ import annotations

import pytest
import torch
from byte_tokenizer import save_byte_tokenizer
from small_llama import SIZES, WORK, llama, tokens, transformers
from torch import nn

import regard
from regard import Unsupported
from regard.integrations.transformers import AutoModelForCausalLM, with_longer_positions
from regard.retrofit.hosts import open_host
from regard.retrofit.settings import RetrofitSettings

COMMON = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "pad_token_id")}
LAYERS = {**COMMON, "num_hidden_layers": 2, "intermediate_size": 48}
GPT2 = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
OPT = {**COMMON, "num_hidden_layers": 2, "ffn_dim": 48, "word_embed_proj_dim": 32}
MODELS = {  # settings, the table, and its rows that are no positions
    "GPT2LMHeadModel": (GPT2, "transformer.wpe", 0),
    "OPTForCausalLM": ({**OPT, "max_position_embeddings": 32}, "model.decoder.embed_positions", 2),
    "BertForMaskedLM": ({**LAYERS, "max_position_embeddings": 32}, "bert.embeddings.position_embeddings", 0),
    "RobertaForMaskedLM": ({**LAYERS, "max_position_embeddings": 33}, "roberta.embeddings.position_embeddings", 1),
}


def made(name):
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**MODELS[name][0], bos_token_id=0, eos_token_id=0)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_longer_table_is_the_old_one_stretched_and_loads(name, tmp_path):
    model, (_, table, reserved) = made(name), MODELS[name]
    before = {key: x.clone() for key, x in model.state_dict().items()}
    longer = with_longer_positions(model, 63)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    after = longer.state_dict()
    assert [key for key, x in after.items() if not torch.equal(x, before[key])] == [f"{table}.weight"]
    old, new = (each[f"{table}.weight"] for each in (before, after))
    assert len(new) == 63 + reserved and torch.equal(new[:reserved], old[:reserved])
    torch.testing.assert_close(new[reserved::2], old[reserved:])
    torch.testing.assert_close(new[reserved + 1 :: 2], (old[reserved:-1] + old[reserved + 1 :]) / 2)
    longer.save_pretrained(tmp_path)
    ids = torch.randint(1, 48, (2, 63))
    torch.testing.assert_close(type(model).from_pretrained(tmp_path)(ids).logits, longer(ids).logits)


def test_models_without_a_table_and_tables_that_are_long_enough_are_refused():
    with pytest.raises(Unsupported, match="LlamaForCausalLM, which has no table of learned positions"):
        with_longer_positions(llama(1), 512)
    with pytest.raises(Unsupported, match="supported: more than its own 32"):
        with_longer_positions(made("OPTForCausalLM"), 32)


def test_a_retrofit_learns_positions_beyond_those_of_the_original(tmp_path):
    output, work = tmp_path / "out", {**WORK, "length": 64, "lengths": (64,), "evaluation_blocks": 1}
    model = made("GPT2LMHeadModel")
    table = model.transformer.wpe.weight.clone()
    found = regard.retrofit(
        model,
        "local:window=8",
        data=tokens(),
        keep_layers="0",
        budget="28 steps",
        distil=0.0,
        positions=64,
        output=output,
        **work,
    )
    assert torch.equal(model.transformer.wpe.weight, table) and found.record["settings"]["positions"] == 64
    assert any("stretched to 64 positions" in note for note in found.record["recommendation"]["notes"])
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert loaded.config.max_position_embeddings == 64 and list(found.results["needles"]) == ["64"]
    assert loaded.generate(tokens(50)[None], max_new_tokens=9, min_new_tokens=9, do_sample=False).shape == (1, 59)


def test_the_tokenizer_reads_as_far_as_the_longer_table(tmp_path):
    tokenizer = save_byte_tokenizer(tmp_path)
    tokenizer.model_max_length = 32
    host = open_host(made("GPT2LMHeadModel"), tokenizer).extended(64)
    assert host.tokenizer.model_max_length == 64 and tokenizer.model_max_length == 32
    tokenizer.model_max_length = 99
    assert open_host(made("GPT2LMHeadModel"), tokenizer).extended(64).tokenizer.model_max_length == 99


def test_longer_tables_are_offered_where_texts_are_too_long_and_need_no_teacher():
    settings = RetrofitSettings("local:window=8", length=64, distil=0.0)
    host = open_host(made("GPT2LMHeadModel"))
    with pytest.raises(
        Unsupported, match=r"64 tokens for a model of 32 positions.*try length=32 or positions=64, distil=0"
    ):
        host.begun(settings)
    with pytest.raises(Unsupported, match=r"try length=256$"):
        open_host(llama(1)).begun(RetrofitSettings("local:window=8", length=300))
    with pytest.raises(Unsupported, match=r"positions=64 with distil=1.0.*try distil=0"):
        RetrofitSettings("local:window=8", positions=64)
    with pytest.raises(
        Unsupported, match=r"positions=64 of a BertModel, which has no head .*supported: language models"
    ):
        open_host(made("BertForMaskedLM").bert).extended(64)
