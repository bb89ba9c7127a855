"""Shorter prompts keep the tokens that the model expects least, given the tokens kept so far."""

import math

import pytest
import torch
from support import close, load, recorded_state, refused

from regard.compression.prompts import choose_parts, shorten
from regard.models import LanguageModel, LanguageModelConfig
from regard.models.speculation import ReadLanguageModel

VOCABULARY = 31


def model():
    sizes = {"vocab_size": VOCABULARY, "dim": 32, "num_heads": 2, "num_layers": 2}
    return LanguageModel(LanguageModelConfig(plan=["softmax", "gated_linear"], **sizes)).double().eval()


def information(one, before, ids):
    """Information by the definition: -log p of each token given all tokens before it, in one pass."""
    text = torch.cat([before, ids])
    with torch.no_grad():
        logits = one(text[None]).output[0].log_softmax(-1)
    at = range(len(before), len(text))
    return [math.inf if t == 0 else -float(logits[t - 1, text[t]]) for t in at]


def test_tokens_of_the_most_information_stay_behind_what_stayed_before():
    one = model()
    parts = [(torch.randint(VOCABULARY, (n,)), share) for n, share in ((7, 1.0), (23, 0.4), (0, 0.5), (5, 0.3))]
    found = shorten(ReadLanguageModel(one), parts, segment=8)
    kept, at = torch.empty(0, dtype=torch.int64), 0
    places = []
    for ids, share in parts:
        for piece in ids.split(8) if len(ids) else ():
            told = information(one, kept, piece)
            own = found.information[at : at + len(piece)].nan_to_num(math.inf)
            assert torch.allclose(own, torch.tensor(told, dtype=torch.float64), atol=1e-10)
            stays = sorted(sorted(range(len(piece)), key=lambda i: -told[i])[: math.ceil(share * len(piece))])
            kept = torch.cat([kept, piece[stays]])
            places += [at + i for i in stays]
            at += len(piece)
    assert found.places.tolist() == places and found.ids.equal(kept)
    assert found.ids.equal(torch.cat([ids for ids, _ in parts])[found.places])


def test_a_share_of_one_keeps_all_and_a_smaller_one_no_more():
    reads, ids = ReadLanguageModel(model()), torch.randint(VOCABULARY, (40,))
    whole = shorten(reads, [(ids, 1.0)])
    assert whole.ids.equal(ids) and bool(whole.information[1:].isfinite().all())
    counts = [len(shorten(reads, [(ids, share)], segment=40).ids) for share in (0.01, 0.25, 0.5, 0.75)]
    assert counts == [1, 10, 20, 30]


def test_parts_that_tell_the_most_are_chosen_while_they_fit():
    one = model()
    parts = [torch.randint(VOCABULARY, (n,)) for n in (9, 6, 12, 5)]
    means = [sum(information(one, ids[:0], ids)[1:]) / (len(ids) - 1) for ids in parts]
    order = sorted(range(4), key=lambda i: -means[i])
    reads = ReadLanguageModel(one)
    assert choose_parts(reads, parts, 100) == [0, 1, 2, 3] and choose_parts(reads, parts, 4) == []
    first = order[0]
    assert choose_parts(reads, parts, len(parts[first]))[0] == first


def test_models_of_transformers_judge_too():
    transformers = pytest.importorskip("transformers")
    from regard.integrations.transformers.speculation import ReadCausalModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    one = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes)).double().eval()
    ids = torch.randint(VOCABULARY, (30,))
    found = shorten(ReadCausalModel(one), [(ids, 0.5)], segment=10)
    kept = found.ids[found.places < 20]
    with torch.no_grad():
        logits = one(torch.cat([kept, ids[20:]])[None]).logits[0].log_softmax(-1)
    expected = -logits[len(kept) - 1 : -1].gather(1, ids[20:, None])[:, 0]
    assert len(found.ids) == 15 and torch.allclose(found.information[20:], expected, atol=1e-10)


def test_information_is_that_of_the_authors_code_which_keeps_the_tokens_before_those_of_the_most():
    transformers = pytest.importorskip("transformers")
    from regard.integrations.transformers.speculation import ReadCausalModel

    found = load("compression_llmlingua")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=40, max_position_embeddings=64, **sizes)
    config._attn_implementation = "eager"
    one = transformers.LlamaForCausalLM(config).double().eval()
    one.load_state_dict(recorded_state("compression_llmlingua"))
    ids, theirs = found["ids"][0], [i + 1 for i in found["places"].tolist() if i + 1 < 30]
    own = shorten(ReadCausalModel(one), [(ids, (len(theirs) + 1) / 30)])  # the first token always stays
    close(own.information[1:], found["information"], 1e-12)
    close(own.information[1:].mean(), found["mean"], 1e-12)
    assert own.places.tolist() == [0, *theirs]


def test_what_is_no_prompt_and_no_share_is_refused():
    reads, ids = ReadLanguageModel(model()), torch.randint(VOCABULARY, (5,))
    refused("share of 0", shorten, reads, [(ids, 0.0)])
    refused("share of 1.5", shorten, reads, [(ids, 1.5)])
    refused("without tokens", shorten, reads, [(ids[:0], 0.5)])
    refused("without tokens", choose_parts, reads, [ids, ids[:0]], 9)
