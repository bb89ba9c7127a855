"""Measurements of layers: kept, read again, bounded in time, whatever state the file is in."""

import json
import os
import time
from dataclasses import replace

import pytest
import torch

import regard
from regard.workbench import samples
from regard.workbench.layer_work import LayerSettings
from regard.workbench.probe import probe
from regard.workbench.samples import Cache, LayerMeasure, Sample, cache_folder

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
    monkeypatch.setattr(samples.library, "why_missing", lambda: "no library")
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
        {},
        {"seconds": "1"},
        {"seconds": 0},
        {"seconds": -1.0},
        {"memory": -2},
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"backend": 7},
        {"spread": None},
        {"pulse": -1.0},
    ],
)
def test_a_damaged_entry_is_left_out_and_measured_again(entry):
    run(Fake(), lengths=(16, 64))
    cache = Cache(SMALL)
    stored = json.loads(cache.path.read_text())
    whole = stored["samples"]["forward linear 16"]
    stored["samples"]["forward linear 16"] = whole | entry if entry else entry
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
        stored["samples"][key] = stored["samples"]["forward linear 16"]
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


def test_what_would_not_fit_in_the_machine_s_memory_is_left_out(monkeypatch):
    monkeypatch.setattr("regard.workbench.probe.room", lambda: 100 * 1000)
    found = run(fake := Fake(), lengths=(16, 64, 1024))
    assert {n for _, n, _ in fake.asked} == {16, 64} and len(found.left) == 4


