"""Parts removed from a model for good: outputs equal those of the masked model; saving, loading and undoing work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import close, refused
from torch import Tensor

import regard
from regard.compression.pruning.anatomy import Cut, find_host
from regard.compression.pruning.masks import Gates, gated, masked
from regard.compression.pruning.records import restore, structure
from regard.contract import Context
from regard.integrations.conv1d import replace_conv1d
from regard.models import Encoder, EncoderConfig, LanguageModel, LanguageModelConfig, from_pretrained, save_pretrained

VOCABULARY = 30


def language_model(**options: Any) -> LanguageModel:
    sizes = {"vocab_size": VOCABULARY, "dim": 16, "num_heads": 4, "num_layers": 4, "feed_forward": 24} | options
    return _spread(LanguageModel(LanguageModelConfig(**sizes)))


def encoder(**options: Any) -> Encoder:
    sizes = {"vocab_size": VOCABULARY, "dim": 16, "num_heads": 4, "num_layers": 4, "feed_forward": 24} | options
    return _spread(Encoder(EncoderConfig(num_classes=3, **sizes)))


def llama(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, attention_bias=True, **sizes, **options)
    return _spread(transformers.LlamaForCausalLM(config))


def bert() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=VOCABULARY, num_labels=3, **sizes)
    return _spread(transformers.BertForSequenceClassification(config))


def gpt2(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_inner": 24, "n_layer": 4, "n_head": 4, "n_positions": 32}
    config = transformers.GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=None, **sizes, **options)
    return _spread(transformers.GPT2LMHeadModel(config))


def open_gpt2(**options: Any) -> Any:
    """GPT-2 with linear layers for its Conv1D."""
    model = gpt2(**options)
    replace_conv1d(model)
    return model


def gpt_neox(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = transformers.GPTNeoXConfig(vocab_size=VOCABULARY, eos_token_id=None, **sizes, **options)
    return _spread(transformers.GPTNeoXForCausalLM(config))


def opt(**options: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    config = transformers.OPTConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **tokens, **sizes, **options)
    return _spread(transformers.OPTForCausalLM(config))


def distilbert() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 4, "n_heads": 4, "max_position_embeddings": 32}
    config = transformers.DistilBertConfig(vocab_size=VOCABULARY, num_labels=3, **sizes)
    return _spread(transformers.DistilBertForSequenceClassification(config))


def vit(**options: Any) -> Any:
    timm = pytest.importorskip("timm")
    sizes = {
        "img_size": 16,
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 4,
        "num_heads": 4,
        "mlp_ratio": 1.5,
        "num_classes": 3,
    }
    return _spread(timm.create_model("deit_tiny_patch16_224", **sizes, init_values=0.5, **options))


def _spread(model: Any) -> Any:
    """Convert to float64, with biases and norms that are not 0 and 1."""
    for parameter in model.double().parameters():
        with torch.no_grad():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


MODELS = {
    "language model": language_model,
    "grouped, gated": lambda: language_model(
        num_kv_heads=2, plan=[("softmax", {"output_gate": "swish", "output_norm": "rms", "bias": True})] * 4
    ),
    "other mechanisms": lambda: language_model(
        plan=["linear", "sigmoid", ("local", {"window": 3}), "softmax"],
        stack={"branch_norm": "all", "layer_scale": 0.5},
    ),
    "encoder": lambda: encoder(
        plan=[("softmax", {"feed_forward_kind": "gelu", "feed_forward_options": {"bias": True}})] * 4
    ),
    "llama": llama,
    "grouped llama": lambda: llama(num_key_value_heads=2),
    "bert": bert,
    "gpt2": open_gpt2,
    "gpt-neox": gpt_neox,
    "gpt-neox, one after another": lambda: gpt_neox(use_parallel_residual=False),
    "opt": opt,
    "opt, norms after": lambda: opt(do_layer_norm_before=False, word_embed_proj_dim=8),
    "distilbert": distilbert,
    "timm": vit,
}

NAMED = ("gpt2", "gpt-neox", "opt", "opt, norms after", "distilbert")
"""Models of transformers whose layers are known by their class."""

CUTS = [
    Cut(heads=(0,), neurons=(1, 5, 20)),
    Cut(attention=True, neurons=(0,)),
    Cut(feed_forward=True),
    Cut(heads=(0, 1, 2, 3), neurons=tuple(range(24))),
]


def cuts_for(host: Any) -> list[Cut]:
    """A cut for each layer, in random order."""
    order = torch.randperm(4).tolist()
    every = [CUTS[i] for i in order]
    return [
        Cut(cut.layer, cut.attention, cut.feed_forward, tuple(h for h in cut.heads if h < layer.units), cut.neurons)
        for layer, cut in zip(host.layers, every, strict=True)
    ]


def output(model: Any, ids: Tensor) -> Tensor:
    found = model(ids)
    return next((getattr(found, name) for name in ("logits", "output") if hasattr(found, name)), found).detach()


def batch(name: str = "") -> Tensor:
    return torch.randn(2, 3, 16, 16, dtype=torch.float64) if name == "timm" else torch.randint(VOCABULARY, (2, 11))


@pytest.mark.parametrize("name", MODELS)
def test_a_compacted_model_is_the_masked_one_and_undo_gives_the_model_back(name):
    model, ids = MODELS[name](), batch(name)
    before, names = output(model, ids), [n for n, _ in model.named_parameters()]
    host = find_host(model)
    cuts = cuts_for(host)
    with masked(host, cuts):
        expected = output(model, ids)
    close(output(model, ids), before, 0.0)
    assert not torch.allclose(expected, before)
    numbers = sum(p.numel() for p in model.parameters())
    undo = host.compact(cuts)
    assert sum(p.numel() for p in model.parameters()) < numbers
    close(output(model, ids), expected)
    undo()
    close(output(model, ids), before, 0.0)
    assert [n for n, _ in model.named_parameters()] == names


@pytest.mark.parametrize("name", ["language model", "llama", "bert", *NAMED, "timm"])
def test_whole_layers_go_and_the_others_stay_in_order(name):
    model, ids = MODELS[name](), batch(name)
    host = find_host(model)
    cuts = [Cut(), Cut(layer=True), Cut(), Cut(layer=True)]
    with masked(host, cuts):
        expected = output(model, ids)
    undo = host.compact(cuts)
    close(output(model, ids), expected)
    assert len(find_host(model).layers) == 2
    if name in ("language model", "llama", "gpt2", "gpt-neox", "opt"):
        options = {} if name == "language model" else {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 4}
        new = model.generate(ids, *([4] if name == "language model" else []), **options)
        assert new.shape[1] == (4 if name == "language model" else 15)
    undo()
    assert len(find_host(model).layers) == 4


NARROW = {
    name: MODELS[name]
    for name in (
        *("language model", "grouped, gated", "encoder", "llama", "grouped llama", "bert"),
        *("gpt2", "gpt-neox", "opt", "distilbert"),
    )
} | {
    "convolutions, a sink": lambda: language_model(
        plan=[("gated_linear", {"short_convolution": 3}), ("softmax", {"learn_sink": True})] * 2
    ),
    "tied": lambda: language_model(tie_embeddings=True, embedding_dim=5),
    "learned positions": lambda: language_model(positions="learned", max_length=20, tie_embeddings=True),
    "normed embedding": lambda: encoder(positions="learned", max_length=20, embedding_norm="layer", norm="layer"),
    "tied llama": lambda: llama(tie_word_embeddings=True),
}
GONE = (1, 2, 7, 15)


@pytest.mark.parametrize("name", NARROW)
def test_a_model_of_a_narrower_stream_is_the_one_in_which_these_dimensions_are_masked(name):
    model, ids = NARROW[name](), batch()
    before, state = output(model, ids), {key: value.clone() for key, value in model.state_dict().items()}
    host = find_host(model)
    heads = () if "heads" in host.layers[0].fixed else (0,)
    cuts = [Cut(heads=heads), Cut(), Cut(neurons=(1, 5)), Cut(attention=True)]
    with masked(host, cuts, GONE):
        expected = output(model, ids)
    close(output(model, ids), before, 0.0)
    assert not torch.allclose(expected, before)
    undo = host.compact(cuts, GONE)
    close(output(model, ids), expected)
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    assert {table.embedding_dim for table in tables} == ({5} if name == "tied" else {12})
    if name == "tied llama":
        assert model.lm_head.weight is model.model.embed_tokens.weight
    undo()
    close(output(model, ids), before, 0.0)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["encoder", "tied", "llama", "tied llama", "bert"])
def test_a_model_of_a_narrower_stream_is_saved_and_loaded(name, tmp_path):
    model, ids = NARROW[name](), batch()
    find_host(model).compact([Cut()] * 4, GONE)
    expected = output(model, ids)
    if name in ("encoder", "tied"):
        save_pretrained(model, tmp_path)
        again: Any = from_pretrained(tmp_path)
        assert again.config.dim == 12
    elif name == "bert":
        record, config = structure(model), model.config
        assert record is not None and record["hidden"] == 12 and config.hidden_size == 16
        again = type(model)(config).double()
        restore(again, record, source="the test")
        again.load_state_dict(model.state_dict())
        for wrong in (0, 16, "12"):
            record["hidden"] = wrong
            refused("the hidden width is", restore, type(model)(config), record, source="the test")
    else:
        assert structure(model) is None
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
        assert again.config.hidden_size == 12
        options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 3}
        assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))
    close(output(again.eval(), ids), expected)


def test_a_stream_that_cannot_become_narrower_is_refused_with_the_reason():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}

    def foreign(kind: str, **options: Any) -> Any:
        family = kind[:-11] if kind.endswith("ForCausalLM") else kind.partition("For")[0].removesuffix("Model")
        return getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**sizes, **options)).eval()

    for model, words in (
        (vit(), "whose heads share its width"),
        (language_model(positions="sinusoidal"), "sinusoidal positions are made for its width"),
        (language_model(plan=["mamba2"] * 4), "in blocks.0 ends in no plain projection"),
        (language_model(plan=["gated_softmax"] * 4), "beside blocks.0.mixer.projection"),
        (language_model(norm="rms_nonparametric"), "norms have no weights"),
        (language_model(norm="none"), "no norms"),
        (language_model(stack={"branch_norm": "all"}), "norms of exits or of branches"),
        (language_model(stack={"exits": (1,)}), "norms of exits or of branches"),
        (encoder(pool="additive"), "the pool additive"),
        (foreign("LlamaModel"), "its answers are the hidden states"),
        (foreign("BertModel"), "its answers are the hidden states"),
        (foreign("BertForMaskedLM"), "a head has some of its own"),
        (foreign("GemmaForCausalLM"), "its embeddings are multiplied"),
        (foreign("OlmoForCausalLM"), "norms have no weights"),
        (foreign("ElectraForSequenceClassification", embedding_size=8), "or of another width"),
        (MODELS["opt, norms after"](), "or of another width"),
    ):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        host = find_host(model)
        refused(words, host.compact, [Cut(feed_forward=True), Cut(), Cut(), Cut()], GONE)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for gone, words in (((16,), "dimensions"), (tuple(range(16)), "all dimensions")):
        refused(words, find_host(language_model()).compact, [Cut()] * 4, gone)


def test_no_parts_taken_leave_the_model_exactly_as_it_is():
    for name in ("language model", "llama", "bert", "timm"):
        model, ids = MODELS[name](), batch(name)
        before = output(model, ids)
        host = find_host(model)
        with masked(host, [Cut()] * 4):
            close(output(model, ids), before, 0.0)
        host.compact([Cut()] * 4)
        close(output(model, ids), before, 0.0)


def test_all_heads_gone_leave_the_bias_of_the_projection_which_a_branch_that_is_gone_does_not():
    model, ids = llama(), batch()
    host = find_host(model)
    outputs = []
    for cut in (Cut(heads=(0, 1, 2, 3)), Cut(attention=True)):
        with masked(host, [cut, Cut(), Cut(), Cut()]):
            outputs.append(output(model, ids))
    assert not torch.allclose(*outputs)


def test_a_branch_that_is_gone_is_the_identity_before_a_norm_and_the_norm_behind_one():
    model, x = bert(), torch.randn(2, 5, 16, dtype=torch.float64)
    layer = model.bert.encoder.layer[0]
    first, second = layer.attention.output.LayerNorm, layer.output.LayerNorm
    find_host(model).compact([Cut(attention=True, feed_forward=True), Cut(), Cut(), Cut()])
    close(model.bert.encoder.layer[0](x), second(first(x)).detach())
    own = language_model()
    block = own.blocks[0]
    with masked(find_host(own), [Cut(attention=True, feed_forward=True), Cut(), Cut(), Cut()]):
        close(block(x, context=Context()).output.detach(), x, 0.0)


def test_a_smaller_model_of_regard_is_an_ordinary_one_that_decodes_and_loads(tmp_path):
    model, ids = language_model(), batch()
    find_host(model).compact([CUTS[1], CUTS[2], CUTS[0], Cut(layer=True)])
    expected = output(model, ids)
    slow = model.generate(ids, 5, use_state=False)
    assert torch.equal(model.generate(ids, 5), slow)
    save_pretrained(model, tmp_path)
    again: Any = from_pretrained(tmp_path)
    close(output(again, ids), expected, 0.0)
    assert again.config.num_layers == 3


@pytest.mark.parametrize("make", [llama, open_gpt2, gpt_neox, opt])
def test_generation_of_transformers_counts_tokens_where_the_first_attention_is_gone(make):
    model, ids = make(), batch()
    find_host(model).compact([Cut(attention=True), Cut(), CUTS[1], Cut()])
    from regard.integrations.transformers import CACHE

    cache = getattr(model(ids[:, :6], use_cache=True), CACHE)
    assert cache.get_seq_length() == 6
    second = model(ids[:, 6:], **{CACHE: cache}, use_cache=True).logits
    close(second.detach(), output(model, ids)[:, 6:])
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 5}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_gates_are_differentiable_and_leave_the_weights_alone():
    model, ids = encoder(), batch()
    layers = find_host(model).layers
    gates = torch.rand(4, dtype=torch.float64, requires_grad=True)
    with gated(layers, {1: Gates(heads=gates)}):
        model(ids).output.square().sum().backward()
    assert gates.grad is not None and bool((gates.grad != 0).all())


def test_what_cannot_be_taken_is_refused_with_the_reason():
    for options, words in (
        ({"plan": [("softmax", {"learn_sink": True})] * 4}, "has parameters in addition to its heads"),
        ({"positions": "alibi"}, "differ from head to head"),
        ({"plan": [("softmax", {"short_convolution": 3})] * 4}, "pass a convolution"),
    ):
        model = language_model(**options)
        refused(words, find_host(model).compact, [Cut(heads=(0,)), Cut(), Cut(), Cut()])
        find_host(model).compact([Cut(attention=True), Cut(), Cut(), Cut()])
    refused("share", find_host, language_model(stack={"share": "all"}))
    refused("0 stacks of known layers.*within conv1d_as_linear", find_host, gpt2())
    refused("divided by the layer's number", find_host, open_gpt2(scale_attn_by_inverse_layer_idx=True))
    refused("Linear", find_host, torch.nn.Linear(2, 2))
    refused("all heads say together", find_host(vit(scale_attn_norm=True)).compact, [Cut(heads=(0,)), *[Cut()] * 3])
    refused("hard attention in a model of timm", find_host(vit()).compact, [Cut(hard=2), *[Cut()] * 3])
    other = vit()
    other.blocks[1].attn = torch.nn.Identity()
    refused("VisionTransformer with an Identity", find_host, other)
    refused("out of a ResNet", find_host, pytest.importorskip("timm").create_model("test_resnet"))
    refused("neurons", find_host(language_model()).compact, [Cut(neurons=(24,)), Cut(), Cut(), Cut()])
    refused("cuts of 1 layers", find_host(language_model()).compact, [Cut()])


@pytest.mark.parametrize(
    ("kind", "branches", "heads"),
    [
        ("RobertaPreLayerNorm", "norms come before", ""),
        ("Esm", "norms come before", ""),
        ("MobileBert", "more than hidden states", ""),
        ("LayoutLM", "returns no weights", ""),
        ("BigBird", "by the length", "attention interface"),
        ("MegatronBert", "norms come before", "attention interface"),
        ("RoFormer", "", "attention interface"),
    ],
)
def test_relatives_of_bert_are_refused_what_their_layers_cannot_lose_and_searched_for_the_rest(kind, branches, heads):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, pad_token_id=1, embedding_size=16, **sizes)
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    host, ids = find_host(model), torch.randint(2, VOCABULARY, (2, 9))
    before = model(ids).logits
    given = [{"input_ids": ids, "labels": torch.tensor([0, 1])}]
    if heads:
        refused("hard attention in a", regard.compress, model, "axformer", given)
    regard.compress(model, "axformer:hard=0,groups=1", given).undo()
    for words, cut in ((branches, Cut(attention=True)), (heads, Cut(heads=(0,)))):
        if words:
            refused(words, host.compact, [cut, Cut()])
        else:
            undo = host.compact([cut, Cut()])
            assert not torch.equal(model(ids).logits, before)
            undo()
    assert torch.equal(model(ids).logits, before)


def test_a_refused_cut_of_a_model_of_timm_changes_nothing():
    model, images = vit(), batch("timm")
    before = output(model, images)
    refused("hard attention", find_host(model).compact, [Cut(neurons=(0,)), Cut(attention=True), Cut(hard=2), Cut()])
    close(output(model, images), before, 0.0)


def test_a_vision_transformer_that_timm_did_not_create_is_cut_as_one_that_it_did():
    model, images = vit(), batch("timm")
    del model._model_args
    before = output(model, images)
    undo = find_host(model).compact([Cut(neurons=(0, 5)), Cut(layer=True), Cut(neurons=(1, 2)), Cut(neurons=(3, 4))])
    assert len(model.blocks) == 3 and structure(model) is not None
    undo()
    close(output(model, images), before, 0.0)
    assert structure(model) is None
