"""The clients of `benchmarks/soak.py` find no fault in a correct server, and the faults of broken ones."""

import contextlib
import random
from pathlib import Path

import pytest
import torch
from readers import VOCABULARY, HashReader, alone

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from test_app import LONG, Letters, SlowReader, send, server, until

from regard.cli.serve import listen
from regard.serving.app import ServerLimits
from regard.serving.engine import Limits, Request
from regard.serving.run import Running

KEY, BODY = "secret", 1 << 16


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import soak_clients
    import soak_questions

    return soak_clients, soak_questions


@contextlib.contextmanager
def clients_of(parts, questions, reader=None, limits=None):
    made, listening = server(reader, limits, key=KEY), listen("127.0.0.1", 0)
    made.limits = ServerLimits(body=BODY)
    places = made.service.engine.limits.places
    bad = parts[0].bad_requests("letters", VOCABULARY, 64, BODY, places)
    with Running(made, listening, drain=0):
        yield parts[0].Clients(listening.getsockname(), "letters", KEY, questions, bad, places), made


def question_of(parts, prompt, new, **changes):
    questions = parts[1]
    text = Letters().decode(alone(Request("", Letters().encode(prompt), new))[0])
    said = {"text": text, "finish": "length", "tokens": new} | changes
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "logprobs": 3}
    return questions.Question("short prompt", body, (questions.Answer(**said),), len(prompt))


def test_nothing_is_found_where_answers_are_right_and_bad_requests_are_refused(parts):
    questions = [question_of(parts, prompt, 8) for prompt in ("some", "words")]
    with clients_of(parts, questions) as (clients, _):
        for request in clients.bad:
            clients.refused(*request)
        for act in (
            clients.whole,
            clients.streamed,
            clients.slow_writer,
            clients.several,
            clients.no_http,
            clients.looks,
        ):
            act(random.Random(0))
    assert not clients.tally.faults and clients.tally.outcomes["bad request", "right"] == len(clients.bad) > 90
    assert sum(n for (_, outcome), n in clients.tally.outcomes.items() if outcome == "right") == len(clients.bad) + 6


@pytest.mark.parametrize("changes", [{"text": "other"}, {"finish": "stop"}, {"tokens": 7}], ids=str)
def test_an_answer_that_is_not_the_models_is_found_whole_and_streamed(parts, changes):
    with clients_of(parts, [question_of(parts, "some", 8, **changes)]) as (clients, _):
        clients.whole(random.Random(0))
        clients.streamed(random.Random(0))
    assert len(clients.tally.faults) == 2


def test_errors_of_the_server_and_clients_turned_away_for_nothing_are_found(parts):
    class Failing(HashReader):
        def read(self, rows, tokens):
            return torch.full((len(rows), VOCABULARY), torch.nan)

    question = question_of(parts, "some", 8)
    with clients_of(parts, [question], Failing()) as (clients, _):
        clients.whole(random.Random(0))
        clients.refused("a good one", "POST", "/v1/completions", b'{"prompt": "a"}', {}, 400)
    assert "status 500" in clients.tally.faults[0] and "500 and not 400" in clients.tally.faults[1]
    with clients_of(parts, [question], SlowReader(), Limits(rows=1, waiting=0)) as (clients, made):
        made.key = None  # for a client that these do not know about
        with send(clients.address, LONG | {"stream": True}):
            until(lambda: made.service.engine.active)
            clients.whole(random.Random(0))
    assert len(clients.tally.faults) == 1 and "status 429" in clients.tally.faults[0]


def test_who_is_turned_away_in_a_crowd_is_no_fault(parts):
    with clients_of(parts, [question_of(parts, "some", 8)], SlowReader(), Limits(rows=2, waiting=1)) as (clients, _):
        clients.burst(random.Random(3))
    outcomes = {outcome: n for (_, outcome), n in clients.tally.outcomes.items()}
    assert not clients.tally.faults and set(outcomes) <= {"right", "turned away"} and outcomes["right"] >= 3
