import numpy as np
import pytest

from regard.measurement.statistics import Comparison, Scores
from regard.workbench.comparison.recommend import published_means, recommend
from regard.workbench.comparison.summary import frames_sentences, rank

BITS, ACCURACY = ("bits per byte", False), ("accuracy", True)
TIMES = {"slow": 10.0, "fast": 1.0, "toy": 0.1}
LEVEL = dict.fromkeys(TIMES, 1.0)


def case(scores, inference=TIMES, solved=None, seeds=3, noise=0.001):
    """One task's summary and comparison, from mean scores, inference times and the mechanisms that solve it."""
    rng = np.random.default_rng(0)

    def items(mean):
        return np.array([[mean + noise * rng.standard_normal(), 1.0] for _ in range(20)])

    by_name = {name: Scores({seed: items(mean) for seed in range(seeds)}) for name, mean in scores.items()}
    summary = [
        {
            "mechanism": name,
            "mean": by_name[name].mean,
            "inference_ms": inference[name],
            "solved": None if solved is None else name in solved,
        }
        for name in scores
    ]
    return summary, Comparison(by_name)


def advise(beside=None, named=(), edges=None, published=None, seeds=1, **tasks):
    """The recommendation after these tasks; the metric of recall is accuracy, that of the others bits."""
    return recommend(
        {name: summary for name, (summary, _) in tasks.items()},
        {name: comparison for name, (_, comparison) in tasks.items()},
        {name: ACCURACY if name == "recall" else BITS for name in tasks},
        budget="8m",
        seeds=seeds,
        at_length=dict.fromkeys(tasks, 2048),
        frame="bare",
        beside=beside,
        named=named,
        edges=edges,
        published=published,
    )


def test_the_fastest_toy_cannot_win_without_solving_recall():
    recall = case({"slow": 0.99, "fast": 0.98, "toy": 0.2}, solved={"slow", "fast"})
    found = advise(recall=recall, text=case({"slow": 2.0, "fast": 2.0, "toy": 2.0}))
    assert found.winner == "fast" and "toy" in found.reason


def test_cost_does_not_buy_a_separable_loss_of_quality():
    found = advise(text=case({"slow": 1.0, "fast": 2.0}))
    assert found.winner == "slow" and "ahead of fast" in found.reason


def test_the_cost_that_is_given_is_said_to_be_the_winners():
    """This holds even if another mechanism has the best score and begins the sentence."""
    found = advise(text=case({"slow": 1.0, "fast": 1.02, "toy": 9.0}, noise=0.08))
    assert found.winner == "fast"
    assert "slow reaches" in found.reason and "; fast needs 1 ms" in found.reason
    # mechanisms that cannot be separated are named, with what would help
    assert any("Cannot separate" in note and "--seeds" in note and "--budget" in note for note in found.notes)


def test_what_is_not_shown_to_beat_the_rule_is_not_taken_where_others_are():
    summary, comparison = case(LEVEL)
    for entry, standing in zip(summary, ("ahead", "ahead", "level"), strict=True):
        entry["beside_baseline"] = standing
    found = advise(text=(summary, comparison))
    assert found.winner == "fast" and "without training" not in found.text
    assert "not shown to beat a rule without training: toy" in found.reason
    summary[1]["beside_baseline"] = "level"
    assert (
        "Take slow: each of the others is clearly behind it or not shown to" in advise(text=(summary, comparison)).text
    )
    for entry in summary:
        entry["beside_baseline"] = "level"
    found = advise(text=(summary, comparison))
    assert found.winner == "toy"
    assert "on text a rule without training is not clearly beaten: it may have learned nothing there." in found.text
    few = Comparison({n: Scores({s: x[:3] for s, x in each.items.items()}) for n, each in comparison.scores.items()})
    text = advise(text=(summary, few)).text
    assert (
        "On text so few items are held out that nothing can be shown to beat a rule" in text and "learned" not in text
    )
    for entry in summary:
        entry["beside_baseline"] = "behind"
    assert "on text a rule without training is better" in advise(text=(summary, comparison)).text
    for entry in summary:
        entry["solved"] = True  # whatever a few items say about the rule
    assert "without training" not in advise(text=(summary, comparison)).text


def test_scores_that_are_exactly_the_same_are_called_so():
    """This happens if every model predicts the most frequent class."""
    found = advise(text=case(LEVEL, noise=0.0))
    assert found.notes == ["On text all of slow, fast and toy score exactly the same."]