def test_no_measurement_starts_when_the_time_is_over(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

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
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

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


class Disturbed(Fake):
    """Takes ten times as long, or spreads as much, at the first of some measurements; `beats` are the pulses."""

    def __init__(self, where, spread=0.0, beats=lambda count: 1e-3):
        super().__init__(lambda what, name, n: (3e-6 if what == "training" else 1e-6) * n)
        self.where, self.spread, self.beats, self.count = set(where), spread, beats, 0

    def __call__(self, what, length, names):
        found = super().__call__(what, length, names)
        self.count += 1
        for name, sample in found.items():
            if (what, length, name) in self.where:
                self.where.remove((what, length, name))
                sample = replace(sample, seconds=10 * sample.seconds, spread=self.spread)
            found[name] = replace(sample, pulse=self.beats(self.count))
        return found


@pytest.mark.parametrize(
    ("at", "spread"),
    [(("forward", 256, "linear"), 0.0), (("training", 64, "linear"), 0.0), (("forward", 256, "linear"), 0.5)],
)
def test_a_measurement_that_is_impossible_beside_others_or_spreads_is_made_again(at, spread):
    """A forward call that takes longer than a training step, or a short input longer than a long one."""
    fake = Disturbed([at], spread)
    found = probe(SMALL, {"forward": NAMES, "training": NAMES}, seconds=60, lengths=(16, 64, 256), measure=fake)
    what, length, name = at
    assert found.samples[what][name][length].seconds == pytest.approx((3e-6 if what == "training" else 1e-6) * length)
    assert fake.asked.count(at) == 2 and len(fake.asked) == 13


def test_what_stays_impossible_is_believed():
    """Some mechanisms do less in training."""
    fake = Fake(lambda what, name, n: (1e-7 if what == "training" else 1e-6) * n)
    found = probe(SMALL, {"forward": NAMES, "training": NAMES}, seconds=60, lengths=(16, 64), measure=fake)
    assert found.samples["forward"]["linear"][64].seconds == pytest.approx(64e-6)
    assert max(map(fake.asked.count, fake.asked)) == 2


def test_what_a_busy_machine_made_is_used_but_not_kept():
    busy = Disturbed([], beats=lambda count: 1e-3 if count == 1 else 2e-3)
    first = run(busy, lengths=(16, 64))
    assert {n for n, s in first.samples["forward"]["linear"].items()} == {16, 64}
    calm = Disturbed([])
    again = run(calm, lengths=(16, 64))
    assert again.recalled == 2 and ("forward", 16, "linear") not in calm.asked and len(calm.asked) == 6


def test_samples_that_a_busy_machine_kept_are_forgotten_once_a_calm_one_is_known():
    run(Disturbed([], beats=lambda count: 2e-3), lengths=(16, 64))
    calm = Disturbed([])
    probe(SMALL, {"forward": NAMES}, seconds=60, lengths=(16, 32), measure=calm)
    assert {n for _, n, _ in calm.asked} == {32}  # nothing told yet
    assert run(again := Disturbed([]), lengths=(16, 64)).recalled == 0 and len(again.asked) == 8


def test_the_fastest_are_compared_on_an_equally_fast_machine():
    """What was known from a calmer time would win against what is measured now."""
    run_asked = {"seconds": 60, "lengths": (16, 32), "asked": (100,)}
    probe(SMALL, {"forward": ["linear"]}, measure=Disturbed([]), **run_asked)
    fake = Disturbed([], beats=lambda count: 1.2e-3)
    probe(SMALL, {"forward": ["softmax", "linear"]}, measure=fake, **run_asked)
    assert fake.asked.count(("forward", 100, "linear")) == 1 and fake.asked.count(("forward", 100, "softmax")) == 2


def test_who_surely_takes_longer_or_does_not_fit_is_no_contender():
    times = {"linear": 1e-6, "local": 1.2e-6, "softmax": 2e-5, "sigmoid": 1e-9}

    class Sized(Fake):
        def __call__(self, what, length, names):
            found = super().__call__(what, length, names)
            return {n: replace(s, memory=10**9 if n == "sigmoid" else s.memory) for n, s in found.items()}

    fake = Sized(lambda what, name, n: times[name] * n)
    found = probe(SMALL, {"forward": list(times)}, seconds=60, lengths=(16, 64, 256), measure=fake)
    assert found.contenders("forward", list(times), (256,), cap=10**6) == ["linear"]
    assert found.contenders("forward", list(times), (1 << 11,), cap=10**7) == ["linear", "local"]
    assert found.contenders("forward", list(times), (256,))[0] == "sigmoid"


def test_short_calls_rule_nothing_out_at_long_lengths():
    """One whose calls of 16 and 64 tokens take equally long may yet grow as the other does."""
    names = ["linear", "local"]
    fake = Fake(lambda what, name, n: 1e-3 if name == "linear" else 6e-6 * n)
    found = probe(SMALL, {"forward": names}, seconds=60, lengths=(16, 64), measure=fake)
    assert set(found.contenders("forward", names, (1 << 14,))) == set(names)
    assert found.contenders("forward", names, (64,)) == ["local"]


def test_a_search_for_the_fastest_ends_with_one_that_was_measured():
    """Whoever is slower than expected makes room for others, and they are measured too."""
    slow = {"linear"}
    fake = Fake(lambda what, name, n: (9e-6 if n > 256 and name in slow else 1e-6 if name in slow else 4e-6) * n)
    found = probe(SMALL, {"forward": NAMES}, seconds=60, lengths=(16, 64, 256), asked=(300,), measure=fake)
    assert found.contenders("forward", NAMES, (300,)) == ["softmax"] and 300 in found.samples["forward"]["softmax"]


def test_real_layers_are_measured():
    measure = LayerMeasure(SMALL, group_seconds=0.01)
    for what in ("forward", "training", "decode"):
        found = measure(what, 24, ["softmax", "mamba2"])
        assert all(s.seconds > 0 and s.memory > 0 for s in found.values())
        assert (found["mamba2"].state > 0) == (what == "decode")
    short, long = (measure("decode", n, ["softmax", "mamba2"]) for n in (24, 96))
    assert long["softmax"].state > 3 * short["softmax"].state
    assert long["mamba2"].state == short["mamba2"].state
