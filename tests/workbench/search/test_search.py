"""Architecture search (arXiv 2207.13955): supernet, ranker, searchers, budget, and a whole search on a small task."""

import dataclasses
import json
import random
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import answer, run
from PIL import Image
from torch import nn

from regard.catalogue import unregister
from regard.cli.arguments import read_mechanisms
from regard.contract import Context, Unsupported
from regard.measurement.budget import Budget
from regard.measurement.flops import flop_counter
from regard.measurement.store import Store
from regard.models import count_parameters
from regard.models.exits import joint_loss
from regard.models.variants import read_variant, read_variants
from regard.tasks import create_task, mean_loss
from regard.training.loop import run_model
from regard.workbench.comparison.task_models import build, model_config
from regard.workbench.comparison.work import Work
from regard.workbench.search import report
from regard.workbench.search.costs import MEASURES, CostTable, NetworkBudget, count_flops, flops, parameters
from regard.workbench.search.predictor import Predictor, features, judge, kendall_tau, pair_accuracy, prune
from regard.workbench.search.record import _commands, _verdict, task_in_words, write_plan
from regard.workbench.search.run import Search
from regard.workbench.search.searchers import SEARCHERS, check_searchers
from regard.workbench.search.settings import SearchSettings
from regard.workbench.search.space import Choices, Space, fitting
from regard.workbench.search.supernet import Supernet

EXAMPLES = Path(__file__).parents[3] / "docs/examples/mechanisms"
RECALL = create_task("recall", length=20, pairs=3, queries=8, evaluation_items=24)
SIZES = {"dims": (8, 16), "depths": (1, 2), "heads": (1, 2), "feed_forward": (8, 16)}
READING = {"encoder_depths": (2, 3), "memory_layers": (1, 2)}


def space(mechanisms="softmax,cosformer", task=RECALL, **sizes):
    variants = tuple(read_variants(mechanisms))
    sizes = (READING if task.memory_length else {}) | sizes
    settings = SearchSettings(NetworkBudget("flops", 0.6, True)).models(task, variants)
    return Space(task, Choices(variants, **{**SIZES, **sizes}), settings)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A task that reads a memory and writes tokens."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"a": f"text number {i}", "b": f"number {i}"}) for i in range(40)))
    return create_task(
        "summarize", data=str(file), source="a", target="b", length=16, source_length=24, evaluation_items=4
    )


@pytest.fixture(params=["recall", "images", "pairs"])
def task(request):
    if request.param == "pairs":
        return request.getfixturevalue("pairs")
    return RECALL if request.param == "recall" else create_task("images", data="digits", patch=4)


def random_losses(one, networks, kinds=("dim", "depth", "mechanism", "heads", "feed_forward"), seed=0):
    """Losses that are sums of random values, one for each choice of each gene of the given kinds."""
    rng = np.random.default_rng(seed)
    worth = {gene.name: rng.standard_normal(len(gene.choices)) * (gene.kind in kinds) for gene in one.genes}
    return [
        sum(worth[gene.name][n] for gene, n, counts in zip(one.genes, genes, one.active(genes), strict=True) if counts)
        for genes in networks
    ]


def drawn(one, count, seed=0):
    rng, found = random.Random(seed), {}
    while len(found) < count:
        found[one.draw(rng)] = None
    return list(found)


# the space


def test_genes_to_network_to_genes_is_the_identity_and_every_network_is_counted_once():
    one = space()
    every = list(one.every())
    assert len(every) == len(set(every)) == one.size == 2 * (8 + 64)
    assert all(one.genes_of(one.network(genes)) == genes for genes in every)
    cosformer = one.restricted({"mechanism": (1,)})
    assert len(list(cosformer.every())) == cosformer.size == 2 * (4 + 16)
    with pytest.raises(Unsupported, match="networks of the space"):
        one.genes_of(space(dims=(24,)).network((0,) * len(one.genes)))


def test_an_encoder_decoder_has_genes_for_each_attention_of_each_layer(pairs):
    """In the paper's space 18 attentions have a mechanism and heads, 12 layers a network width, 6 cross attentions a number
    of encoder layers, and both sides a width and a depth: 40 genes and 18 mechanisms."""
    one = space(task=pairs, depths=(1, 2, 3, 4, 5, 6), encoder_depths=(6,), memory_layers=(1, 2, 3))
    counts = Counter(gene.kind for gene in one.genes)
    assert counts == {"mechanism": 18, "heads": 18, "feed_forward": 12, "memory_layers": 6, "dim": 2, "depth": 2}
    wanted = {"decoder dim": 1, "decoder depth": 5}
    kinds = {"mechanism": lambda gene: 1, "memory_layers": lambda gene: gene.layer % 3}
    genes = tuple(wanted.get(g.name, kinds.get(g.kind, lambda gene: 0)(g)) for g in one.genes)
    config, network = one.config(genes), one.network(genes)
    assert one.genes_of(network) == genes
    assert (config.dim, config.encoder_dim) == (network.dim, network.encoder_dim) and config.dim != config.encoder_dim
    layers = network.stacks
    assert [options.get("memory_layers", 1) for _, options in config.cross_plan] == [1, 2, 3] * 2
    assert [options["length"] for _, options in config.cross_plan] == [24, 48, 72] * 2
    for plan, stack in (("encoder_plan", "encoder"), ("decoder_plan", "decoder"), ("cross_plan", "cross")):
        told = [(name, options["num_heads"]) for name, options in getattr(config, plan)]
        assert told == [(layer.mechanism, layer.heads) for layer in layers[stack]]


