"""FastV keeps the tokens that the last token attends to, with their positions, and leaves the model unchanged afterwards."""

import pytest
import torch
from support import close, load, recorded_state, refused

from regard.compression.tokens.fastv import FewerTokens, fewer_tokens

transformers = pytest.importorskip("transformers")
from regard.integrations.transformers import CACHE  # noqa: E402  needs transformers


def model(kind="Llama", layers=4):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, num_hidden_layers=layers, head_dim=8, **sizes)
    config._attn_implementation = "eager"
    return getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()


def prompt(batch=2, length=24):
    return torch.randint(1, 50, (batch, length))


@torch.no_grad()
def by_hand(one, ids, chosen, layer):
    """The last token's logits when layers from `layer` on read only the chosen tokens, and the previous layer's attention."""
    inner, seen = one.model, None
    x, places = inner.embed_tokens(ids), torch.arange(ids.shape[1]).expand(len(ids), -1)
    for number, block in enumerate(inner.layers):
        if number == layer:
            rows = torch.arange(len(ids))[:, None]
            x, places = x[rows, chosen], places[rows, chosen]
        n = x.shape[1]
        causal = torch.full((n, n), -torch.inf, dtype=x.dtype).triu(1).expand(len(ids), 1, n, n)
        around = inner.rotary_emb(x, places)
        if number == layer - 1:
            _, weights = block.self_attn(block.input_layernorm(x), attention_mask=causal, position_embeddings=around)
            seen = weights[:, :, -1].mean(1)
        x = block(x, attention_mask=causal, position_embeddings=around)
        x = x[0] if isinstance(x, tuple) else x
    return one.lm_head(inner.norm(x))[:, -1], seen


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_later_layers_read_what_the_last_token_looks_at(kind, implementation):
    one, ids = model(kind), prompt()
    one.set_attn_implementation(implementation)
    with torch.no_grad(), fewer_tokens(one, keep=0.4, layer=2, place=slice(3, 20)) as fast:
        found = one(ids, use_cache=True)
    one.set_attn_implementation("eager")
    expected, seen = by_hand(one, ids, fast.places, 2)
    close = 1e-10 if implementation == "eager" else 1e-6  # eager attention computes softmax in float32
    assert (found.logits[:, -1] - expected).abs().max() < close
    assert fast.places.shape == (2, 24 - 17 + 7)  # ceil(0.4 * 17) of 17 remain
    for row, chosen in zip(seen, fast.places.tolist(), strict=True):
        ranked = sorted(range(3, 20), key=lambda j: -float(row[j]))[:7]
        assert chosen == sorted([*range(3), *ranked, *range(20, 24)])
    lengths = [layer.keys.shape[2] for layer in getattr(found, CACHE).layers]
    assert lengths == [24, 24, 14, 14]


@pytest.mark.parametrize("how", ["dropped", "masked"])
def test_the_authors_model_keeps_the_same_tokens_and_says_the_same_of_them(how):
    """The authors' code computes norms, angles and logits in float32."""
    found = load("compression_fastv")
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-6,
    )
    config._attn_implementation = "eager"
    one = transformers.LlamaForCausalLM(config).double().eval()
    one.load_state_dict(recorded_state("compression_fastv"))
    with torch.no_grad(), fewer_tokens(one, keep=7 / 16, layer=2, place=slice(3, 19)) as fast:
        logits = one(found["ids"]).logits[0]
    assert fast.places.equal(found["places"][None])
    close(logits, found[how].double(), 1e-6)


def test_a_share_of_one_changes_nothing_and_the_model_is_itself_afterwards():
    one, ids = model(), prompt()
    choice = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    before = one.generate(ids, **choice)
    with fewer_tokens(one, keep=1.0):
        assert one.generate(ids, **choice).equal(before)
    with fewer_tokens(one, keep=0.2) as fast:
        written = one.generate(ids, **choice)
        assert written.shape == before.shape and fast.places.shape == (2, 6)  # 5 of 23, plus the last
    assert one.generate(ids, **choice).equal(before)


