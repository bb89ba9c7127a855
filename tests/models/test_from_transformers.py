"""Transformers' Mamba and Mamba-2 checkpoints: the same logits and tokens, or a reason why not."""

from __future__ import annotations

import json

import pytest
import torch
from support import read_in_pieces
from torch import nn

from regard import Context, Mask, Unsupported
from regard.models import from_pretrained, from_transformers, save_pretrained

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 41, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "eos_token_id": None}
MAMBA2 = {"num_heads": 8, "head_dim": 8, "n_groups": 2}
SETTINGS = {
    "mamba": {},
    "mamba, untied": {"tie_word_embeddings": False, "time_step_rank": 5, "conv_kernel": 3, "layer_norm_epsilon": 0.3},
    "mamba, no bias": {"use_conv_bias": False, "expand": 1},
    "mamba2": MAMBA2,
    "mamba2, tied": {**MAMBA2, "tie_word_embeddings": True, "layer_norm_epsilon": 0.3, "use_conv_bias": False},
    "mamba2, limited": {**MAMBA2, "time_step_limit": (0.2, 0.6), "chunk_size": 4},
}


def saved(settings, folder, **options):
    mamba2 = settings.startswith("mamba2")
    config = (transformers.Mamba2Config if mamba2 else transformers.MambaConfig)(**SIZES, **SETTINGS[settings])
    model = (transformers.Mamba2ForCausalLM if mamba2 else transformers.MambaForCausalLM)(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_checkpoint_gives_the_logits_and_the_tokens_of_transformers(settings, tmp_path):
    theirs = saved(settings, tmp_path)
    ours, ids = from_transformers(tmp_path), torch.randint(41, (3, 11))
    with torch.no_grad():
        logits = ours(ids).output
        torch.testing.assert_close(logits, theirs(ids).logits, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(read_in_pieces(ours, ids, [6, 5])[0], logits, atol=2e-5, rtol=2e-5)
        padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], 1)
        valid = torch.arange(13).expand(3, -1) > 1
        torch.testing.assert_close(ours(padded, context=Context(mask=Mask(valid=valid))).output[:, 2:], logits)
        exact = from_transformers(tmp_path, dtype=torch.float64)
        assert {p.dtype for p in exact.parameters()} == {torch.float64}
        torch.testing.assert_close(exact(ids).output.float(), logits, atol=2e-5, rtol=2e-5)
    cached = "limited" not in settings  # transformers' cached step ignores the limits
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "use_cache": cached}
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **settings)
    assert torch.equal(ours.generate(ids, 3), expected[:, 11:])


def test_checkpoints_in_several_files_are_read_and_saved_as_ours(tmp_path):
    saved("mamba2, tied", tmp_path / "theirs", max_shard_size="8KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours, ids = from_transformers(tmp_path / "theirs"), torch.randint(41, (2, 9))
    save_pretrained(ours, tmp_path / "ours")
    assert torch.equal(from_pretrained(tmp_path / "ours")(ids).output, ours(ids).output)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "falcon_mamba"}, "falcon_mamba .it normalises B, C and the steps"),
        ({"model_type": "gpt2"}, "a checkpoint of gpt2; supported: mamba, mamba2, llama, mistral, qwen2"),
        ({"use_bias": True}, "use_bias=True of a mamba"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"num_hidden_layers": 3}, "without blocks.2"),
        ({"num_hidden_layers": 1}, "with unknown blocks.1"),
        ({"state_size": 4}, "whose blocks.0.mixer"),
        ({"state_size": None}, "d_state|state_size"),
    ],
)
def test_what_cannot_be_loaded_is_said(changes, told, tmp_path):
    saved("mamba", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    with pytest.raises(Unsupported, match=told):
        from_transformers(tmp_path)


def test_folders_without_weights_or_settings_are_refused(tmp_path):
    for settings, told in (
        (None, r"without config.json"),
        ('{"model_type": "mamba"}', r"without model.safetensors or"),
        ("[]", "other contents"),
    ):
        if settings is not None:
            (tmp_path / "config.json").write_text(settings)
        with pytest.raises(Unsupported, match=told):
            from_transformers(tmp_path)


STRETCHED = {"factor": 8.0, "rope_theta": 10.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
ATTENDING = {
    "llama": ("Llama", {}),
    "llama, tied": ("Llama", {"tie_word_embeddings": True, "head_dim": 12, "rope_theta": 500.0}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("Llama", {"rope_parameters": {"rope_type": "llama3", **STRETCHED, **LLAMA3}}),
    "llama, interpolated": ("Llama", {"rope_parameters": {"rope_type": "linear", **STRETCHED}}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "mistral with a window": ("Mistral", {"sliding_window": 4}),
    "qwen2": ("Qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True}),
    "qwen2 with windows": ("Qwen2", WINDOWS),
}


def attending(kind, **others):
    name, options = ATTENDING[kind]
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{name}Config")(
        **sizes, vocab_size=41, num_hidden_layers=2, eos_token_id=None, bos_token_id=None, **options, **others
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("kind", ATTENDING)
def test_a_model_with_attention_gives_the_logits_and_the_tokens_of_transformers(kind, tmp_path):
    theirs = attending(kind)
    theirs.save_pretrained(tmp_path)
    ours, ids = from_transformers(tmp_path, dtype=torch.float64), torch.randint(41, (2, 19))
    with torch.no_grad():
        logits = ours(ids).output
        torch.testing.assert_close(logits, theirs.double()(ids).logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(read_in_pieces(ours, ids, [6, 1, 12])[0], logits)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, 3), theirs.generate(ids, **settings)[:, 19:])
    names = {name.rpartition(".")[2] for name, _ in ours.named_parameters() if ".output." in name}
    assert names == ({"weight", "bias"} if kind == "llama with biases" else {"weight"})


def test_rotary_positions_of_another_kind_are_refused(tmp_path):
    attending("qwen2", rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}).save_pretrained(
        tmp_path
    )
    with pytest.raises(Unsupported, match=r"a qwen2 with rotary positions of type 'yarn'.*llama3"):
        from_transformers(tmp_path)