def test_each_side_of_an_encoder_decoder_is_chosen_and_fixed_by_itself(pairs):
    sizes = {"depths": (1,), "encoder_depths": (2,), "heads": (1,), "feed_forward": (8,)}
    one = space(task=pairs, **sizes)
    every = list(one.every())
    assert len(set(every)) == len(every) == one.size == 4 * 2**4 * 2
    assert all(one.genes_of(one.network(genes)) == genes for genes in every)
    assert len({one.describe(genes) for genes in every}) == one.size
    assert len({row.tobytes() for row in features(one, every)}) == one.size
    fixed = one.restricted({"decoder dim": (1,)})
    assert {(g.dim, g.encoder_dim) for g in map(fixed.network, fixed.every())} == {(16, 8), (16, 16)}


def test_the_reference_reads_the_fewest_layers_of_the_encoder_and_the_largest_network_the_most(pairs):
    one = space(task=pairs)
    for genes, read in ((one.uniform("softmax"), 1), (one.extreme(random.Random(0), largest=True), 2)):
        network = one.network(genes)
        assert [layer.memory_layers for layer in network.stacks["cross"]] == [read] * 2
        assert (network.dim, network.encoder_dim, len(network.stacks["encoder"])) == (16, 16, 3)


def test_a_plan_file_builds_the_network_that_was_found(pairs, tmp_path):
    one = space(task=pairs)
    for genes in dict.fromkeys(cases(one)):
        write_plan(one, genes, tmp_path / "plan.json")
        variant = read_variant(str(tmp_path / "plan.json"))
        assert model_config(variant, pairs, one.sized(genes), "bare") == one.config(genes)
    with pytest.raises(Unsupported, match="width of the encoder, on the task recall"):
        model_config(dataclasses.replace(variant, encoder=(), decoder=()), RECALL, one.sized(genes), "bare")


def test_the_reach_of_a_mechanism_is_the_length_of_the_task():
    one = space("cosformer")
    assert all(options["length"] == RECALL.length for _, options in one.config(one.uniform("cosformer")).plan)


# the supernet


def cases(one):
    """Yield genes with every choice of every gene, the other genes being random."""
    rng = random.Random(3)
    for at, gene in enumerate(one.genes):
        for number in range(len(gene.choices)):
            genes = one.extreme(rng, largest=True)
            yield one.canonical((*genes[:at], number, *genes[at + 1 :]))


def test_a_slice_of_the_supernet_equals_the_network_that_stands_alone_forward_and_backward(task):
    one = space(task=task)
    supernet = Supernet(one, 0).double()
    batch = task.training_batch(0, 0, 2)
    batch = batch if batch.inputs.dtype == torch.long else type(batch)(batch.inputs.double(), batch.targets)
    inputs = [batch.inputs] + ([] if batch.memory is None else [batch.memory])
    context = Context(grid=getattr(task, "grid", None))
    for genes in dict.fromkeys(cases(one)):
        alone = build(model_config(one.variant(genes), task, one.sized(genes), "bare"), 1).double()
        used = {supernet.key(alone, name): parameter for name, parameter in alone.named_parameters()}
        assert len(used) == len(list(alone.parameters()))
        with torch.no_grad():
            for name, parameter in used.items():
                parameter.copy_(supernet.tensors[name][tuple(slice(n) for n in parameter.shape)])
        supernet.zero_grad()
        sliced, expected = supernet.run(genes, *inputs, context=context).output, alone(*inputs, context=context).output
        assert torch.allclose(sliced, expected, rtol=0, atol=1e-10)
        grown = torch.randn_like(expected)
        (sliced * grown).sum().backward()
        (expected * grown).sum().backward()
        for name, whole in supernet.tensors.items():
            grad = torch.zeros_like(whole) if whole.grad is None else whole.grad
            own = torch.zeros_like(whole)
            if name in used and used[name].grad is not None:
                own[tuple(slice(n) for n in used[name].shape)] = used[name].grad
            assert torch.allclose(grad, own, rtol=0, atol=1e-10), name


def test_a_matrix_of_several_projections_is_not_cut_and_mechanisms_may_have_projections_of_their_own():
    one = space("softmax,mamba2,gated_linear")
    supernet, whole = Supernet(one, 0), Supernet(one, 0, share=False)
    for genes in drawn(one, 6):
        for name, part in supernet.slices(genes).items():
            key = supernet.key(supernet.model(genes), name)
            if "|" in key:
                assert part.shape == supernet.tensors[key].shape, key
    blocks = [key for key in supernet.tensors if key.startswith("blocks/0/mixer/query")]
    assert blocks == ["blocks/0/mixer/query/weight"]
    assert len([key for key in whole.tensors if key.startswith("blocks/0/mixer/query")]) == 2  # mamba2 has no queries


