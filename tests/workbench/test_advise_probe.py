"""Measurements of layers: kept, read again, bounded in time, whatever state the file is in."""

import json
import os

import pytest
import torch

import regard
from regard.workbench import probe as module
from regard.workbench.layer_work import LayerSettings
from regard.workbench.probe import Cache, LayerMeasure, Sample, cache_folder, probe

SMALL = LayerSettings(dim=32, heads=2)
NAMES = ["linear", "softmax"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


class Fake:
    """Measures nothing; remembers what it was asked."""

    def __init__(self, seconds=lambda what, name, n: 1e-6 * n):
        self.seconds, self.asked = seconds, []

    def __call__(self, what, length, names):
        self.asked += [(what, length, name) for name in names]
        return {name: Sample(self.seconds(what, name, length), 100 * length, 8 * length) for name in names}


def run(fake, **options):
    return probe(SMALL, {"forward": NAMES, "decode": NAMES}, seconds=60, measure=fake, **options)


def test_everything_is_measured_once_and_then_read():
    first, second = Fake(), Fake()
    found = run(first, lengths=(16, 64, 256))
    assert len(first.asked) == found.measured == 12 and found.recalled == 0
    again = run(second, lengths=(16, 64, 256))
    assert second.asked == [] and again.recalled == 12
    assert again.samples == found.samples
    assert again.curve("forward", "linear", "seconds")(64) == pytest.approx(64e-6)


def test_what_decides_comes_first_at_two_lengths_and_then_short_lengths():
    fake = Fake()
    run(fake, lengths=(64, 256, 16))
    assert [(n, what) for what, n, name in fake.asked if name == "linear"] == [
        (16, "forward"),
        (64, "forward"),
        (16, "decode"),
        (64, "decode"),
        (256, "forward"),
        (256, "decode"),
    ]


def test_an_interrupted_probe_goes_on_where_it_stopped():
    class Interrupted(Fake):
        def __call__(self, what, length, names):
            if len(self.asked) == 4:
                raise KeyboardInterrupt
            return super().__call__(what, length, names)

    with pytest.raises(KeyboardInterrupt):
        run(Interrupted(), lengths=(16, 64, 256))
    fake = Fake()
    assert run(fake, lengths=(16, 64, 256)).recalled == 4
    assert len(fake.asked) == 8


def test_fresh_measures_again():
    run(Fake(), lengths=(16, 64))
    fake = Fake(lambda what, name, n: 0.3)
    found = run(fake, lengths=(16, 64), fresh=True)
    assert len(fake.asked) == 8 and found.samples["forward"]["linear"][16].seconds == 0.3


def test_another_size_thread_count_kernel_or_version_is_another_file(monkeypatch):
    paths = {Cache(SMALL).path, Cache(LayerSettings(dim=64, heads=2)).path, Cache(LayerSettings(batch=2)).path}
    assert len(paths) == 3
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        paths.add(Cache(SMALL).path)
    finally:
        torch.set_num_threads(before)
    monkeypatch.setattr(module.library, "why_missing", lambda: "no library")
    paths.add(Cache(SMALL).path)
    monkeypatch.setattr(regard, "__version__", "9.9")
    paths.add(Cache(SMALL).path)
    monkeypatch.setattr(torch, "__version__", "9.9")
    paths.add(Cache(SMALL).path)
    assert len(paths) == 7


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        '{"identity": 1}',
        b"\xff\xfe\x00",
        '{"samples": {"forward linear 16": {"seconds": 1, "memory": 1}}}',
    ],
)
def test_a_damaged_or_foreign_file_counts_as_empty_and_is_replaced(content):
    path = Cache(SMALL).path
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert Cache(SMALL).read() == {}
    run(Fake(), lengths=(16, 64))
    assert run(Fake(), lengths=(16, 64)).recalled == 8


@pytest.mark.parametrize(
    "entry",
    [
        3,
        None,
        {},
        {"seconds": "1", "memory": 2},
        {"seconds": 0, "memory": 2},
        {"seconds": -1.0, "memory": 2},
        {"seconds": 1.0, "memory": -2},
        {"seconds": float("nan"), "memory": 2},
        {"seconds": float("inf"), "memory": 2},
        {"seconds": 1.0, "memory": 2, "backend": 7},
    ],
)
def test_a_damaged_entry_is_left_out_and_measured_again(entry):
    run(Fake(), lengths=(16, 64))
    cache = Cache(SMALL)
    stored = json.loads(cache.path.read_text())
    stored["samples"]["forward linear 16"] = entry
    cache.path.write_text(json.dumps(stored))
    fake = Fake()
    run(fake, lengths=(16, 64))
    assert fake.asked == [("forward", 16, "linear")]


