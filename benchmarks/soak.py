"""Soak test of `regard serve`: random load from clients of every kind, with every answer known beforehand.

    python benchmarks/soak.py                             # 30 minutes, with a new small hybrid model
    python benchmarks/soak.py smollm2_int8 --minutes 10   # any folder that regard serve accepts; --json for programs

Clients ask for completions and chats, whole and streamed, alone and several at once, with shared prefixes and with as many
tokens as fit; some disconnect, read or write slowly, stop reading, send invalid requests, or come all at once. Answers must
equal those of `generate` alone, and every status must be the right one. After each round of load the server has to be at
rest: no request, no state, and no pages except those of the prefix cache. Resident memory is recorded then, and a line is
fitted to it after a warm-up. At the end the server is told to stop under load. The exit status is 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from soak_clients import RACE, Clients, bad_requests, read_events, read_whole
from soak_questions import Alone, Pool

from regard.measurement import provenance
from regard.models import LanguageModel, LanguageModelConfig, save_pretrained
from regard.serving.opened import open_model
from regard.tasks.tokenizer import BpeTokenizer

PROSE = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
ROUND, ROUNDS = 45.0, 20
"""Longest round of load in seconds, and fewest rounds."""
REST = 60.0
"""Most seconds that a server may take to come to rest without load."""
WARM, JUDGED = 1 / 3, 8
"""Share of a run that counts as warm-up, and fewest memory samples after it for a verdict."""
FLAT = 0.01
"""Share of resident memory by which it may grow in an hour."""
DRAIN = 60
BODY = 1 << 16


def small_model(folder: Path, seed: int) -> None:
    """Save a hybrid language model with random weights and a tokenizer trained on the docs, as `regard train` does."""
    torch.manual_seed(seed)
    tokenizer = BpeTokenizer.train([path.read_bytes() for path in PROSE], 1024)
    model = LanguageModel(
        LanguageModelConfig(tokenizer.vocab_size, dim=64, plan=["gated_linear", "softmax"] * 2, num_heads=2)
    )
    with torch.no_grad():
        model.head.weight.mul_(4)  # so that rounding hardly ever decides which token is the likeliest
    save_pretrained(model, folder)
    tokenizer.save(folder / "tokenizer.json")
    task = {"name": "text", "options": {}}
    record = {"state": "finished", "mechanism": "gated_linear+softmax", "layers": [], "tokenizer": tokenizer.name}
    (folder / "training.json").write_text(json.dumps(record | {"task": task, "settings": {"length": 512}}))


class Process:
    """A server that runs in its own process."""

    def __init__(self, folder: Path, log: Path, key: str, options: argparse.Namespace) -> None:
        arguments = {
            "port": 0, "rows": options.rows, "waiting": options.waiting, "context": options.context,
            "cache-tokens": options.cache_tokens, "chunk": 64, "max-body": BODY, "drain": DRAIN, "threads": options.threads,
        }  # fmt: skip
        words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
        self._log = log.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "regard", "serve", str(folder), "--json", *words],
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=os.environ | {"REGARD_API_KEY": key},
        )
        self.told = self._read_told()

    def _read_told(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line.decode()
            try:
                return json.loads(said)
            except ValueError:
                continue
        raise SystemExit(f"the server did not start: {Path(self._log.name).read_text()}")

    @property
    def resident(self) -> int:
        """Resident memory of the process in bytes."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        """Kill the process if it is still running."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._log.close()


