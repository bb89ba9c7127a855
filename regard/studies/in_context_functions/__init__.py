"""In-context learning of Boolean functions (Bhattamishra et al., arXiv 2310.03016): which mechanisms learn a new function from
the examples in their context, and how near do they come to the optimum?

The paper: Transformers come near the optimal learner for simple classes (conjunctions, disjunctions), less so for DNF and CNF,
and stay at chance on parities; some attention-free models do almost as well. With a teaching sequence (examples that
leave only one possible function) far fewer examples are enough, and one model holds both algorithms and uses the better
one that the examples allow. Pretrained language models compete with nearest neighbours.

Here: contexts of 24 examples of 8 bits, where most of the paper's have 40 of 28; models of 3 layers of width 64 instead
of 12 of 256, trained for 1,000 steps of 32 contexts with this project's optimiser. A clause reads 0.6 of the 8 bits
(0.3 of the paper's 28 bits), so that few clauses are empty. The models are compared, on the same held-out contexts,
with the best guess (every function of the class weighted by its probability), the exact learners, nearest neighbours, a
network trained on each context, and always -1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from regard.contract import Kind, Paper, Pattern
from regard.models.variants import read_variant
from regard.reproductions import Reproduction
from regard.reproductions.framework.judging import Check, Seed, largest, measured, number
from regard.reproductions.framework.pretrained import PACKAGES, smollm2_file
from regard.studies.framework.protocol import Chosen, Study, lacks
from regard.studies.in_context_functions.cells import BEST, NEAREST, NOTHING, run_cell
from regard.studies.in_context_functions.showing import sections
from regard.tasks.in_context_functions.functions import CLASSES

CONTROL = "softmax"
RETENTION = "gated_linear:gate=fixed,positions=rotary"
"""What `--mechanisms retention` stands for: the paper's attention-free model."""
TAUGHT, MIXED = "taught conjunction", "taught in half of the contexts"
FUNCTIONS: dict[str, dict[str, Any]] = {
    "conjunction": {"function": "conjunction"},
    TAUGHT: {"function": "teach_biconjunction"},
    "dnf": {"function": "dnf"},
    "parity": {"function": "parity"},
    "nearest neighbours": {"function": "nearest_neighbours"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    MIXED: {"function": "teach_biconjunction", "taught": 0.5},
    "labels flipped": {"function": "conjunction", "noise": 0.1},
    "a pool of functions": {"function": "conjunction", "pool": 256},
    "frozen layers": {"function": "conjunction", "frozen": True},
}
"""Further ways to train the control."""
PRETRAINED: dict[str, dict[str, Any]] = {
    name: {"kind": "pretrained", "function": function, "dimensions": 5, "literals": 0.5, "length": 80, "items": 20}
    for name, function in {
        "SmolLM2: monotone conjunction": "monotone_conjunction",
        "SmolLM2: majority": "majority",
    }.items()
}
SMALL: dict[str, Any] = {
    "length": 48,
    "dimensions": 8,
    "layers": 3,
    "dim": 64,
    "num_heads": 4,
    "steps": 1000,
    "batch_size": 32,
    "learning_rate": 3e-3,
    "items": 512,
}
TINY = SMALL | {"length": 24, "dimensions": 5, "layers": 2, "dim": 32, "num_heads": 2, "steps": 250, "items": 128}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": TINY | {"learning_rate": 5e-3},
    "small": SMALL,
    "paper": SMALL
    | {"length": 80, "dimensions": 28, "layers": 12, "dim": 256, "num_heads": 8}
    | {"steps": 15_000, "batch_size": 64, "learning_rate": 1e-4, "items": 1280},
}
SECONDS = {"tiny": 2.5, "small": 50.0, "paper": 40_000.0}
"""Seconds for a model; mamba2 takes twice as long as the mean."""
OTHER_SECONDS: dict[str, dict[str, float]] = {
    "tiny": {"references": 1.0},
    "small": {"references": 15.0, "pretrained": 130.0},
    "paper": {},
}
OF_MODELS = ("layers", "dim", "num_heads", "steps", "batch_size", "learning_rate")


def functions_of(preset: str) -> dict[str, dict[str, Any]]:
    """The functions of a preset: tiny has three, small those of the paper's claims, paper all classes."""
    if preset == "tiny":
        return {name: FUNCTIONS[name] for name in ("conjunction", TAUGHT, "parity")}
    if preset == "small":
        return FUNCTIONS
    named = {one["function"] for one in FUNCTIONS.values()}
    others = {name.replace("_", " "): {"function": name} for name in CLASSES if name not in named}
    return FUNCTIONS | others | {"parity": {"function": "parity", "dimensions": 10}}  # parities of 28 bits are hopeless


