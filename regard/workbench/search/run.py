"""A search, from its space to a plan for `regard train` and `regard compare`.

Its steps: a cost table for every network, from a few measured ones; the supernet; networks evaluated with its weights,
from which a ranker learns and which show the less important genes, to be fixed; searchers that follow the ranker within
the budget; finalists evaluated with the supernet's weights and, for a time budget, timed as whole networks; the best of
all and the best with each single mechanism, trained from scratch along with the largest network of the first mechanism.

The first quarter of the held-out items is used for choices; the others judge the chosen networks. Every step is a
stored row or a checkpoint, so the same call resumes an interrupted search.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from regard.catalogue import plugin_code
from regard.contract import Unsupported
from regard.measurement import provenance, units
from regard.measurement.store import Store, canonical_key
from regard.models import count_parameters
from regard.tasks import Batch, Task
from regard.training import TrainConfig, runner_of
from regard.training.step import answered, batch_context
from regard.workbench.comparison.task_models import build
from regard.workbench.comparison.work import rule_after, task_identity
from regard.workbench.search.costs import MEASURES, CostTable, count_flops, time_models, worded
from regard.workbench.search.predictor import KINDS, Judged, Predictor, judge, prune
from regard.workbench.search.record import REFERENCE, Found, Row, record_of
from regard.workbench.search.searchers import SEARCHERS
from regard.workbench.search.searchers import Found as Searched
from regard.workbench.search.settings import SearchSettings
from regard.workbench.search.space import Choices, Genes, Space
from regard.workbench.search.supernet import Supernet

STORE, REPORT, FOUND = "regard.sqlite", "search.html", "found"
TIMING_SECONDS = 0.5


@dataclass
class Watch:
    """Callbacks that follow a search.

    Attributes:
        say: called with sentences on what was decided.
        doing: called with the current work, and the finished share of it.
    """

    say: Callable[[str], None] = lambda sentence: None
    doing: Callable[[str, float], None] = lambda what, share: None


class Search:
    """An architecture search for a task.

    Args:
        task: the task that the networks are for.
        choices: the choices that span the space.
        settings: the settings of the search.
        output: folder for all output.
        watch: callbacks that follow the search.

    Raises:
        Unsupported: for a task with its own training, sizes that a mechanism cannot have, and a space in which no
            network keeps the budget.
    """

    def __init__(
        self, task: Task, choices: Choices, settings: SearchSettings, output: Path, watch: Watch | None = None
    ) -> None:
        if getattr(task, "runner", None) is not None:
            raise Unsupported(
                f"a search on {task.name}, which trains in a way of its own", supported="tasks of batches"
            )
        self.task, self.choices, self.settings, self.output = task, choices, settings, output
        self.watch = Watch() if watch is None else watch
        self.models = settings.models(task, choices.mechanisms)
        self.space = Space(task, choices, self.models)
        self.batch_size = max(1, settings.batch_tokens // (task.length + (task.memory_length or 0)))
        self.items = sum(batch.size for batch in task.evaluation_batches(64))
        if self.items < 2:
            raise Unsupported(
                f"a search on {units.counted(self.items, 'held-out item')}",
                supported="two or more: some choose, some judge",
                nearest="more data, or a smaller --length",
            )
        self.choosing = max(1, self.items // 4)
        self.rule = rule_after(task, self.items, self.choosing)
        self.reference = self.space.uniform(choices.names[0])
        self.identity = {
            **task_identity(task),
            "frame": settings.frame,
            "batch_size": self.batch_size,
            "learning_rate": settings.learning_rate,
            "precision": settings.precision,
            "device": settings.device,
        }
        if code := plugin_code(*choices.names):
            self.identity["plugins"] = code
        self.of_space: dict[str, list[Any]] = {
            "mechanisms": list(choices.names),
            **{name: list(values) for name, values in self.space.sizes.items()},
        }
        self.of_supernet = {
            **self.identity,
            **self.of_space,
            "steps": settings.steps,
            "seed": settings.seed,
            "share": settings.share,
        }

    def run(self) -> Row:
        """Run the whole search; returns its record, for :func:`regard.workbench.search.report.write_page` and JSON."""
        with Store(self.output / STORE) as store:
            self.store = store
            return self._run()

    def _run(self) -> Row:
        settings, say = self.settings, self.watch.say
        unit = settings.budget.unit
        table = self._table(unit)
        limit = settings.budget.limit(table(self.reference))
        spaces, left_out = self._spaces(table, limit)
        say(
            f"{self.space.size:,} networks; at most {worded(unit, limit)}, the reference "
            f"({self.space.describe(self.reference)}) has about {worded(unit, table(self.reference))}"
        )
        self.supernet = self._trained_supernet()
        tried, pruned, judged = self._tried(table, limit)
        predictors = {kind: self._fitted(kind, tried) for kind in KINDS}
        say(_how_well(judged))
        found, methods = self._found(spaces, pruned, predictors, table, limit, tried)
        entrants = {name: genes for name, genes in found.items() if genes is not None}
        left_out += [
            f"{name}: no finalist keeps the budget when it is measured whole" for name, g in found.items() if g is None
        ]
        if FOUND not in entrants:
            raise Unsupported(
                f"budget {settings.budget}, which no finalist keeps when it is timed whole",
                supported="a larger budget, or smaller choices",
            )
        entrants[REFERENCE] = self.reference
        rows = self._entrants(entrants)
        return record_of(self, Found(table, limit, tried, judged, methods, rows, left_out))

    # costs

    def _table(self, unit: str) -> CostTable:
        key = {
            "search": "table",
            "unit": unit,
            **self.of_space,
            **{k: v for k, v in self.identity.items() if k in _OF_COSTS},
        }
        if unit == "milliseconds":
            key |= {"machine": provenance.fingerprint()["machine_id"], "threads": torch.get_num_threads()}

        def measured() -> list[Any]:
            self.watch.doing(f"measuring the {unit} of layers", 0.0)
            table = CostTable.of(self.space, lambda networks: MEASURES[unit](self.space, networks))
            return [[list(part), amount] for part, amount in table.amounts.items()]

        return CostTable(self.space, {tuple(part): amount for part, amount in self._stored("cost", key, measured)})

    def _spaces(self, table: CostTable, limit: float) -> tuple[dict[str, Space], list[str]]:
        """The whole space and, if there are several mechanisms, its part for each single one; parts in which no network
        keeps the budget are left out, with a sentence on each."""
        spaces, left_out = {FOUND: self.space}, []
        if len(self.choices.names) > 1:
            for number, name in enumerate(self.choices.names):
                spaces[f"{name} alone"] = self.space.restricted({"mechanism": (number,)})
        for name, space in list(spaces.items()):
            least = table.cheapest(space)
            if table(least) <= limit:
                continue
            unit = self.settings.budget.unit
            if name == FOUND:
                share = table(least) / table(self.reference)
                raise Unsupported(
                    f"budget {self.settings.budget}, which no network of the space keeps",
                    supported=f"from {worded(unit, table(least))} on, which {space.describe(least)} has",
                    nearest=f'--budget "{math.ceil(105 * share)}% {_WORD[unit]}"',
                )
            left_out.append(f"{name}: the smallest network has {worded(unit, table(least))}")
            del spaces[name]
        return spaces, left_out

    # the supernet and what is tried with it

    def _trained_supernet(self) -> Supernet:
        settings = self.settings
        supernet = Supernet(self.space, settings.seed, settings.device, share=settings.share)
        name = hashlib.blake2b(canonical_key(self.of_supernet).encode(), digest_size=6).hexdigest()
        config = TrainConfig(
            steps=settings.steps,
            batch_size=self.batch_size,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            precision=settings.precision,
            measure_memory=False,
        )

        def step(point: Any) -> None:
            self.watch.doing(f"supernet, loss {point.loss:.3f}", (point.step + 1) / settings.steps)

        path = self.output / f"supernet-{name}.safetensors"
        history = runner_of(self.task).train(supernet, self.task, config, checkpoint=path, on_step=step)
        if history.diverged:
            raise Unsupported(
                f"a learning rate of {settings.learning_rate:g}, at which the supernet diverged",
                supported="a smaller --learning-rate",
            )
        return supernet.eval()

    def inherited(self, genes: Genes) -> float:
        """The loss of a network with the supernet's weights, on the items for choices."""
        key = {"search": "inherited", **self.of_supernet, "items": self.choosing, "genes": list(genes)}

        def measured() -> float:
            return _loss(self.supernet, genes, self.task, self.batch_size, self.choosing)

        loss = self._stored("search", key, measured)
        return math.inf if loss is None else loss

    def _tried(self, table: CostTable, limit: float) -> tuple[dict[Genes, float], Space, dict[str, Judged]]:
        """The evaluated networks with their losses, the space with the genes still open, and the quality of the
        predictors.

        The first round draws from the whole space. Later rounds draw from what the last one left open, within the
        budget if such networks are found.
        """
        settings = self.settings
        rng, tried, space = random.Random(f"{settings.seed} tried"), dict[Genes, float](), self.space
        judged: dict[str, Judged] = {}
        for number in range(settings.rounds):
            wanted = settings.networks * (number + 1) // settings.rounds
            for attempt in range(50 * settings.networks):
                if len(tried) >= wanted:
                    break
                genes = space.draw(rng)
                beyond = number > 0 and attempt < 25 * settings.networks and table(genes) > limit
                if genes not in tried and not beyond:
                    tried[genes] = self.inherited(genes)
                    self.watch.doing("networks tried", len(tried) / settings.networks)
            judged = {kind: judge(self.space, *_columns(tried), kind, seed=settings.seed) for kind in KINDS}
            if number + 1 < settings.rounds:
                importance = judged["ranker"].importance
                keep = max(1, math.ceil(settings.keep * len(importance)))
                pruned = prune(self.space, self._fitted("ranker", tried), importance, keep, settings.seed)
                # the genes may have been fixed such that no network keeps the budget
                space = pruned if table(table.cheapest(pruned)) <= limit else space
        return tried, space, judged

    def _fitted(self, kind: str, tried: Mapping[Genes, float]) -> Predictor:
        return Predictor(self.space, kind, self.settings.seed).fit(*_columns(tried))

    def _found(
        self,
        spaces: Mapping[str, Space],
        pruned: Space,
        predictors: Mapping[str, Predictor],
        table: CostTable,
        limit: float,
        tried: Mapping[Genes, float],
    ) -> tuple[dict[str, Genes | None], list[Row]]:
        """The network chosen in each space (None if no finalist keeps the budget), and the results of the methods."""
        settings, ranker, methods = self.settings, predictors["ranker"], list[Row]()
        within = sorted((genes for genes in tried if table(genes) <= limit), key=lambda genes: tried[genes])
        finalists: dict[str, dict[Genes, None]] = {}
        for name, space in spaces.items():
            part = pruned if name == FOUND else space
            start = [table.cheapest(part)]
            finalists[name] = dict.fromkeys([*start, *[genes for genes in within if space.holds(genes)][:2]])
            for searcher in settings.searchers:
                self.watch.doing(f"{searcher}, {name}", 0.0)
                result = self._searched(searcher, part, ranker, table, limit, start)
                finalists[name] |= dict.fromkeys(genes for genes, _ in result.best[: settings.finalists])
                if name == FOUND:
                    methods.append(self._method(f"{searcher}, ranker", result, ranker))
            if name == FOUND:
                result = self._searched(settings.searchers[0], part, predictors["regression"], table, limit, start)
                told = f"{settings.searchers[0]}, regression"
                methods.append(self._method(told, result, ranker))
                if within:
                    direct = Searched([(genes, -tried[genes]) for genes in within], len(within))
                    methods.append(self._method("best of those tried", direct, ranker))
        for name in finalists:
            finalists[FOUND] |= finalists[name]  # networks with a single mechanism are in the whole space too
        kept = set(self._keeping(list(finalists[FOUND]), limit))
        chosen = {
            name: min((genes for genes in several if genes in kept), key=self.inherited, default=None)
            for name, several in finalists.items()
        }
        return chosen, methods

    def _searched(
        self, searcher: str, space: Space, predictor: Predictor, table: CostTable, limit: float, start: Sequence[Genes]
    ) -> Searched:
        def fits(genes: Genes) -> bool:
            return table(genes) <= limit

        search = SEARCHERS[searcher]
        return search(space, predictor.score, fits, self.settings.evaluations, self.settings.seed, start)

    def _method(self, name: str, result: Searched, ranker: Predictor) -> Row:
        genes = result.best[0][0]
        return {
            "method": name,
            "network": self.space.describe(genes),
            "score": float(ranker.score([genes])[0]),
            "inherited": self.inherited(genes),
            "scored": result.scored,
            "fewer": result.fewer,
        }

    def _keeping(self, finalists: Sequence[Genes], limit: float) -> list[Genes]:
        """The finalists whose measured cost keeps the budget; times are measured along with the reference's, to which a
        share refers."""
        budget = self.settings.budget
        if budget.unit != "milliseconds":
            return list(finalists)
        key = {
            "search": "whole",
            **self.identity,
            "networks": [[self.space.describe(g)] for g in (*finalists, self.reference)],
            "machine": provenance.fingerprint()["machine_id"],
            "threads": torch.get_num_threads(),
        }

        def measured() -> list[float]:
            self.watch.doing("timing the finalists", 0.0)
            return MEASURES["milliseconds"](self.space, [*finalists, self.reference], seconds=TIMING_SECONDS)

        *times, own = self._stored("cost", key, measured)
        most = budget.limit(own) if budget.share else limit
        return [genes for genes, time in zip(finalists, times, strict=True) if time <= most]

    # the chosen networks, trained from scratch

    def _entrants(self, entrants: Mapping[str, Genes]) -> list[Row]:
        settings, rows = self.settings, []
        costs = self._costs(entrants)
        count = settings.seeds * bool(settings.retrain_steps)
        runs = len(entrants) * count
        done = 0
        for name, genes in entrants.items():
            made = []
            for seed in range(settings.seed, settings.seed + count):
                made.append(self._retrained(genes, seed, f"{name}, seed {seed}", done / runs))
                done += 1
            rows.append(
                {
                    "name": name,
                    "network": self.space.network(genes).as_dict(),
                    "width": self.space.network(genes).width,
                    "plan": self.space.variant(genes).name,
                    "genes": list(genes),
                    "inherited": self.inherited(genes),
                    **costs[name],
                    "runs": made,
                }
            )
        return rows

    def _retrained(self, genes: Genes, seed: int, told: str, share: float) -> Row:
        settings = self.settings
        key = {
            "search": "retrained",
            **self.identity,
            "plan": self.space.variant(genes).record(),
            "dim": self.space.network(genes).dim,
            "steps": settings.retrain_steps,
            "seed": seed,
            "first_item": self.choosing,
        }

        def measured() -> Row:
            self.watch.doing(f"training {told}", share)
            model = build(self.space.config(genes), seed, settings.device)
            config = TrainConfig(
                steps=settings.retrain_steps,
                batch_size=self.batch_size,
                learning_rate=settings.learning_rate,
                seed=seed,
                precision=settings.precision,
                measure_memory=False,
            )
            runner = runner_of(self.task)
            if runner.train(model, self.task, config).diverged:
                return {"seed": seed, "diverged": True, "score": None, "loss": None, "items": []}
            found = runner.evaluate(model, self.task, self.batch_size, first=self.choosing)
            return {"seed": seed, "diverged": False, "score": found.score, "loss": found.loss, "items": found.items}

        return self._stored("quality", key, measured)

    def _costs(self, entrants: Mapping[str, Genes]) -> dict[str, Row]:
        """Parameters, FLOPs and time of each network; times are measured in turns."""
        key = {
            "search": "entrants",
            **self.identity,
            "networks": [self.space.describe(genes) for genes in entrants.values()],
            "machine": provenance.fingerprint()["machine_id"],
            "threads": torch.get_num_threads(),
        }

        def measured() -> dict[str, Row]:
            self.watch.doing("measuring what was chosen", 0.0)
            models = {self.space.describe(g): build(self.space.config(g), 0) for g in entrants.values()}
            counted = {
                name: {"parameters": count_parameters(model), "flops": count_flops(model, self.task)}
                for name, model in models.items()
            }
            timed = time_models(models, self.space, TIMING_SECONDS)
            return {name: {**counted[name], "ms": timed[name].median * 1e3} for name in models}

        costs = self._stored("cost", key, measured)
        return {name: costs[self.space.describe(genes)] for name, genes in entrants.items()}

    def _stored(self, kind: str, key: Mapping[str, Any], measured: Callable[[], Any]) -> Any:
        """The payload of a stored row, measured first if it is missing."""
        row = self.store.get(kind, key)
        if row is None:
            self.store.put(kind, key, {"value": measured()})
            row = self.store.get(kind, key)
            assert row is not None
        return row.payload["value"]