def test_parameters_that_are_not_cut_are_there_for_each_pair_of_widths_whatever_the_layers_read(pairs):
    one = space("mamba2,gated_linear", task=pairs, depths=(1,), encoder_depths=(2,), feed_forward=(8,))
    supernet, at = Supernet(one, 0), one.at("cross 1 memory_layers")
    for genes in dict.fromkeys(cases(one)):
        found = supernet.slices(genes)
        assert {n: p.shape for n, p in supernet.model(genes).named_parameters()} == {
            n: t.shape for n, t in found.items()
        }
        others = (supernet.model((*genes[:at], n, *genes[at + 1 :])) for n in (0, 1))
        first, second = ([supernet.key(model, name) for name, _ in model.named_parameters()] for model in others)
        assert first == second


def test_a_step_trains_the_largest_the_smallest_and_drawn_networks_by_the_mean_of_their_losses():
    one = space()
    supernet = Supernet(one, 5)
    batch = RECALL.training_batch(0, 0, 3)
    networks = supernet.drawn(7)
    sizes = [[one.network(g).dim, len(one.network(g).stacks["layer"])] for g in networks]
    assert sizes[:2] == [[16, 2], [8, 1]]
    assert networks == Supernet(one, 5).drawn(7) != supernet.drawn(8)
    result = supernet.train()(batch.inputs, context=Context(progress=7.0))
    joint = joint_loss(result, lambda output: mean_loss(RECALL, output, batch))
    each = [mean_loss(RECALL, supernet.run(g, batch.inputs, context=Context()).output, batch) for g in networks]
    assert torch.allclose(joint, torch.stack(each).mean(), atol=1e-6)


def test_a_stand_alone_copy_is_what_the_supernet_computes():
    one = space()
    supernet, batch = Supernet(one, 0).eval(), RECALL.training_batch(0, 0, 2)
    for genes in drawn(one, 3):
        copied = supernet.alone(genes).eval()
        expected = supernet.run(genes, batch.inputs, context=Context()).output
        assert torch.allclose(copied(batch.inputs, context=Context()).output, expected, atol=1e-6)


# costs


def test_costs_of_layers_add_up_to_those_of_networks(task):
    sizes = {"feed_forward": (8,)} if task.memory_length else {"dims": (8,)}
    one = space(task=task, heads=(1,), **sizes)
    for measure in (parameters, flops):
        table = CostTable.of(one, lambda networks, measure=measure: measure(one, networks))
        networks = drawn(one, 3)
        assert [table(genes) for genes in networks] == pytest.approx(measure(one, networks), rel=1e-9)


def test_flops_hold_the_projections_and_agree_with_hooks():
    one = space("softmax")
    genes = one.uniform("softmax")
    model, counted = build(one.config(genes), 0).eval(), []

    def linear(module, inputs, output):
        counted.append(2 * inputs[0].numel() * module.out_features)

    hooks = [m.register_forward_hook(linear) for m in model.modules() if isinstance(m, nn.Linear)]
    batch = next(iter(RECALL.evaluation_batches(1)))
    run_model(model, batch, Context())
    for hook in hooks:
        hook.remove()
    attention = 2 * 4 * RECALL.length**2 * 16  # two layers with two products of 2 N^2 C
    assert count_flops(model, RECALL) == pytest.approx(sum(counted) + attention, rel=0.01)


def test_the_cheapest_network_costs_least(pairs):
    one = space()
    reading = space(task=pairs, depths=(1,), encoder_depths=(2,), heads=(1,), feed_forward=(8,))
    cases = (
        (one, parameters, ({}, {"mechanism": (1,)}, {"dim": (1,), "layer 1 heads": (1,)})),
        (reading, flops, ({}, {"encoder dim": (1,), "cross 1 memory_layers": (1,)})),
    )
    for whole, measure, parts in cases:
        table = CostTable.of(whole, lambda networks, whole=whole, measure=measure: measure(whole, networks))
        for part in map(whole.restricted, parts):
            cheapest = table.cheapest(part)
            assert part.holds(cheapest)
            assert table(cheapest) == pytest.approx(min(map(table, part.every())))


def test_reading_more_of_the_encoder_costs_operations_and_no_parameters(pairs):
    one = space("softmax", task=pairs)
    least = one.uniform("softmax")
    more = tuple(1 if gene.kind == "memory_layers" else n for gene, n in zip(one.genes, least, strict=True))
    assert parameters(one, [least]) == parameters(one, [more])
    counts, (m, n) = flops(one, [least, more]), (24, 16)
    keys = 2 * 2 * m * 16 * 16 * 2  # in each of two layers 24 more tokens, two projections, 16 x 16 weights
    assert counts[1] - counts[0] == keys + 2 * 2 * 2 * m * n * 16


