"""Whatever requests arrive in whatever order, answers are those of a model alone, and nothing is left allocated."""

import random

import pytest
import torch
from readers import VOCABULARY, HashReader, alone, drain, following

from regard.contract import Unsupported
from regard.serving.engine import Busy, Engine, Limits, Request

KINDS = {"pages": {}, "pages and states": {"holds": True}, "states": {"holds": True, "pages": 0}}


def request(key, draws, context=64, beginnings=((),), **fixed):
    """A random request, whose prompt may share its beginning with others."""
    prompt = list(draws.choice(beginnings)) + draws.choices(range(VOCABULARY), k=draws.randint(1, 20))
    sampled = draws.random() < 0.5
    options = {
        "max_tokens": draws.randint(1, min(16, context - len(prompt))),
        "temperature": 0.8 if sampled else 0.0,
        "seed": draws.randint(0, 99) if sampled else None,
        "top_k": draws.choice([None, 5]) if sampled else None,
        "stop_tokens": frozenset(draws.sample(range(VOCABULARY), 3)),
        "client": draws.choice("abc"),
    }
    return Request(key, prompt, **options | fixed)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_answers_of_random_arrivals_equal_those_alone_and_every_page_comes_back(kind):
    draws = random.Random(torch.initial_seed())
    preempted = shared = 0
    for _ in range(40):
        beginnings = [(), *(tuple(draws.choices(range(VOCABULARY), k=draws.randint(3, 30))) for _ in range(2))]
        reader = HashReader(**{"pages": draws.choice([17, 40]), **kind})
        limits = Limits(
            rows=draws.randint(1, 5),
            chunk=draws.choice([1, 3, 8, 50]),
            waiting=99,
            prefix_cache=draws.random() < 0.8,
        )
        engine = Engine(reader, limits)
        requests = [request(str(i), draws, beginnings=beginnings) for i in range(10)]
        tokens, ends = drain(engine, requests, every=draws.choice([1, 2, 5]))
        for one in requests:
            assert (tokens[one.key], ends[one.key]) == alone(one)
        assert not engine.active and not reader.held and max(map(sum, reader.calls)) <= max(limits.chunk, limits.rows)
        if engine.pages is not None:
            if engine.prefixes is not None:
                engine.prefixes.clear()
            assert engine.pages.free == engine.pages.count and not any(engine.pages.owners)
        preempted, shared = preempted + engine.preempted, shared + engine.shared_tokens
    assert shared > 0 and (preempted > 0) == bool(reader.pages)


def test_cancelled_requests_say_nothing_more_and_leave_nothing_behind():
    draws = random.Random(torch.initial_seed())
    engine = Engine(HashReader(holds=True), Limits(rows=3, chunk=4))
    requests = [request(str(i), draws, max_tokens=8, stop_tokens=frozenset()) for i in range(9)]
    for one in requests:
        engine.submit(one)
    cancelled, tokens = set(), {}
    while engine.busy:
        for event in engine.step():
            assert event.key not in cancelled
            tokens.setdefault(event.key, []).append(event.token)
        left = [one.key for one in requests if one.key not in cancelled and len(tokens.get(one.key, ())) < 8]
        if left and len(cancelled) < 5:
            key = draws.choice(left)
            assert engine.cancel(key)
            cancelled.add(key)
    for one in requests:
        if one.key not in cancelled:
            assert tokens[one.key] == alone(one)[0]
    assert not engine.cancel("unknown") and not engine.reader.held
    engine.prefixes.clear()
    assert engine.pages.free == engine.pages.count


def test_a_beginning_that_prompts_share_is_read_once():
    for holds in (False, True):
        reader = HashReader(context=256, pages=99, holds=holds)
        engine = Engine(reader, Limits(rows=2, chunk=7))
        beginning = list(range(42))
        counts = []
        for i in range(4):
            before = sum(map(sum, reader.calls))
            one = Request(str(i), [*beginning, *[60 + i] * 6], 1)
            assert drain(engine, [one])[0][one.key] == alone(one)[0]
            counts.append(sum(map(sum, reader.calls)) - before)
        # whole pages of 4 tokens are shared; states are kept where the second prompt diverged from the first
        assert counts == ([48, 8, 8, 8] if not holds else [48, 48, 8, 8])