_OF_COSTS = ("task", "data", "length", "frame", "device", "plugins")
_WORD = {"milliseconds": "time", "flops": "flops", "parameters": "parameters"}


@torch.no_grad()
def _loss(supernet: Supernet, genes: Genes, task: Task, batch_size: int, last: int) -> float:
    """The mean loss of a network with the supernet's weights on the first held-out items; unlike scoring, this never
    generates."""

    def run(part: Batch) -> Tensor:
        memory = () if part.memory is None else (part.memory,)
        return supernet.run(genes, part.inputs, *memory, context=batch_context(part)).output

    total, weight, seen = 0.0, 0.0, 0
    for batch in task.evaluation_batches(batch_size):
        chosen = batch.items(0, min(batch.size, last - seen)).to(torch.device(supernet.device))
        output = answered(task, run, chosen)
        sums, weights = task.loss(output, chosen)
        total, weight, seen = total + float(sums.sum()), weight + float(weights.sum()), seen + chosen.size
        if seen >= last:
            break
    return total / weight if weight else math.nan


def _how_well(judged: Mapping[str, Judged]) -> str:
    """How well the predictors order networks that they have not learned from."""
    ranker, regression = judged["ranker"].tau, judged["regression"].tau
    if math.isnan(ranker):
        return "ranker: too few networks with different losses to tell how well it orders others"
    return f"ranker: Kendall's tau {ranker:.2f} on networks that it has not learned from (regression {regression:.2f})"


def _columns(tried: Mapping[Genes, float]) -> tuple[list[Genes], list[float]]:
    """Networks and losses; losses that are not finite are replaced by the worst finite one."""
    known = [loss for loss in tried.values() if math.isfinite(loss)]
    worst = max(known, default=0.0)
    return list(tried), [loss if math.isfinite(loss) else worst for loss in tried.values()]
