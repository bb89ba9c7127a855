"""The study of softmax regression: exact derivatives, shifts and bounds, solvers, learners, and its report."""

from pathlib import Path

import pytest
import torch
from command_line import answer, run
from support import close, refused

from regard import catalogue
from regard.reproductions.framework.runs import run_cell
from regard.studies import Chosen, get_study
from regard.studies.framework.protocol import opened
from regard.studies.framework.report import render_study
from regard.studies.softmax_regression import MECHANISMS, cells, refuses
from regard.studies.softmax_regression.cells import VARIANTS, bounds, derivatives, problem_of, solvers
from regard.studies.softmax_regression.learners import (
    Learner,
    Likeness,
    Tasks,
    constructed,
    descent,
    loss_of,
    tuned_rate,
)
from regard.studies.softmax_regression.regression import Regression
from regard.studies.softmax_regression.shifts import (
    extreme,
    shift_of_data,
    shift_of_weight,
    tight_bound_of_data,
    tight_bound_of_weight,
)
from regard.studies.softmax_regression.solvers import descend, newton

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples" / "mechanisms"


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))


def test_gradient_and_hessian_are_those_of_automatic_differentiation(generator):
    found = derivatives({"n": 9, "d": 4, "draws": 5}, generator)
    assert set(found) == {*VARIANTS, "identity"}
    assert max(found.values()) < 1e-12, found


def test_the_hessian_is_symmetric_and_the_gradient_vanishes_at_the_target(generator):
    problem, x = problem_of(6, 7, 4, generator)
    h = problem.hessian(x)
    close(h, h.mT)
    at_target = Regression(problem.a, problem.predict(x))
    assert float(at_target.gradient(x).abs().max()) < 1e-15


def test_neither_forms_a_matrix_of_all_keys(generator):
    n = 300_000  # a square matrix would take 720 GB
    problem, x = problem_of(1, n, 3, generator)
    close(problem.hessian_product(x, x), (problem.hessian(x) @ x[..., None])[..., 0], 1e-10)


def test_predictions_add_up_and_ignore_what_all_keys_share(generator):
    problem, x = problem_of(6, 7, 4, generator)
    same = Regression(problem.a + torch.randn(6, 1, 4, generator=generator, dtype=torch.float64), problem.b)
    for link in ("exp", "cosh"):
        close(Regression(problem.a, problem.b, link).predict(x).sum(-1), torch.ones(6, dtype=torch.float64))
    close(same.predict(x), problem.predict(x))
    close(same.value(x), problem.value(x))
    r = torch.randn(4, generator=generator, dtype=torch.float64)  # a direction in which all scores change equally
    alike = Regression(torch.cat([problem.a, torch.ones(6, 7, 1, dtype=torch.float64)], -1), problem.b)
    assert float(alike.gradient(torch.cat([x, r[:1].expand(6, 1)], -1))[:, -1].abs().max()) < 1e-15


@pytest.mark.parametrize("link", ["exp", "cosh", "sinh"])
def test_large_scores_do_not_overflow(generator, link):
    problem, x = problem_of(6, 7, 4, generator, link=link)
    f = problem.predict(1e4 * x)
    assert bool(f.isfinite().all()) and bool(problem.gradient(1e4 * x).isfinite().all())
    close(f.sum(-1), torch.ones(6, dtype=torch.float64))


def test_two_keys_are_logistic_least_squares(generator):
    problem, x = problem_of(6, 2, 4, generator)
    difference = problem.a[:, 0] - problem.a[:, 1]
    s = (difference * x).sum(-1).sigmoid()
    close(problem.predict(x)[:, 0], s)
    miss = s - problem.b[:, 0]
    close(problem.value(x), miss.square())
    close(problem.gradient(x), (2 * miss * s * (1 - s))[:, None] * difference)


def test_queries_at_once_add_their_losses(generator):
    problem, x = problem_of(2, 7, 4, generator, queries=True)
    alone = [Regression(problem.a[:, i], problem.b[:, i]) for i in range(3)]
    for name in ("value", "gradient", "hessian"):
        close(getattr(problem, name)(x), sum(getattr(one, name)(x) for one in alone))


def test_what_does_not_go_together_is_refused(generator):
    problem, _ = problem_of(1, 7, 4, generator)
    refused("cross_entropy of sinh", Regression, problem.a, problem.b, "sinh", "cross_entropy")
    refused(
        "cross_entropy of normalised=False", Regression, problem.a, problem.b, loss="cross_entropy", normalised=False
    )
    refused("link", Regression, problem.a, problem.b, "tanh")
    refused("temperature=0", Regression, problem.a, problem.b, temperature=0)
    refused(r"a of shape \(1, 7, 4\) and b of shape \(1, 6\)", Regression, problem.a, problem.b[:, :6])
    refused("rate=0", descend, problem, torch.zeros(1, 4, dtype=torch.float64), 1, 0.0)


