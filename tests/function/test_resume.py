"""Answers that outlive their connection: kept, continued by the same replica and by others, each token once."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner
from replicas import CHAT, WORDS, LocalAgent, Replica, chat, frames, parsed, replicas, said

from cache_agent.snapshots.store import Key
from runtime.commands import ask as commands
from runtime.resume.client import AskFailed, ask
from runtime.resume.seal import Plain, Sealed
from runtime.resume.snapshot import ReplicaIdentity
from runtime.sse import EventParser


@pytest.fixture
def agent() -> Iterator[LocalAgent]:
    with LocalAgent.running() as agent:
        yield agent


@pytest.fixture
def replica(agent: Any, serve: Callable[..., Any]) -> Iterator[Callable[..., Replica]]:
    with replicas(agent, serve) as make:
        yield make


# --- one cut, anywhere ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False], ids=["same replica", "another"])
@pytest.mark.parametrize("after", [1, 2, 17, 60])
def test_the_rest_of_a_stream_from_any_replica(replica: Any, same: bool, after: int) -> None:
    first = replica()
    second = first if same else replica()
    whole = parsed(first.post(CHAT, chat())[2])
    head = first.cut(CHAT, chat(), after)
    status, headers, body = second.post(CHAT, chat(), Last_Event_ID=head[-1].id)
    rest = parsed(body)
    assert status == 200
    assert said(head) + said(rest) == said(whole) == WORDS
    assert headers["X-Request-Id"] == head[-1].id.partition(":")[0] == frames(rest)[0]["id"]
    usage = [frame["usage"] for frame in frames(rest) if frame["usage"]]
    assert usage == [frame["usage"] for frame in frames(whole) if frame["usage"]]
    finishes = [one["finish_reason"] for frame in frames(head + rest) for one in frame["choices"]]
    assert [reason for reason in finishes if reason] == ["stop"]
    assert rest[-1].data == "[DONE]"
    assert len({frame["created"] for frame in frames(head + rest)}) == 1


def test_every_event_of_a_whole_answer_can_be_the_last_one_seen(replica: Any) -> None:
    """After its end, too: the tail, the usage, and nothing at all."""
    first, second = replica(delay=0.0), replica(delay=0.0)
    body = chat(messages=[{"role": "user", "content": "a ü b"}])
    whole = parsed(first.post(CHAT, body)[2])
    assert frames(whole)[-1]["usage"]
    ids = [event.id for event in whole if event.data != "[DONE]"]
    assert len(set(ids)) == len(ids)
    for number, last in enumerate(ids):
        rest = parsed(second.post(CHAT, body, Last_Event_ID=last)[2])
        assert [event.data for event in rest] == [event.data for event in whole[number + 1 :]]


def test_ten_cuts_in_a_row_on_three_replicas(replica: Any) -> None:
    replicas, body = [replica(), replica(), replica()], chat(temperature=1.0, seed=5)
    whole = said(parsed(replicas[0].post(CHAT, body)[2]))
    events, last = [], ""
    for number in range(10):
        headers = {"Last_Event_ID": last} if last else {}
        events += replicas[number % 3].cut(CHAT, body, 12, **headers)
        last = events[-1].id
    events += parsed(replicas[0].post(CHAT, body, Last_Event_ID=last)[2])
    assert said(events) == whole
    assert len(whole) > 150


def test_several_choices_and_prompts(replica: Any) -> None:
    first, second = replica(), replica()
    body = {"prompt": ["one two three", "vier fünf"], "n": 2, "max_tokens": 30, "temperature": 1.0, "seed": 3}
    body |= {"stream": True}

    def texts(events: list[Any]) -> list[str]:
        found = ["", "", "", ""]
        for frame in frames(events):
            for one in frame["choices"]:
                found[one["index"]] += one["text"]
        return found

    whole = texts(parsed(first.post("/v1/completions", body)[2]))
    head = first.cut("/v1/completions", body, 35)
    rest = parsed(second.post("/v1/completions", body, Last_Event_ID=head[-1].id)[2])
    assert [a + b for a, b in zip(texts(head), texts(rest), strict=True)] == whole
    assert whole[0] != whole[1]


def test_stop_strings_and_characters_are_whole_across_the_cut(replica: Any) -> None:
    first, second = replica(), replica()
    body = chat(stop=["w40ü w41ü"])
    whole = said(parsed(first.post(CHAT, body)[2]))
    assert whole.endswith("w39ü ")
    for after in (20, 47, 81, 82, 83):
        head = first.cut(CHAT, body, after)
        rest = parsed(second.post(CHAT, body, Last_Event_ID=head[-1].id)[2])
        assert said(head) + said(rest) == whole
        assert "\ufffd" not in said(head) + said(rest)


# --- plain requests ---------------------------------------------------------------------------------------------------


def test_a_repeated_key_gets_the_one_answer(replica: Any) -> None:
    first, second = replica(), replica()
    body = {"messages": [{"role": "user", "content": WORDS}], "temperature": 1.0}  # no seed: drawn once
    one, two = (json.loads(each.post(CHAT, body, Idempotency_Key="k-1")[2]) for each in (first, second))
    assert one == two
    other = json.loads(second.post(CHAT, body, Idempotency_Key="k-2")[2])
    assert other["id"] != one["id"]
    assert other["choices"] != one["choices"], "another draw"


def test_a_key_whose_first_client_left_goes_on_where_it_was(replica: Any, eventually: Callable[..., Any]) -> None:
    first, second = replica(delay=0.01), replica()
    body = json.dumps({"messages": [{"role": "user", "content": WORDS}], "temperature": 1.0}).encode()
    connection = first.served.connect()
    connection.request("POST", CHAT, body, {"Idempotency-Key": "k"})
    eventually(lambda: first.model.engine.stats().running == 1)
    eventually(
        lambda: any(session.at and sum(session.stored) > 8 for session in first.model.sessions._sessions.values())
    )
    (session,) = first.model.sessions._sessions.values()
    tokens = list(session.tokens[0])
    connection.close()
    answer = json.loads(second.post(CHAT, body, Idempotency_Key="k")[2])
    assert answer["choices"][0]["message"]["content"].encode().startswith(bytes(tokens[:-4]))
    assert answer["usage"]["completion_tokens"] == len(answer["choices"][0]["message"]["content"].encode()) + 1


def test_keys_belong_to_their_callers_and_to_their_requests(replica: Any) -> None:
    first = replica(delay=0.0)
    body = {"messages": [{"role": "user", "content": "a b"}]}
    mine = json.loads(first.post(CHAT, body, Idempotency_Key="k", Authorization="Bearer a")[2])
    theirs = json.loads(first.post(CHAT, body, Idempotency_Key="k", Authorization="Bearer b")[2])
    assert mine["id"] != theirs["id"]
    status, _, answer = first.post(CHAT, {**body, "seed": 1}, Idempotency_Key="k", Authorization="Bearer a")
    assert status == 400
    assert "another request" in json.loads(answer)["error"]["message"]
    assert json.loads(answer)["error"]["param"] == "Idempotency-Key"


def test_log_probabilities_of_the_rest_are_made_again(replica: Any) -> None:
    """The toy has no log-probabilities, but takes the same path."""
    first, second = replica(), replica()
    whole = said(parsed(first.post(CHAT, chat(logprobs=True))[2]))
    head = first.cut(CHAT, chat(logprobs=True), 23)
    rest = parsed(second.post(CHAT, chat(logprobs=True), Last_Event_ID=head[-1].id)[2])
    assert said(head) + said(rest) == whole


# --- who may, and what is refused -------------------------------------------------------------------------------------


def error_of(answer: tuple[int, Any, bytes]) -> tuple[int, str]:
    return answer[0], json.loads(answer[2])["error"]["code"]


def test_what_is_refused_by_name(replica: Any) -> None:
    first, off = replica(delay=0.0), replica(keep=False)
    head = parsed(first.post(CHAT, chat())[2])[:5]
    last = head[-1].id
    assert error_of(off.post(CHAT, chat(), Last_Event_ID=last)) == (409, "not_resumable")
    unknown = "chatcmpl-" + "0" * 24 + ":3"
    assert error_of(first.post(CHAT, chat(), Last_Event_ID=unknown)) == (410, "request_gone")
    assert error_of(first.post(CHAT, chat(seed=1), Last_Event_ID=last)) == (400, "bad_request")
    assert error_of(first.post(CHAT, chat(), Last_Event_ID="what?")) == (400, "bad_request")
    assert error_of(first.post(CHAT, chat(), Last_Event_ID=last + ".4")) == (400, "bad_request")
    assert error_of(first.post("/v1/completions", {"prompt": "x"}, Last_Event_ID=last)) == (400, "bad_request")
    assert error_of(first.post(CHAT, chat(), Idempotency_Key="k" * 256)) == (400, "bad_request")


@pytest.mark.parametrize("what", ["engine", "revision", "tokenizer", "adapter"])
def test_another_replica_refuses_with_the_reason_and_lets_go(replica: Any, what: str) -> None:
    here = ReplicaIdentity("toy", "toy", "tok")
    first, stranger, third = replica(), replica(place=replace(here, **{what: "other"})), replica()
    whole = said(parsed(first.post(CHAT, chat())[2]))
    head = first.cut(CHAT, chat(), 9)
    status, _, body = stranger.post(CHAT, chat(), Last_Event_ID=head[-1].id)
    assert (status, json.loads(body)["error"]["code"]) == (409, "snapshot_refused")
    assert f"another {what}" in json.loads(body)["error"]["message"]
    assert said(head) + said(parsed(third.post(CHAT, chat(), Last_Event_ID=head[-1].id)[2])) == whole


def test_a_function_with_a_key_hides_all_and_takes_nothing_else(replica: Any, agent: Any) -> None:
    pytest.importorskip("cryptography")
    mine, same, other, none = (
        replica(seal=seal) for seal in (Sealed(b"k" * 32), Sealed(b"k" * 32), Sealed(b"x" * 32), Plain())
    )
    whole = said(parsed(mine.post(CHAT, chat())[2]))
    head = mine.cut(CHAT, chat(), 30)
    for stranger in (other, none):
        assert error_of(stranger.post(CHAT, chat(), Last_Event_ID=head[-1].id)) == (409, "snapshot_refused")
    kept = agent.store.claim(Key("chat", head[-1].id.partition(":")[0]), "reader", 0.0).pieces
    assert kept
    assert b"GLOWSNAP" not in b"".join(kept)
    assert said(head) + said(parsed(same.post(CHAT, chat(), Last_Event_ID=head[-1].id)[2])) == whole
    open_head = none.cut(CHAT, chat(), 5)
    legible = agent.store.claim(Key("chat", open_head[-1].id.partition(":")[0]), none.name, 0.0).pieces
    assert b"GLOWSNAP" in b"".join(legible), "what is told apart above can be told apart"
    assert error_of(mine.post(CHAT, chat(), Last_Event_ID=open_head[-1].id)) == (409, "snapshot_refused")


def test_the_slots_are_taken(replica: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.resume import resumption

    monkeypatch.setattr(resumption, "PATIENCE", 0.3)
    first, full, third = replica(), replica(slots=1, delay=0.05), replica()
    whole = said(parsed(first.post(CHAT, chat())[2]))
    head = first.cut(CHAT, chat(), 9)
    blocker = full.model.generate(WORDS, stream=True, max_tokens=2000)
    assert error_of(full.post(CHAT, chat(), Last_Event_ID=head[-1].id)) == (429, "busy")
    blocker.close()
    assert said(head) + said(parsed(third.post(CHAT, chat(), Last_Event_ID=head[-1].id)[2])) == whole


# --- fencing ----------------------------------------------------------------------------------------------------------


def test_two_connections_at_once_and_the_later_one_has_it(replica: Any, agent: Any) -> None:
    """The first replica still answers, to a connection that its client may have given up: it is asked to let go."""
    first, second = replica(delay=0.02), replica()
    connection = first.served.connect()
    connection.request("POST", CHAT, json.dumps(chat()), {})
    response = connection.getresponse()
    parser, head = EventParser(), []
    while len(head) < 8:
        head += parser.feed(response.read1(65536))
    rest = parsed(second.post(CHAT, chat(), Last_Event_ID=head[7].id)[2])
    assert said(head[:8]) + said(rest) == WORDS
    left = response.read()
    assert b'"code":"moved"' in left
    owners = agent.store.history(Key("chat", response.headers["X-Request-Id"]))
    assert [(change.epoch, change.owner) for change in owners] == [(1, first.name), (2, second.name)]
    connection.close()


def test_whoever_was_overtaken_while_it_stood_still_says_nothing_more(replica: Any, agent: Any) -> None:
    """A replica as after SIGSTOP: its lease is over, another took the request, and then it wakes in its answer."""
    first, second = replica(), replica()
    sessions, stopped = first.model.sessions, threading.Event()
    exchange = sessions._client.keep

    def stands_still(steps: Any) -> Any:
        stopped.wait(20)
        return exchange(steps)

    connection = first.served.connect()
    body = chat(messages=[{"role": "user", "content": WORDS * 40}], max_tokens=20_000)
    connection.request("POST", CHAT, json.dumps(body), {})
    response = connection.getresponse()
    parser, head = EventParser(), []
    while len(head) < 8:
        head += parser.feed(response.read1(65536))
    sessions._client.keep = stands_still  # nothing reaches the store any more, as if no instruction of it ran
    rest = second.cut(CHAT, body, 20, Last_Event_ID=head[7].id)
    assert len(rest) == 20
    stopped.set()
    head += parser.feed(response.read())
    head = [event for event in head if event.data != "[DONE]"]
    assert frames(head)[-1]["error"]["code"] == "moved"
    told = said([event for event in head if "error" not in json.loads(event.data)])
    assert len(told) < len(WORDS) * 20, "it spoke for as long as its lease ran, and then no more"
    request = response.headers["X-Request-Id"]
    owners = agent.store.history(Key("chat", request))
    assert [change.owner for change in owners][:2] == [first.name, second.name]
    connection.close()


def test_a_store_that_cannot_be_asked_silences_nobody(replica: Any, agent: Any) -> None:
    first = replica(delay=0.01)
    head = first.cut(CHAT, chat(), 3)
    assert said(head)
    agent.stop()
    begun = time.monotonic()
    assert said(parsed(first.post(CHAT, chat())[2])) == WORDS
    assert time.monotonic() - begun < 30


# --- handlers ---------------------------------------------------------------------------------------------------------


def test_a_handler_that_returns_the_stream_as_it_is(replica: Any) -> None:
    calls = []

    def handle(event: Any, context: Any) -> Any:
        calls.append(event.body)
        return context.model.generate(event.body.decode(), stream=True, max_tokens=120)

    first, second = replica(handle=handle), replica(handle=handle)
    body, accept = WORDS.encode(), {"Accept": "text/event-stream"}
    whole = "".join(event.data for event in parsed(first.post("/", body, **accept)[2])[:-1])
    head = first.cut("/", body, 30, **accept)
    rest = parsed(second.post("/", body, Last_Event_ID=head[-1].id, **accept)[2])
    assert "".join(event.data for event in head + rest[:-1]) == whole
    assert rest[-1].data == "[DONE]"
    assert len(calls) == 2, "it was not called for the rest"


def test_a_handlers_answer_whose_end_its_client_claims_to_have_seen_ends(replica: Any) -> None:
    """A handler's ids do not state the end of its stream."""
    first = replica(handle=lambda event, context: context.model.generate(WORDS, stream=True, max_tokens=120))
    head = first.cut("/", b"", 5, Accept="text/event-stream")
    status, _, body = first.post("/", b"", Last_Event_ID=f"{head[-1].id}f", Accept="text/event-stream")
    assert (status, [event.data for event in parsed(body)]) == (200, ["[DONE]"])