def settings(chosen: Chosen) -> dict[str, dict[str, Any]]:
    """All settings: references and models of each function, variants of the control, the pretrained model if any."""
    size, found = SIZES[chosen.preset], dict[str, dict[str, Any]]()
    sizes = {name: value for name, value in size.items() if name not in OF_MODELS}
    for name, function in functions_of(chosen.preset).items():
        found[references(name)] = {"kind": "references"} | sizes | function
        for mechanism in entered(chosen) if chosen.preset != "tiny" or name == "conjunction" else (CONTROL,):
            found[trained(name, mechanism)] = {"kind": "trained", "mechanism": mechanism} | size | function
    if chosen.preset != "tiny":
        for name, variant in VARIANTS.items():
            found[trained(name, CONTROL)] = {"kind": "trained", "mechanism": CONTROL} | size | variant
        if smollm2_file() is not None:
            found |= PRETRAINED
    return found


def references(function: str) -> str:
    """The name of the setting of the reference learners."""
    return f"{function}: references"


def trained(function: str, mechanism: str) -> str:
    """The name of the setting of a model."""
    return f"{function}: {mechanism}"


def entered(chosen: Chosen) -> tuple[str, ...]:
    """The mechanisms, the control first."""
    return (CONTROL, *(name for name in chosen.mechanisms if name != CONTROL))


def refuses(name: str) -> str | None:
    """Why a mechanism cannot enter."""
    for card in read_variant(name).cards:
        if card.kind in (Kind.POOLING, Kind.PROJECTION):
            return "it does not map tokens to as many tokens"
        reason = lacks(card, Pattern.CAUSAL_SELF) or ("it inserts tokens" if card.prepare is not None else None)
        if reason is not None:
            return reason
    return None


def _less(first: str, second: str, name: str = "end") -> Callable[[Seed], float]:
    return lambda seed: number(seed, first, name) - number(seed, second, name)


def _short_of_best(seed: Seed) -> float:
    """The control's final gap to the best guess on conjunctions, or to elimination if the best guess is too costly."""
    known = seed[references("conjunction")]
    best = f"{BEST} end" if f"{BEST} end" in known else "elimination end"
    return number(seed, references("conjunction"), best) - number(seed, trained("conjunction", CONTROL), "end")


def of_fixed_state(chosen: Chosen) -> tuple[str, ...]:
    """Entered mechanisms with a state of fixed size, on which claims about attention-free models are tested."""
    return tuple(name for name in entered(chosen) if all(card.recurrent for card in read_variant(name).cards))


def _nearest_of_fixed_state(others: tuple[str, ...]) -> Callable[[Seed], float]:
    """How far the best of these mechanisms ends above the control on conjunctions."""
    return lambda seed: largest(
        number(seed, trained("conjunction", one), "end") - number(seed, trained("conjunction", CONTROL), "end")
        for one in others
    )


def checks(chosen: Chosen) -> tuple[Check, ...]:
    """The paper's claims about the functions that the preset has."""
    conjunction, taught = trained("conjunction", CONTROL), trained(TAUGHT, CONTROL)
    found = [
        Check("conjunctions: softmax within 5 points of the best guess at the end", _short_of_best, below=0.05),
        Check(
            "conjunctions: softmax above the nearest neighbour at the end",
            lambda seed: number(seed, conjunction, "end") - number(seed, references("conjunction"), f"{NEAREST} end"),
            above=0.0,
        ),
        Check("parities: softmax at chance, below 0.55", measured(trained("parity", CONTROL), "end"), below=0.55),
        Check(
            "a teaching sequence: 5 points more in the second quarter of the context",
            _less(taught, conjunction, "early"),
            above=0.05,
        ),
        Check("a teaching sequence: right above 0.97 at the end", measured(taught, "end"), above=0.97),
    ]
    if others := of_fixed_state(chosen):
        found.append(
            Check(
                "conjunctions: the best mechanism with a state of fixed size within 3 points of softmax",
                _nearest_of_fixed_state(others),
                above=-0.03,
            )
        )
    if chosen.preset != "tiny":
        mixed = trained(MIXED, CONTROL)
        found += [
            Check(
                "DNF: softmax further from right than on conjunctions",
                _less(conjunction, trained("dnf", CONTROL)),
                above=0.0,
            ),
            Check(
                "one model for both: with a teaching sequence 5 points more in the second quarter",
                lambda seed: number(seed, mixed, "taught early") - number(seed, mixed, "untaught early"),
                above=0.05,
            ),
            Check("one model for both: taught, right above 0.97 at the end", measured(mixed, "taught end"), above=0.97),
            Check(
                "one model for both: untaught, above the nearest neighbour on conjunctions",
                lambda seed: (
                    number(seed, mixed, "untaught end") - number(seed, references("conjunction"), f"{NEAREST} end")
                ),
                above=0.0,
            ),
        ]
    return tuple(found)