def test_a_shift_of_weight_or_data_is_a_shift_of_the_target(generator):
    before, x0 = problem_of(20, 7, 4, generator)
    moved, x1 = problem_of(20, 7, 4, generator)
    after = Regression(moved.a, before.b)
    for shifted, now in (
        (shift_of_weight(before, x0, x1), before.predict(x1)),
        (shift_of_data(before, after, x0), after.predict(x0)),
    ):
        close((before.predict(x0) - shifted).norm(dim=-1), (now - before.b).norm(dim=-1))
        close(shifted.sum(-1), before.b.sum(-1))
        assert bool((shifted < 0).any()), "no shifted target here is no probability, as most are in theory"


def test_to_first_order_only_the_shift_of_the_scores_counts(generator):
    problem, x = problem_of(6, 7, 4, generator)
    x = x + 0.5 * x.sign()
    f = problem.predict(x)
    jacobian = f.diag_embed() - f[..., None] * f[:, None]
    errors = []
    for size in (1e-3, 1e-4):
        dx = size * torch.ones_like(x)
        scores = (problem.a @ dx[..., None])[..., 0]
        da = scores[..., None] * x[:, None] / x.square().sum(-1)[:, None, None]  # so that dA x = A dx
        same = da + torch.full((6, 1, 4), size, dtype=torch.float64)  # adds a constant to all scores
        expected = (jacobian @ scores[..., None])[..., 0]
        changes = [
            problem.predict(x + dx) - f,
            *(Regression(problem.a + d, problem.b).predict(x) - f for d in (da, same)),
        ]
        errors.append(max(float((change - expected).norm(dim=-1).max()) for change in changes))
        assert max(float((change - changes[0]).abs().max()) for change in changes) < 1e-14
    assert errors[1] < errors[0] / 50  # second order


@pytest.mark.parametrize("radius", [1.0, 4.0])
def test_both_bounds_hold_in_a_thousand_draws(generator, radius):
    found = bounds({"n": 8, "d": 4, "draws": 1000, "radius": radius}, generator)
    for shift in ("weight", "data"):
        assert found[f"{shift}: beyond tight"] == found[f"{shift}: beyond loose"] == 0
        assert 0.05 < found[f"{shift}: largest"] < 1
        assert found[f"{shift}: loose log10"] < -2  # far too loose to verify anything


@pytest.mark.parametrize(("n", "d"), [(2, 2), (9, 5)])
def test_the_tight_bound_is_reached_at_its_extreme(generator, n, d):
    a, x0, x1, a1 = extreme(n, d, generator=generator)
    problem = Regression(a, torch.full((n,), 1 / n, dtype=a.dtype))
    by_weight = (shift_of_weight(problem, x0, x1) - problem.b).norm()
    by_data = (shift_of_data(problem, Regression(a1, problem.b), x0) - problem.b).norm()
    for moved, bound in ((by_weight, tight_bound_of_weight(a, x0, x1)), (by_data, tight_bound_of_data(a, a1, x0))):
        assert 0.95 < float(moved / bound) <= 1


def test_newton_converges_quadratically_and_descent_falls(generator):
    found = solvers({"n": 10, "d": 4, "draws": 16, "steps": 30, "weight": 0.5}, generator)
    assert found["order"] > 1.7 and found["newton gradient"] < 1e-8
    assert found["largest rise"] <= 1e-15
    assert found["regularised: lowest eigenvalue"] > 0
    assert found["plain: indefinite"] > 0.5  # without the regulariser the Hessian is not positive definite


def test_newton_never_climbs_where_the_hessian_is_indefinite(generator):
    problem, x = problem_of(16, 10, 4, generator)
    losses = newton(problem, x, 12).losses
    assert bool((losses[1:] <= losses[:-1] + 1e-15).all()) and bool((losses[-1] < losses[0]).all())


def test_linear_attention_is_one_step_of_gradient_descent(generator):
    n, d, rate = 10, 5, 20.0
    tasks = Tasks.draw(7, n, d, generator, dtype=torch.float64)
    close(constructed(d, rate / n**2)(tasks), descent(rate)(tasks))
    y = torch.randn(7, n, generator=generator, dtype=torch.float64)
    tokens = torch.cat([torch.cat([tasks.a, y[..., None]], -1), torch.nn.functional.pad(tasks.queries, (0, 1))], 1)
    x = rate / n * (tasks.a.mT @ y[..., None])  # a step from 0 on |A x - y|^2 / (2 n)
    layer = constructed(d, rate / n).layer
    close(layer(tokens).output[:, n:, -1], (tasks.queries @ x)[..., 0])