def test_a_handler_that_does_more_with_it_has_no_ids(replica: Any) -> None:
    def handle(event: Any, context: Any) -> Any:
        return (piece.upper() for piece in context.model.generate("a b", stream=True, max_tokens=9))

    first = replica(handle=handle)
    events = parsed(first.post("/", b"", Accept="text/event-stream")[2])
    assert {event.id for event in events} == {None}
    with pytest.raises(AskFailed, match="had no ids"):
        list(_cut_without_ids())


def _cut_without_ids() -> Iterator[Any]:
    """A real server whose answer breaks off."""
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            sock, _ = server.accept()
            sock.recv(65536)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\ndata: A\n\n")
            sock.close()

        thread = threading.Thread(target=answer)
        thread.start()
        yield from ask([f"http://127.0.0.1:{server.getsockname()[1]}"], "/", b"", patience=2)
        thread.join(10)


def test_ids_that_are_not_ours_are_the_handlers_own(replica: Any) -> None:
    def handle(event: Any, context: Any) -> Any:
        return f"you saw {event.headers['Last-Event-ID']}"

    for keep in (True, False):
        assert replica(handle=handle, keep=keep).post("/", b"", Last_Event_ID="17")[2] == b"you saw 17"


# --- the client -------------------------------------------------------------------------------------------------------


