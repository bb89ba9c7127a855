"""Offloaded attention changes no answer, whichever worker has which keys or is lost, and moves only the necessary bytes."""

import errno
import gc
import os
import random
import signal
import socket

import pytest
import torch
from support import refused

from regard.contract import Unsupported
from regard.engines.cache import KeyValueState
from regard.models import LanguageModel, LanguageModelConfig
from regard.serving.engine import Engine, Limits, Request, Row
from regard.serving.offload import LocalBackend, OffloadedReader, ProcessBackend, TcpBackend, backends, create_backend
from regard.serving.offload import splits as splits_module
from regard.serving.offload.backends import LocalLink, Lost
from regard.serving.offload.costs import Sizes, traffic_bytes
from regard.serving.offload.messages import Channel, Garbled, Message, Ring
from regard.serving.offload.splits import Rows, TokenSplit, put_together
from regard.serving.offload.worker import AttentionWorker

VOCABULARY = 30
GROUPED = [
    "softmax",
    ("softmax", {"softcap": 2.0, "query_key_norm": "rms", "output_gate": "swish", "num_heads": 6, "num_kv_heads": 3}),
    ("softmax", {"positions": "none"}),
]
CONVOLVED = [
    ("gated_linear", {"short_convolution": 4}),
    ("softmax", {"short_convolution": 4, "query_key_norm": "rms", "num_heads": 6, "num_kv_heads": 3}),
    ("softmax", {"short_convolution": 3, "output_norm": "rms"}),
]
HYBRID = ["gated_linear", "softmax", "local", "softmax"]


def language_model(plan=GROUPED, dtype=torch.float64, **options):
    config = LanguageModelConfig(VOCABULARY, dim=24, plan=plan, num_heads=4, num_kv_heads=2, **options)
    return LanguageModel(config).to(dtype).eval()


def requests(count=6):
    draws = random.Random(torch.initial_seed())
    lengths = [1, 5, 30, 61, 18, 40]
    return [
        Request(str(i), draws.choices(range(VOCABULARY), k=n), draws.randint(3, 9), logprobs=0)
        for i, n in enumerate(lengths[:count])
    ]


def alone(model, request):
    return model.generate(torch.tensor([list(request.prompt)]), request.max_tokens)[0].tolist()


def answers(reader, asked):
    """Tokens and log-probabilities of requests that arrive one after another."""
    engine, coming, found = Engine(reader, Limits(rows=4, chunk=11)), list(asked), {}
    while coming or engine.busy:
        if coming:
            engine.submit(coming.pop(0))
        for event in engine.step():
            assert event.token is not None, event.error
            found.setdefault(event.key, []).append((event.token, event.logprob))
    return found


def check(model, found, asked):
    """Check tokens and log-probabilities: greedy answers of a small model may be right by chance, these are not."""
    for request in asked:
        tokens = alone(model, request)
        assert [token for token, _ in found[request.key]] == tokens
        ids = torch.tensor([[*request.prompt, *tokens]])
        with torch.no_grad():
            nats = model(ids[:, :-1]).output[0, len(request.prompt) - 1 :].log_softmax(-1)
        expected = nats.gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        assert [nat for _, nat in found[request.key]] == pytest.approx(expected, abs=1e-10)


def check_and_close(model, reader, asked):
    try:
        check(model, answers(reader, asked), asked)
        assert not reader._texts and not reader._held._where
        assert all(stats["rows"] == stats["cache_bytes"] == 0 for stats in reader.pool.stats())
    finally:
        reader.close()


@pytest.mark.parametrize(
    ("plan", "workers", "split", "ways"),
    [
        (GROUPED, 1, "auto", {"micro_batches": 1, "overlap": False}),
        (GROUPED, 2, "head", {}),
        (GROUPED, 3, "request", {"micro_batches": 3}),
        (GROUPED, 2, "sequence", {}),
        (HYBRID, 3, "auto", {"long": 45}),
        (HYBRID, 3, "sequence", {"overlap": False}),
        (CONVOLVED, 2, "auto", {}),
        (CONVOLVED[1:], 2, "request", {"overlap": False}),
    ],
)
def test_answers_equal_generate_alone(plan, workers, split, ways, monkeypatch):
    monkeypatch.setattr(splits_module, "BLOCK", 7)
    model = language_model(plan)
    check_and_close(model, OffloadedReader(model, workers, split=split, rows=4, context=80, **ways), requests())