@pytest.mark.parametrize(
    ("text", "unit", "limit"),
    [
        ("60% time", "milliseconds", 6.0),
        ("4.5ms", "milliseconds", 4.5),
        ("2M FLOPs", "flops", 2e6),
        ("70 % params", "parameters", 7.0),
    ],
)
def test_a_budget_is_a_share_or_an_amount(text, unit, limit):
    budget = NetworkBudget.parse(text)
    assert (budget.unit, budget.limit(10.0)) == (unit, pytest.approx(limit))


@pytest.mark.parametrize("text", ["2 apples", "0% time", "60%", "5 time", "-3ms", "50% M flops", ""])
def test_a_budget_that_says_nothing_is_refused(text):
    with pytest.raises(Unsupported, match="60% time"):
        NetworkBudget.parse(text)


# the ranker


def test_the_ranker_is_antisymmetric_and_orders_what_is_a_sum_over_genes():
    one = space(depths=(1, 2, 3))
    networks = drawn(one, 60)
    losses = random_losses(one, networks)
    ranker = Predictor(one).fit(networks, losses)
    assert pair_accuracy(ranker.score(networks), losses) == 1.0
    a, b = networks[:2]
    assert ranker.probability(a, b) == pytest.approx(1 - ranker.probability(b, a), abs=1e-12)
    assert judge(one, networks, losses).tau > 0.7


def test_the_ranker_knows_nothing_of_losses_that_are_drawn():
    one = space(depths=(1, 2, 3))
    networks, rng = drawn(one, 60), np.random.default_rng(1)
    found = [judge(one, networks, rng.standard_normal(60), seed=seed).accuracy for seed in range(2)]
    assert abs(np.mean(found) - 0.5) < 0.15


def test_networks_with_equal_losses_judge_nothing():
    one = space(depths=(1, 2, 3))
    networks = drawn(one, 20)
    losses = np.ones(20)
    assert np.isnan(judge(one, networks, losses).tau)
    losses[:4] = random_losses(one, networks[:4])  # some folds have only equal ones
    found = judge(one, networks, losses)
    assert np.isfinite(found.tau) and np.isfinite(found.accuracy)


def test_tau_counts_pairs():
    assert kendall_tau([3, 2, 1], [1.0, 2.0, 3.0]) == 1.0
    assert kendall_tau([1, 2, 3], [1.0, 2.0, 3.0]) == -1.0
    assert kendall_tau([3, 1, 2], [1.0, 2.0, 3.0]) == pytest.approx(1 / 3)
    assert pair_accuracy([1, 1, 1], [1.0, 2.0, 3.0]) == 0.5
    assert np.isnan(kendall_tau([1, 2], [1.0, 1.0]))


def test_silent_genes_are_no_features():
    one = space()
    at = one.at("layer 2 mechanism")
    shallow = one.canonical((0,) * len(one.genes))
    loud = tuple(1 if i == at else n for i, n in enumerate(shallow))
    assert (features(one, [shallow]) == features(one, [loud])).all()
    assert one.canonical(loud) == shallow


def test_genes_that_do_not_matter_are_fixed_at_their_best_choice():
    one = space(depths=(2,))
    networks = drawn(one, 100)
    losses = random_losses(one, networks, kinds=("dim", "mechanism"))
    judged = judge(one, networks, losses)
    ranked = sorted(judged.importance, key=lambda name: -judged.importance[name])
    assert set(ranked[:3]) == {"dim", "layer 1 mechanism", "layer 2 mechanism"}
    pruned = prune(one, Predictor(one).fit(networks, losses), judged.importance, keep=3)
    assert pruned.size == 8
    only = prune(one, Predictor(one).fit(networks, losses), judged.importance, keep=0)
    best = min(one.every(), key=lambda genes: random_losses(one, [genes], kinds=("dim", "mechanism"))[0])
    kept = [at for at, gene in enumerate(one.genes) if gene.kind in ("dim", "mechanism")]
    assert [next(iter(only.every()))[at] for at in kept] == [best[at] for at in kept]


# searchers


@pytest.mark.parametrize("name", ["evolution", "random", "optuna"])
def test_a_searcher_finds_the_optimum_of_the_ranker_within_the_budget(name):
    if name == "optuna":
        pytest.importorskip("optuna")
    one = space("softmax,cosformer,linear", dims=(8, 16, 24))
    assert 400 < one.size <= 500
    networks = drawn(one, 40)
    ranker = Predictor(one).fit(networks, random_losses(one, networks, seed=2))
    table = CostTable.of(one, lambda networks: parameters(one, networks))
    every = list(one.every())
    limit = float(np.quantile([table(genes) for genes in every], 0.4))

    def fits(genes):
        return table(genes) <= limit

    allowed = [genes for genes in every if fits(genes)]
    scores = ranker.score(allowed)
    count = 150 if name == "evolution" else 40 if name == "optuna" else 1000
    start = [table.cheapest(one), one.uniform("linear")]  # the second exceeds the budget
    found = SEARCHERS[name](one, ranker.score, fits, count, 0, start)
    assert found.scored == len(found.best) <= min(count, len(allowed))
    if name != "evolution":  # which may end where its parents lead to nothing new
        assert found.scored == min(count, len(allowed))
    assert bool(found.fewer) == (found.scored < count)
    assert all(fits(genes) for genes, _ in found.best)
    if name == "evolution":  # the others have too few tries to be sure
        assert found.best[0][1] == pytest.approx(scores.max(), abs=1e-9)
    again = SEARCHERS[name](one, ranker.score, fits, count, 0, start)
    assert again.best == found.best


