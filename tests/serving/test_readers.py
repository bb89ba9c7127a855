"""Served models answer as their own `generate` does, whatever else is in the batch."""

import random

import pytest
import torch
from readers import drain

from regard import swap
from regard.compression.sparse import sparsely
from regard.contract import Unsupported
from regard.engines.paged_cache import PagedState
from regard.models import LanguageModel, LanguageModelConfig
from regard.serving.engine import Engine, Limits, Request
from regard.serving.language import ENDLESS, LanguageReader

VOCABULARY = 30
PLANS = {
    "softmax": ["softmax"] * 2,
    "softmax with everything": [
        ("softmax", {"softcap": 3.0, "learn_sink": True, "window": (9, 0), "num_kv_heads": 1}),
        ("softmax", {"positions": "alibi"}),
    ],
    "hybrid": ["gated_linear", "softmax", "local", "mamba2"],
    "other caches": ["sigmoid", "differential", "latent", "clipped_softmax"],
    "inserted tokens": [("landmark", {"block": 5}), "softmax"],
    "convolutions beside pages": [("softmax", {"short_convolution": 3})],
}

CACHES = (
    "snapkv:capacity=9,window=4,local=3,prefix=1,kernel=3",
    "ada_snapkv:capacity=9,window=4,local=3,prefix=1,kernel=3",
    "h2o:capacity=8",
    "streaming:capacity=7",
    "quest:budget=4,page=2",
    "int8:block=4,window=3",
)


def requests(count=7, sampled=True):
    draws = random.Random(torch.initial_seed())
    beginning = draws.choices(range(VOCABULARY), k=11)
    made = []
    for i in range(count):
        prompt = beginning * (i % 2) + draws.choices(range(VOCABULARY), k=draws.choice([1, 4, 17, 26]))
        options = {"temperature": 1.0, "seed": i, "top_p": 0.9} if sampled and i % 3 == 0 else {}
        made.append(Request(str(i), prompt, draws.randint(2, 8), **options))
    return made


def language_model(plan, **options):
    return LanguageModel(LanguageModelConfig(VOCABULARY, dim=16, plan=plan, num_heads=2, **options)).double().eval()


def own_answer(model, request, **options):
    generator = torch.Generator().manual_seed(request.seed or 0)
    found = model.generate(
        torch.tensor([request.prompt]),
        request.max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        generator=generator,
        **options,
    )
    return found[0].tolist()


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS.keys())
def test_answers_of_a_language_model_equal_generate_alone(plan):
    check(language_model(plan))


@pytest.mark.parametrize("method", CACHES)
def test_answers_through_a_cheaper_cache_equal_generate_alone(method):
    model = language_model(["softmax", "mamba2", "softmax"])
    with sparsely(model, method):
        check(model)


def test_a_model_with_a_layer_that_has_no_state_is_read_anew():
    model = language_model(["softmax"])
    model.blocks[0].continues = False
    check(model)


def check(model):
    reader = LanguageReader(model, rows=3, context=64, cache_tokens=100, page_size=4)
    engine = Engine(reader, Limits(rows=3, chunk=9))
    asked = requests()
    tokens, _ = drain(engine, asked, every=2)
    for request in asked:
        assert tokens[request.key] == own_answer(model, request, use_state=not reader.whole)
    assert (engine.prefixes is None) == reader.at_once != (engine.shared_tokens > 0)
    assert not reader._held._where and not reader._texts


def test_a_recurrent_layer_holds_as_much_after_a_long_prompt_as_after_a_short_one():
    reader = LanguageReader(language_model(["gated_linear", "softmax"]), rows=3, context=64, page_size=4)
    engine, held = Engine(reader, Limits(rows=3, prefix_cache=False)), []
    for n in (3, 60):
        engine.submit(Request(str(n), [1] * n, 2))
        engine.step()
        held.append(reader.held_bytes)
        drain(engine)
    assert held[0] == held[1] > 0 == reader.held_bytes and reader.page_bytes == 2 * 2 * 8 * 8 * 4


def test_pages_that_run_out_change_no_answer():
    model = language_model(["softmax", "gated_linear"])
    engine = Engine(LanguageReader(model, rows=4, context=40, cache_tokens=64, page_size=4), Limits(rows=4, chunk=9))
    asked = [Request(str(i), [i, 1, 2], 30) for i in range(5)]
    tokens, _ = drain(engine, asked)
    assert engine.preempted > 0
    assert all(tokens[request.key] == own_answer(model, request) for request in asked)