class Watched(LocalBackend):
    """Local workers that are lost at given messages: (op, n) is the n-th message of that kind; `ops` records all messages."""

    def __init__(self, losses=()):
        self.losses, self.ops = losses, []

    def start(self, count):
        return [WatchedLink(self) for _ in range(count)]


class WatchedLink(LocalLink):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def send(self, message):
        self._watch(message.op)
        super().send(message)

    def receive(self):
        self._watch("receive")
        return super().receive()

    def _watch(self, op):
        self.backend.ops.append(op)
        if (op, self.backend.ops.count(op)) in self.backend.losses:
            self.close()
            raise Lost("it is gone")


@pytest.mark.parametrize("split", ["head", "request", "sequence"])
def test_workers_that_are_lost_at_any_moment_change_no_answer(split, monkeypatch):
    monkeypatch.setattr(splits_module, "BLOCK", 7)
    model = language_model(["softmax", "gated_linear", "softmax"])
    draws = random.Random(torch.initial_seed())
    moments = {"append": (2, 6), "early": (2, 9), "attend": (10, 25), "receive": (30, 70)}
    backend = Watched([(op, draws.randint(*numbers)) for op, numbers in moments.items()])
    reader = OffloadedReader(model, 2, split=split, backend=backend, rows=4, context=80)
    asked = requests(5)
    check(model, answers(reader, asked), asked)
    assert reader.pool.replaced > 1


def test_queries_leave_before_their_keys_and_one_batch_before_the_other_is_back():
    model, backend = language_model(["softmax"]), Watched()
    reader = OffloadedReader(model, 1, backend=backend, rows=2, context=20)
    rows = [Row(Request(str(i), [1, 2], 9), i, [], None) for i in range(2)]
    reader.read(rows, [[1, 2], [3, 4]])
    for row in rows:
        row.length = 2
    for overlap, in_turn, expected in (
        (True, True, ["early", "attend", "early", "attend", "receive", "receive"]),
        (False, True, ["attend", "attend", "receive", "receive"]),
        (False, False, ["attend", "receive", "attend", "receive"]),
    ):
        reader.overlap, reader.in_turn = overlap, in_turn
        backend.ops.clear()
        reader.read(rows, [[5], [6]])
        for row in rows:
            row.length += 1
        assert backend.ops == expected


