"""Plausible rows of a comparison, for tests of the report: `write_report("OUT.html", Measured(**example()))` shows them."""

from __future__ import annotations

import math

import numpy as np

MECHANISMS = ["softmax", "gated_linear", "delta_rule", "mamba2", "sigmoid", "aaren", "local_window", "landmark"]
MECHANISMS += ["flow_attention", "agent", "retention", "mixture_of_heads"]
TASKS = {
    "language_model": ("bits per byte", False),
    "recall": ("accuracy", True),
    "forecast": ("mean squared error", False),
    "copy": ("exact match", True),
}
LENGTHS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384]
RATES = [3e-4, 1e-3, 3e-3, 1e-2]
MACHINE = {"machine_id": "5f0c9d2ab7e1", "cpu": "Example CPU 9000", "gpus": [], "memory_bytes": 32 * 2**30}
MACHINE |= {"physical_cores": 8, "logical_cores": 16, "usable_cores": 16, "threads": 8, "architecture": "x86_64"}
MACHINE |= {"os": "Linux 6.8", "python": "3.12.4", "torch": "2.13.0+cpu", "numpy": "2.4.6", "regard": "0.1.0"}

SIZE = {"tokens": 4_000_000, "steps": 488}
SETTINGS = {"dim": 256, "layers": 4, "heads": 4, "context": 1024, "precision": "float32", "rates": RATES}
REASON = "No mechanism is both better and faster on any task, and its score cannot be told apart from the best one."
NOTES = [
    "Below about 300 tokens softmax is the faster one.",
    "On recall it is behind softmax by 0.03: choose softmax if exact copying matters.",
]


def example(tasks: int = 3, mechanisms: int = 6, seeds: int = 3, entropy: int | None = None) -> dict:
    """The fields of a `Measured` for a comparison of this size."""
    random = np.random.default_rng(entropy)
    names = MECHANISMS[:mechanisms]
    chosen_tasks = list(TASKS)[:tasks]
    quality, cost, search, summary, rules = [], [], [], {}, {}
    for task in chosen_tasks:
        metric, higher = TASKS[task]
        entries, reference = [], None
        for index, name in enumerate(names):
            where, quadratic = {"task": task, "mechanism": name}, name in ("softmax", "sigmoid")
            level = random.uniform(0.55, 0.97) if higher else random.uniform(1.35, 1.9)
            speed = random.uniform(2e4, 2e5)
            rate = RATES[int(random.integers(len(RATES)))]
            chosen, scores = {"lr": rate, "metric": metric, "higher_is_better": higher}, []
            for seed in range(seeds):
                scores.append(level + random.normal() * 0.02)
                tokens = np.linspace(0, 4e6, 60)
                loss = level + 3.6 * np.exp(-tokens / random.uniform(4e5, 9e5)) + 0.03 * random.normal(size=60)
                items = np.stack([random.random(32), np.ones(32)], 1).tolist()
                curve = np.stack([tokens, loss], 1).tolist()
                run = where | chosen | SIZE | {"seed": seed, "score": scores[-1], "items": items, "curve": curve}
                run |= {"solved": scores[-1] > 0.9 if higher else None, "parameters": 3_211_264 + 1024 * index}
                run |= {"feed_forward": 1024 - 8 * index, "seconds": 4e6 / speed, "tokens_per_second": speed}
                run["training_memory_bytes"] = int(random.uniform(3e8, 9e8))
                command = f"regard compare corpus.txt --tasks {task} --mechanisms {name}"
                quality.append(run | {"reproduce": f"{command} --seeds {seed} --lr {rate} --budget 4M"})
            for lr in RATES:
                diverged = lr > 5e-3 and random.random() < 0.5
                away = 0.12 * abs(math.log10(lr / rate))
                found = {"score": level - away if higher else level + away, "loss": level + away}
                found = dict.fromkeys(found) if diverged else found
                search.append(where | {"lr": lr, "seed": 0, "diverged": diverged} | found)
            factor = random.uniform(0.7, 3.5)
            latency = [factor * (n / 500 + (n / 2500) ** 2 if quadratic else 0.6 + n / 900) for n in LENGTHS]
            state = [n * 4096 if quadratic else 262144 * (1 + index) for n in LENGTHS]
            memory = [(n**1.8 * 40 if quadratic else n * 9000) * factor + 4e5 for n in LENGTHS]
            reference = reference if index else (latency, memory)

            def beats(measured, of, lengths=LENGTHS):
                return next((n for n, a, b in zip(lengths, measured, of, strict=True) if a < b), None)

            decoded = [4e3 / factor / (1 + n / 3000 if quadratic else 1) for n in LENGTHS]
            by_length = {"decode": decoded, "memory": memory, "state_bytes": state}
            row = {key: [list(pair) for pair in zip(LENGTHS, of, strict=True)] for key, of in by_length.items()}
            row["latency"] = [[n, t, t * 0.93, t * 1.12] for n, t in zip(LENGTHS, latency, strict=True)]
            ends = {"time": beats(latency, reference[0]), "memory": beats(memory, reference[1])}
            cost.append(where | row | {f"efficiency_length_{of}": end for of, end in ends.items()})
            error = float(np.std(scores, ddof=1) / math.sqrt(seeds)) if seeds > 1 else None
            entry = {"mechanism": name, "mean": float(np.mean(scores)), "standard_error": error, "seeds": seeds}
            entry |= {"parameters": 3_211_264 + 1024 * index, "tokens_per_second": speed, "solved": None}
            entry |= {"inference_ms": latency[3], "decode_tokens_per_second": 4e3 / factor, "state_bytes": state[3]}
            entries.append(entry | {"training_memory_bytes": int(memory[3])})
        sign = 1 if higher else -1
        means = [entry["mean"] for entry in entries]
        best, rule = max(entries, key=lambda e: sign * e["mean"]), (min(means) + max(means)) / 2
        rules[task] = {"name": f"rule of {task}", "score": rule, "higher_is_better": higher}
        for entry in entries:
            entry["on_front"] = not any(
                sign * other["mean"] > sign * entry["mean"] and other["inference_ms"] < entry["inference_ms"]
                for other in entries
            )
            entry["beside_baseline"] = "ahead" if sign * entry["mean"] > sign * rule else "behind"
            gap = abs(entry["mean"] - best["mean"])
            entry["separable_from_best"] = None if error is None else entry is not best and gap > 0.04
        summary[task] = entries
    command = f"regard compare corpus.txt --tasks {','.join(chosen_tasks)} --budget 4M"
    run = {"title": "Which attention for corpus.txt?", "command": command, "budget": "4M tokens a model"}
    run |= {"tasks": chosen_tasks, "mechanisms": names, "seeds": list(range(seeds)), "settings": SETTINGS}
    run |= {"started": "2026-01-05T09:12:44+00:00", "finished": "2026-01-05T10:02:10+00:00"}
    winner = names[min(1, len(names) - 1)]
    text = f"Use {winner}. It is as good as softmax on your text and 2.4 times faster at 1,024 tokens."
    run["recommendation"] = {"text": text, "reason": REASON, "winner": winner, "notes": NOTES}
    run |= {"resolution": dict.fromkeys(chosen_tasks, 0.021), "baselines": rules}
    rows = {"quality": quality, "cost": cost, "search": search, "summary": summary}
    return {"run": run, **rows, "machine": MACHINE, "revision": "0123456789abcdef0123456789abcdef01234567"}
