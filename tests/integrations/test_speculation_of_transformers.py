"""Speculative decoding of transformers models: their caches are cut back, or the model is refused."""

import pytest
import torch

import regard
from regard import Unsupported
from regard.models.speculation import ModelDraft, PromptLookup, Speculation, _judge

transformers = pytest.importorskip("transformers")
from regard.integrations.transformers.speculation import ReadCausalModel  # noqa: E402


def llama(seed, layers=2):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=24, num_hidden_layers=layers, initializer_range=0.3, eos_token_id=None, **sizes
    )
    return transformers.LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("draft", ["a model", "a lookup"])
def test_the_likeliest_text_is_that_of_generate(draft):
    target = llama(0)
    ids = torch.randint(24, (1, 9))
    alone = target.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=0)[0, 9:]
    proposes = PromptLookup() if draft == "a lookup" else ModelDraft(ReadCausalModel(llama(1, 1)))
    speculation = Speculation(ReadCausalModel(target), proposes, count=3)
    found = [int(token) for token in speculation.stream(ids, 30)]
    assert found == alone.tolist()
    assert speculation.counts.kept < speculation.counts.proposed, "nothing was ever cut back"


def test_logits_of_a_prompt_are_computed_only_where_they_are_used():
    target, counts = llama(0), []
    target.lm_head.register_forward_hook(lambda module, args, output: counts.append(output.shape[1]))
    speculation = Speculation(ReadCausalModel(target), ModelDraft(ReadCausalModel(target)), count=3)
    list(speculation.stream(torch.randint(24, (1, 50)), 12))
    assert max(counts) == 4


def test_a_cache_that_cannot_be_cut_is_refused():
    target = llama(0)
    regard.swap(target, "gated_linear")
    speculation = Speculation(ReadCausalModel(target), PromptLookup())
    with pytest.raises(Unsupported, match="cannot be cut back"):
        next(speculation.stream(torch.randint(24, (1, 9)), 5))


def drawing(patch, chances):
    """Make draws known: uniform numbers are `chances`, and of a distribution its copy is noted and token 0 drawn."""
    seen, left = [], iter(chances.tolist())

    def multinomial(shares, *_, **__):
        seen.append(shares.flatten() / shares.sum())
        return torch.zeros(*shares.shape[:-1], 1, dtype=torch.int64)

    patch.setattr(torch, "rand_like", lambda x: chances.view_as(x))
    patch.setattr(torch, "rand", lambda *_, **__: torch.tensor(next(left), dtype=torch.float64))
    patch.setattr(torch, "multinomial", multinomial)
    return seen


def test_drawn_tokens_are_kept_and_replaced_as_transformers_does(monkeypatch):
    from transformers.generation.utils import _speculative_sampling

    kept_of = []
    for _ in range(60):
        p, q = (torch.randn(n, 7, dtype=torch.float64) for n in (5, 4))
        proposed, chances = torch.randint(7, (4,)), torch.rand(4, dtype=torch.float64)
        with monkeypatch.context() as patch:
            expected = drawing(patch, chances)
            _, matches = _speculative_sampling(proposed[None], q[None], 4, p[None])
        with monkeypatch.context() as patch:
            found = drawing(patch, chances)
            kept, _ = _judge(p.softmax(-1), proposed, q.softmax(-1), None)
        assert kept == int(matches) and len(found) == len(expected) == 1
        assert torch.allclose(found[0], expected[0], rtol=0, atol=1e-12)
        kept_of.append(kept)
    assert set(kept_of) >= {0, 1, 2, 4}


def test_a_lookup_proposes_what_transformers_does_where_the_tokens_occurred_once():
    """Where the same tokens occurred more than once, transformers takes the earliest place and regard the latest."""
    from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

    once = more = 0
    for _ in range(300):
        longest, text = int(torch.randint(1, 4, ())), torch.randint(12, (int(torch.randint(1, 30, ())),))
        theirs = PromptLookupCandidateGenerator(num_output_tokens=4, max_matching_ngram_size=longest, max_length=99)
        expected = theirs.get_candidates(text[None])[0][0, len(text) :].tolist()
        proposed = PromptLookup(longest).propose(text, 4, None)[0].tolist()
        places = []
        for n in range(min(longest, len(text) - 1), 0, -1):
            places = places or [i + n for i in range(len(text) - n) if torch.equal(text[i : i + n], text[-n:])]
        if len(places) < 2:
            once += bool(places)
            assert proposed == expected
        else:
            more += 1
            assert (expected, proposed) == (text[places[0] :][:4].tolist(), text[places[-1] :][:4].tolist())
    assert once > 30 and more > 30
