"""Measurements of layers: stored, read again and bounded in time, whatever the state of the file."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch

from regard.measurement import provenance
from regard.workbench.advice import samples
from regard.workbench.advice.layer_work import LayerSettings
from regard.workbench.advice.probe import bumps, probe
from regard.workbench.advice.samples import Cache, Sample, cache_folder

pytestmark = pytest.mark.usefixtures("_own_cache")

SMALL = LayerSettings(dim=32, heads=2)
NAMES = ["linear", "softmax"]


class Fake:
    """Measures nothing, but records what it was asked for."""

    def __init__(self, seconds=lambda what, name, n: 1e-6 * n):
        self.seconds, self.asked = seconds, []

    def __call__(self, what, length, names):
        self.asked += [(what, length, name) for name in names]
        return {name: Sample(self.seconds(what, name, length), 100 * length, 8 * length) for name in names}


def measured(fake, lengths=(16, 64), what=("forward", "decode"), names=NAMES, **options):
    options = {"seconds": 60, "measure": fake, **options}
    return probe(SMALL, dict.fromkeys(what, tuple(names)), lengths=lengths, **options)


def forward(fake, lengths, names=NAMES, **options):
    return measured(fake, lengths, ("forward",), names, **options)


def test_everything_is_measured_once_and_then_read_unless_it_is_to_be_fresh():
    first, second = Fake(), Fake()
    found = measured(first, (16, 64, 256))
    assert len(first.asked) == found.measured == 12 and found.recalled == 0
    again = measured(second, (16, 64, 256))
    assert second.asked == [] and again.recalled == 12
    assert again.samples == found.samples
    fresh = measured(third := Fake(lambda what, name, n: 0.3), (16, 64), fresh=True)
    assert len(third.asked) == 8 and fresh.samples["forward"]["linear"][16].seconds == 0.3
    assert again.curve("forward", "linear", "seconds")(64) == pytest.approx(64e-6)
    assert forward(Fake(), (16,)).curve("forward", "linear", "seconds") is None, "too few measurements predict nothing"


def test_what_decides_comes_first_at_two_lengths_and_then_short_lengths():
    measured(fake := Fake(), (64, 256, 16))
    order = [(16, "forward"), (64, "forward"), (16, "decode"), (64, "decode"), (256, "forward"), (256, "decode")]
    assert [(n, what) for what, n, name in fake.asked if name == "linear"] == order


def test_an_interrupted_probe_goes_on_where_it_stopped():
    class Interrupted(Fake):
        def __call__(self, what, length, names):
            if len(self.asked) == 4:
                raise KeyboardInterrupt
            return super().__call__(what, length, names)

    with pytest.raises(KeyboardInterrupt):
        measured(Interrupted(), (16, 64, 256))
    assert measured(fake := Fake(), (16, 64, 256)).recalled == 4
    assert len(fake.asked) == 8


def test_another_size_thread_count_kernel_or_version_is_another_file(monkeypatch):
    paths = [Cache(SMALL).path, Cache(LayerSettings(dim=64, heads=2)).path, Cache(LayerSettings(batch=2)).path]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        paths.append(Cache(SMALL).path)
    finally:
        torch.set_num_threads(before)
    for where, name, value in (
        (samples.library, "why_missing", lambda: "no library"),
        (provenance, "VERSION", "9.9"),
        (torch, "__version__", "9.9"),
    ):
        monkeypatch.setattr(where, name, value)
        paths.append(Cache(SMALL).path)
    assert len(set(paths)) == 7


FOREIGN = b'{"samples": {"forward linear 16": {"seconds": 1, "memory": 1}}}'


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"identity": 1}', b"\xff\xfe\x00", FOREIGN])
def test_a_damaged_or_foreign_file_counts_as_empty_and_is_replaced(content):
    path = Cache(SMALL).path
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert Cache(SMALL).read() == {}
    measured(Fake())
    assert measured(Fake()).recalled == 8


def change(key, changes):
    """Write a changed copy of a sample into the file of samples, in its place or under another key."""
    path = Cache(SMALL).path
    stored = json.loads(path.read_text())
    stored["samples"][key] = stored["samples"]["forward linear 16"] | changes if changes is not None else {}
    path.write_text(json.dumps(stored))


DAMAGED = [{"seconds": value} for value in ("1", 0, -1.0, math.nan, math.inf)]
DAMAGED += [None, {"memory": -2}, {"backend": 7}, {"spread": None}, {"pulse": -1.0}]


@pytest.mark.parametrize("changes", DAMAGED)
def test_a_damaged_entry_and_names_that_are_no_samples_are_left_out_and_measured_again(changes):
    measured(Fake())
    before = Cache(SMALL).read()
    for key in ("", "forward", "forward linear", "forward linear x", "forward  -3"):
        change(key, {})
    assert Cache(SMALL).read() == before
    change("forward linear 16", changes)
    measured(fake := Fake())
    assert fake.asked == [("forward", 16, "linear")]


def test_writing_keeps_what_another_process_wrote_and_leaves_no_scraps():
    first, second = Cache(SMALL), Cache(SMALL)
    first.add("forward", 16, {"linear": Sample(1.0, 2)})
    second.add("forward", 64, {"linear": Sample(3.0, 4)})
    assert set(first.read()["forward"]["linear"]) == {16, 64}
    assert [p.suffix for p in cache_folder().iterdir()] == [".json"]


def test_a_folder_that_cannot_be_written_only_forgets(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert measured(Fake()).measured == 8


def test_what_would_take_too_long_is_left_out_and_said():
    fake = Fake(lambda what, name, n: 1e-8 * n * n if name == "softmax" else 1e-6 * n)
    found = forward(fake, (16, 64, 8192))
    assert found.left == [("forward", "softmax", 8192)]  # 6 calls of 0.67 s: over a twentieth of a minute
    assert ("forward", 8192, "linear") in fake.asked
    assert found.curve("forward", "softmax", "seconds")(8192) == pytest.approx(1e-8 * 8192**2, rel=0.01)


def test_what_would_not_fit_in_the_machine_s_memory_is_left_out(monkeypatch):
    monkeypatch.setattr("regard.workbench.advice.probe.room", lambda: 100 * 1000)
    found = measured(fake := Fake(), (16, 64, 1024))
    assert {n for _, n, _ in fake.asked} == {16, 64} and len(found.left) == 4


@pytest.fixture
def slow(monkeypatch):
    """Makes measurements that take a given number of seconds by a fake clock."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Slow(Fake):
        def __init__(self, step):
            super().__init__()
            self.step = step

        def __call__(self, what, length, names):
            now[0] += self.step
            return super().__call__(what, length, names)

    return Slow