@contextmanager
def loaded(clients: Clients, count: int, draws: random.Random, act: Any) -> Iterator[threading.Event]:
    """Run `count` clients until the block ends or the yielded event is set."""
    stop = threading.Event()

    def client(own: random.Random) -> None:
        while not stop.is_set() and not clients.gone:
            try:
                act(own)
            except Exception as error:
                clients.tally.fault("client", repr(error))

    threads = [threading.Thread(target=client, args=(random.Random(draws.random()),)) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def gauges(clients: Clients) -> dict[str, float]:
    """The server's metrics by name."""
    _, text = clients.get("/metrics")
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {name.removeprefix("regard_"): float(value) for name, _, value in lines}


def at_rest(clients: Clients) -> dict[str, float]:
    """The server's metrics once it is idle; records a fault if it does not come to rest."""
    end = time.monotonic() + REST
    while True:
        found = gauges(clients)
        kept = found.get("prefix_blocks", 0) if "pages" in found else 0
        left = {name: found[name] for name in ("running", "waiting", "state_bytes")}
        left["pages in use beside the prefix cache's"] = found.get("pages_used", 0) - kept
        if not any(left.values()):
            return found
        if time.monotonic() > end:
            clients.tally.fault("at rest", f"without load the server has { ({k: v for k, v in left.items() if v}) }")
            return found
        time.sleep(0.1)


def soak(clients: Clients, server: Process, options: argparse.Namespace) -> dict[str, Any]:
    """Run rounds of load; returns resident memory over time and the server's last metrics."""
    draws = random.Random(f"{options.seed} rounds")
    began, seconds = time.monotonic(), 60 * options.minutes
    length = min(ROUND, seconds / ROUNDS)
    resting, highest, found = [], 0, {}
    for request in clients.bad:  # each bad request at least once, and one burst
        clients.refused(*request)
    clients.burst(draws)
    while time.monotonic() < began + seconds and server.process.poll() is None:
        with loaded(clients, draws.randint(1, options.clients), draws, clients.act):
            end = time.monotonic() + length
            while time.monotonic() < end and server.process.poll() is None:
                highest = max(highest, server.resident)
                time.sleep(0.5)
        if server.process.poll() is not None:
            clients.tally.fault("server", f"it ended by itself with {server.process.returncode}")
            break
        found = at_rest(clients)
        resting.append((time.monotonic() - began, server.resident))
        if not options.json:
            done = sum(clients.tally.outcomes.values())
            words = f"{resting[-1][0] / 60:5.1f} min  {done:>7,} done  {len(clients.tally.faults)} wrong"
            print(f"{words}  {server.resident / 2**20:.1f} MiB", file=sys.stderr, flush=True)
    return {"resting": resting, "highest": highest, "gauges": found}


def stop_under_load(clients: Clients, server: Process, options: argparse.Namespace) -> dict[str, Any]:
    """Send SIGTERM while answers are under way: the server must finish them, then end."""
    draws = random.Random(f"{options.seed} end")

    def act(own: random.Random) -> None:
        question = own.choice(clients.long + clients.short)
        clients.ask("before the end", question, own, own.choice([read_whole, read_events]))

    with loaded(clients, options.clients, draws, act) as stop:
        time.sleep(2 * RACE)
        running = gauges(clients)["running"]
        clients.closing = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        try:
            server.process.wait(DRAIN + 30)
        except subprocess.TimeoutExpired:
            clients.tally.fault("before the end", "the server did not end")
            server.close()
        took = time.monotonic() - clients.closing
        stop.set()
    status = server.process.returncode
    if status != 0:
        clients.tally.fault("before the end", f"the server ended with {status}")
    return {"running": running, "seconds": took, "status": status}


def line_of(resting: list[tuple[float, int]]) -> dict[str, float] | None:
    """Slope of resident memory after the warm-up in bytes per hour, with its standard error; None for few samples."""
    kept = np.array([(t, size) for t, size in resting if t > WARM * resting[-1][0]], dtype=float)
    if len(kept) < JUDGED:
        return None
    (slope, _), covariance = np.polyfit(kept[:, 0] / 3600, kept[:, 1], 1, cov=True)
    return {"slope": float(slope), "error": float(covariance[0, 0] ** 0.5), "resident": float(kept[:, 1].mean())}


def judge(clients: Clients, found: dict[str, Any], log: str) -> list[str]:
    """List everything that went wrong."""
    tally, line = clients.tally, found["line"]
    wrong = list(tally.faults)
    wrong += [f"{n} answers with status {status}" for status, n in sorted(tally.statuses.items()) if status >= 500]
    if "Traceback" in log or "ERROR" in log:
        wrong.append(f"the server's log has errors: {log[-2000:]}")
    if not tally.statuses[429]:
        wrong.append("nobody was turned away")
    if line is not None and line["slope"] - 2 * line["error"] > FLAT * line["resident"]:
        wrong.append(f"memory grows by {line['slope'] / 2**20:.1f} MiB an hour")
    return wrong


def report(clients: Clients, found: dict[str, Any], wrong: list[str]) -> None:
    """Print the table and the verdict."""
    acts = sorted({act for act, _ in clients.tally.outcomes})
    outcomes = ("right", "done", "turned away", "too late", "wrong")
    print(f"| what clients did | {' | '.join(outcomes)} |\n|---|{'---:|' * len(outcomes)}")
    for act in acts:
        counts = (clients.tally.outcomes[act, outcome] for outcome in outcomes)
        print(f"| {act} | {' | '.join(f'{n:,}' if n else '' for n in counts)} |")
    statuses = ", ".join(f"{status}: {n:,}" for status, n in sorted(clients.tally.statuses.items()))
    print(f"\nstatuses that clients saw: {statuses}")
    told = found["gauges"]
    counted = {
        name: told.get(f"{name}_total", 0) for name in ("prompt_tokens", "shared_tokens", "new_tokens", "preemptions")
    }
    print("the server: " + ", ".join(f"{n:,.0f} {name.replace('_', ' ')}" for name, n in counted.items()))
    print(
        f"at rest: {told.get('pages_used', 0):.0f} of {told.get('pages', 0):.0f} pages in use, all of the prefix cache"
    )
    line = found["line"]
    memory = (
        f"resident memory: {found['resting'][-1][1] / 2**20:.1f} MiB at rest, {found['highest'] / 2**20:.1f} at most"
    )
    if line is None:
        print(f"{memory}; too few samples for a line")
    else:
        print(f"{memory}; {line['slope'] / 2**20:+.2f} ± {line['error'] / 2**20:.2f} MiB an hour")
    end = found["end"]
    if end:
        print(
            f"SIGTERM with {end['running']:.0f} answers under way: ended after {end['seconds']:.1f} s ({end['status']})"
        )
    for words in wrong[:20]:
        print(f"WRONG: {words[:1000]}")
    print("verdict: " + (f"{len(wrong)} things were wrong" if wrong else "nothing was wrong"))


def main() -> int:
    """Run the soak test and report the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="what regard serve takes; a small model when not given")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=10, help="at the most; each round of load draws a number")
    parser.add_argument("--questions", type=int, default=12, help="of each kind")
    parser.add_argument("--rows", type=int, default=6)
    parser.add_argument("--waiting", type=int, default=10)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--cache-tokens", type=int, default=1536, help="few, so that requests give back their pages")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    key = secrets.token_hex(8)
    with tempfile.TemporaryDirectory() as place:
        folder = options.folder
        if folder is None:
            folder = Path(place, "small")
            small_model(folder, options.seed)
        opened = open_model(folder, rows=1, context=options.context, cache_tokens=options.context)
        prose, draws = "".join(path.read_text() for path in PROSE), random.Random(options.seed)
        questions = Pool(Alone(folder, opened.text), prose, options.context, draws).fill(options.questions)
        server = Process(folder, log := Path(place, "log"), key, options)
        try:
            name, places = server.told["model"], options.rows + options.waiting
            host, _, port = server.told["url"].removeprefix("http://").removesuffix("/v1").rpartition(":")
            bad = bad_requests(name, opened.reader.vocab_size, options.context, BODY, places)
            clients = Clients((host, int(port)), name, key, questions, bad, places)
            found = soak(clients, server, options)
            found["line"] = line_of(found["resting"])
            found["end"] = stop_under_load(clients, server, options) if server.process.poll() is None else None
        finally:
            server.close()
        wrong = judge(clients, found, log.read_text(errors="replace"))
    if options.json:
        outcomes = [{"act": a, "outcome": o, "count": n} for (a, o), n in sorted(clients.tally.outcomes.items())]
        record = {"machine": provenance.fingerprint(), "minutes": options.minutes, "model": name, "wrong": wrong}
        record |= {"outcomes": outcomes, "statuses": dict(sorted(clients.tally.statuses.items())), **found}
        print(json.dumps(record, indent=1, default=str))
    else:
        report(clients, found, wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