def test_prompts_that_arrive_together_share_what_the_first_has_read_already():
    engine = Engine(HashReader(pages=99), Limits(rows=4, chunk=40))
    requests = [Request(str(i), [*range(30), 50 + i], 2) for i in range(4)]
    for one in requests:
        engine.submit(one)
    tokens, _ = drain(engine)
    assert all(tokens[one.key] == alone(one)[0] for one in requests)
    assert engine.shared_tokens == 3 * 28


def test_writing_goes_on_while_a_long_prompt_is_read_and_a_short_one_overtakes_it():
    reader = HashReader(context=400, pages=200)
    engine = Engine(reader, Limits(rows=3, chunk=10))
    engine.submit(Request("writer", [1], 60))
    engine.step()
    engine.submit(Request("long", list(range(90)) * 3, 1))
    engine.submit(Request("short", [5, 6, 7], 1))
    seen = []
    for _ in range(30):
        events = engine.step()
        assert "writer" in {event.key for event in events}, "a token in each step"
        seen += [event.key for event in events if event.finish]
    assert seen == ["short", "long"]


def test_short_prompts_are_read_together():
    reader = HashReader()
    engine = Engine(reader, Limits(rows=8, chunk=32))
    for i in range(4):
        engine.submit(Request(str(i), [i] * (5 + i), 1))
    drain(engine)
    assert reader.calls == [[5, 6, 7, 8]]


def test_a_client_with_many_requests_does_not_hold_up_another():
    engine = Engine(HashReader(), Limits(rows=1))
    for i in range(6):
        engine.submit(Request(f"many{i}", [1, 2, 3], 3, client="many"))
    engine.step()
    engine.submit(Request("one", [4, 5], 2, client="one"))
    order = list(drain(engine)[1])
    assert order.index("one") == 1
    engine.submit(Request("many", [1], 1, client="many"))
    engine.submit(Request("saved", [1], 1, client="new"))
    assert list(drain(engine)[1]) == ["many", "saved"], "who comes back does not come with what it has saved up"


def test_more_requests_than_may_wait_are_turned_away():
    engine = Engine(HashReader(), Limits(rows=2, waiting=3))
    for i in range(5):
        engine.submit(Request(str(i), [1], 2))
    with pytest.raises(Busy):
        engine.submit(Request("late", [1], 2))
    drain(engine)
    engine.submit(Request("later", [1], 2))


@pytest.mark.parametrize(
    ("prompt", "new", "words"),
    [
        ([], 1, "without tokens"),
        ([1] * 60, 5, "try max_tokens=4"),
        ([1] * 64, 1, "shorter prompt"),
        ([VOCABULARY], 1, "know"),
    ],
)
def test_requests_that_could_never_be_answered_are_refused(prompt, new, words):
    with pytest.raises(Unsupported, match=words):
        Engine(HashReader()).submit(Request("a", prompt, new))


def test_a_pool_smaller_than_the_context_bounds_what_is_taken():
    engine = Engine(HashReader(context=64, pages=5))
    assert engine.context == 20
    one = Request("a", [1] * 10, 10)
    assert drain(engine, [one])[0]["a"] == alone(one)[0]


def test_where_pages_run_out_who_came_first_keeps_its_own():
    engine = Engine(HashReader(context=64, pages=20), Limits(rows=3, prefix_cache=False))
    for i in range(3):
        engine.submit(Request(str(i), [i, 1, 2], 50))
    first = []
    while "0" not in first:
        first += [event.key for event in engine.step() if event.finish]
        assert not first or first == ["0"]
        assert any(row.request.key == "0" for row in engine.active) or first
    assert engine.preempted > 0
    drain(engine)