def test_no_measurement_starts_when_the_time_is_over(slow):
    found = forward(fake := slow(25), (16, 32, 64, 128, 256))
    assert {n for _, n, _ in fake.asked} == {16, 32, 64}
    assert {n for _, _, n in found.left} == {128, 256}


def test_only_what_decides_is_measured_in_any_case_when_there_is_no_time(slow):
    lengths, able = (16, 32, 64), ("forward", "training", "decode")
    found = measured(fake := slow(2), lengths, able, seconds=3)
    assert [(what, n) for what, n, name in fake.asked if name == "linear"] == [("forward", 16), ("forward", 32)]
    assert found.curve("forward", "linear", "seconds") is not None
    assert len(found.left) == 7 * len(NAMES)
    measured(every := slow(2), lengths, able, seconds=3, always=able, fresh=True)
    assert {(what, n) for what, n, _ in every.asked} == {(what, n) for what in able for n in (16, 32)}


def test_what_another_kind_of_work_took_tells_what_there_is_time_for():
    """Training is not measured for a layer whose forward call alone exceeds the time."""
    fake = Fake(lambda what, name, n: 1.0 if name == "softmax" else 1e-6)
    found = measured(fake, (16, 32), ("forward", "training"))
    assert [(what, n) for what, name, n in found.left if name == "softmax"] == [("training", 16), ("training", 32)]
    assert ("training", 16, "linear") in fake.asked


def test_how_long_it_may_take_is_said_before_it_starts_and_nothing_when_all_is_known():
    said = []

    class Listening(Fake):
        def __call__(self, what, length, names):
            assert len(said) == 1 and "60 seconds" in said[0] and "8 short" in said[0]
            return super().__call__(what, length, names)

    measured(Listening(), say=said.append)
    measured(Fake(), say=said.append)
    assert len(said) == 1


class Disturbed(Fake):
    """Takes `factor` times as long, with a spread, at the first of the measurements `where`; `beats` gives the pulses."""

    def __init__(self, where, spread=0.0, beats=lambda count: 1e-3, factor=10):
        super().__init__(lambda what, name, n: (3e-6 if what == "training" else 1e-6) * n)
        self.where, self.spread, self.beats, self.count, self.factor = set(where), spread, beats, 0, factor

    def __call__(self, what, length, names):
        found = super().__call__(what, length, names)
        self.count += 1
        for name, sample in found.items():
            if (what, length, name) in self.where:
                self.where.remove((what, length, name))
                sample = replace(sample, seconds=self.factor * sample.seconds, spread=self.spread)
            found[name] = replace(sample, pulse=self.beats(self.count))
        return found


