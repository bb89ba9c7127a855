"""Every reproduction runs, in seconds, and can be judged by what its cells measure."""

import pytest

from regard.contract import Unsupported
from regard.reproductions import get_reproduction, landmark, list_reproductions
from regard.reproductions.framework.protocol import Reproduction
from regard.reproductions.framework.runs import run_cell
from regard.tasks.protocol import IGNORED

SMALL: dict[str, dict[tuple[str, int], dict]] = {}


def small_cells(name):
    """What the shrunk settings measure with one seed; run once."""
    if name not in SMALL:
        reproduction = get_reproduction(name)
        SMALL[name] = {(s, 0): small_cell(reproduction, s) for s in reproduction.settings}
    return SMALL[name]


def small_cell(reproduction, setting):
    try:
        return run_cell(reproduction, reproduction.smoke_settings()[setting], 0)
    except Unsupported as error:
        if "without the package" in error.asked:
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("name", list_reproductions())
def test_small_settings_run_and_measure_what_the_checks_ask_for(name):
    reproduction = get_reproduction(name)
    cells = small_cells(name)
    for measured in cells.values():
        assert measured
        for value in measured.values():
            assert value is None or isinstance(value, float | int) or set(value) == {"median", "low", "high"}
    again = {(setting, seed): measured for (setting, _), measured in cells.items() for seed in (0, 1)}
    for finding in reproduction.judge(again).findings:
        assert finding.seeds == 2
        assert finding.mean == finding.mean


@pytest.mark.parametrize("name", list_reproductions())
def test_it_says_what_it_is(name):
    reproduction = get_reproduction(name)
    assert isinstance(reproduction, Reproduction)
    assert reproduction.name == name
    assert reproduction.checks
    assert reproduction.claim.strip()
    assert reproduction.instead.strip()
    assert reproduction.timings <= set(reproduction.settings)
    assert reproduction.seeds >= (3 if reproduction.seconds < 120 else 2)
    for setting in reproduction.smoke_settings().values():
        assert set(reproduction.smoke) & set(setting), "a setting that is not shrunk"


@pytest.mark.parametrize("name", list_reproductions())
def test_a_cell_without_timings_repeats(name):
    reproduction = get_reproduction(name)
    setting = next((s for s in reproduction.settings if s not in reproduction.timings), None)
    if setting is None:
        pytest.skip("nothing but timings")
    again = small_cell(reproduction, setting)
    assert again == small_cells(name)[setting, 0]


def test_a_fact_of_the_landmark_lookup_is_a_key_and_then_its_value():
    task = landmark.Lookup(128, 16)
    (batch,) = task.evaluation_batches(16)
    for ids, targets in zip(batch.inputs, batch.targets, strict=True):
        asked = (targets != IGNORED).nonzero().flatten()
        assert len(asked) == landmark.FACTS
        for place in asked:
            (key,) = (ids[: -landmark.ENDING] == ids[place]).nonzero().flatten()
            assert ids[key + 1] == targets[place]
        assert (ids < landmark.VALUES).sum() == landmark.FACTS