def test_the_client_goes_on_by_itself(replica: Any) -> None:
    first, second = replica(), replica()
    events, urls = [], [first.url, second.url]
    for event in ask(urls, CHAT, chat(), patience=20):
        events.append(event)
        if len(events) == 20:
            first.model.sessions.close(time.monotonic() + 2)  # as a worker does whose grace is over
    assert said(events) == WORDS
    assert frames(events)[-1]["usage"]["completion_tokens"] == len(WORDS.encode()) + 1


def test_the_client_says_what_was_refused(replica: Any) -> None:
    with pytest.raises(AskFailed) as caught:
        list(ask([replica().url], CHAT, {"messages": [], "stream": True}))
    assert (caught.value.status, caught.value.code) == (400, "bad_request")
    with pytest.raises(AskFailed):
        list(ask(["http://127.0.0.1:9"], CHAT, {}, patience=0.2))


# --- glowplug ask -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cutting() -> Iterator[Callable[[int, int], str]]:
    """`cutting(port, after)`: an address that leads to the port, and ends its first connection after so many bytes."""
    doors: list[socket.socket] = []

    def serve(door: socket.socket, port: int, after: int) -> None:
        limit = after
        with contextlib.suppress(OSError):
            while True:
                client, _ = door.accept()
                with client, socket.create_connection(("127.0.0.1", port)) as function:
                    client.settimeout(20)
                    request = client.recv(65536)
                    while b"\r\n\r\n" not in request or len(request.partition(b"\r\n\r\n")[2]) < _length(request):
                        request += client.recv(65536)
                    function.sendall(request)
                    sent = 0
                    while sent < limit and (data := function.recv(min(65536, limit - sent))):
                        client.sendall(data)
                        sent += len(data)
                limit = 1 << 30

    def make(port: int, after: int) -> str:
        doors.append(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=serve, args=(doors[-1], port, after), daemon=True).start()
        return f"http://127.0.0.1:{doors[-1].getsockname()[1]}"

    yield make
    for door in doors:
        door.shutdown(socket.SHUT_RDWR)
        door.close()