def test_optuna_scores_as_many_networks_as_the_others_where_most_exceed_the_budget():
    """A third of the networks fit, so that most of its trials are pruned."""
    pytest.importorskip("optuna")
    one = space("softmax,cosformer,linear", dims=(8, 16, 24))
    table = CostTable.of(one, lambda networks: parameters(one, networks))
    every = [table(genes) for genes in one.every()]
    limit = float(np.quantile(every, 0.3))

    def search(name):
        def score(networks):
            return np.array([float(sum(genes)) for genes in networks])

        return SEARCHERS[name](one, score, lambda genes: table(genes) <= limit, 60, 0, [table.cheapest(one)])

    found = search("optuna")
    assert (found.scored, found.fewer) == (search("random").scored, "") == (60, "")
    assert found.best == search("optuna").best


@pytest.mark.parametrize("name", ["evolution", "random", "optuna"])
def test_a_searcher_of_a_small_space_ends_and_says_why_it_scored_fewer(name):
    if name == "optuna":
        pytest.importorskip("optuna")
    one = space().restricted({"mechanism": (1,), "dim": (1,)})
    assert one.size == 20
    count = len([genes for genes in one.every() if sum(genes) < 6])

    def score(networks):
        return np.array([float(sum(genes)) for genes in networks])

    start = [one.nearest((0,) * len(one.genes))]
    found = SEARCHERS[name](one, score, lambda genes: sum(genes) < 6, 100, 0, start)
    assert found.scored <= count < 20
    assert name == "evolution" or found.scored == count
    assert "within the budget" in found.fewer


def test_evolution_is_never_worse_than_what_it_starts_with_and_keeps_to_what_is_left():
    one = space().restricted({"mechanism": (1,), "dim": (1,)})
    start = one.nearest((0,) * len(one.genes))
    found = SEARCHERS["evolution"](one, lambda nets: -np.array([sum(g) for g in nets]), lambda _: True, 30, 1, [start])
    assert found.best[0][1] >= -sum(start)
    assert all(one.holds(genes) for genes, _ in found.best)


@pytest.mark.parametrize("name", ["evolution", "optuna"])
def test_a_searcher_changes_widths_and_encoder_layers(name, pairs):
    """From the smallest of both, on a score that knows nothing else."""
    if name == "optuna":
        pytest.importorskip("optuna")
    one = space(task=pairs, depths=(2,))
    worth = [at for at, gene in enumerate(one.genes) if gene.kind in ("dim", "memory_layers")]
    start = one.canonical((0,) * len(one.genes))

    def score(networks):
        return np.array([float(sum(genes[at] for at in worth)) for genes in networks])

    found = SEARCHERS[name](one, score, lambda _: True, 60, 0, [start])
    assert found.best[0][1] == len(worth) == 4
    assert all(one.genes_of(one.network(genes)) == genes for genes, _ in found.best)


def test_optuna_that_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(Unsupported, match=r"regard\[search\]"):
        check_searchers(("evolution", "optuna"))
    with pytest.raises(Unsupported, match="evolution, random, optuna"):
        check_searchers(("annealing",))


# the whole


@pytest.fixture
def quick_ranker(monkeypatch):
    monkeypatch.setattr("regard.workbench.search.predictor.STEPS", 20)


SMALL = (
    "search --task recall:length=20,pairs=3,queries=8,evaluation_items=24 --dims 8,16 --layers 1,2 --heads 1,2 "
    "--feed-forward 8,16 --steps 3 --batch-tokens 60 --networks 10 --evaluations 30 --finalists 2 --retrain 3 --seeds 2"
)


@pytest.mark.usefixtures("quick_ranker")
def test_a_search_leads_to_a_plan_that_train_and_compare_take_and_goes_on_where_it_stopped(
    capsys, tmp_path, monkeypatch
):
    place = tmp_path / "search"
    found = answer(capsys, f"{SMALL} --budget '60% flops' --output", place)
    names = [row["name"] for row in found["entrants"]]
    assert names == ["found", "softmax alone", "cosformer alone", "reference"]
    limit = 0.6 * found["entrants"][-1]["flops"]
    assert all(row["flops"] <= limit * (1 + 1e-9) for row in found["entrants"][:-1])
    assert len(found["tried"]) == 10
    assert {row["method"] for row in found["methods"]} >= {
        "evolution, ranker",
        "random, ranker",
        "evolution, regression",
    }
    assert "Neither is shown to be better than chance (0.0" in found["verdict"], "three steps teach nothing"
    page = (place / "search.html").read_text()
    assert found["verdict"].split(" has ")[0] in page
    assert page.count("<svg") >= 2
    assert "tried on 6 held-out items" in page
    assert "the 18 items that were not used for choosing" in page

    variant = read_variant(str(place / "plan.json"))
    one = space(task=create_task("recall", length=20, pairs=3, queries=8, evaluation_items=24))
    winner = found["entrants"][0]
    config = model_config(variant, one.task, one.sized(tuple(winner["genes"])), "bare")
    assert config == one.config(tuple(winner["genes"]))
    assert count_parameters(config) == winner["parameters"]

    def again(*_, **__):
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr("regard.workbench.search.run._loss", again)
        patch.setattr("regard.workbench.search.run.build", again)
        assert answer(capsys, f"{SMALL} --budget '60% flops' --output", place) == found

    command = found["commands"][0].replace("'3 steps'", "'20 steps'")
    trained = answer(capsys, command.removeprefix("regard ") + " --output", tmp_path / "trained")
    assert trained["parameters"] == winner["parameters"]