def test_logits_in_float32_equal_those_of_the_model_alone():
    model = language_model(dtype=torch.float32)
    ids = torch.randint(VOCABULARY, (3, 70))
    whole = model(ids).output
    for split in ("head", "sequence"):
        reader = OffloadedReader(model, 2, split=split, rows=3, context=80)
        rows = [Row(Request(str(i), ids[i].tolist(), 9), i, [], None) for i in range(3)]
        for start, end in ((0, 33), (33, 66), (66, 67), (67, 68)):
            found = reader.read(rows, ids[:, start:end].tolist())
            for row in rows:
                row.length = end
            torch.testing.assert_close(found, whole[:, end - 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("before", [0, 1, 50])
@pytest.mark.parametrize("owners", [1, 2, 3])
def test_partial_softmax_over_workers_with_the_new_token_merged_equals_the_whole(before, owners, monkeypatch):
    monkeypatch.setattr(splits_module, "BLOCK", 4)
    split = TokenSplit(owners, 0)
    workers = [AttentionWorker() for _ in range(owners)]
    layer = {"heads": 4, "kv_heads": 2, "key_width": 5, "value_width": 3, "scale": 0.7, "softcap": None}
    for worker in workers:
        begin = {"layers": [layer], "page_size": 4, "pages": 40, "dtype": "float64"}
        assert worker.answer(Message("begin", begin)).op == "begun"
    split.place(7, before + 1)
    k, v = torch.randn(1, 2, before + 1, 5).double(), torch.randn(1, 2, before + 1, 3).double()
    q = torch.randn(1, 4, 1, 5).double()
    found = {}
    for a, share in split.shares(Rows([7], [0], [before])).items() if before else ():
        old = share.fresh(k[:, :, :before]), share.fresh(v[:, :, :before])
        workers[a].answer(Message("append", {"layer": 0, "rows": [7], "counts": share.counts}, old))
    shares = split.shares(Rows([7], [before], [1]))
    for a, share in shares.items():
        asked = {"layer": 0, "rows": [7], "ranks": share.ranks, "parts": share.parts, "counts": share.counts}
        if any(share.counts):
            assert workers[a].answer(Message("early", asked, (q,))) is None
            new = share.fresh(k[:, :, before:]), share.fresh(v[:, :, before:])
            found[a] = workers[a].answer(Message("attend", asked, new)).tensors
        else:
            found[a] = workers[a].answer(Message("attend", asked, (q,))).tensors
    together = put_together(shares, found, 1, 2)
    whole = (0.7 * q @ k.repeat_interleave(2, 1).mT).softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(together, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("split", ["head", "request", "sequence"])
def test_bytes_that_move_are_those_of_the_closed_form(split):
    model = language_model(["softmax"] * 3, dtype=torch.float32)
    reader = OffloadedReader(model, 2, split=split, rows=4, context=80)
    rows = [Row(Request(str(i), [1] * 40, 9), i, [], None) for i in range(4)]
    reader.read(rows, [[1] * (10 + 9 * i) for i in range(4)])
    sizes = Sizes.of(model)
    traffic = reader.pool.traffic
    assert (traffic.sent, traffic.received) == (0, 0)
    assert traffic.prefilled == sizes.token_bytes * sum(10 + 9 * i for i in range(4))
    for i, row in enumerate(rows):
        row.length = 10 + 9 * i
    reader.read(rows, [[2]] * 4)
    assert (traffic.sent, traffic.received) == traffic_bytes(sizes, 4, owners=2 if split == "sequence" else 1)
    if split != "sequence":  # L e B D (2 + 2 / G)
        assert traffic.sent + traffic.received == 3 * 4 * 4 * 24 * (2 + 2 / 2)


def test_workers_have_no_weights_and_the_model_no_cache_and_one_that_is_killed_is_replaced():
    model = language_model(HYBRID, dtype=torch.float32)
    # the ring is smaller than a prompt's keys, and the rest goes through the socket
    reader = OffloadedReader(model, 2, split="head", backend=ProcessBackend(shared_bytes=4096), rows=3, context=80)
    asked = requests()
    gc.collect()
    engine, found = Engine(reader, Limits(rows=3, chunk=64)), {}
    for request in asked:
        engine.submit(request)
    steps = 0
    try:
        while engine.busy:
            for event in engine.step():
                found.setdefault(event.key, []).append(event.token)
            steps += 1
            if steps == 4:
                gc.collect()
                assert not [x for x in gc.get_objects() if type(x) is KeyValueState and x.k.shape[2] > 1]
                stats = reader.pool.stats()
                assert all(one["parameter_bytes_of_process"] == 0 < one["cache_bytes"] for one in stats)
                assert reader.held_bytes > 0 and reader.pool.framing > 0
                os.kill(reader.pool.links[1].process, signal.SIGKILL)
    finally:
        reader.close()
    assert reader.pool.replaced == 1
    assert found == {request.key: alone(model, request) for request in asked}


def test_memory_that_is_full_is_refused_before_anything_is_written_to_it(monkeypatch, tmp_path):
    def take(file, start, size):
        taken.append(size)
        if len(taken) < most:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", take, raising=False)
    monkeypatch.setattr(backends, "SHARED_FOLDERS", (tmp_path / "none", tmp_path, tmp_path))
    most, taken = 2, []
    backends._memory_file(4096).close()  # the second folder has room
    assert taken == [4096, 4096] and not list(tmp_path.iterdir())
    most, taken = 9, []
    refused("No space left on device", ProcessBackend(shared_bytes=4096).start, 1)


def test_answers_over_tcp_equal_generate_alone():
    model = language_model()
    reader = OffloadedReader(model, 2, split="sequence", backend=TcpBackend(), rows=4, context=80)
    check_and_close(model, reader, requests(4))


def test_a_full_cache_fails_what_does_not_fit_and_nothing_else():
    model = language_model(["softmax"])
    reader = OffloadedReader(model, 1, rows=2, context=300, cache_tokens=32)  # plus one page for each row
    engine, events = Engine(reader, Limits(rows=2)), {}
    for request in (Request("long", [1] * 150, 4), Request("short", [1] * 5, 4)):
        engine.submit(request)
        while engine.busy:
            for event in engine.step():
                events.setdefault(request.key, []).append(event)
    assert [event.finish for event in events["long"]] == ["error"] and "is full" in events["long"][0].error
    assert [event.token for event in events["short"]] == alone(model, Request("short", [1] * 5, 4))


def test_whole_sequences_are_spread_evenly_the_longest_first():
    split, tokens = TokenSplit(3, None), [random.Random(torch.initial_seed() + i).randint(1, 900) for i in range(20)]
    from regard.serving.offload.pool import AttentionPool

    pool = AttentionPool(LocalBackend(), split, [], dtype=torch.float32, pages=1, page_size=32)
    pool.place(range(20), tokens)
    loads = [sum(t for key, t in enumerate(tokens) if a in split.owners(key)) for a in range(3)]
    assert sum(loads) == sum(tokens) and max(loads) <= 4 / 3 * max(sum(tokens) / 3, max(tokens))


@pytest.mark.parametrize(
    ("plan", "options", "words"),
    [
        ([("softmax", {"window": (4, 0)})], {}, "layer 0, softmax"),
        (["softmax", ("softmax", {"learn_sink": True})], {}, "layer 1, softmax"),
        ([("softmax", {"positions": "alibi"})], {}, "layer 0, softmax"),
        (["softmax", "sigmoid"], {}, "layer 1, sigmoid"),
        (["gated_linear"], {}, "without softmax layers"),
        (["softmax"], {"workers": 3, "split": "head"}, "at most 2 workers"),
        (["softmax"], {"split": "column"}, "auto, head, request, sequence"),
        (["softmax"], {"workers": 0}, "workers >= 1"),
        (["softmax"], {"micro_batches": 0}, "micro_batches >= 1"),
    ],
)
def test_what_cannot_be_offloaded_is_refused(plan, options, words):
    with pytest.raises(Unsupported, match=words):
        OffloadedReader(language_model(plan), **{"context": 20, **options})


def test_backends_that_cannot_be_are_refused():
    for name, options, words in (
        ("pigeon", {}, "local, process, tcp"),
        ("process", {"threads": 0}, "threads >= 1"),
        ("tcp", {"cores": [100_000]}, "cores="),
    ):
        with pytest.raises(Unsupported, match=words):
            create_backend(name, **options)


def test_messages_arrive_as_they_were_sent_in_memory_that_both_see_or_behind_each_other():
    import mmap

    draws = random.Random(torch.initial_seed())
    left, right = socket.socketpair()
    with left, right, mmap.mmap(-1, 2000) as memory:
        one = Channel(left, Ring(memory, 0, 1000), Ring(memory, 1000, 1000))
        other = Channel(right, Ring(memory, 1000, 1000), Ring(memory, 0, 1000))
        for _ in range(60):
            sent = []
            for _ in range(draws.randint(1, 4)):
                shape = [draws.randint(0, 15) for _ in range(draws.randint(0, 2))]
                dtype = draws.choice([torch.float32, torch.bfloat16, torch.float64])
                sent.append(Message("x", {"rows": [1, 2]}, (torch.randn(shape).to(dtype), torch.randn(3))))
                one.send(sent[-1])
            for message in sent:
                got = other.receive()
                assert (got.op, got.fields) == (message.op, message.fields)
                assert all(torch.equal(a, b) for a, b in zip(got.tensors, message.tensors, strict=True))
            other.send(Message("y"))
            assert one.receive().op == "y"


def test_bytes_that_are_no_message_are_refused():
    from regard.serving.offload.messages import MARK, PREFIX

    def framed(header, inline=0):
        return PREFIX.pack(MARK, len(header), inline) + header

    for data in (
        b"\x80\x04]" * 20,
        PREFIX.pack(MARK, 1 << 30, 0),
        framed(b"[1]"),
        framed(b'{"op":"x","fields":{},"tensors":[["object",[1]]]}'),
        framed(b'{"op":"x","fields":{},"tensors":[["float32",[-4]]]}'),
        framed(b'{"op":"x","fields":{},"tensors":[["float32",[4]]]}'),
        framed(b'{"op":"x","fields":{},"tensors":[["float32",[4]]],"at":5}'),
    ):
        left, right = socket.socketpair()
        with left, right:
            left.sendall(data)
            with pytest.raises(Garbled):
                Channel(right).receive()
    assert AttentionWorker().answer(Message("erase")).op == "failed"


def test_who_does_not_know_the_secret_is_no_worker(monkeypatch):
    monkeypatch.setattr(backends, "GREETING", 0.2)
    secret = b"s" * backends.SECRET_BYTES
    with socket.create_server((backends.LOOPBACK, 0)) as listening:
        address = listening.getsockname()
        assert address[0] == "127.0.0.1"
        others = [socket.create_connection(address) for _ in range(3)]
        others[0].sendall(b"x" * backends.SECRET_BYTES)
        others[1].sendall(b"s")  # and nothing else
        others[2].sendall(secret)
        with backends._accepted(listening, secret) as connection:
            assert connection.getpeername() == others[2].getsockname()
        for other in others:
            other.close()
