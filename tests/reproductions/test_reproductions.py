"""Every reproduction runs in seconds and can be judged by the measurements of its cells."""

import pytest
import torch
from support import ALL

from regard.compression.sparse import sparsely
from regard.contract import Context, Unsupported
from regard.reproductions import cache_eviction, get_reproduction, landmark, list_reproductions, seqpe
from regard.reproductions.framework.protocol import Reproduction
from regard.reproductions.framework.runs import MOST_SEEDS, run_cell
from regard.reproductions.framework.training import digit_pixels
from regard.tasks.protocol import IGNORED

TOGETHER = [pytest.param(name, marks=pytest.mark.xdist_group(f"reproduction {name}")) for name in list_reproductions()]
"""Tests of one reproduction run in the same worker, since they share its cells."""
SMALL: dict[str, dict[tuple[str, int], dict]] = {}


def small_cells(name):
    """A reproduction and the measurements of its shrunk settings with one seed, run only once."""
    reproduction = get_reproduction(name)
    if name not in SMALL:
        SMALL[name] = {(s, 0): small_cell(reproduction, s) for s in reproduction.settings}
    return reproduction, SMALL[name]


def small_cell(reproduction, setting):
    try:
        return run_cell(reproduction, reproduction.smoke_settings()[setting], 0)
    except Unsupported as error:
        if "without the package" in error.asked:
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("name", TOGETHER)
def test_small_settings_run_and_measure_what_the_checks_ask_for(name):
    reproduction, cells = small_cells(name)
    for measured in cells.values():
        assert measured
        for value in measured.values():
            assert value is None or isinstance(value, float | int) or set(value) == {"median", "low", "high"}
    again = {(setting, seed): measured for (setting, _), measured in cells.items() for seed in (0, 1)}
    verdict = reproduction.judge(again)
    assert all(found.seeds == 2 and found.mean == found.mean for found in verdict.findings + verdict.needs)


@pytest.mark.parametrize("name", list_reproductions())
def test_it_says_what_it_is(name):
    reproduction = get_reproduction(name)
    assert isinstance(reproduction, Reproduction) and reproduction.name == name
    assert reproduction.checks and reproduction.claim.strip() and reproduction.instead.strip()
    assert reproduction.timings | set(reproduction.more_seeds) <= set(reproduction.settings)
    most = max(reproduction.seeds, *reproduction.more_seeds.values(), 0)
    assert most <= MOST_SEEDS or most * reproduction.seconds < 1800
    assert reproduction.seeds >= (3 if reproduction.seconds < 120 else 2)
    for setting in reproduction.smoke_settings().values():
        assert set(reproduction.smoke) & set(setting), "a setting that is not shrunk"


@pytest.mark.parametrize("name", TOGETHER[:: 1 if ALL else 5])
def test_a_cell_without_timings_repeats(name):
    reproduction, cells = small_cells(name)
    setting = next((s for s in reproduction.settings if s not in reproduction.timings), None)
    if setting is None:
        pytest.skip("nothing but timings")
    assert small_cell(reproduction, setting) == cells[setting, 0]


def test_a_fact_of_the_landmark_lookup_is_a_key_and_then_its_value():
    task = landmark.Lookup(128, 16)
    (batch,) = task.evaluation_batches(16)
    for ids, targets in zip(batch.inputs, batch.targets, strict=True):
        asked = (targets != IGNORED).nonzero().flatten()
        assert len(asked) == landmark.QUESTIONS
        assert set(ids[asked].unique(return_counts=True)[1].tolist()) == {landmark.QUESTIONS // landmark.FACTS}
        for place in asked:
            (key,) = (ids[: -landmark.ENDING] == ids[place]).nonzero().flatten()
            assert ids[key + 1] == targets[place]
        assert (ids < landmark.VALUES).sum() == landmark.FACTS


def test_windows_of_seqpe_are_parts_of_their_images_in_all_places():
    images = digit_pixels(16)
    windows = seqpe.Windows(images, 6)
    corners = set()
    for step in range(8):
        batch, whole = (task.training_batch(step, 3, 16) for task in (windows, images))
        assert batch.grid == (6, 6)
        assert torch.equal(batch.targets, whole.targets)
        for small, large in zip(batch.inputs.view(-1, 6, 6), whole.inputs.view(-1, 8, 8), strict=True):
            found = [(i, j) for i in range(3) for j in range(3) if torch.equal(large[i : i + 6, j : j + 6], small)]
            assert found
            corners |= set(found)
    assert len(corners) == 9
    for batch, whole in zip(windows.evaluation_batches(5), images.evaluation_batches(5), strict=True):
        assert torch.equal(batch.inputs.view(-1, 6, 6), whole.inputs.view(-1, 8, 8)[:, 1:7, 1:7])


def test_a_pixel_of_seqpe_has_one_number_in_windows_of_any_size():
    seen = {}

    def encoder(inputs, *, context):
        seen[context.grid] = context.positions.view(-1, *context.grid)

    for side in (6, 8):
        inputs = torch.randn(2, side**2, 1)
        seqpe.NumberedByPlace(encoder)(inputs, context=Context(grid=(side, side)))
    assert torch.equal(seen[8, 8], torch.arange(64).view(1, 8, 8).expand(2, -1, -1))
    assert torch.equal(seen[6, 6], seen[8, 8][:, :6, :6])


def test_second_questions_are_about_the_facts_of_the_first():
    task = cache_eviction.AskedTwice(96, 8)
    (batch,) = task.evaluation_batches(8)
    count = cache_eviction.QUESTIONS
    for ids, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
        first, second = (
            dict(zip(ids[part], targets[part], strict=True))
            for part in (slice(-2 * count, -count), slice(-count, None))
        )
        assert first == second and len(first) == count
        assert all(targets[i] == IGNORED for i in range(96 - 2 * count))
        facts = {ids[i]: ids[i + 1] for i in range(0, 96 - 2 * count, 2)}
        assert all(facts[key] == value for key, value in first.items())


def test_uniform_choice_keeps_each_token_so_far_as_likely_as_the_others():
    task = cache_eviction.AskedTwice(96, 1)
    model = cache_eviction.language_model(task, ["softmax"], dim=16, num_heads=2).eval()
    ids, kept = torch.randint(task.vocab_size, (1, 40)), torch.zeros(40)
    for seed in range(60):
        drawn = cache_eviction.Drawn(capacity=10, longest=40, seed=seed)
        with torch.no_grad(), sparsely(model, drawn):
            state = model(ids[:, :30], context=cache_eviction.STATE).state
            for token in ids[:, 30:].split(1, 1):
                state = model(token, context=cache_eviction.STATE, state=state).state
        cache = state.layers[0].mechanism
        assert cache.counts.tolist() == [[10, 10]]
        ranks = cache.ranks[0, 0, :10]
        assert torch.equal(ranks.sort().values, cache.ranks[0, 1, :10].sort().values)
        kept[ranks] += 1
    assert 0.15 < kept[:30].mean() / 60 < 0.35 and 0.15 < kept[30:].mean() / 60 < 0.35
    assert (kept > 0).all()


def test_what_makes_a_gating_unit_is_judged_at_equal_sizes():
    def parameters(name, *settings):
        _, cells = small_cells(name)
        return [cells[setting, 0]["parameters"] for setting in settings]

    sizes = parameters("activator", "network", "larger units alone", "one factor")
    assert max(sizes) < 1.02 * min(sizes)
    whole, added, along_tokens, along_channels = parameters(
        "ninformer", "ninformer", "sum", "gate along tokens", "gate along channels"
    )
    assert whole == added > max(along_tokens, along_channels)