@pytest.mark.usefixtures("quick_ranker")
def test_a_search_among_encoder_decoders_leads_to_a_plan_that_train_takes(capsys, tmp_path, pairs):
    sizes = (
        "--mechanisms softmax --dims 8,16 --layers 1 --heads 1 --feed-forward 8 --encoder-layers 2 --memory-layers 2"
    )
    short = "--steps 2 --batch-tokens 60 --networks 10 --evaluations 10 --finalists 1 --retrain 0"
    line = f"search {task_in_words(pairs)} {sizes} {short} --rounds 1 --budget '150% flops'"
    found = answer(capsys, line, "--output", tmp_path / "search")
    winner = found["entrants"][0]
    assert found["choices"]["memory_layers"] == [2] and found["choices"]["encoder_depths"] == [2]
    assert {layer["memory_layers"] for layer in winner["network"]["cross"]} == {2}
    plan = json.loads((tmp_path / "search" / "plan.json").read_text())
    assert plan["encoder_dim"] == winner["network"]["encoder_dim"]
    assert winner["width"] in (tmp_path / "search" / "search.html").read_text()
    command = found["commands"][0].removeprefix("regard ")
    trained = answer(capsys, command + " --output", tmp_path / "trained")
    assert trained["parameters"] == winner["parameters"]


OWN_TASK = """
from regard.tasks.recall import RecallTask

TASK = RecallTask(length=20, pairs=3, queries=8, evaluation_items=24)
"""


@pytest.mark.usefixtures("quick_ranker")
def test_the_commands_for_what_was_found_bring_its_plugins(capsys, tmp_path, monkeypatch):
    folder = tmp_path / "my plugins"
    folder.mkdir()
    shutil.copy(EXAMPLES / "rectified.py", folder)
    (folder / "task.py").write_text(OWN_TASK)
    monkeypatch.chdir(folder)
    line = SMALL.replace("--task recall:length=20,pairs=3,queries=8,evaluation_items=24 ", "")
    line += " --mechanisms rectified --budget '90% flops' --plugin rectified.py --plugin task.py"
    try:
        found = answer(capsys, f"{line} --output", tmp_path / "search")
        monkeypatch.chdir(tmp_path)
        for command in found["commands"]:
            assert shlex.split(command).count("--plugin") == 2
            assert "--task" not in command, "which is a plugin's"
        unregister("rectified")
        monkeypatch.chdir(folder)
        _, out, _ = run(capsys, f"{line} --output", tmp_path / "search")
        assert set(found["commands"]) <= set(out.splitlines()), "each on one line, to be copied"
        unregister("rectified")
        monkeypatch.chdir(tmp_path)
        command = found["commands"][0].removeprefix("regard ")
        told = answer(capsys, f"{command} --output", tmp_path / "trained")
    finally:
        unregister("rectified")
    assert told["parameters"] == found["entrants"][0]["parameters"]


def test_the_command_for_what_was_found_reads_the_same_files(capsys, tmp_path):
    files = [tmp_path / f"my text {i}.txt" for i in range(3)]
    for i, file in enumerate(files):
        file.write_text(" ".join(str(random.random()) for _ in range(300 + i)))
    *data, held_out = map(str, files)
    task = create_task("text", length=32, data=data, validation=held_out, tokenizer="bpe:300")
    words = task_in_words(task)
    sizes = (
        "--mechanism softmax --dim 8 --layers 1 --heads 1 --batch-tokens 64 --budget '20 steps' --learning-rate 0.01"
    )
    answer(capsys, f"train {words} {sizes} --output", tmp_path / "trained")
    told = json.loads((tmp_path / "trained" / "training.json").read_text())["task"]
    assert {k: v for k, v in told["options"].items() if k != "tokenizer"} == {
        k: v for k, v in task.origin.items() if k != "tokenizer"
    }
    assert told["options"]["tokenizer"].endswith(("bpe:300", ".json"))


class Stop(Exception):
    """Raised in place of the work of a command."""


@pytest.fixture
def asked_of(monkeypatch):
    """What a printed command asks for: the tasks and the settings that it would work with."""
    found = []

    def work(*arguments, **_):
        found[:] = arguments[:2]
        raise Stop

    monkeypatch.setattr("regard.workbench.trained.run.train_model", work)
    monkeypatch.setattr("regard.workbench.comparison.compare.compare", work)

    def asked(capsys, command):
        found.clear()
        with pytest.raises(Stop):
            run(capsys, command.removeprefix("regard "))
        return found

    return asked