def test_a_single_seed_ranks_nothing():
    found = advise(text=case({"slow": 1.0, "fast": 9.0}, seeds=1))
    assert any("single seed" in note for note in found.notes) and "single seed" in found.text
    assert found.notes[0].endswith("use --seeds 2 or more.")
    late = advise(seeds=3, text=case({"slow": 1.0, "fast": 9.0}, seeds=1))
    assert late.notes[0].endswith("nothing can be separated; a larger --budget has time for more.")
    assert "within the noise" not in found.reason and "two seeds or more" in found.reason.lower()
    assert "within the noise" in advise(text=case({"slow": 1.0, "fast": 1.0})).reason


def test_who_is_ahead_of_the_winner_on_another_task_is_said():
    """Tasks decide one after the other; a mechanism dropped after the first may lead on the second."""
    one, other = case({"slow": 1.0, "fast": 2.0, "toy": 2.0}), case({"slow": 2.0, "fast": 1.0, "toy": 3.0})
    assert advise(one=one, other=other).notes == [
        "On other slow is clearly behind fast, eliminated for the reasons above."
    ]
    recall = case({"slow": 0.99, "fast": 0.2, "toy": 0.2}, solved={"slow"})
    assert advise(recall=recall, other=other).notes == advise(one=one, other=other).notes
    assert not advise(recall=recall, other=one).notes


def test_where_all_solve_a_task_a_sure_difference_is_not_called_noise():
    """A recall of 0.997 is surely below 0.9999, but both solve it, so scores do not decide, and no sentence says so."""
    scores = {"slow": 0.9999, "fast": 0.997}
    recall = case(scores, solved=set(scores), noise=1e-5)
    assert recall[1].difference("slow", "fast").separable
    found = advise(recall=recall)
    assert found.winner == "fast"
    assert found.text == "Take fast: slow and fast solve recall, and it is the cheapest in inference at 2048 tokens."
    assert found.reason.startswith("Every mechanism solves recall, where scores no longer decide; fast solves recall")
    found = advise(recall=recall, text=case({"slow": 1.0, "fast": 1.0}))
    assert "slow and fast solve recall, none is clearly behind the best on text, and it is" in found.text
    assert "scores no longer decide; on text all reached the same quality within the noise; fast" in found.reason


def test_nobody_solving_is_said_and_does_not_exclude():
    found = advise(recall=case({"slow": 0.3, "fast": 0.3}, solved=set()))
    assert found.winner is not None
    assert any("No mechanism solved recall" in note for note in found.notes)


def test_mechanisms_without_a_score_are_left_out():
    summary, comparison = case({"slow": 1.0, "fast": 1.0})
    for index, winner in ((1, "slow"), (0, None)):
        summary[index]["mean"] = None
        assert advise(text=(summary, comparison)).winner == winner


def alike(names=("slow", "fast"), beside=None, means=None, published=None, **costs):
    """The recommendation for mechanisms of similar cost that seeds cannot separate; means are equal unless given."""
    times = {**dict.fromkeys(names, 1.0), "fast": 0.95, **costs}
    scores = {name: (means or {}).get(name, 1.0) for name in names}
    return advise(beside, names, published=published, text=case(scores, times, noise=0.1 if means else 0.0))


def elsewhere(**solved):
    """Results of mechanisms that solved recall: whether they also solve it in another frame."""
    told = {"frame": "own", "first_solved": True}
    return {"recall": [{"mechanism": name, "solved": won, **told} for name, won in solved.items()]}


