"""Speculative decoding gives the model's own text: exactly for greedy decoding, in distribution for sampling."""

import pytest
import torch

from regard import Unsupported
from regard.models import LanguageModel, LanguageModelConfig
from regard.models.generation import distribution, sample
from regard.models.speculation import ModelDraft, PromptLookup, ReadLanguageModel, Speculation

VOCABULARY = 12


def model(plan, seed=0, vocabulary=VOCABULARY):
    torch.manual_seed(seed)
    made = LanguageModel(LanguageModelConfig(vocabulary, dim=16, plan=plan, num_heads=2)).double().eval()
    with torch.no_grad():
        for weight in made.parameters():
            weight.mul_(3.0)  # so that the next token's probabilities differ
    return made


def tokens(stream):
    return [int(token) for token in stream]


@pytest.mark.parametrize("plan", [["softmax"], ["gated_linear", "local"], ["mamba2"], ["delta_rule", "softmax"]])
@pytest.mark.parametrize("draft", ["a model", "itself", "a lookup"])
def test_the_likeliest_text_is_that_of_the_model_alone(plan, draft):
    target = model(plan)
    ids = torch.randint(VOCABULARY, (1, 17))
    drafts = {"a model": model(["linear"], 1), "itself": target}
    proposes = PromptLookup() if draft == "a lookup" else ModelDraft(ReadLanguageModel(drafts[draft]))
    speculation = Speculation(ReadLanguageModel(target), proposes, count=3)
    assert tokens(speculation.stream(ids, 40)) == target.generate(ids, 40)[0].tolist()
    counts = speculation.counts
    assert counts.tokens == 40 and counts.kept <= counts.proposed
    if draft == "itself":
        assert counts.kept == counts.proposed and counts.passes == 10


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("drawn", [True, False], ids=["a model", "a lookup"])
def test_pairs_of_drawn_tokens_are_distributed_as_the_models_own(drawn, options):
    """The first two of three tokens in 1,200 draws, against their exact probabilities."""
    vocabulary, runs = 6, 1200
    target, other = model(["softmax"], 3, vocabulary), model(["linear"], 4, vocabulary)
    temperature = 2.0
    prompts = [
        torch.tensor([[1, 2, x, 1, 2]]) for x in range(3, vocabulary)
    ]  # their lookup is neither certain nor hopeless
    likely = [distribution(target(ids).output[0, -1], temperature=temperature)[x] for x, ids in enumerate(prompts, 3)]
    ids = prompts[min(range(len(prompts)), key=lambda i: abs(float(likely[i].detach()) - 0.5))]
    first = distribution(target(ids).output[0, -1], temperature=temperature, **options)
    nexts = torch.cat([ids.expand(vocabulary, -1), torch.arange(vocabulary)[:, None]], 1)
    second = distribution(target(nexts).output[:, -1], temperature=temperature, **options)
    expected = ((first[:, None] * second).flatten() * runs).detach()

    reads, draws = _Remembered(target), torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    other_reads = _Remembered(other)
    counts = torch.zeros(vocabulary * vocabulary)
    for _ in range(runs):
        proposes = ModelDraft(other_reads) if drawn else PromptLookup()
        made = Speculation(reads, proposes, count=2)
        a, b, _ = tokens(made.stream(ids, 3, temperature=temperature, generator=draws, **options))
        counts[a * vocabulary + b] += 1
    possible = expected > 0
    assert counts[~possible].sum() == 0
    common = expected > 5
    rare = possible & ~common
    found = torch.cat([counts[common], counts[rare].sum()[None]])[: int(common.sum()) + bool(rare.any())]
    wanted = torch.cat([expected[common], expected[rare].sum()[None]])[: len(found)]
    freedom = len(found) - 1
    assert chi_square(found, wanted) < freedom + 5 * (2 * freedom) ** 0.5 + 10


class _Remembered:
    """A model that computes each sequence only once, for tests with few sequences."""

    def __init__(self, model):
        self.model, self.known, self.vocabulary = model, {}, model.config.vocab_size

    def __call__(self, ids, state, last=None):
        text = (*(state or ()), *ids[0].tolist())
        if text not in self.known:
            self.known[text] = self.model(torch.tensor([text])).output[0]
        return self.known[text][-(last or ids.shape[1]) :], text

    def cut(self, state, read, kept):
        return state[: len(state) - read + kept]


def test_a_distribution_is_what_is_sampled():
    logits = torch.randn(3, 9, dtype=torch.float64)
    for options in ({"temperature": 0.7, "top_k": 4}, {"temperature": 1.5, "top_p": 0.6}, {"temperature": 0.0}):
        share = distribution(logits, **options)
        torch.testing.assert_close(share.sum(-1), torch.ones(3, dtype=torch.float64))
        drawn = torch.stack([sample(logits, **options) for _ in range(200)], 1)
        assert bool((share.gather(1, drawn) > 0).all())
    assert torch.equal(distribution(logits).argmax(-1), logits.argmax(-1))


def test_it_stops_after_a_stop_token_and_never_writes_more_than_asked():
    target = model(["softmax"])
    ids = torch.randint(VOCABULARY, (1, 5))
    whole = target.generate(ids, 30)[0].tolist()
    for stop in set(whole):
        made = Speculation(ReadLanguageModel(target), ModelDraft(ReadLanguageModel(target)), count=7)
        assert tokens(made.stream(ids, 30, stop_tokens=[stop])) == whole[: whole.index(stop) + 1]
    for count in (0, 1, 2, 5):
        made = Speculation(ReadLanguageModel(target), ModelDraft(ReadLanguageModel(target)), count=7)
        assert tokens(made.stream(ids, count)) == whole[:count]


def test_a_lookup_takes_the_latest_and_the_longest_match():
    text = torch.tensor([7, 1, 2, 3, 9, 2, 3, 8, 4, 1, 2, 3])
    assert PromptLookup(3).propose(text, 2, None)[0].tolist() == [9, 2]
    assert PromptLookup(2).propose(text, 2, None)[0].tolist() == [8, 4]
    assert PromptLookup(3).propose(torch.tensor([1, 2, 3]), 2, None)[0].tolist() == []
    assert PromptLookup(3).propose(torch.tensor([5]), 2, None)[0].tolist() == []


def test_what_cannot_be_done_is_refused():
    target, other = model(["softmax"]), model(["softmax"], vocabulary=VOCABULARY + 1)
    with pytest.raises(Unsupported, match="vocabulary"):
        Speculation(ReadLanguageModel(target), ModelDraft(ReadLanguageModel(other)))
    made = Speculation(ReadLanguageModel(target), PromptLookup())
    with pytest.raises(Unsupported, match="one prompt"):
        tokens(made.stream(torch.ones(2, 3, dtype=torch.int64), 5))
    with pytest.raises(Unsupported, match="count"):
        Speculation(ReadLanguageModel(target), PromptLookup(), count=0)