class Broken(HashReader):
    """A reader that raises for one token, and gives NaN for another."""

    def read(self, rows, tokens):
        if any(66 in new for new in tokens):
            raise RuntimeError("out of memory")
        logits = super().read(rows, tokens)
        for i, new in enumerate(tokens):
            if 77 in new:
                logits[i, 3] = torch.nan
        return logits


def test_a_request_that_fails_takes_no_other_with_it():
    engine = Engine(Broken(), Limits(rows=4, chunk=4))
    bad = [Request("raises", [66, 1, 2, 3], 2), Request("nan", [77, 1, 2, 3], 2)]
    good = [Request(str(i), [i, 5, 6, 7], 4, stop_tokens=frozenset()) for i in range(3)]
    assert not {66, 77} & {token for one in good for token in alone(one)[0]}
    tokens, ends = drain(engine, [good[0], bad[0], good[1], bad[1], good[2]])
    assert ends == {"raises": "error", "nan": "error", **{one.key: "length" for one in good}}
    assert all(tokens[one.key] == alone(one)[0] for one in good)
    engine.prefixes.clear()
    assert engine.pages.free == engine.pages.count


def test_log_probabilities_are_those_of_the_model():
    engine = Engine(HashReader())
    engine.submit(Request("a", [1, 2], 2, temperature=2.0, seed=1, logprobs=3))
    events = [event for _ in range(2) for event in engine.step()]
    text = [1, 2]
    for event in events:
        nats = following(text).log_softmax(-1)
        assert event.logprob == pytest.approx(float(nats[event.token]))
        best = nats.topk(3)
        assert event.top == tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        text.append(event.token)


def test_the_longest_unused_beginnings_make_room():
    from regard.serving.pages import Pages
    from regard.serving.prefixes import Prefixes

    tree = Prefixes(2, None, blocks=8, snapshot_bytes=30)
    blocks = [tree.add(tree.root, (i, i), None) for i in range(3)]
    for block in blocks:
        tree.keep(block, "state", 10)
    tree.path([0, 0, 9])  # used again
    more = tree.add(tree.root, (7, 7), None)
    tree.keep(more, "state", 10)
    assert [block.snapshot for block in blocks] == ["state", None, "state"]
    tree.keep(more, "larger than all", 31)
    assert more.snapshot == "state"
    for i in range(20, 40):
        tree.add(tree.root, (i, i), None)
    assert tree.count <= 8 and not tree.alive(blocks[1])

    pages = Pages(9, 2)
    tree = Prefixes(2, pages)
    owned = pages.take(3)
    first = tree.add(tree.root, (1, 1), owned[0])
    for page, tokens in zip(owned[1:], ((2, 2), (3, 3)), strict=True):
        tree.add(first, tokens, page)
    pages.give_back(owned[:2])  # the third is still in use
    tree.evict(3)
    assert [len(tree.path([1, 1, i, i, 9])) for i in (2, 3)] == [1, 2] and pages.free == 7

    pages = Pages(2, 4)
    assert pages.take(3) is None and pages.free == 2
    owned = pages.take(2)
    pages.share(owned[:1])
    pages.give_back(owned)
    assert pages.free == 1


def test_a_full_tree_is_searched_for_many_pages_at_once(monkeypatch):
    from regard.serving.pages import Pages
    from regard.serving.prefixes import Prefixes

    pages = Pages(640, 2)
    tree, searched = Prefixes(2, pages), []
    pages.evict = tree.evict
    for i in range(640):
        page = pages.take(1)
        tree.add(tree.root, (i, i), page[0])
        pages.give_back(page)
    ends = Prefixes._ends
    monkeypatch.setattr(Prefixes, "_ends", lambda self: searched.append(self.count) or ends(self))
    assert all(pages.take(1) for _ in range(100))
    assert len(searched) < 15 and tree.count + pages.free == 540 and pages.free < 10
