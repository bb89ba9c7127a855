"""The study of scan and snap: facts, exact gradients, the conservation law, the limit, findings, and the report."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import answer, run
from support import close, load, refused
from torch.nn import functional as F

from regard import catalogue
from regard.contract import Unsupported
from regard.reproductions.framework.runs import run_cell
from regard.studies import get_study
from regard.studies.framework.protocol import opened
from regard.studies.framework.report import render_study
from regard.studies.training_dynamics.cells import FORMS, exactness, figure, following, sweep
from regard.studies.training_dynamics.facts import Contexts, Facts, counted
from regard.studies.training_dynamics.layer import Model, entropy
from regard.studies.training_dynamics.runs import Descent, descend, flow, in_order

RECTIFIED = Path(__file__).parents[2] / "docs/examples/mechanisms/rectified.py"


@pytest.fixture
def draws():
    return np.random.default_rng(int(torch.randint(1 << 30, ())))


def log_likelihood(model, weights, tokens, following):
    """The definition, token by token; the last token is the query."""
    size = len(weights["y"])
    one_hot = F.one_hot(tokens, size).double()
    last = one_hot[:, -1]
    keys = one_hot if model.last_as_key else one_hot[:, :-1]
    scores = torch.einsum("bm,ml,btl->bt", last, model.scores(weights), keys)
    u = (scores.softmax(1)[..., None] * keys).sum(1) + (last if model.residual else 0)
    f = u / u.norm(dim=1, keepdim=True) if model.normalise else u
    return -F.cross_entropy(f @ weights["y"], following)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_definition_token_by_token(form, draws):
    model, facts = Model(**FORMS[form]), Facts.make(2, 2, common=3, distinct=3)
    fact = torch.randint(4, (12,))
    chosen = torch.multinomial(facts.probabilities[fact], 9, replacement=True)
    tokens = torch.cat([chosen, facts.last[fact][:, None]], 1)
    contexts = Contexts(counted(chosen, facts.size), facts.last[fact], facts.following[fact])
    weights = {name: w.requires_grad_() for name, w in model.start(facts.size, "uniform").items()}
    expected = log_likelihood(model, weights, tokens, facts.following[fact])
    value, gradients = model.gradients(weights, contexts)
    close(value, expected)
    close(model.value(weights, contexts), expected)
    for name, of in zip(weights, torch.autograd.grad(expected, list(weights.values())), strict=True):
        close(gradients[name], of)


def test_equals_the_recorded_model_and_generator():
    told = load("training_dynamics_model2")
    facts = Facts.make(2, 2, common_of_last=3, distinct=6)
    close(facts.probabilities, told["probabilities"].double(), 1e-6)
    assert facts.last.tolist() == told["last"].tolist() and facts.following.tolist() == told["following"].tolist()

    def contexts(x, y):
        x = x.long()
        return Contexts(counted(x[:, :-1], facts.size), x[:, -1], y.long())

    start = {"y": told["k1"].double().mT.contiguous(), "z": told["k2"].double()}
    forms = {
        "paper": Model(),
        "plain": Model(normalise=False),
        "residual": Model(residual=True),
        "base": Model(last_as_key=True),
    }
    for name, model in forms.items():
        value, gradients = model.gradients(start, contexts(told["x"], told["y"]))
        close(-value, told[f"loss_{name}"].double(), 1e-6)
        close(-gradients["y"].mT, told[f"grad1_{name}"].double(), 1e-5)
        close(-gradients["z"], told[f"grad2_{name}"].double(), 1e-5)

    class Recorded:
        def __init__(self):
            self.batches = iter(zip(told["xs"], told["ys"], strict=True))

        def draw(self, *_):
            return contexts(*next(self.batches))

    *course, (weights, last) = descend(Model(), Recorded(), start, Descent(steps=20, ratio=2.0), None)
    losses = [loss for _, loss in course] + [last]
    close(torch.tensor(losses[1:], dtype=torch.float64), told["losses"].double(), 1e-5)
    close(weights["y"].mT, told["k1_end"].double(), 1e-4)
    close(weights["z"], told["k2_end"].double(), 1e-4)


def test_sgd_conserves_the_sums_and_adam_and_decay_do_not():
    found = exactness({"steps": 100}, int(torch.randint(1 << 30, ())))
    assert all(found[f"conserved: {form}"] < 1e-10 for form in FORMS)
    assert all(found[f"gradient: {form}"] < 1e-12 for form in FORMS)
    assert found["changed by: SGD, momentum"] < 1e-10
    assert min(found[f"changed by: {name}"] for name in ("Adam", "SGD, weight decay")) > 1e-3


def test_from_zeros_the_first_step_moves_the_decoder_alone(draws):
    facts, model = Facts.make(2, 2), Model()
    _, gradients = model.gradients(model.start(facts.size), facts.draw(32, 20, draws))
    assert bool((gradients["z"] == 0).all()) and bool((gradients["y"] != 0).any())


def test_contexts_are_what_the_facts_say(draws):
    facts = Facts.make(3, 2, common_of_last=2)
    assert facts.size == 10 + 2 * 3 + 10 * 6 + 3 + 6
    assert int(facts.common.sum()) == 10 + 6 and int(facts.distinct.sum()) == 60
    close(facts.probabilities.sum(1), torch.ones(6, dtype=torch.float64))
    found = facts.draw(3000, 50, draws)
    assert bool((found.counts.sum(1) == 50).all())
    for i in range(6):
        own = found.following == facts.following[i]
        assert bool((found.last[own] == facts.last[i]).all())
        close(found.counts[own].mean(0) / 50, facts.probabilities[i], 0.1)


def test_finite_contexts_near_the_limit_as_the_root_of_their_length(draws):
    facts, model = Facts.make(2, 1), Model()
    weights = {**model.start(facts.size, "uniform"), "z": torch.randn(facts.size, facts.size, dtype=torch.float64)}
    limit = model.attention(weights, facts.limit())
    distances = []
    for length in (256, 4096):
        contexts = facts.draw(400, length, draws)
        fact = (contexts.following - facts.following[0]).long()
        distances.append(float((model.attention(weights, contexts) - limit[fact]).norm(dim=1).mean()))
    assert distances[0] / distances[1] == pytest.approx(4, rel=0.2)


def test_descent_follows_the_limit_and_the_better_the_larger_the_batch():
    setting = {"num_last": 2, "num_next": 2, "steps": 60, "parts": 4, "rate": 0.1, "ratio": 5.0, "length": 4096}
    found = following({**setting, "batches": [4, 256]}, int(torch.randint(1 << 30, ())))
    assert found["largest"] < found["smallest"] / 2 < 0.1


def test_relabelled_tokens_are_learned_alike():
    facts, model = Facts.make(2, 2), Model()
    order = torch.randperm(facts.size)
    start = model.start(facts.size, "uniform")
    moved = {name: torch.empty_like(w) for name, w in start.items()}
    for name, w in start.items():
        moved[name][order[:, None], order] = w
    *_, one = flow(model, facts, start, 0.5, 2.0, 20)
    *_, other = flow(model, facts.relabelled(order), moved, 0.5, 2.0, 20)
    for name in start:
        close(other[name][order[:, None], order], one[name], 1e-10)


def test_in_the_limit_equal_tokens_stay_equal_and_tokens_that_tell_nothing_stay():
    facts, model = Facts.make(2, 1), Model()
    *_, weights = flow(model, facts, model.start(facts.size), 1.0, 1.0, 30)
    common = weights["z"][facts.last][:, facts.common]
    assert float(common.abs().max()) > 0.1
    close(common, common[:, :1].expand_as(common), 1e-10)
    alike = Facts.make(2, 2, distinct=0)
    *_, weights = flow(model, alike, model.start(alike.size), 1.0, 1.0, 30)
    assert float(weights["z"].abs().max()) < 1e-12 and float(weights["y"].abs().max()) > 0.1


def test_relative_attention_is_what_the_scores_have_grown_by():
    facts, model = Facts.make(2, 1), Model()
    *_, weights = flow(model, facts, model.start(facts.size), 1.0, 1.0, 20)
    first, last = (model.attention(w, facts.limit())[0] for w in (model.start(facts.size), weights))
    own = facts.probabilities[0] > 0
    gain = (last / first)[own].square()
    close(gain / gain[0], (2 * (weights["z"][facts.last[0], own] - weights["z"][facts.last[0], 0])).exp())


def test_attention_scans_and_snaps():
    found = figure({"num_last": 2, "num_next": 1, "steps": 100, "rate": 1.0, "ratio": 1.0}, int(torch.randint(99, ())))
    mass = [found["common"][i] for i in (0, 10, 20, 40, 100)]
    assert mass == [pytest.approx(at, abs=0.03) for at in (0.645, 0.571, 0.456, 0.397, 0.388)]  # by the paper's code
    assert all(b < a for a, b in pairwise(mass[:4]))
    assert found["losses"][21] < 1e-3 and found["last entropy"] > 2
    assert found["in order"] > 0.95
    assert 20 < found["snapped"] < 60 and found["still"] < 0.05


def test_a_faster_decoder_freezes_attention_earlier_and_leaves_it_broader():
    found = sweep({"num_last": 1, "num_next": 2, "steps": 100, "rate": 1.0, "ratios": [1, 10]}, 3)
    assert found["rise"] > 0.05 and found["earlier"] > 0


def test_runs_on_the_same_contexts_are_those_of_each_ratio_alone():
    setting, seed = {"num_last": 2, "num_next": 2, "steps": 20, "rate": 1.0}, int(torch.randint(1 << 30, ()))
    both = sweep({**setting, "ratios": [1, 4]}, seed)
    assert both["entropies"][0] != both["entropies"][1]
    for i, ratio in enumerate(both["ratios"]):
        alone = sweep({**setting, "ratios": [ratio]}, seed)
        for name in ("entropies", "common"):
            assert alone[name] == [pytest.approx(both[name][i], rel=1e-12)]


def test_the_order_of_tokens_is_counted_in_pairs():
    facts = Facts.make(1, 2, distinct=4)
    grown = facts.probabilities * (facts.probabilities * 9).exp()
    assert in_order(grown, facts) == 1
    assert in_order(facts.probabilities / facts.probabilities.clamp(min=1e-9).exp(), facts) == 0
    assert float(entropy(torch.full((8,), 1 / 8))) == pytest.approx(np.log(8))


def test_what_means_nothing_is_refused():
    refused("q = k = 0", Model(rank=2).start, 5)
    refused("start", Model().start, 5, "ones")
    refused("facts without tokens", Facts.make, common=0, distinct=0)
    refused("num_last=0", Facts.make, 0)
    refused("method", Descent, method="rmsprop")


def test_every_cell_is_shown_in_the_report():
    study = get_study("training-dynamics")
    chosen = study.choose()
    reproduction = study.make(chosen)
    cells = {(name, 0): run_cell(reproduction, setting, 0) for name, setting in reproduction.smoke_settings().items()}
    shown = study.sections(chosen, cells)
    assert [len(part.rows) > 0 for part in shown] == [True] * 5
    (drawn,) = shown[-1].pictures
    assert drawn.curves["Adam"][-1][1] == cells["exactness", 0]["course: Adam"][-1] > 1e-3
    older = {
        key: {name: x for name, x in one.items() if "course" not in name}
        for key, one in cells.items()
        if key[0] == "exactness"
    }
    assert [len(part.pictures) for part in study.sections(chosen, older)] == [0], (
        "rows without the courses are still shown"
    )
    assert study.sections(chosen, {}) == []
    page = render_study(opened(study, chosen, None) | {"sections": [part.plain() for part in shown]})
    assert page.count("<svg") >= 8
    seed = {name: cell for (name, _), cell in cells.items()}
    assert all(check.value(seed) is not None for check in (*reproduction.checks, *reproduction.needs))


def test_the_text_is_read_by_any_mechanism_that_returns_its_weights(capsys, tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of a text" for i in range(400)))
    study = get_study("training-dynamics")
    try:
        told = answer(
            capsys, f"study training-dynamics {tmp_path}/text.txt --plugin {RECTIFIED} --table --output", tmp_path
        )
        assert told["entered"] == ["softmax", "rectified"]
        chosen = study.choose(mechanisms="rectified,local:window=4", data=[f"{tmp_path}/text.txt"])
        reproduction = study.make(chosen)
        assert "mechanism" not in reproduction.settings["text"], "rows of softmax count whoever reads beside it"
        settings = {name: one for name, one in reproduction.smoke_settings().items() if name.startswith("text")}
        assert list(settings) == ["text", "text, rectified", "text, local:window=4"]
        cells = {(name, 0): run_cell(reproduction, setting, 0) for name, setting in settings.items()}
        (part,) = study.sections(chosen, cells)
        assert [row["mechanism"] for row in part.rows] == ["softmax", "rectified", "local:window=4"]
        assert len({row["last entropy"] for row in part.rows}) == 3
    finally:
        catalogue.unregister("rectified")
    assert {"softmax", "sigmoid", "local"} <= set(study.choose(mechanisms="all").mechanisms)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("linear", "it returns no attention weights"),
        ("mamba2", "it returns no attention weights"),
        ("differential", "two heads make one map"),
        ("low_rank_pooling", "it lacks the pattern causal-self"),
        ("moving_average", "it returns no attention weights"),
        ("query_pooling", "it lacks the pattern causal-self"),
    ],
)
def test_what_cannot_read_the_text_is_refused_in_one_sentence(name, why):
    example = RECTIFIED.with_name(f"{name}.py")
    if example.exists():
        catalogue.load_plugin(example)
    try:
        with pytest.raises(Unsupported, match=f"{name} in training-dynamics, since .*{why}") as refusal:
            get_study("training-dynamics").choose(mechanisms=name)
    finally:
        if example.exists():
            catalogue.unregister(name)
    assert str(refusal.value).count("supported") == 2, "no refusal within a refusal"


def test_the_command_takes_a_text_of_the_users(capsys, tmp_path):
    words = [f"line {i} of a text" for i in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(words))
    options = f"training-dynamics {tmp_path / 'text.txt'} --table --output"
    text = answer(capsys, f"study {options}", tmp_path / "out")["settings"]["text"]
    assert text["data"] == [str(tmp_path / "text.txt")]
    study = get_study("training-dynamics")
    reproduction = study.make(study.choose(data=[str(tmp_path / "text.txt")]))
    assert run_cell(reproduction, reproduction.smoke_settings()["text"], 0)["last entropy"] > 0
    (tmp_path / "text.txt").write_text("\n".join(reversed(words)))
    assert answer(capsys, f"study {options}", tmp_path / "out")["settings"]["text"]["digest"] != text["digest"]
    (tmp_path / "short.txt").write_text("a b")
    for name, word in (("nothing.txt", "nothing.txt"), ("short.txt", "more text")):
        code, _, said = run(capsys, f"study training-dynamics {tmp_path / name} --output", tmp_path / "out")
        assert code == 2 and word in said
        assert not (tmp_path / "out").exists()