@pytest.mark.parametrize(
    ("at", "spread"),
    [(("forward", 256, "linear"), 0.0), (("training", 64, "linear"), 0.0), (("forward", 256, "linear"), 0.5)],
)
def test_a_measurement_that_is_impossible_beside_others_or_spreads_is_made_again(at, spread):
    """A forward call slower than a training step, or a short input slower than a long one, is impossible."""
    fake = Disturbed([at], spread)
    found = measured(fake, (16, 64, 256), ("forward", "training"))
    what, length, name = at
    assert found.samples[what][name][length].seconds == pytest.approx((3e-6 if what == "training" else 1e-6) * length)
    assert fake.asked.count(at) == 2 and len(fake.asked) == 13


def test_a_measurement_far_above_those_beside_it_is_made_again():
    """It is below the time of the longer length, so it is not impossible."""
    fake = Disturbed([at := ("forward", 64, "linear")], factor=1.6)
    found = forward(fake, (16, 64, 256, 1024))
    assert found.samples["forward"]["linear"][64].seconds == pytest.approx(64e-6)
    assert fake.asked.count(at) == 2 and len(fake.asked) == 9
    for growth in (lambda n: 100 + n, lambda n: 100 + n + n * n / 100, lambda n: n**0.5):
        assert not [*bumps({n: growth(n) for n in (32, 64, 128, 256, 512, 2048, 8192)})]


def test_what_stays_impossible_is_believed():
    """Some mechanisms do less work in training."""
    fake = Fake(lambda what, name, n: (1e-7 if what == "training" else 1e-6) * n)
    found = measured(fake, what=("forward", "training"))
    assert found.samples["forward"]["linear"][64].seconds == pytest.approx(64e-6)
    assert max(map(fake.asked.count, fake.asked)) == 2


def test_what_a_busy_machine_made_is_used_but_not_kept():
    first = measured(Disturbed([], beats=lambda count: 1e-3 if count == 1 else 2e-3))
    assert set(first.samples["forward"]["linear"]) == {16, 64}
    again = measured(calm := Disturbed([]))
    assert again.recalled == 2 and ("forward", 16, "linear") not in calm.asked and len(calm.asked) == 6


def test_samples_that_a_busy_machine_kept_are_forgotten_once_a_calm_one_is_known():
    measured(Disturbed([], beats=lambda count: 2e-3))
    forward(calm := Disturbed([]), (16, 32))
    assert {n for _, n, _ in calm.asked} == {32}  # the machine's speed is still unknown
    assert measured(again := Disturbed([])).recalled == 0 and len(again.asked) == 8


def test_the_fastest_are_compared_on_an_equally_fast_machine():
    """A measurement from a calmer time would otherwise win against those made now."""
    forward(Disturbed([]), (16, 32), ["linear"], asked=(100,))
    forward(fake := Disturbed([], beats=lambda count: 1.2e-3), (16, 32), asked=(100,))
    assert fake.asked.count(("forward", 100, "linear")) == 1 and fake.asked.count(("forward", 100, "softmax")) == 2


def test_who_surely_takes_longer_or_does_not_fit_is_no_contender():
    times = {"linear": 1e-6, "local": 1.2e-6, "softmax": 2e-5, "sigmoid": 1e-9}

    class Sized(Fake):
        def __call__(self, what, length, names):
            found = super().__call__(what, length, names)
            return {n: replace(s, memory=10**9 if n == "sigmoid" else s.memory) for n, s in found.items()}

    fake = Sized(lambda what, name, n: times[name] * n)
    found = forward(fake, (16, 64, 256), times)
    assert found.contenders("forward", list(times), (256,), cap=10**6) == ["linear"]
    assert found.contenders("forward", list(times), (1 << 11,), cap=10**7) == ["linear", "local"]
    assert found.contenders("forward", list(times), (256,))[0] == "sigmoid"


def test_short_calls_rule_nothing_out_at_long_lengths():
    """A mechanism that takes equally long for 16 and 64 tokens may still grow like the other one."""
    names = ["linear", "local"]
    fake = Fake(lambda what, name, n: 1e-3 if name == "linear" else 6e-6 * n)
    found = forward(fake, (16, 64), names)
    assert set(found.contenders("forward", names, (1 << 14,))) == set(names)
    assert found.contenders("forward", names, (64,)) == ["local"]


def test_a_search_for_the_fastest_ends_with_one_that_was_measured():
    """If a contender is slower than expected, others become contenders and are measured too."""
    slow = {"linear"}
    fake = Fake(lambda what, name, n: (9e-6 if n > 256 and name in slow else 1e-6 if name in slow else 4e-6) * n)
    found = forward(fake, (16, 64, 256), asked=(300,))
    assert found.contenders("forward", NAMES, (300,)) == ["softmax"] and 300 in found.samples["forward"]["softmax"]
