"""StreamingLLM: keys are rotated to their places in the cache, or stay at their positions in the text."""

from __future__ import annotations

import pytest
import torch
from support import refused

import regard
from regard import Context, Mask
from regard.compression.sparse import sparsely, sparsify
from regard.integrations.transformers.rotary import Rotary
from regard.models import LanguageModel, LanguageModelConfig

transformers = pytest.importorskip("transformers")
CACHE = pytest.importorskip("regard.integrations.transformers").CACHE

CAPACITY, SINKS = 9, 2
FAMILIES = ("Llama", "Mistral", "Qwen2", "Gemma", "GPTNeoX", "Phi", "Cohere")  # the last: whole, a part, in pairs


def own(positions="rotary", **options):
    sizes = {"vocab_size": 40, "dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    config = LanguageModelConfig(plan="softmax", positions=positions, **sizes, **options)
    return disturbed(LanguageModel(config))


def of_transformers(kind, **options):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": None, "pad_token_id": 0, "eos_token_id": None}
    config = getattr(transformers, f"{kind}Config")(vocab_size=40, **sizes, **options)
    return disturbed(transformers.AutoModelForCausalLM.from_config(config))


def disturbed(model):
    """Large random parameters, so that positions make a difference."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


MODELS = {
    "own": own,
    "lrpe": lambda: own("lrpe"),
    **{kind: lambda kind=kind: of_transformers(kind) for kind in FAMILIES},
}


def named(positions, capacity=CAPACITY):
    return f"streaming:capacity={capacity},sinks={SINKS},positions={positions}"


@torch.no_grad()
def stepped(model, ids, prompt):
    """Logits of a prompt and of the tokens after it, read one at a time."""
    found, state = [], None
    for piece in [ids[:, :prompt], *ids[:, prompt:].split(1, 1)]:
        if isinstance(model, LanguageModel):
            here = model(piece, state=state, context=Context(want=frozenset({"state"})))
            output, state = here.output, here.state
        else:
            here = model(piece, **{CACHE: state}, use_cache=True)
            output, state = here.logits, getattr(here, CACHE)
        found.append(output)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", MODELS)
def test_logits_do_not_depend_on_how_much_was_dropped(name):
    """Once two layers have dropped everything that differs, only the first tokens and the last ones are left of a text."""
    model = MODELS[name]()
    first, last = torch.randint(3, 40, (2, SINKS)), torch.randint(3, 40, (2, 3 * CAPACITY))
    texts = [torch.cat([first, torch.randint(3, 40, (2, n)), last], 1) for n in (CAPACITY, 4 * CAPACITY + 1)]
    apart = {}
    for positions in ("cache", "text"):
        with sparsely(model, named(positions)):
            one, other = (stepped(model, ids, ids.shape[1] - 3 * CAPACITY + 2)[:, -CAPACITY:] for ids in texts)
        apart[positions] = float((one - other).abs().max() / one.abs().max())
    assert apart["cache"] < 1e-12
    assert apart["text"] > 1e-5, "the first tokens are farther away in the longer text"


def heads_of(model):
    """The parts of a model's layers: queries, keys and values that are not rotated, and the rest of the layer."""
    if isinstance(model, LanguageModel):
        for block in model.blocks:
            mixer = block.mixer
            projections = mixer.query, mixer.key, mixer.value

            def finish(x, y, block=block):
                return block.add_fed(x + block.mixer.output(y), context=Context())

            yield block.mixer_norm, projections, finish
        return
    for layer in model.model.layers:
        attention = layer.self_attn

        def finish(x, y, layer=layer):
            x = x + layer.self_attn.o_proj(y)
            return x + layer.mlp(layer.post_attention_layernorm(x))

        yield layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), finish


def turned(model, x, positions):
    """(positions, heads, 8) rotated, feature i with i + 4."""
    if isinstance(model, LanguageModel):
        angles = positions[:, None] * 10_000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        cos, sin = (f(angles).repeat(1, 2)[:, None] for f in (torch.cos, torch.sin))
    else:
        cos, sin = (y[0][:, None] for y in model.model.rotary_emb(x, positions[None]))
    return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


@torch.no_grad()
def by_loops(model, ids, prompt, positions):
    """Logits for one text, by the definition: each token after the prompt reads the kept keys, rotated anew."""
    is_own = isinstance(model, LanguageModel)
    x = (model.embed(ids, None, Context())[0] if is_own else model.model.embed_tokens(ids))[0]
    for norm, projections, finish in heads_of(model):
        q, k, v = (project(norm(x)).unflatten(-1, (-1, 8)) for project in projections)
        rows = []
        for t in range(len(x)):
            kept = torch.arange(t + 1)
            if t >= prompt and t >= CAPACITY:
                kept = torch.cat([kept[:SINKS], kept[SINKS - CAPACITY :]])
            places = torch.arange(len(kept)) if positions == "cache" else kept
            keys, query = turned(model, k[kept], places), turned(model, q[t : t + 1], places[-1:])[0]
            keys, values = (y.repeat_interleave(2, 1) for y in (keys, v[kept]))
            weights = (torch.einsum("hd,nhd->hn", query, keys) * 8**-0.5).softmax(-1)
            rows.append(torch.einsum("hn,nhd->hd", weights, values).flatten())
        x = finish(x[None], torch.stack(rows)[None])[0]
    return model.logits(model.norm(x)) if is_own else model.lm_head(model.model.norm(x))


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("prompt", [3, CAPACITY, 20])
@pytest.mark.parametrize("name", ["own", "Llama"])
def test_a_token_reads_the_kept_keys_at_their_positions(name, prompt, positions):
    model, ids = MODELS[name](), torch.randint(3, 40, (2, 31))
    with sparsely(model, named(positions)):
        found = stepped(model, ids, prompt)
    expected = torch.stack([by_loops(model, row[None], prompt, positions) for row in ids])
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


