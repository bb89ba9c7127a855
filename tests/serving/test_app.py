"""The HTTP server as clients see it: OpenAI-compatible answers, clear errors, and nothing left over from lost clients."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import threading
import time

import pytest
from readers import HashReader, alone

pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from regard.cli.serve import listen
from regard.serving.app import LONG_BODY, Server, ServerLimits
from regard.serving.engine import Busy, Engine, Limits, Request
from regard.serving.run import Running, run
from regard.serving.service import Service


class Letters:
    """A tokenizer in which token i is the character i places after the space."""

    stop_tokens = frozenset({90})

    def encode(self, text):
        return [ord(letter) - 32 for letter in text]

    def decode(self, tokens):
        return "".join(chr(32 + token) for token in tokens)

    def chat(self, messages):
        return self.encode("|".join(message["content"] for message in messages))


class SlowReader(HashReader):
    def read(self, rows, tokens):
        time.sleep(0.01)
        return super().read(rows, tokens)


def server(reader=None, limits=None, **options):
    return Server(Service(Engine(reader or HashReader(), limits or Limits(rows=4))), Letters(), "letters", **options)


@pytest.fixture
def client():
    made = server()
    made.service.start()
    with TestClient(made.app()) as found:
        found.made = made
        yield found


def expected(prompt, new, **options):
    return Letters().decode(alone(Request("", Letters().encode(prompt), new, **options))[0])


def events(response):
    lines = [line[6:] for line in response.text.split("\n") if line]
    assert lines[-1] == "[DONE]" and response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line) for line in lines[:-1]]


def test_a_completion_is_the_models_own_whole_and_streamed(client):
    asked = {"model": "letters", "prompt": "Once", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    whole = client.post("/v1/completions", json=asked).json()
    text = expected("Once", 6)
    assert whole["object"] == "text_completion" and whole["model"] == "letters"
    assert whole["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    assert whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10}
    streamed = events(
        client.post("/v1/completions", json=asked | {"stream": True, "stream_options": {"include_usage": True}})
    )
    assert "".join(piece["choices"][0]["text"] for piece in streamed[:-1]) == text
    assert [piece["choices"][0]["finish_reason"] for piece in streamed[:-1]] == [None] * 5 + ["length"]
    assert streamed[-1]["choices"] == [] and streamed[-1]["usage"] == whole["usage"]


def test_a_chat_is_answered_whole_and_streamed_with_log_probabilities(client):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    asked = {"messages": messages, "max_completion_tokens": 3, "seed": 5, "logprobs": True, "top_logprobs": 2}
    whole = client.post("/v1/chat/completions", json=asked).json()
    choice = whole["choices"][0]
    stop = {"stop_tokens": Letters.stop_tokens}
    assert choice["message"] == {"role": "assistant", "content": expected("Hi", 3, temperature=1.0, seed=5, **stop)}
    assert [len(one["top_logprobs"]) for one in choice["logprobs"]["content"]] == [2, 2, 2]
    assert "".join(one["token"] for one in choice["logprobs"]["content"]) == choice["message"]["content"]
    streamed = events(client.post("/v1/chat/completions", json=asked | {"stream": True}))
    assert streamed[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"]["content"] for p in streamed) == choice["message"]["content"]
    told = [one for piece in streamed for one in piece["choices"][0]["logprobs"]["content"]]
    assert told == choice["logprobs"]["content"]


def test_several_prompts_and_answers_come_in_order_each_with_its_seed(client):
    asked = {"prompt": ["Up", [1, 2]], "n": 2, "max_tokens": 4, "seed": 7, "ignore_eos": True, "logprobs": 0}
    found = client.post("/v1/completions", json=asked).json()["choices"]
    prompts = ["Up", "Up", Letters().decode([1, 2]), Letters().decode([1, 2])]
    wanted = [expected(p, 4, temperature=1.0, seed=7 + i % 2) for i, p in enumerate(prompts)]
    assert [(c["index"], c["text"]) for c in found] == list(enumerate(wanted))
    assert found[0]["logprobs"]["text_offset"] == [0, 1, 2, 3] and found[0]["logprobs"]["top_logprobs"] == [{}] * 4


def test_answers_are_counted_before_any_prompt_is_read(client):
    client.made.text.encode = None
    found = client.post("/v1/completions", json={"prompt": ["a"] * 300})
    assert found.status_code == 400 and "300 answers at once" in found.json()["error"]["message"]


def test_of_tokens_that_are_parts_of_a_character_the_likeliest_is_told(client):
    client.made.text.decode = lambda tokens: "\ufffd" * len(tokens)
    asked = {"prompt": "Once", "max_tokens": 2, "temperature": 0, "ignore_eos": True, "logprobs": 5}
    told = client.post("/v1/completions", json=asked).json()["choices"][0]["logprobs"]
    assert [list(top.values()) for top in told["top_logprobs"]] == [[nats] for nats in told["token_logprobs"]]


def test_an_answer_ends_at_a_stop_string_or_a_stop_token(client):
    asked = {"prompt": "Once", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
    text = expected("Once", 20)
    cut = client.post("/v1/completions", json=asked | {"stop": text[3:5]}).json()["choices"][0]
    assert cut["text"] == text[: text.find(text[3:5])] and cut["finish_reason"] == "stop"
    for seed in range(60):
        options = {"temperature": 1.0, "seed": seed, "stop_tokens": Letters.stop_tokens}
        tokens, end = alone(Request("", [1], 20, **options))
        if end == "stop":
            break
    found = client.post("/v1/completions", json={"prompt": [1], "max_tokens": 20, "seed": seed}).json()
    assert found["choices"][0]["text"] == Letters().decode(tokens[:-1])
    assert found["choices"][0]["finish_reason"] == "stop"


BAD = {
    "not json": (b"{", 400, "not JSON"),
    "a list": (b"[]", 400, "not a JSON object"),
    "deep": (b"[" * 100_000, 400, "not JSON"),
    "no number": (b'{"prompt": "a", "temperature": NaN}', 400, "NaN"),
    "half a character": (b'{"prompt": "\\ud800"}', 400, "half a character"),
    "half a character in a name": (b'{"prompt": "a", "\\ud800": 1}', 400, "half a character"),
    "half a character in bytes": (b'{"prompt": "\xed\xa0\x80"}', 400, "not JSON"),
    "a whole one": (b'\xef\xbb\xbf{"prompt": "a", "user": "\\ud83d\\ude00", "max_tokens": 1}', 200, None),
    "no prompt": ({}, 400, "prompt is missing"),
    "empty": ({"prompt": ""}, 400, "without tokens"),
    "a wrong type": ({"prompt": {"a": 1}}, 400, "a string"),
    "unknown tokens": ({"prompt": [1, 1000]}, 400, "does not know"),
    "too long": ({"prompt": "a" * 64}, 400, "64 tokens in all"),
    "unknown": ({"prompt": "a", "max_tokes": 3}, 400, "try max_tokens"),
    "text for a number": ({"prompt": "a", "max_tokens": "3"}, 400, "whole number from 1"),
    "a truth for a number": ({"prompt": "a", "max_tokens": True}, 400, "whole number from 1"),
    "out of range": ({"prompt": "a", "top_p": 2}, 400, "from 1e-09 to 1"),
    "not here": ({"prompt": "a", "echo": True}, 400, "does not have"),
    "options of no stream": ({"prompt": "a", "stream_options": {}}, 400, "without stream"),
    "too many": ({"prompt": "a", "n": 128, "max_tokens": 1}, 200, None),
    "far too many": ({"prompt": ["a", "b"], "n": 128}, 400, "256 answers at once"),
    "a long stop string": ({"prompt": "a", "stop": ["b", "a" * 1001]}, 400, "1 to 1000 characters"),
    "a long name": (b'{"prompt": "a", "%s": 1}' % (b"k" * 100_000), 400, f"unknown parameter '{'k' * 64}'"),
    "hardly a temperature": ({"prompt": "a", "temperature": 1e-320, "max_tokens": 1}, 200, None),
    "a long user": ({"prompt": "a", "user": "u" * 513}, 400, "up to 512 characters"),
    "another model": ({"prompt": "a", "model": "gpt"}, 404, "'letters'"),
}


@pytest.mark.parametrize(("body", "status", "words"), BAD.values(), ids=BAD.keys())
def test_bad_requests_get_a_status_and_a_sentence(client, body, status, words):
    given = {"content": body} if isinstance(body, bytes) else {"json": body}
    response = client.post("/v1/completions", **given)
    assert response.status_code == status
    if words is not None:
        error = response.json()["error"]
        assert words in error["message"] and error["type"] == "invalid_request_error"
    assert client.get("/health").json()["status"] == "ok"


BAD_CHATS = {
    "none": ([], "missing or empty"),
    "no role": ([{"content": "a"}], "a role"),
    "a picture": ([{"role": "user", "content": [{"type": "image_url"}]}], "is text"),
    "a number for a name": ([{"role": "user", "content": "a", "name": 5}], "name in a message"),
    "a tool": ([{"role": "user", "content": "a", "tool_calls": []}], "tool_calls"),
}


def test_fields_of_a_message_that_are_null_are_as_if_they_were_not_there(client):
    said = {"role": "assistant", "content": "Hi", "name": None, "refusal": None, "tool_calls": None}
    assert client.post("/v1/chat/completions", json={"messages": [said], "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(("messages", "words"), BAD_CHATS.values(), ids=BAD_CHATS.keys())
def test_bad_chats_get_a_status_and_a_sentence(client, messages, words):
    response = client.post("/v1/chat/completions", json={"messages": messages})
    assert response.status_code == 400 and words in response.json()["error"]["message"]


def test_models_paths_and_metrics(client):
    found = client.get("/v1/models").json()["data"]
    assert [(one["id"], one["max_model_len"]) for one in found] == [("letters", 64)]
    assert client.get("/v1/models/letters").json()["id"] == "letters"
    assert client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert client.get("/nowhere").status_code == 404 and client.get("/v1/completions").status_code == 405
    client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 2, "ignore_eos": True})
    told = client.get("/metrics").text
    assert 'regard_http_answers_total{path="/v1/completions",status="200"} 1.0' in told
    assert "regard_new_tokens_total 2.0" in told and "regard_prompt_tokens_total 3.0" in told
    assert "regard_page_bytes 32.0" in told and "regard_state_bytes 0.0" in told
    families = {family.name: family for family in text_string_to_metric_families(told)}
    assert {"regard_http_answers", "regard_running", "regard_pages_used"} <= set(families)
    assert all(family.documentation and family.samples and family.type != "unknown" for family in families.values())
    assert "regard_first_token_seconds_count 1.0" in told and "regard_between_tokens_seconds_count 1.0" in told
    client.post("/v1/completions", json={"prompt": "a" * 13, "max_tokens": 2})  # 14 tokens read, after 4: blocks of 4
    told = client.get("/metrics").text
    assert "regard_prefix_blocks 4.0" in told and "regard_pages_used 4.0" in told


def test_a_key_is_asked_for_everywhere_but_for_health():
    made = server(key="secret")
    made.service.start()
    with TestClient(made.app()) as client:
        assert client.get("/health").status_code == 200
        for shown in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer sécret".encode()}):
            refused = client.post("/v1/completions", json={"prompt": "a"}, headers=shown)
            assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/metrics", headers=shown).status_code == 401
        for scheme in ("Bearer", "bearer"):
            assert client.get("/v1/models", headers={"Authorization": f"{scheme} secret"}).status_code == 200
        assert client.get("/v1/models", headers={"Authorization": "Basic secret"}).status_code == 401


def test_large_bodies_and_long_answers_are_turned_away():
    made = server(SlowReader(), limits=Limits(rows=1), key=None)
    made.limits = ServerLimits(body=200, seconds=0.05)
    made.service.start()
    with TestClient(made.app()) as client:
        assert client.post("/v1/completions", json={"prompt": "a" * 300}).status_code == 413
        parts = (b"x" * 50 for _ in range(9))  # sent without a length
        assert client.post("/v1/completions", content=parts).status_code == 413
        slow = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 50, "ignore_eos": True})
        assert slow.status_code == 408 and "0.05 s" in slow.json()["error"]["message"]
        streamed = client.post(
            "/v1/completions", json={"prompt": "a", "max_tokens": 50, "stream": True, "ignore_eos": True}
        )
        # even the first token may be late
        told = streamed.json() if streamed.status_code == 408 else events(streamed)[-1]
        assert "no whole answer" in told["error"]["message"]


def test_a_failing_model_is_an_error_of_the_server_and_the_next_request_is_answered():
    class Failing(HashReader):
        def read(self, rows, tokens):
            if any(5 in new for new in tokens):
                raise RuntimeError("no memory")
            return super().read(rows, tokens)

    made = server(Failing())
    made.service.start()
    with TestClient(made.app()) as client:
        for stream in (False, True):
            found = client.post("/v1/completions", json={"prompt": [5], "stream": stream})
            assert found.status_code == 500 and found.json()["error"]["message"] == "no memory"
        assert client.post("/v1/completions", json={"prompt": [6], "max_tokens": 1}).status_code == 200


def test_a_scheduler_that_fails_says_so():
    class Dead(HashReader):
        def read(self, rows, tokens):
            raise KeyError("a mistake")

    made = server(Dead())
    made.service.start()
    with TestClient(made.app()) as client:
        assert client.post("/v1/completions", json={"prompt": [5]}).status_code == 500
        assert client.get("/health").status_code == 503
        assert client.post("/v1/completions", json={"prompt": [5]}).status_code == 503


def until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def request(body):
    text = json.dumps(body).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(text) + text


def send(address, body):
    found = socket.create_connection(address)
    found.sendall(request(body))
    return found


def gone(connection):
    """Return whether the other end closed a connection before the end of an answer."""
    connection.settimeout(20)
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1 << 16):
            if b"[DONE]" in part:
                return False
    return True


def read_all(connection):
    connection.settimeout(20)
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
        if b"\r\n0\r\n\r\n" in part or b'"total_tokens"' in part:
            break
    return b"".join(parts)


LONG = {"prompt": "a", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


def test_clients_that_go_away_are_forgotten_and_too_many_are_turned_away(monkeypatch):
    monkeypatch.setattr("regard.serving.connections.ASK_AGAIN", 0.01)
    made = server(SlowReader(context=9000, pages=3000), limits=Limits(rows=1, waiting=1))
    listening = listen("127.0.0.1", 0)
    address = listening.getsockname()
    with Running(made, listening):
        engine, longer = made.service.engine, LONG | {"max_tokens": 8000}
        streaming = send(address, longer | {"stream": True})
        until(lambda: len(engine.active) == 1)
        whole = send(address, longer)
        until(lambda: made.service.waiting == 1)
        with send(address, LONG) as third:
            answer = third.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 429") and b"retry-after" in answer
        streaming.close()
        until(lambda: made.service.waiting == 0)
        whole.close()
        until(lambda: not engine.active)
        with send(address, LONG | {"max_tokens": 2}) as last:
            assert b'"completion_tokens":2' in read_all(last)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_sends_nothing_after_its_request_gets_its_answer(monkeypatch, stream):
    monkeypatch.setattr("regard.serving.connections.ASK_AGAIN", 0.01)
    listening = listen("127.0.0.1", 0)
    with Running(server(SlowReader()), listening):
        with send(listening.getsockname(), LONG | {"max_tokens": 5, "stream": stream}) as asking:
            asking.shutdown(socket.SHUT_WR)
            answer = http.client.HTTPResponse(asking)
            answer.begin()
            assert answer.status == 200 and (b"[DONE]" if stream else b'"completion_tokens":5') in answer.read()
            assert asking.recv(1) == b""  # nothing can follow it
        with socket.create_connection(listening.getsockname()) as several:
            several.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" + request(LONG | {"max_tokens": 3}))
            several.shutdown(socket.SHUT_WR)
            assert b'"completion_tokens":3' in read_all(several)


def test_as_many_requests_are_taken_as_there_are_places_also_in_the_middle_of_a_step():
    class Held(HashReader):
        def read(self, rows, tokens):
            assert go_on.wait(20)
            return super().read(rows, tokens)

    go_on, made, key = threading.Event(), server(Held(), limits=Limits(rows=2, waiting=2)), itertools.count()

    def submit():
        return made.service.submit([Request(str(next(key)), [1], 2)])

    async def asks():
        made.service.start()
        submit(), submit()
        while len(made.service.engine.active) < 2:
            await asyncio.sleep(0.001)
        submit(), submit()  # the step is still running
        with pytest.raises(Busy):
            submit()
        go_on.set()
        await asyncio.to_thread(made.service.close)

    asyncio.run(asks())


def test_a_body_that_does_not_arrive_is_not_waited_for():
    made = server(limits=Limits(rows=1))
    made.limits = ServerLimits(body_seconds=0.05)
    listening = listen("127.0.0.1", 0)
    with Running(made, listening), socket.create_connection(listening.getsockname()) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")


def test_who_does_not_send_a_request_or_read_its_answer_in_time_is_cut_off(monkeypatch):
    monkeypatch.setattr("regard.serving.connections.GRACE", 0.05)
    made = server(SlowReader(pages=200), limits=Limits(rows=8))
    made.limits = ServerLimits(body_seconds=0.05, seconds=0.3)
    listening = listen("127.0.0.1", 0)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 12)
    with Running(made, listening) as running:
        with socket.create_connection(listening.getsockname()) as late:
            late.sendall(b"GET /health HTTP/1.1\r\nhost:")
            assert gone(late)
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
            deaf.connect(listening.getsockname())
            deaf.sendall(request(LONG | {"stream": True, "n": 8, "logprobs": 20}))  # more than buffers hold
            until(lambda: len(made.service.engine.active) == 8)
            until(lambda: not running._uvicorn.server_state.connections)
            assert gone(deaf) and not made.service._streams


def test_a_signal_lets_answers_finish_takes_no_more_and_is_not_passed_on():
    made = server(SlowReader())
    listening = listen("127.0.0.1", 0)
    address, seen = listening.getsockname(), {}

    def ask():
        until(lambda: made.service.healthy and made.service._thread.is_alive())
        time.sleep(0.2)
        with send(address, LONG) as connection:
            until(lambda: len(made.service.engine.active) == 1)
            os.kill(os.getpid(), signal.SIGTERM)
            seen["answer"] = read_all(connection)
        try:
            socket.create_connection(address, timeout=1).close()
        except OSError:
            seen["closed"] = True

    before = signal.signal(signal.SIGTERM, lambda *_: seen.setdefault("signal", True))
    thread = threading.Thread(target=ask)
    try:
        thread.start()
        run(made, listening, drain=20)
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)
    body = json.loads(seen["answer"].partition(b"\r\n\r\n")[2])
    assert body["choices"][0]["text"] == expected("a", 60) and seen["closed"] and "signal" not in seen
    assert not made.service._thread.is_alive()


def test_answers_that_are_not_done_when_the_time_to_finish_is_over_say_so():
    made = server(SlowReader())
    listening = listen("127.0.0.1", 0)
    found = []
    with Running(made, listening, drain=0):
        whole, stream = (send(listening.getsockname(), LONG | {"stream": stream}) for stream in (False, True))
        until(lambda: len(made.service.engine.active) == 2)
        reading = [threading.Thread(target=lambda c=c: found.append(read_all(c))) for c in (whole, stream)]
        for thread in reading:
            thread.start()
    for thread in reading:
        thread.join()
    one, other = sorted(found, key=lambda answer: b"text/event-stream" in answer)
    assert one.startswith(b"HTTP/1.1 503") and json.loads(one.partition(b"\r\n\r\n")[2])["error"]["code"] == "closing"
    assert b'"message": "the server is shutting down"' in other and b"[DONE]" in other
    whole.close(), stream.close()


def test_answers_go_on_while_a_long_text_is_turned_into_tokens():
    class Slow(Letters):
        def encode(self, text):
            if len(text) > LONG_BODY:
                begun.set()
                assert go_on.wait(20)
            return super().encode(text)

    begun, go_on = threading.Event(), threading.Event()
    made = server()
    made.text = Slow()
    listening = listen("127.0.0.1", 0)
    with Running(made, listening), send(listening.getsockname(), {"prompt": "a" * 2 * LONG_BODY}) as long:
        assert begun.wait(20)
        with send(listening.getsockname(), LONG | {"max_tokens": 2}) as short:
            assert b'"completion_tokens":2' in read_all(short)
        go_on.set()
        assert long.recv(1 << 16).startswith(b"HTTP/1.1 400")


def test_events_of_one_service_reach_who_asked_while_others_come_and_go():
    """With many clients at once, some of which disconnect, every client gets its own answer."""
    made = server(HashReader(pages=30), limits=Limits(rows=5, waiting=200))
    made.service.start()
    with TestClient(made.app()) as client:

        def one(i):
            body = {"prompt": [1, i], "max_tokens": 9, "seed": i, "ignore_eos": True}
            found = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
            answers[i] = found == expected(Letters().decode([1, i]), 9, temperature=1.0, seed=i)

        answers = {}
        threads = [threading.Thread(target=one, args=(i,)) for i in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == dict.fromkeys(range(20), True)
    assert not made.service._streams