NEEDS = (
    Check(
        "conjunctions: softmax 10 points above always -1 at the end",
        lambda seed: (
            number(seed, trained("conjunction", CONTROL), "end")
            - number(seed, references("conjunction"), f"{NOTHING} end")
        ),
        above=0.1,
    ),
    Check(
        "parities: Gaussian elimination above 0.9 at the end",
        measured(references("parity"), "Gaussian elimination end"),
        above=0.9,
    ),
    Check(
        "taught conjunctions: elimination always right at the end",
        measured(references(TAUGHT), "elimination end"),
        above=0.999,
    ),
)


def make(chosen: Chosen) -> Reproduction:
    """The reproduction for a preset and its mechanisms."""
    installed, cells = smollm2_file() is not None, settings(chosen)
    words = "SmolLM2-135M is measured beside the nearest neighbour in the preset small, and not judged"
    return Reproduction(
        name="in-context-functions",
        mechanisms=tuple(dict.fromkeys(card.name for one in entered(chosen) for card in read_variant(one).cards)),
        source=Paper(
            "Understanding In-Context Learning in Transformers and LLMs by Learning to Learn Discrete Functions",
            "2310.03016",
            2023,
            29,
        ),
        claim=(
            "Transformers nearly match the optimal learner on simple classes of Boolean functions and get worse on complex ones, "
            "parities staying at chance; some attention-free models do almost the same; with a teaching sequence far fewer "
            "examples do, and one model holds both algorithms (abstract)."
        ),
        instead=(
            "tiny: 12 examples of 5 bits, 2 layers of width 32, 250 steps, others than softmax on conjunctions alone. small: 24 examples of 8 bits, 3 layers of width 64, "
            "1,000 steps. paper: 40 examples of 28 bits (parities of 10), 12 layers of width 256, 15,000 steps. All trained by "
            "this project's loop (AdamW, cosine), new functions at each step. Early is the second quarter of a context, end "
            "its last."
        ),
        settings=cells,
        run_cell=run_cell,
        checks=checks(chosen),
        needs=NEEDS,
        left_out=(
            f"LLaMA-2 and GPT-4 compete with nearest neighbours: {words if installed else f'for SmolLM2-135M: {PACKAGES}'}",
            "frozen layers of GPT-2 and LLaMA: those of the control are frozen as they were drawn",
            "LSTM, GRU and Hyena: not mechanisms of the catalogue",
            *(
                ()
                if of_fixed_state(chosen)
                else ("models without attention: no mechanism with a state of fixed size entered",)
            ),
            *(("DNF and one model for both algorithms: in the preset small",) if chosen.preset == "tiny" else ()),
        ),
        smoke={"steps": 2, "batch_size": 2, "items": 4, "layers": 1, "dim": 16, "num_heads": 2, "length": 16},
        seeds=2 if chosen.preset == "tiny" else 3,
        seconds=SECONDS[chosen.preset],
        more_seconds={
            name: seconds
            for name, setting in cells.items()
            if (seconds := OTHER_SECONDS[chosen.preset].get(setting["kind"]))
        },
        protocol=3,
    )


def shown(chosen: Chosen, cells: Mapping[tuple[str, int], Any]) -> Any:
    """The report's sections."""
    return sections(cells, tuple(functions_of(chosen.preset)), entered(chosen), settings(chosen))


STUDY = Study(
    name="in-context-functions",
    question=(
        "Which mechanisms learn a new Boolean function from the examples in their context, and how near do they come to the "
        "best that can be done?"
    ),
    make=make,
    sections=shown,
    presets=("tiny", "small", "paper"),
    mechanisms=("softmax", RETENTION, "gated_linear", "delta_rule", "mamba2", "aaren"),
    refuses=refuses,
)