@pytest.mark.parametrize("given", [{}, {"precision": "bfloat16", "batch_tokens": 96, "seed": 7, "seeds": 2}])
def test_the_commands_for_what_was_found_have_its_task_and_its_settings(capsys, tmp_path, asked_of, given):
    pictures = tmp_path / "my pictures"
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (pictures / name).mkdir(parents=True)
        for i in range(8):
            picture = rng.integers(0, 4000, (8, 12)).astype(np.uint16)
            Image.fromarray(picture).save(pictures / name / f"{i}.png")
    options = {"size": [8, 12], "span": [0, 3000.5], "flip": None, "held_out": 0.5}
    task = create_task("images", data=str(pictures), seed=3, **options)
    settings = SearchSettings(NetworkBudget("flops", 1e6), learning_rate=0.00123456789, retrain_steps=30, **given)
    choices = Choices(tuple(read_variants("softmax,linear")), **SIZES)
    search = Search(task, choices, settings, tmp_path)
    write_plan(search.space, search.reference, tmp_path / "plan.json")
    train, compare = _commands(search, {"genes": search.reference})
    own, trained = asked_of(capsys, train)
    assert own.origin == task.origin and own.registered == "images" and own.grid == task.grid
    for name in ("batch_tokens", "precision", "device"):
        assert getattr(trained, name) == getattr(settings, name)
    assert trained.batch_size(own) == search.batch_size
    assert (trained.first_seed, trained.rates) == (settings.seed, (settings.learning_rate,))
    assert trained.budget == Budget.parse("30 steps")
    ((own,), compared) = asked_of(capsys, compare)
    assert own.origin == task.origin
    assert (compared.first_seed, compared.seeds) == (settings.seed, settings.seeds)
    assert compared.precision == settings.precision


def test_all_mechanisms_of_an_encoder_decoder_have_each_of_its_patterns(pairs):
    settings = SearchSettings(NetworkBudget("flops", 1.0))
    names = sorted(read_mechanisms("all", [pairs]), key="softmax".__ne__)
    choices = Choices(tuple(map(read_variant, names)), dims=(16,), depths=(1,), heads=(1,), feed_forward=(8,))
    kept, left_out = fitting(pairs, choices, settings)
    assert {*kept.names, *left_out} == set(names) and kept.names[0] == "softmax"
    assert "causal-self" in left_out["linformer"] and "heads" in left_out["differential"]
    one = Space(pairs, kept, settings.models(pairs, kept.mechanisms))
    for name in kept.names:
        build(one.config(one.uniform(name)), 0)
    with pytest.raises(Unsupported, match="encoder of 1"):
        fitting(pairs, dataclasses.replace(choices, memory_layers=(2,)), settings)


@pytest.mark.usefixtures("quick_ranker")
def test_a_search_of_all_mechanisms_tells_which_were_left_out(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("regard.cli.search.read_mechanisms", lambda text, tasks: ["softmax", "differential", "linear"])
    line = f"{SMALL} --mechanisms all --heads 1 --retrain 0 --budget '90% parameters' --output"
    _, out, _ = run(capsys, line, tmp_path)
    assert out.count("Left out: differential with ") == 1 and "differential:" not in out
    found = answer(capsys, line, tmp_path)
    assert found["choices"]["mechanisms"] == ["softmax", "linear"]
    assert found["left_out"][0].startswith("differential: ") and "even numbers" in found["left_out"][0]
    assert found["left_out"][0].split(";")[0] in (tmp_path / "search.html").read_text()


@pytest.mark.usefixtures("quick_ranker")
def test_a_report_says_why_a_searcher_scored_fewer_networks(capsys, tmp_path):
    sizes = "--mechanisms softmax --layers 1 --searchers random --evaluations 100 --retrain 0"
    found = answer(capsys, f"{SMALL} {sizes} --budget '90% parameters' --output", tmp_path)
    row = found["methods"][0]
    assert row["scored"] < 8 and "random draws" in row["fewer"]
    assert f"random, ranker: {row['scored']} of 100 networks; {row['fewer']}" in (tmp_path / "search.html").read_text()


def test_attention_that_torch_runs_as_one_operator_is_counted():
    """In evaluation mode nn.MultiheadAttention is one operator, which torch's counter ignores."""
    one = nn.MultiheadAttention(16, 2, batch_first=True).eval()
    x = torch.randn(1, 7, 16)
    before = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), flop_counter() as counter:
        one(x, x, x)
    assert counter.get_total_flops() == 2 * 7 * 16 * 4 * 16 + 2 * 2 * 7 * 7 * 16
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_a_plan_with_all_its_widths_is_compared_as_it_is():
    settings = SearchSettings(NetworkBudget("flops", 1e6))
    plan = read_variant("softmax:num_heads=2,feed_forward=24+linear:num_heads=2,feed_forward=8")
    both = settings.models(RECALL, [read_variant("softmax"), plan])
    work = Work(RECALL, both)
    assert count_parameters(work.configs["softmax"]) == work.target
    assert work.configs[plan.name] == model_config(plan, RECALL, both, "bare")
    assert plan.name in work.published