def test_names_that_are_no_samples_are_left_out():
    run(Fake(), lengths=(16, 64))
    cache = Cache(SMALL)
    before = cache.read()
    stored = json.loads(cache.path.read_text())
    for key in ("", "forward", "forward linear", "forward linear x", "forward  -3"):
        stored["samples"][key] = {"seconds": 1.0, "memory": 1}
    cache.path.write_text(json.dumps(stored))
    assert cache.read() == before


def test_writing_keeps_what_another_process_wrote_and_leaves_no_scraps():
    first, second = Cache(SMALL), Cache(SMALL)
    first.add("forward", 16, {"linear": Sample(1.0, 2)})
    second.add("forward", 64, {"linear": Sample(3.0, 4)})
    assert set(first.read()["forward"]["linear"]) == {16, 64}
    assert [p.suffix for p in cache_folder().iterdir()] == [".json"]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX only")
def test_a_folder_that_cannot_be_written_only_forgets(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    assert run(Fake(), lengths=(16, 64)).measured == 8


def test_what_would_take_too_long_is_left_out_and_said():
    fake = Fake(lambda what, name, n: 1e-8 * n * n if name == "softmax" else 1e-6 * n)
    found = probe(SMALL, {"forward": NAMES}, seconds=60, lengths=(16, 64, 8192), measure=fake)
    assert found.left == [("forward", "softmax", 8192)]  # 6 calls of 0.67 s, more than a twentieth of the minute
    assert ("forward", 8192, "linear") in fake.asked
    assert found.curve("forward", "softmax", "seconds")(8192) == pytest.approx(1e-8 * 8192**2, rel=0.01)


def test_no_measurement_starts_when_the_time_is_over(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    class Slow(Fake):
        def __call__(self, what, length, names):
            now[0] += 25
            return super().__call__(what, length, names)

    fake = Slow()
    found = probe(SMALL, {"forward": NAMES}, seconds=60, lengths=(16, 32, 64, 128, 256), measure=fake)
    assert {n for _, n, _ in fake.asked} == {16, 32, 64}
    assert {n for _, _, n in found.left} == {128, 256}


def test_only_what_decides_is_measured_in_any_case_when_there_is_no_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    class Slow(Fake):
        def __call__(self, what, length, names):
            now[0] += 2
            return super().__call__(what, length, names)

    fake, every = Slow(), Slow()
    able = {"forward": NAMES, "training": NAMES, "decode": NAMES}
    found = probe(SMALL, able, seconds=3, lengths=(16, 32, 64), measure=fake)
    assert [(what, n) for what, n, name in fake.asked if name == "linear"] == [("forward", 16), ("forward", 32)]
    assert found.curve("forward", "linear", "seconds") is not None
    assert len(found.left) == 7 * len(NAMES)
    probe(SMALL, able, seconds=3, lengths=(16, 32, 64), always=tuple(able), measure=every, fresh=True)
    assert {(what, n) for what, n, _ in every.asked} == {(what, n) for what in able for n in (16, 32)}


def test_what_another_kind_of_work_took_tells_what_there_is_time_for():
    """No training of a layer starts whose forward call alone is beyond the time."""
    fake = Fake(lambda what, name, n: 1.0 if name == "softmax" else 1e-6)
    found = probe(SMALL, {"forward": NAMES, "training": NAMES}, seconds=60, lengths=(16, 32), measure=fake)
    assert [(what, n) for what, name, n in found.left if name == "softmax"] == [("training", 16), ("training", 32)]
    assert ("training", 16, "linear") in fake.asked


def test_how_long_it_may_take_is_said_before_it_starts_and_nothing_when_all_is_known():
    said = []

    class Listening(Fake):
        def __call__(self, what, length, names):
            assert len(said) == 1 and "60 seconds" in said[0] and "8 short" in said[0]
            return super().__call__(what, length, names)

    run(Listening(), lengths=(16, 64), say=said.append)
    run(Fake(), lengths=(16, 64), say=said.append)
    assert len(said) == 1


def test_too_few_measurements_predict_nothing():
    found = run(Fake(), lengths=(16,))
    assert found.curve("forward", "linear", "seconds") is None


def test_real_layers_are_measured():
    measure = LayerMeasure(SMALL, group_seconds=0.01)
    for what in ("forward", "training", "decode"):
        found = measure(what, 24, ["softmax", "mamba2"])
        assert all(s.seconds > 0 and s.memory > 0 for s in found.values())
        assert (found["mamba2"].state > 0) == (what == "decode")
    short, long = (measure("decode", n, ["softmax", "mamba2"]) for n in (24, 96))
    assert long["softmax"].state > 3 * short["softmax"].state
    assert long["mamba2"].state == short["mamba2"].state
