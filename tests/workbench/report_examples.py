"""Plausible rows of a comparison, for the tests of the report: `write_report("OUT.html", **example())` shows them."""

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


def example(tasks: int = 3, mechanisms: int = 6, seeds: int = 3, entropy: int | None = None) -> dict:
    """Arguments of `write_report` for a comparison of this size."""
    random = np.random.default_rng(entropy)
    names = MECHANISMS[:mechanisms]
    chosen_tasks = list(TASKS)[:tasks]
    quality, cost, search, summary = [], [], [], {}
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
                quality.append(
                    {
                        **where,
                        **chosen,
                        "seed": seed,
                        "score": scores[-1],
                        "solved": scores[-1] > 0.9 if higher else None,
                        "items": [[float(random.random()), 1.0] for _ in range(32)],
                        "curve": [[float(t), float(v)] for t, v in zip(tokens, loss, strict=True)],
                        "parameters": 3_211_264 + 1024 * index,
                        "feed_forward": 1024 - 8 * index,
                        "tokens": 4_000_000,
                        "steps": 488,
                        "seconds": 4e6 / speed,
                        "tokens_per_second": speed,
                        "training_memory_bytes": int(random.uniform(3e8, 9e8)),
                        "reproduce": f"regard compare corpus.txt --tasks {task} --mechanisms {name} --seeds {seed} "
                        f"--lr {rate} --budget 4M",
                    }
                )
            for lr in RATES:
                diverged = lr > 5e-3 and random.random() < 0.5
                away = 0.12 * abs(math.log10(lr / rate))
                search.append(
                    {
                        **where,
                        "lr": lr,
                        "seed": 0,
                        "diverged": diverged,
                        "score": None if diverged else level - away if higher else level + away,
                        "loss": None if diverged else level + away,
                    }
                )
            factor = random.uniform(0.7, 3.5)
            latency = [factor * (n / 500 + (n / 2500) ** 2 if quadratic else 0.6 + n / 900) for n in LENGTHS]
            state = [n * 4096 if quadratic else 262144 * (1 + index) for n in LENGTHS]
            memory = [(n**1.8 * 40 if quadratic else n * 9000) * factor + 4e5 for n in LENGTHS]
            reference = reference if index else (latency, memory)

            def beats(measured, of, lengths=LENGTHS):
                return next((n for n, a, b in zip(lengths, measured, of, strict=True) if a < b), None)

            cost.append(
                {
                    **where,
                    "latency": [[n, t, t * 0.93, t * 1.12] for n, t in zip(LENGTHS, latency, strict=True)],
                    "decode": [[n, 4e3 / factor / (1 + n / 3000 if quadratic else 1)] for n in LENGTHS],
                    "memory": [list(pair) for pair in zip(LENGTHS, memory, strict=True)],
                    "state_bytes": [list(pair) for pair in zip(LENGTHS, state, strict=True)],
                    "efficiency_length_time": beats(latency, reference[0]),
                    "efficiency_length_memory": beats(memory, reference[1]),
                }
            )
            error = float(np.std(scores, ddof=1) / math.sqrt(seeds)) if seeds > 1 else None
            entries.append(
                {
                    "mechanism": name,
                    "mean": float(np.mean(scores)),
                    "standard_error": error,
                    "seeds": seeds,
                    "parameters": 3_211_264 + 1024 * index,
                    "tokens_per_second": speed,
                    "inference_ms": latency[3],
                    "decode_tokens_per_second": 4e3 / factor,
                    "training_memory_bytes": int(memory[3]),
                    "state_bytes": state[3],
                    "solved": None,
                }
            )
        sign = 1 if higher else -1
        best = max(entries, key=lambda e: sign * e["mean"])
        for entry in entries:
            entry["on_front"] = not any(
                sign * other["mean"] > sign * entry["mean"] and other["inference_ms"] < entry["inference_ms"]
                for other in entries
            )
            entry["beside_baseline"] = "ahead" if sign * entry["mean"] > sign * (0.7 if higher else 1.6) else "behind"
            gap = abs(entry["mean"] - best["mean"])
            entry["separable_from_best"] = None if error is None else entry is not best and gap > 0.04
        summary[task] = entries
    winner = names[min(1, len(names) - 1)]
    run = {
        "title": "Which attention for corpus.txt?",
        "command": "regard compare corpus.txt --tasks " + ",".join(chosen_tasks) + " --budget 4M",
        "tasks": chosen_tasks,
        "mechanisms": names,
        "seeds": list(range(seeds)),
        "budget": "4M tokens a model",
        "settings": {"dim": 256, "layers": 4, "heads": 4, "context": 1024, "precision": "float32", "rates": RATES},
        "started": "2026-01-05T09:12:44+00:00",
        "finished": "2026-01-05T10:02:10+00:00",
        "recommendation": {
            "text": f"Use {winner}. It is as good as softmax on your text and 2.4 times faster at 1,024 tokens.",
            "reason": "No mechanism is both better and faster on any task, and its score cannot be told apart from the "
            "best one. Its state does not grow, so decoding stays as fast as it starts.",
            "winner": winner,
            "notes": [
                "Below about 300 tokens softmax is the faster one.",
                "On recall it is behind softmax by 0.03: choose softmax if exact copying matters.",
            ],
        },
        "resolution": {task: 0.021 for task in chosen_tasks},
        "baselines": {
            task: {"name": f"rule of {task}", "score": 0.7 if higher else 1.6, "higher_is_better": higher}
            for task, (_, higher) in list(TASKS.items())[:tasks]
        },
    }
    rows = {"quality": quality, "cost": cost, "search": search, "summary": summary}
    return {"run": run, **rows, "machine": MACHINE, "revision": "0123456789abcdef0123456789abcdef01234567"}