def test_a_space_without_a_network_for_the_budget_is_refused_before_anything_is_trained(capsys, tmp_path):
    code, _, said = run(capsys, f"{SMALL} --budget '2% flops' --output", tmp_path)
    assert code == 2
    assert "which no network of the space keeps" in said
    assert "--budget" in said
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_text_too_short_to_choose_and_to_judge_by_is_refused_with_a_way_out(capsys, tmp_path):
    (tmp_path / "one.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    code, _, said = run(capsys, f"search {tmp_path}/one.txt --budget '60% parameters' --output {tmp_path}/out")
    assert code == 2
    assert "a search on 1 held-out item; " in said and "a smaller --length" in said


def test_a_mechanism_whose_smallest_network_is_too_large_is_left_out(tmp_path):
    one = space("softmax,mamba2", heads=(2,), dims=(16,))
    table = CostTable.of(one, lambda networks: parameters(one, networks))
    least, most = (table(table.cheapest(one.restricted({"mechanism": (n,)}))) for n in (0, 1))
    assert least < most
    settings = SearchSettings(NetworkBudget("parameters", (least + most) / 2), networks=10)
    search = Search(RECALL, one.choices, settings, tmp_path)
    spaces, left_out = search._spaces(table, settings.budget.amount)
    assert list(spaces) == ["found", "softmax alone"]
    assert left_out[0].startswith("mamba2 alone")


def test_finalists_that_take_too_long_whole_are_dropped(tmp_path, monkeypatch):
    """Whole networks are timed, whatever their layers promised; a share is relative to the reference in the same rounds."""
    one = space()
    settings = SearchSettings(NetworkBudget.parse("60% time"))
    search = Search(RECALL, one.choices, settings, tmp_path)
    near, far = drawn(one, 2)
    monkeypatch.setitem(MEASURES, "milliseconds", lambda space, networks, seconds: [5.9, 6.1, 10.0])
    with Store(tmp_path / "store.sqlite") as search.store:
        assert search._keeping([near, far], limit=100.0) == [near]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--mechanisms softmax+local", "as a choice for one layer"),
        ("--mechanisms softmax:num_heads=2", "--heads"),
        ("--mechanisms softmax:memory_layers=2", "--memory-layers"),
        ("--memory-layers 1,2", "read a memory"),
        ("--encoder-layers 2", "read a memory"),
        ("--mechanisms softmax,softmax", "each mechanism once"),
        ("--dims 10 --heads 4", "--dims 12"),
        ("--networks 3", "networks"),
        ("--searchers annealing", "evolution, random, optuna"),
        ("--budget '3 apples'", "60% time"),
        ("--keep 0", "share of the genes"),
        ("--mechanisms fnet", "fnet"),
        ("--dims two", "whole numbers"),
    ],
)
def test_what_cannot_be_searched_is_said_in_a_line(capsys, tmp_path, more, said):
    code, _, messages = run(capsys, f"{SMALL} {more} --output", tmp_path)
    assert code == 2
    assert said in messages
    assert "Traceback" not in messages


@pytest.mark.usefixtures("quick_ranker")
def test_runs_that_diverged_are_told():
    run = {"seed": 0, "diverged": True, "score": None, "loss": None, "items": []}
    row = {"plan": "softmax", "width": "16", "cost": 1.0, "parameters": 1, "flops": 1, "ms": 1.0}
    winner = {**row, "name": "winner", "runs": [{**run, "diverged": False, "score": 0.5, "loss": 1.0}] * 2}
    reference = {**row, "name": "reference", "runs": [run] * 2}
    record = {"entrants": [winner, reference]}
    assert [report.cells(record, one)[0] for one in record["entrants"]] == [
        "winner",
        "reference (diverged in 2 of 2 runs)",
    ]
    search = SimpleNamespace(
        settings=SimpleNamespace(budget=NetworkBudget.parse("90% parameters")), task=SimpleNamespace(metric="accuracy")
    )
    assert "to compare: the reference diverged in 2 of 2." in _verdict(search, [winner, reference], {})
    assert _verdict(search, [winner, {**reference, "runs": []}], {}).endswith("from scratch to compare.")


def test_a_record_is_json(capsys, tmp_path):
    found = answer(capsys, f"{SMALL} --retrain 0 --mechanisms softmax --budget '80% parameters' --output", tmp_path)
    assert "no runs of both from scratch" in found["verdict"]
    assert [row["name"] for row in found["entrants"]] == ["found", "reference"]
    assert json.loads(json.dumps(found)) == found


def test_more_encoder_layers_than_there_are_cannot_be_read(pairs):
    with pytest.raises(Unsupported, match="last 3 layers of an encoder of 2"):
        space(task=pairs, memory_layers=(1, 3))
    assert space(task=pairs, encoder_depths=None, memory_layers=None).sizes["memory_layers"] == (1,)
