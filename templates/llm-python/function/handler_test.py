"""Runs at every build, without weights: the toy model answers with the words of the last message.

Locally: pip install pytest ./template/llm-python/glowplug, then pytest in this folder.
"""

from handler import handle

from runtime.function.handler import Event, toy_context


def test_answers_in_one_piece():
    response = handle(Event(body=b"Hello from the toy"), toy_context())
    assert response["statusCode"] == 200
    assert response["body"] == "Hello from the toy"


def test_streams_to_those_who_ask():
    event = Event(body=b"one two three", headers={"Accept": "text/event-stream"})
    assert "".join(handle(event, toy_context())) == "one two three"