def _length(request: bytes) -> int:
    found = re.search(rb"content-length: (\d+)", request, re.IGNORECASE)
    return int(found[1]) if found else 0


def test_the_command_asks_for_the_rest_of_an_answer(
    replica: Any, cutting: Callable[[int, int], str], eventually: Any
) -> None:
    tested = replica(delay=0.0)
    url = cutting(tested.served.port, 5000)
    whole = CliRunner().invoke(commands.ask, [WORDS, "--resume", "--json", "--url", url, "--timeout", "30"])
    assert whole.exit_code == 0, whole.output
    answer = json.loads(whole.stdout)
    assert (answer["text"], answer["tokens"]) == (WORDS, len(WORDS.encode()) + 1)
    cut = CliRunner().invoke(commands.ask, [WORDS, "--url", cutting(tested.served.port, 5000)])
    assert (cut.exit_code, "broke off" in cut.stderr or "stopped answering" in cut.stderr) == (1, True)


def test_the_command_says_that_an_answer_in_one_piece_cannot_be_resumed(replica: Any) -> None:
    tested = replica(handle=lambda event, context: "all of it")
    done = CliRunner().invoke(commands.ask, ["x", "--handler", "--resume", "--url", tested.url])
    assert done.exit_code == 1
    assert "cannot be gone on with" in done.stderr