def test_few_queries_are_read_where_the_pages_lie(monkeypatch):
    """With the native kernel, decoding with softmax gathers no pages."""
    from regard.backends.native import library

    if library.why_missing() is not None:
        pytest.skip("no native library")
    model = language_model(["softmax"]).float()
    engine = Engine(LanguageReader(model, rows=2, context=40, page_size=4), Limits(rows=2))
    for i in range(2):
        engine.submit(Request(str(i), [i] * 20, 5))
    while not any(row.writing for row in engine.active):
        engine.step()
    monkeypatch.setattr(PagedState, "extended", None)
    assert len(engine.step()) == 2


def test_a_context_beyond_the_models_positions_is_refused():
    model = language_model(["softmax"], positions="learned", max_length=32)
    assert LanguageReader(model, page_size=4).context == 32
    with pytest.raises(Unsupported, match="reach 32"):
        LanguageReader(model, context=33)
    with pytest.raises(Unsupported, match="GiB"):
        LanguageReader(language_model(["softmax"]), cache_tokens=1 << 50)


RETRIEVES = ("landmark", {"block": 3, "top_k": 2, "chunk": 8})


@pytest.mark.parametrize(
    ("plan", "positions", "context"),
    [
        ([RETRIEVES] * 2, 23, ENDLESS),  # (2 + 1)(3 + 1) + 3 + 8
        ([RETRIEVES] * 2, 22, 22),
        ([RETRIEVES, "softmax"], 23, 23),
        ([("landmark", {"block": 3})], 23, 23),
        ([("landmark", {"block": 3, "top_k": 2})], 23, 23),
    ],
)
def test_the_context_has_no_end_where_all_layers_stay_within_the_positions(plan, positions, context):
    model = language_model(plan, max_length=positions)
    assert LanguageReader(model).context == context


def test_a_text_beyond_the_positions_is_answered_as_alone():
    model = language_model([RETRIEVES] * 2, max_length=23)
    request = Request("0", random.Random(torch.initial_seed()).choices(range(VOCABULARY), k=150), 6)
    engine = Engine(LanguageReader(model), Limits(rows=2, prefix_cache=False))  # reads it in one piece, as alone
    tokens, _ = drain(engine, [request])
    assert tokens["0"] == own_answer(model, request)


transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": 0,
}
MODELS = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), None),
    "windows": (lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=7)), None),
    "swapped": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), "sigmoid"),
    "swapped, with states": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)), "gated_linear"),
}


@pytest.mark.parametrize(("make", "mechanism"), MODELS.values(), ids=MODELS.keys())
def test_answers_of_a_model_of_transformers_equal_its_own(make, mechanism):
    model = make().double().eval()
    if mechanism is not None:
        swap(model, mechanism)
    check_of_transformers(model, alone=mechanism is not None)


@pytest.mark.parametrize("method", CACHES)
def test_answers_of_a_model_of_transformers_through_a_cheaper_cache_equal_its_own(method):
    with sparsely(MODELS["llama"][0]().double().eval(), method) as sparse:
        check_of_transformers(sparse.model, alone=True)


def check_of_transformers(model, alone):
    from regard.serving.transformers import TransformersReader

    asked = requests(sampled=False)
    wanted = {}
    for request in asked:
        ids = torch.tensor([request.prompt])
        limits = {"max_new_tokens": request.max_tokens, "min_new_tokens": request.max_tokens}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **limits)
        wanted[request.key] = found[0, ids.shape[1] :].tolist()
    reader = TransformersReader(model, rows=3, cache_tokens=100, page_size=4)
    assert reader.context == 64
    tokens, _ = drain(Engine(reader, Limits(rows=3, chunk=9)), asked, every=2)
    assert tokens == wanted
    assert reader.alone == alone
    assert not reader._caches and not reader._texts


@pytest.mark.parametrize("kind", ["llama", "windows"])
def test_layers_in_one_call_give_the_answers_of_layers_by_themselves(kind, monkeypatch):
    from regard.backends.native import library
    from regard.integrations.transformers import fuse_layers
    from regard.serving.transformers import TransformersReader

    if library.why_missing() is not None:
        pytest.skip("no native library")
    model, asked, seen, call = MODELS[kind][0]().eval(), requests(sampled=False), [], library.call
    monkeypatch.setattr(library, "call", lambda given: (seen.append(given.kernel), call(given)))
    found = []
    for fused in (False, True):
        if fused:
            assert fuse_layers(model) == 2
        reader = TransformersReader(model, rows=3, cache_tokens=100, page_size=4)
        seen.clear()
        found.append(drain(Engine(reader, Limits(rows=3, chunk=9)), asked, every=2)[0])
        assert ("decoder_layers" in seen) == fused
    assert found[0] == found[1]


def test_models_whose_layers_keep_something_else_are_refused():
    from regard.serving.transformers import TransformersReader

    config = transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=2)
    with pytest.raises(Unsupported, match="from_transformers"):
        TransformersReader(transformers.MambaForCausalLM(config).eval())