def test_no_key_is_rotated_beyond_the_cache(monkeypatch):
    seen = []
    by_rank = Rotary.by_rank
    monkeypatch.setattr(Rotary, "by_rank", lambda self, x, ranks: seen.append(ranks) or by_rank(self, x, ranks))
    model, ids = MODELS["Llama"](), torch.randint(3, 40, (2, 60))
    with sparsely(model, named("cache")):
        stepped(model, ids, 4)
    assert {int(ranks.max()) for ranks in seen[-8:]} == {CAPACITY - 1}  # queries and keys of two layers, twice
    assert max(int(ranks.max()) for ranks in seen) == CAPACITY - 1 and min(int(ranks.min()) for ranks in seen) == 0
    mine = MODELS["own"]()
    with sparsely(mine, named("cache")):
        for layer in (block.mixer for block in mine.blocks):
            rotate = layer.positions.rotate
            monkeypatch.setattr(
                layer.positions, "rotate", lambda x, where, rotate=rotate: seen.append(where) or rotate(x, where)
            )
        seen.clear()
        stepped(mine, ids, 4)
    assert len(seen) == 2 * 2 * 57 and max(int(where.max()) for where in seen) == CAPACITY - 1


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("lengths", [[20, 3, 12], [12, 12, 12]])
def test_padded_rows_are_read_as_alone(lengths, positions):
    later = [6, 1, 4]
    ids, more, steps = (torch.randint(3, 40, (3, n)) for n in (20, 6, 15))
    model, want = MODELS["own"](), frozenset({"state"})
    with sparsely(model, named(positions)), torch.no_grad():
        one = model(ids, context=Context(mask=Mask(lengths=torch.tensor(lengths)), want=want))
        two = model(more, state=one.state, context=Context(mask=Mask(lengths=torch.tensor(later))))
        three = model(steps, state=two.state)
        for row, (n, m) in enumerate(zip(lengths, later, strict=True)):
            text = torch.cat([ids[row, :n], more[row, :m], steps[row]])[None]
            alone = stepped(model, text, n)[0]
            found = torch.cat([one.output[row, :n], two.output[row, :m], three.output[row]])
            assert (found - alone).abs().max() < 1e-12 * alone.abs().max()


@pytest.mark.parametrize("positions", ["cache", "text"])
@pytest.mark.parametrize("beams", [1, 3])
def test_padded_batches_generate_what_each_row_does(positions, beams):
    ids, mask = torch.randint(3, 40, (3, 20)), torch.ones(3, 20, dtype=torch.long)
    mask[0, :11], mask[2, :17] = 0, 0
    model = MODELS["GPTNeoX"]()
    settings = {"max_new_tokens": 15, "do_sample": False, "num_beams": beams}
    with sparsely(model, named(positions)):
        together = model.generate(ids, attention_mask=mask, **settings)[:, 20:]
        for row, there in enumerate(mask.bool()):
            alone = model.generate(ids[row, there][None], **settings)
            assert torch.equal(together[row], alone[0, -15:])


@torch.no_grad()
def test_quantized_models_whose_attention_has_no_parameters_are_read_alike():
    model, ids = of_transformers("Llama").float(), torch.randint(40, (1, 12))
    regard.compress(model, "int8")
    assert not any(True for layer in model.model.layers for _ in layer.self_attn.parameters())
    expected = model(ids).logits
    with sparsely(model, named("cache", capacity=20)):
        found = stepped(model, ids, 8)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    regard.swap(model, "softmax")
    assert torch.allclose(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_models_without_positions_read_the_same_in_both_ways():
    model, ids = own("none"), torch.randint(3, 40, (2, 40))
    found = []
    for positions in ("cache", "text"):
        with sparsely(model, named(positions)):
            found.append(stepped(model, ids, 12))
    assert torch.equal(*found)


def test_what_cannot_be_placed_anew_is_refused():
    refused("positions='book'", sparsify, own(), "streaming:positions=book")
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}}
    reasons = {
        "sinusoidal positions": own("sinusoidal"),
        "learned positions": own("learned"),
        "seqpe_mul positions": own("seqpe_mul"),
        "GPT2Attention and no rotation": of_transformers("GPT2", n_embd=32, n_head=4),
        "frequencies that follow the length": of_transformers("Llama", **dynamic),
    }
    for reason, model in reasons.items():
        refused(f"{reason}.*try streaming:positions=text", sparsify, model, "streaming")
        sparsify(model, "streaming:positions=text").undo()
    recipe = "tokens:method=streaming,capacity=8"
    refused("try tokens:method=snapkv", regard.compress, of_transformers("GPT2"), recipe, [torch.tensor([[3, 4]])])
    with sparsely(of_transformers("Llama"), "streaming") as sparse:
        refused(
            "positions that do not count", sparse.model, torch.tensor([[3, 4]]), position_ids=torch.tensor([[5, 9]])
        )