CASES = {
    "one mechanism": lambda: advise(text=case({"slow": 1.0})),
    "nothing can be separated": lambda: advise(text=case(LEVEL)),
    "one is ahead": lambda: advise(text=case({"slow": 1.0, "fast": 2.0, "toy": 3.0})),
    "a tie at the top": lambda: advise(text=case({"slow": 1.0, "fast": 1.0, "toy": 3.0})),
    "another leads on each task": lambda: advise(
        one=case({"slow": 1.0, "fast": 2.0}), other=case({"slow": 2.0, "fast": 1.0})
    ),
    "tied on one task, behind on the other": lambda: advise(
        one=case(LEVEL), other=case({"slow": 1.0, "fast": 2.0, "toy": 2.0})
    ),
    "nothing is solved": lambda: advise(recall=case(LEVEL, solved=set())),
    "all is solved": lambda: advise(recall=case(LEVEL, solved=set(TIMES))),
    "all is solved, one surely better": lambda: advise(
        recall=case({"slow": 1.0, "fast": 0.99, "toy": 0.97}, solved=set(TIMES))
    ),
    "all is solved, by a single seed": lambda: advise(recall=case(LEVEL, solved=set(TIMES), seeds=1)),
    "some solve, none leads": lambda: advise(
        recall=case({"slow": 1.0, "fast": 1.0, "toy": 0.2}, solved={"slow", "fast"}), text=case(LEVEL)
    ),
    "all solve, one leads": lambda: advise(
        recall=case(LEVEL, solved=set(TIMES)), text=case({"slow": 1.0, "fast": 2.0, "toy": 2.0})
    ),
    "one solves, another leads": lambda: advise(
        recall=case({"slow": 0.99, "fast": 0.2, "toy": 0.2}, solved={"slow"}),
        text=case({"slow": 2.0, "fast": 1.0, "toy": 1.0}),
    ),
    "a single seed": lambda: advise(text=case({"slow": 1.0, "fast": 9.0}, seeds=1)),
    "no cost was measured": lambda: advise(text=case(LEVEL, dict.fromkeys(TIMES))),
    "costs are alike": lambda: alike(),
    "costs are alike but for one": lambda: alike(("slow", "fast", "toy"), toy=2.0),
    "costs are alike and the frames differ": lambda: alike(beside=elsewhere(slow=False, fast=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_no_sentence_contradicts_another(name):
    """A sole winner is never called inseparable from others, and a winner that is not alone is never called sole."""
    found = CASES[name]()
    alone = "clearly behind it" in found.text or "only mechanism" in found.text
    tied = any("Cannot separate" in note or "exactly the same" in note for note in found.notes)
    assert found.text.startswith(f"Take {found.winner}: ")
    assert found.text.count("Take ") == 1 and found.text.endswith(".")
    assert not (alone and tied)
    equal = "none is clearly behind" in found.text or "within the noise" in found.reason
    assert tied or not equal
    assert alone or equal or "single seed" in found.text or " solve " in found.text
    left = {m for m in TIMES if f"ahead of {m}" in found.reason or f"not solved by {m}" in found.reason}
    assert found.winner not in left
    assert "cheapest" not in found.text or " at 2048 tokens" in found.text


def test_costs_that_differ_as_timings_do_decide_nothing():
    """A few percent between two timings must not change the answer; a real difference does."""
    for fast in (0.95, 1.0, 1.05):
        found = alike(fast=fast)
        assert found.winner == "slow" and "named first" in found.text and found.alike == ["slow", "fast"]
    assert alike(("fast", "slow")).winner == "fast"
    assert alike(("slow", "fast", "softmax")).winner == "softmax"
    found = alike(fast=0.5)
    assert found.winner == "fast" and "cheapest" in found.text and found.alike == ["fast"]


def test_what_nothing_decides_is_decided_by_the_mean_whatever_was_named_first():
    for names in (("slow", "fast"), ("fast", "slow")):
        for better in names:
            found = alike(names, means={better: 0.97})
            assert found.winner == better and found.alike == list(names)
            assert "has the best mean on text, though not by a clear margin" in found.text
    assert alike(("slow", "softmax"), means={"slow": 0.97}).winner == "softmax"
    bound = alike(("slow", "fast", "softmax"), elsewhere(slow=True, fast=True, softmax=False), {"fast": 0.95})
    assert bound.winner == "fast" and "in the frame own, and fast has the best mean on text" in bound.text


def test_what_one_run_cannot_tell_the_published_ranking_does_so_that_another_run_says_the_same():
    known = {"text": {"slow": 2.8, "fast": 2.9, "softmax": 2.7}, "recall": {"slow": 0.5}}
    for better in ("slow", "fast"):
        found = alike(means={better: 0.97}, published=known)
        assert (
            found.winner == "slow"
            and "in the ranking that regard publishes, though not by a clear margin" in found.text
        )
    assert alike(("fast", "softmax"), published=known).winner == "softmax"
    for unknown in ({"text": {"slow": 1.0}}, {"recall": known["text"]}):  # not all mechanisms; not this task
        assert alike(means={"fast": 0.97}, published=unknown).winner == "fast"
    assert advise(text=case({"slow": 9.0, "fast": 1.0}), published=known).winner == "fast", "it cannot outweigh the run"
    assert published_means("own") == {}
    ranked = published_means("convolution")
    assert ranked["text"].keys() == ranked["recall"].keys() >= {"softmax", "delta_rule", "gated_linear", "local"}


def test_of_two_alike_the_one_is_taken_that_needs_its_frame_less():
    both = ("softmax", "fast")
    found = alike(both, elsewhere(softmax=False, fast=True))
    assert found.winner == "fast" and "unlike softmax it also solves recall in the frame own" in found.text
    for beside in (elsewhere(softmax=True, fast=True), elsewhere(softmax=False, fast=False), elsewhere(softmax=False)):
        assert alike(both, beside).winner == "softmax"  # in the last case fast is unknown
    assert alike(both, elsewhere(softmax=False, fast=True), softmax=0.5).winner == "softmax"


def test_of_two_alike_frames_that_one_alone_was_trained_in_decide_nothing_nor_is_said_to_be_solved_what_is_not():
    both, bare = ("softmax", "fast"), {"frame": "bare", "first_solved": True, "solved": False}
    late = elsewhere(softmax=False)  # no time was left for fast
    late["recall"] += [{"mechanism": name, **bare} for name in both]
    found = alike(both, late)
    assert found.winner == "softmax" and "it also solves" not in found.text
    won = elsewhere(softmax=False, fast=True)
    won["recall"] += late["recall"][1:]
    assert "unlike softmax it also solves recall in the frame own;" in alike(both, won).text.replace(".", ";")
    crossed = {
        "recall": elsewhere(softmax=False, fast=True)["recall"],
        "copying": elsewhere(softmax=False, fast=True)["recall"],
    }
    crossed["order"] = elsewhere(softmax=True, fast=False)["recall"]
    assert (
        "unlike softmax it also solves recall in the frame own and copying in the frame own"
        in alike(both, crossed).text
    )


def test_a_best_rate_at_an_end_qualifies_the_headline_of_the_winner_alone():
    slow, fast = (
        advise(edges={("text", edge): 3e-2}, text=case({"slow": 1.0, "fast": 2.0})) for edge in ("slow", "fast")
    )
    assert "0.03 on text" in slow.text and not slow.notes
    assert "may" not in fast.text and "fast on text" in fast.notes[0]


def test_the_frame_is_named_and_what_it_does_is_not_the_mechanism_s():
    told = {"frame": "bare", "separable": True, "first_solved": True}
    slow = {"mechanism": "slow", "mean": 0.25, "first": 1.0, "solved": False, "overtaken": ["fast"], **told}
    fast = {"mechanism": "fast", "mean": 0.99, "first": 0.98, "solved": True, "overtaken": ["slow"], **told}
    beside = {"recall": [slow, fast]}
    said = " ".join(frames_sentences(beside, {"recall": ACCURACY}, "convolution"))
    assert "on recall (accuracy) slow 0.25 instead of 1" in said
    assert "Due to the parts of the frame convolution: slow solves recall (not in bare)." in said
    assert "The order depends on the frame: slow and fast change places on recall." in said
    assert "with the frame bare" in advise(text=case(LEVEL)).reason
    unsure = {**slow, "mean": 0.8, "separable": False, "overtaken": []}
    said = " ".join(frames_sentences({"recall": [unsure, fast]}, {"recall": ACCURACY}, "convolution"))
    assert "slow 0.8 instead of 1, not solved by every seed" in said
    assert "Due to" not in said and "slow the same" not in said


def test_what_is_solved_in_the_first_frame_alone_is_told_once_for_all_others():
    told = {"mechanism": "slow", "mean": 0.25, "first": 1.0, "separable": True, "overtaken": []}
    rows = [{**told, "frame": frame, "first_solved": True, "solved": False} for frame in ("bare", "unnormed")]
    said = frames_sentences({"recall": rows}, {"recall": ACCURACY}, "convolution")
    assert said[2:] == ["Due to the parts of the frame convolution: slow solves recall (not in bare or unnormed)."]


def test_equal_ranks_are_those_of_a_group_that_cannot_be_told_apart():
    summary, comparison = case({"slow": 1.0, "fast": 1.0005, "toy": 3.0}, noise=0.01)
    entries = sorted(summary, key=lambda entry: entry["mean"])
    rank(entries, comparison)
    assert [entry["rank"] for entry in entries] == [1, 1, 3]