def test_tokens_after_the_prompt_stand_behind_all_of_it():
    one, ids = model(), prompt(1)
    with torch.no_grad(), fewer_tokens(one, keep=0.5, layer=1) as fast:
        cache = getattr(one(ids, use_cache=True), CACHE)
        chosen = fast.places.clone()
        step = one(torch.tensor([[7]]), **{CACHE: cache}, use_cache=True).logits[:, -1]
    whole = torch.cat([ids, torch.tensor([[7]])], 1)
    expected, _ = by_hand(one, whole, torch.cat([chosen, torch.tensor([[24]])], 1), 1)
    assert (step - expected).abs().max() < 1e-10


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_hidden_tokens_leave_the_kept_ones_as_dropped_tokens_do(layer, implementation):
    one, ids = model(), prompt()
    one.set_attn_implementation(implementation)
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    for masks in ({}, {"attention_mask": padding}):
        if masks and implementation == "eager":
            one = one.float()  # in float64, eager attention is NaN where a row sees nothing
        found = {}
        for mask_only in (False, True):
            chance = None if layer else torch.Generator().manual_seed(7)
            with fewer_tokens(one, keep=0.4, layer=layer, mask_only=mask_only, generator=chance) as fast:
                read = one(ids, use_cache=True, **masks)
                more = {name: torch.cat([x, x[:, -1:]], 1) for name, x in masks.items()}
                step = one(ids[:, -1:], use_cache=True, **{CACHE: getattr(read, CACHE)}, **more)
            found[mask_only] = fast.places, read.logits, step.logits
        (places, rows, step), (same, every, after) = found[False], found[True]
        assert places.equal(same) and rows.shape[1] == 11 and every.shape[1] == 24
        close = 1e-10 if implementation == "sdpa" else 1e-5
        assert (rows - every.gather(1, places[..., None].expand_as(rows))).abs().max() < close
        assert (step - after).abs().max() < close
        assert (one(ids, **masks).logits - every)[:, -1].abs().max() > 1e-4


@torch.no_grad()
def test_where_no_layer_sees_all_tokens_the_choice_is_random():
    one, ids = model(), prompt()
    chance, counts = torch.Generator().manual_seed(3), torch.zeros(24)
    for i in range(60):
        with fewer_tokens(one, keep=0.5, layer=0, place=slice(2, 22), mask_only=i % 2 == 1, generator=chance) as fast:
            found = one(ids).logits[:, -1]
        expected, _ = by_hand(one, ids, fast.places, 0)
        assert (found - expected).abs().max() < 1e-5
        counts += torch.bincount(fast.places.flatten(), minlength=24)
    assert (counts[:2] == 120).all() and (counts[22:] == 120).all()
    assert ((counts[2:22] - 60).abs() < 25).all()  # 4.5 standard deviations


def test_padding_in_front_is_looked_at_by_nobody():
    one, ids = model().float(), prompt(1)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], 1)
    mask = torch.cat([torch.zeros(1, 5, dtype=torch.int64), torch.ones_like(ids)], 1)
    with torch.no_grad(), fewer_tokens(one, keep=10 / 28) as fast:
        found = one(padded, attention_mask=mask).logits[:, -1]
    assert (fast.places >= 5).all()
    with torch.no_grad(), fewer_tokens(one, keep=10 / 23) as alone:
        expected = one(ids).logits[:, -1]
    assert (fast.places - 5).equal(alone.places) and (found - expected).abs().max() < 1e-5


def test_other_models_and_numbers_are_refused():
    def entered(one, **options):
        with fewer_tokens(one, **options):
            pass

    refused("share of 0", entered, model(), keep=0)
    refused("layer=4", entered, model(), keep=0.5, layer=4)
    refused("layer >= 0", entered, model(), keep=0.5, layer=-1)
    refused("model of one layer", entered, model(layers=1), keep=0.5, layer=0)
    refused("generator with layer=2", entered, model(), keep=0.5, generator=torch.Generator())
    refused("a Linear", entered, torch.nn.Linear(2, 2), keep=0.5)
    scores = torch.zeros(1, 5)
    assert FewerTokens(0.5, 1, slice(None)).choose(scores).tolist() == [[0, 1, 4]]