def test_the_step_is_compared_at_its_best_rate(generator):
    tasks = Tasks.draw(256, 10, 5, generator)
    best = tuned_rate(tasks)
    least = loss_of(descent(best), tasks)
    uniform = loss_of(lambda tasks: torch.full_like(tasks.targets, 0.1), tasks)
    assert least < 0.7 * uniform
    for rate in (best / 3, best * 3):
        assert loss_of(descent(rate), tasks) > least
    assert loss_of(descent(1.0), tasks) > 1.5 * least


def test_a_learner_is_alike_itself_and_its_construction_alike_the_step(generator):
    tasks = Tasks.draw(64, 10, 5, generator, dtype=torch.float64)
    step = descent(30.0)
    alike = Likeness.of(constructed(5, 30.0 / 100), step, tasks)
    assert alike.difference < 1e-12 and alike.slope < 1e-12 and alike.cosine > 1 - 1e-12
    other = Likeness.of(Learner("softmax", 6).double(), step, tasks)
    assert other.difference > 0.05 and other.cosine < 0.8


def test_a_learner_trains_on_new_tasks_whoever_came_before(monkeypatch):
    seen = []
    monkeypatch.setattr(cells, "loss_of", lambda answer, tasks: (seen.append(tasks), loss_of(answer, tasks))[1])
    reproduction = get_study("softmax-regression").make(Chosen("tiny", ("linear",)))
    setting = reproduction.smoke_settings()["learner linear"]
    items = setting["items"]
    cells.beside.cache_clear()
    first = run_cell(reproduction, setting, 3)
    assert run_cell(reproduction, setting, 3) == first and cells.beside.cache_info().hits == 1
    draws = torch.Generator().manual_seed(3)
    rated, test = (Tasks.draw(items, setting["n"], setting["d"], draws) for _ in range(2))
    assert any(torch.equal(tasks.a, test.a) for tasks in seen)
    trained = torch.cat([tasks.a for tasks in seen if len(tasks.a) == setting["batch_size"]])
    assert len(trained) == 2 * setting["steps"] * setting["batch_size"]
    for tasks in (rated, test):
        assert not (trained[:, None] == tasks.a).flatten(2).all(-1).any()


def test_layers_that_cannot_learn_it_are_refused_in_words(capsys, tmp_path):
    assert [refuses(name) for name in MECHANISMS] == [None] * len(MECHANISMS)
    assert "two heads make one map" in str(refuses("differential"))
    assert "pooling" in str(refuses("low_rank_pooling")) and "parameters" in str(refuses("fnet"))
    code, _, said = run(capsys, "study softmax-regression --mechanisms funnel --output", tmp_path)
    assert code == 2 and "funnel" in said
    assert not list(tmp_path.iterdir())


def test_every_cell_is_shown_in_the_report():
    study = get_study("softmax-regression")
    chosen = study.choose(mechanisms="linear")
    reproduction = study.make(chosen)
    cells = {(name, 0): run_cell(reproduction, setting, 0) for name, setting in reproduction.smoke_settings().items()}
    shown = study.sections(chosen, cells)
    assert [len(part.rows) > 0 for part in shown] == [True] * 6
    for part in shown[:2]:
        assert [row["learner"] for row in part.rows] == ["softmax", "linear", "softmax, of the context"]
    alike, trained = shown[1].rows[1], cells["learner linear", 0]
    assert (alike["cosine"], alike["norm of the difference"]) == (trained["cosines"][-1], trained["slopes"][-1])
    assert (alike["untrained cosine"], alike["untrained norm"]) == (trained["cosines"][0], trained["slopes"][0])
    assert [list(one.curves["linear"])[-1][1] for one in shown[1].pictures] == [
        alike["cosine"],
        alike["norm of the difference"],
    ]
    record = opened(study, chosen, None) | {"sections": [part.plain() for part in shown]}
    page = render_study(record)
    assert "Over the paper&#39;s bound" in page or "Over the paper's bound" in page
    assert page.count("<svg") >= 6
    assert all(
        check.value({name: cell for (name, _), cell in cells.items()}) is not None for check in reproduction.checks
    )
    assert study.sections(chosen, {}) == []


def test_the_command_knows_the_study(capsys, tmp_path):
    found = answer(capsys, "study softmax-regression --table --output", tmp_path)
    assert found["outcome"] == "not run" and "learner delta_rule" in found["settings"]


def test_a_plugin_enters(capsys, tmp_path):
    file = EXAMPLES / "rectified.py"
    try:
        options = f"--plugin {file} --mechanisms rectified --table --output"
        found = answer(capsys, f"study softmax-regression {options}", tmp_path)
        assert "learner rectified" in found["settings"]
        reproduction = get_study("softmax-regression").make(Chosen("tiny", ("rectified",)))
        assert run_cell(reproduction, reproduction.smoke_settings()["learner rectified"], 0)["loss"] > 0
    finally:
        catalogue.unregister("rectified")
