"""The OpenAI routes: the real SDK over a real socket, malformed requests, cold starts, clients that go away."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from flask import Flask
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.serving import make_server

from runtime.engine.base import SamplingParams
from runtime.errors import FunctionError, WeightsUnavailable
from runtime.function.model import Model
from runtime.function.testing import toy_model
from runtime.http.lifecycle import Lifecycle
from runtime.http.routes import SERVED, ModelGate, Served, routes
from runtime.sse import EventParser

HELLO: list[Any] = [{"role": "user", "content": "Grüße, 你好 warm world"}]


class ColdGate:
    """A gate that opens, or fails, when the test says so."""

    name = "toy"

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.model: Model | None = None
        self.failure: FunctionError | None = None

    def wait(self, timeout: float) -> Model | None:
        if not self.opened.wait(timeout):
            return None
        if self.failure:
            raise self.failure
        return self.model


class App(Flask):
    """The routes, and what they serve."""

    def __init__(self, served: Served) -> None:
        super().__init__("function")
        self.served = served
        self.register_blueprint(routes)

    def wsgi_app(self, environ: Any, start_response: Any) -> Any:
        return super().wsgi_app({**environ, SERVED: self.served}, start_response)


def make_app(gate: ModelGate, **options: Any) -> Flask:
    return App(Served(gate, **options))


def opened(model: Model) -> ModelGate:
    """The gate of a model that is there already."""
    gate = Lifecycle(model.name, 64)
    gate.opened(model, None)
    return gate


@contextlib.contextmanager
def serving(app: Flask) -> Iterator[str]:
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def until(condition: Any, limit: float = 10.0) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def toy() -> Iterator[Model]:
    model = toy_model(context_length=512)
    yield model
    model.engine.close()


@pytest.fixture(scope="module")
def app(toy: Model) -> Flask:
    return make_app(opened(toy), max_body=1 << 20)


@pytest.fixture(scope="module")
def url(app: Flask) -> Iterator[str]:
    with serving(app) as url:
        yield url


@pytest.fixture(scope="module")
def sdk(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


class TestSdk:
    def test_chat(self, sdk: openai.OpenAI) -> None:
        answer = sdk.chat.completions.create(model="toy", messages=HELLO)
        assert answer.choices[0].message.content == HELLO[0]["content"]
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(HELLO[0]["content"].encode()) + 1
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
        assert answer._request_id == answer.id

    def test_chat_stream(self, sdk: openai.OpenAI) -> None:
        chunks = list(
            sdk.chat.completions.create(
                model="toy",
                messages=HELLO,
                stream=True,
                stream_options={"include_usage": True},
                user="someone",
                store=False,
                metadata={"a": "b"},
            )
        )
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == HELLO[0]["content"]
        assert all(c.choices[0].delta.content for c in chunks[1:-2])
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].choices == []
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == len(HELLO[0]["content"].encode()) + 1
        assert len({chunk.id for chunk in chunks}) == 1

    def test_completion_stops_and_lengths(self, sdk: openai.OpenAI) -> None:
        answer = sdk.completions.create(model="toy", prompt="one two three", max_tokens=40, stop=["three"])
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" one two ", "stop")
        answer = sdk.completions.create(model="toy", prompt="one two three")
        assert answer.choices[0].finish_reason == "length"
        assert len(answer.choices[0].text) == 16

    def test_choices_and_batches(self, sdk: openai.OpenAI) -> None:
        def texts(**more: Any) -> list[str]:
            answer = sdk.completions.create(
                model="toy", prompt=["a b c d e", "v w x y z"], n=3, seed=7, max_tokens=30, temperature=1.0, **more
            )
            assert [choice.index for choice in answer.choices] == list(range(6))
            return [choice.text for choice in answer.choices]

        first = texts()
        assert first == texts()
        assert len(set(first)) == 6
        alone = sdk.completions.create(model="toy", prompt="a b c d e", seed=7, max_tokens=30, temperature=1.0)
        assert alone.choices[0].text == first[0]
        streamed = [""] * 6
        for chunk in sdk.completions.create(
            model="toy",
            prompt=["a b c d e", "v w x y z"],
            n=3,
            seed=7,
            max_tokens=30,
            temperature=1.0,
            stream=True,
        ):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == first

    def test_token_ids_and_extensions(self, sdk: openai.OpenAI) -> None:
        answer = sdk.completions.create(model="toy", prompt=list(b"ab cd"), max_tokens=9, extra_body={"top_k": 3})
        assert answer.choices[0].text == " ab cd ab"
        answer = sdk.completions.create(model="toy", prompt="ab cd", extra_body={"stop_token_ids": [ord("c")]})
        assert answer.choices[0].text == " ab "

    def test_models(self, sdk: openai.OpenAI) -> None:
        assert [model.id for model in sdk.models.list()] == ["toy"]
        assert sdk.models.retrieve("toy").owned_by == "glowplug"
        with pytest.raises(openai.NotFoundError):
            sdk.models.retrieve("other/model")

    def test_embeddings(self, sdk: openai.OpenAI) -> None:
        answer = sdk.embeddings.create(model="toy", input=["warm start", "start warm", "cold"])
        a, b, c = (item.embedding for item in answer.data)
        assert a == pytest.approx(b)
        assert a != pytest.approx(c)
        assert sum(x * x for x in a) == pytest.approx(1.0)
        assert answer.usage.prompt_tokens == 24
        plain = sdk.embeddings.create(model="toy", input="warm start", encoding_format="float")
        assert plain.data[0].embedding == pytest.approx(a, abs=1e-6)

    def test_errors_have_their_class(self, sdk: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as missing:
            sdk.chat.completions.create(model="gpt-9", messages=HELLO)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as unknown:
            sdk.chat.completions.create(model="toy", messages=HELLO, extra_body={"best": 1})
        assert unknown.value.param == "best"
        with pytest.raises(openai.APIStatusError) as large:
            sdk.completions.create(model="toy", prompt="x" * 10_000_000)
        assert large.value.status_code == 413

    def test_async(self, url: str) -> None:
        async def main() -> list[str]:
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

                async def one(text: str) -> str:
                    stream = await client.completions.create(model="toy", prompt=text, max_tokens=12, stream=True)
                    return "".join([chunk.choices[0].text async for chunk in stream])

                whole = await client.completions.create(model="toy", prompt="ab", max_tokens=12)
                return [whole.choices[0].text, *await asyncio.gather(*(one(text) for text in ("ab", "cd", "ef")))]

        assert asyncio.run(main()) == [" ab ab ab ab", " ab ab ab ab", " cd cd cd cd", " ef ef ef ef"]


def post(app: Flask, body: bytes | object, path: str = "/v1/chat/completions") -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return app.test_client().post(path, data=raw, content_type="application/json")


def chat(**fields: object) -> dict[str, object]:
    return {"model": "toy", "messages": HELLO, **fields}


REFUSED: list[tuple[bytes | object, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b'{"model": "\xff"}', None),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
    (b"[" * 100_000, None),
    ({"model": "toy"}, "messages"),
    (chat(messages=[]), "messages"),
    (chat(messages="hi"), "messages"),
    (chat(messages=[{"role": "king", "content": "x"}]), "messages"),
    (chat(messages=[{"role": "user"}]), "messages"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]), "messages"),
    (chat(max_tokens=-1), "max_tokens"),
    (chat(max_tokens=0), "max_tokens"),
    (chat(max_tokens=1.5), "max_tokens"),
    (chat(max_tokens="many"), "max_tokens"),
    (chat(max_tokens=10_000), "max_tokens"),
    (chat(max_tokens=10**30), "max_tokens"),
    (chat(max_tokens=1, max_completion_tokens=1), "max_completion_tokens"),
    (chat(temperature=-0.1), "temperature"),
    (chat(temperature=3), "temperature"),
    (chat(top_p=0), "top_p"),
    (chat(top_p=1.1), "top_p"),
    (chat(presence_penalty=9), "presence_penalty"),
    (chat(logit_bias={"a": 1}), "logit_bias"),
    (chat(logit_bias={"1": 101}), "logit_bias"),
    (chat(logit_bias={"99999": 1}), "logit_bias"),
    (chat(seed=2**63), "seed"),
    (chat(n=0), "n"),
    (chat(n=9), "n"),
    (chat(stop=""), "stop"),
    (chat(stop=["x"] * 17), "stop"),
    (chat(stream="yes"), "stream"),
    (chat(stream_options={"include_usage": True}), "stream_options"),
    (chat(stream=True, stream_options={"other": True}), "stream_options"),
    (chat(logprobs=1), "logprobs"),
    (chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (chat(logprobs=True, top_logprobs=-1), "top_logprobs"),
    (chat(top_logprobs=2), "top_logprobs"),
    (chat(deterministic="yes"), "deterministic"),
    (chat(response_format={"type": "json_object"}), "response_format"),
    (chat(tool_choice="required"), "tool_choice"),
    (chat(audio={}), "audio"),
    (chat(store=True), "store"),
    (chat(unheard_of=1), "unheard_of"),
]


class TestRefusals:
    @pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: str(value)[-60:])
    @pytest.mark.parametrize("stream", [False, True])
    def test_malformed(self, app: Flask, body: bytes | object, param: str | None, stream: bool) -> None:
        if isinstance(body, dict) and "stream" not in body and "stream_options" not in body:
            body = {**body, "stream": stream}
        answer = post(app, body)
        assert answer.status_code == 400
        error = answer.get_json()["error"]
        assert error["type"] == "invalid_request_error"
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"] == param

    def test_neutral_values_pass(self, app: Flask) -> None:
        body = chat(
            n=1,
            logprobs=False,
            response_format={"type": "text"},
            tool_choice="none",
            tools=[{"type": "function", "function": {"name": "f"}}],
            parallel_tool_calls=True,
            modalities=["text"],
            top_logprobs=None,
            service_tier="auto",
        )
        assert post(app, body).status_code == 200

    def test_long_prompt_says_both_numbers(self, app: Flask) -> None:
        answer = post(app, {"prompt": "x" * 600}, "/v1/completions")
        assert answer.status_code == 400
        assert "600" in answer.get_json()["error"]["message"]
        assert "512" in answer.get_json()["error"]["message"]

    @pytest.mark.parametrize("prompt", [[], [1, "a"], [[]], [[-1]], [999], [[1], "a", 2], "", {"a": 1}])
    def test_odd_prompts(self, app: Flask, prompt: object) -> None:
        assert post(app, {"prompt": prompt}, "/v1/completions").status_code == 400

    @pytest.mark.parametrize(
        ("field", "value"), [("input", []), ("input", [""]), ("encoding_format", "hex"), ("dimensions", 3)]
    )
    def test_odd_embeddings(self, app: Flask, field: str, value: object) -> None:
        answer = post(app, {"input": "x", field: value}, "/v1/embeddings")
        assert (answer.status_code, answer.get_json()["error"]["param"]) == (400, field)

    def test_base64_embedding(self, app: Flask) -> None:
        plain, packed = (
            post(app, {"input": "x", "encoding_format": kind}, "/v1/embeddings").get_json()["data"][0]["embedding"]
            for kind in ("float", "base64")
        )
        assert struct.unpack("<32f", base64.b64decode(packed)) == pytest.approx(plain)

    def test_wrong_method(self, app: Flask) -> None:
        answer = app.test_client().get("/v1/chat/completions")
        assert (answer.status_code, answer.get_json()["error"]["code"]) == (405, "method_not_allowed")

    def test_busy(self) -> None:
        model = toy_model(slots=1, queue_size=0, step_delay=0.05)
        app = make_app(opened(model))
        with contextlib.closing(model.engine), model.generate("x", stream=True):
            for stream in (False, True):
                answer = post(app, chat(stream=stream))
                assert answer.status_code == 429
                assert int(answer.headers["Retry-After"]) >= 1
                assert answer.get_json()["error"]["type"] == "rate_limit_error"
            never = post(app, chat(n=2))
            assert (never.status_code, never.get_json()["error"]["param"]) == (400, "n")

    def test_partial_submission_leaves_nothing(self) -> None:
        model = toy_model(slots=2, queue_size=0, step_delay=0.05)
        app = make_app(opened(model))
        with contextlib.closing(model.engine), model.generate("x", stream=True):
            assert post(app, chat(n=2)).status_code == 429
            assert model.engine.stats().running + model.engine.stats().waiting == 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
fields = st.sampled_from(
    [
        *("model", "messages", "prompt", "input", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed"),
        *("logit_bias", "stop", "stop_token_ids", "n", "stream", "stream_options", "tools", "response_format"),
        *("repetition_penalty", "presence_penalty", "ignore_eos", "encoding_format", "user", "suffix"),
    ]
)
likely = st.dictionaries(fields, json_values, max_size=5)


class TestFuzz:
    @settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]),
        base=st.sampled_from([{}, {"messages": HELLO}, {"prompt": "a b"}, {"input": "a"}]),
        more=likely,
        raw=st.none() | st.binary(max_size=40) | json_values.map(lambda value: json.dumps(value).encode()),
    )
    def test_any_body_gets_an_answer(
        self, app: Flask, path: str, base: dict[str, object], more: dict[str, object], raw: bytes | None
    ) -> None:
        answer = post(app, {"max_tokens": 4, **base, **more} if raw is None else raw, path)
        assert answer.status_code in (200, 400, 404), answer.get_data()
        if answer.status_code != 200:
            assert answer.get_json()["error"]["message"]
        elif answer.mimetype == "text/event-stream":
            assert answer.get_data().endswith(b"data: [DONE]\n\n")
            assert b'"error"' not in answer.get_data()


class TestColdStart:
    def test_stream_waits_with_comments(self) -> None:
        gate = ColdGate()
        with serving(make_app(gate, keep_alive=0.05)) as url:
            connection, lines = open_stream(url, chat(stream=True))
            with connection:
                assert next(line for line in lines if line.startswith(b":")) == b": keep-alive\n"
                gate.model = toy_model()
                gate.opened.set()
                rest = b"".join(lines)
        events = EventParser().feed(rest)
        assert events[-1].data == "[DONE]"
        deltas = [json.loads(event.data)["choices"][0]["delta"] for event in events[:-1]]
        assert "".join(delta.get("content", "") for delta in deltas) == HELLO[0]["content"]
        gate.model.engine.close()

    def test_stream_tells_a_failed_start(self) -> None:
        gate = ColdGate()
        gate.failure = WeightsUnavailable("no such bucket")
        asked: dict[str, Any] = {"model": "toy", "messages": HELLO, "stream": True}
        with (
            serving(make_app(gate, keep_alive=0.05)) as url,
            openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ):
            threading.Timer(1.3, gate.opened.set).start()
            with pytest.raises(openai.APIError, match="no such bucket"):
                list(client.chat.completions.create(**asked))
            with pytest.raises(openai.InternalServerError) as known:  # by now it is known before the stream begins
                client.chat.completions.create(**asked)
        assert known.value.status_code == 503

    def test_whole_answer_waits(self) -> None:
        gate = ColdGate()
        gate.model = toy_model()
        threading.Timer(0.4, gate.opened.set).start()
        assert post(make_app(gate), chat()).status_code == 200
        gate.model.engine.close()

    def test_gives_up_after_the_limit(self) -> None:
        app = make_app(ColdGate(), start_limit=0.3)
        answer = post(app, chat())
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")
        assert b'"code":"starting"' in post(app, chat(stream=True)).get_data()

    def test_refuses_and_lists_without_the_model(self) -> None:
        app = make_app(ColdGate())
        assert post(app, chat(temperature=9, stream=True)).status_code == 400
        assert post(app, chat(model="other")).status_code == 404
        assert app.test_client().get("/v1/models").get_json()["data"][0]["id"] == "toy"


def open_stream(url: str, body: object) -> tuple[socket.socket, Iterator[bytes]]:
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    connection = socket.create_connection((host, int(port)), timeout=10)
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    lines = iter(connection.makefile("rb"))
    for line in lines:
        if line == b"\r\n":
            break
    return connection, lines


class TestGoneClients:
    def test_stream_is_cancelled(self) -> None:
        model = toy_model(step_delay=0.01, context_length=100_000)
        with contextlib.closing(model.engine), serving(make_app(opened(model))) as url:
            connection, lines = open_stream(url, chat(stream=True, max_tokens=50_000, ignore_eos=True))
            next(lines)
            until(lambda: model.engine.stats().running == 1)
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()
            until(lambda: model.engine.stats().running == 0)

    def test_stream_that_never_began(self) -> None:
        model = toy_model(step_delay=0.01)
        with contextlib.closing(model.engine):
            answer = post(make_app(opened(model)), chat(stream=True, max_tokens=2000, ignore_eos=True))
            assert model.engine.stats().running + model.engine.stats().waiting == 1
            answer.close()
            assert model.engine.stats().running == 0

    def test_whole_answer_is_cancelled(self) -> None:
        """As under gunicorn, which shows the connection's socket."""
        model = toy_model(step_delay=0.01)
        server, client = socket.socketpair()
        app = make_app(opened(model))
        threading.Timer(0.3, client.close).start()
        with contextlib.closing(model.engine), contextlib.closing(server):
            answer = app.test_client().post(
                "/v1/chat/completions",
                json=chat(max_tokens=3000, ignore_eos=True),
                environ_overrides={"gunicorn.socket": server},
            )
            assert answer.status_code == 499
            assert model.engine.stats().running == 0


GUNICORN_APP = """
from flask import Flask
from runtime.lifecycle import Lifecycle
from runtime.openai import SERVED, Served, routes
from runtime.testing import toy_model

model = toy_model(step_delay=0.02, context_length=50_000)
gate = Lifecycle("toy", 64)
gate.opened(model, None)
served = Served(gate, max_body=1 << 20)
app = Flask("function")
app.register_blueprint(routes)
answer = app.wsgi_app
app.wsgi_app = lambda environ, start_response: answer({**environ, SERVED: served}, start_response)
app.add_url_rule("/running", view_func=lambda: str(model.engine.stats().running))
"""


class TestGunicorn:
    """What only the real server shows: the connection's socket, and bodies without a length."""

    @pytest.fixture(scope="class")
    @classmethod
    def url(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        folder = tmp_path_factory.mktemp("gunicorn")
        (folder / "function_app.py").write_text(GUNICORN_APP)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port, fd = listener.getsockname()[1], listener.fileno()
            options = ["--bind", f"fd://{fd}", "--threads", "4", "--chdir", str(folder), "--no-control-socket"]
            server = subprocess.Popen([sys.executable, "-m", "gunicorn", *options, "function_app:app"], pass_fds=[fd])
        yield f"http://127.0.0.1:{port}/v1"
        server.terminate()
        assert server.wait(20) == 0

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_client_that_leaves_cancels(self, url: str, stream: bool) -> None:
        def running() -> int:
            return int(urllib.request.urlopen(url.removesuffix("/v1") + "/running", timeout=10).read())

        raw = json.dumps(chat(max_tokens=20_000, ignore_eos=True, stream=stream)).encode()
        with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])), timeout=10) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
            connection.sendall(head.encode() + raw)
            until(lambda: running() == 1)
        left = time.monotonic()
        until(lambda: running() == 0)
        assert time.monotonic() - left < 5

    def test_a_body_that_is_too_large_is_told_so(self, url: str) -> None:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            with pytest.raises(openai.APIStatusError) as large:
                client.completions.create(model="toy", prompt="x" * 10_000_000)
            assert large.value.status_code == 413
            assert client.completions.create(model="toy", prompt="x", max_tokens=2).choices[0].text == " x"

    @pytest.mark.parametrize(("size", "status"), [(10, 200), (3_000_000, 413)])
    def test_a_body_in_chunks(self, url: str, size: int, status: int) -> None:
        body = json.dumps({"prompt": "x" * size, "max_tokens": 2}).encode()
        connection = http.client.HTTPConnection(url.split("/")[2], timeout=20)
        with contextlib.closing(connection):
            pieces = (body[at : at + 70_000] for at in range(0, len(body), 70_000))
            connection.request("POST", "/v1/completions", pieces, encode_chunked=True)
            assert connection.getresponse().status == status


class TestLimit:
    """An answer that takes longer than the platform lets it is ended by us, and says so."""

    def test_stream(self) -> None:
        model = toy_model(step_delay=0.01, context_length=100_000)
        with contextlib.closing(model.engine):
            body = chat(stream=True, max_tokens=50_000, ignore_eos=True)
            answer = post(make_app(opened(model), answer_limit=0.2), body)
            *pieces, error, done = EventParser().feed(answer.get_data())
            assert json.loads(pieces[1].data)["choices"][0]["delta"]["content"]
            assert (json.loads(error.data)["error"]["code"], done.data) == ("answer_limit", "[DONE]")
            until(lambda: model.engine.stats().running == 0)

    def test_whole_answer(self) -> None:
        model = toy_model(step_delay=0.01, context_length=100_000)
        with contextlib.closing(model.engine):
            app = make_app(opened(model), answer_limit=0.2)
            answer = post(app, chat(max_tokens=50_000, ignore_eos=True))
            assert (answer.status_code, answer.get_json()["error"]["code"]) == (504, "answer_limit")
            until(lambda: model.engine.stats().running == 0)

    def test_stream_of_a_cold_start(self) -> None:
        answer = post(make_app(ColdGate(), answer_limit=1.3, keep_alive=0.1), chat(stream=True))
        *comments, error, done = answer.get_data().decode().split("\n\n")[:-1]
        assert set(comments) == {": keep-alive"}
        assert ("answer_limit" in error, done) == (True, "data: [DONE]")

    def test_an_answer_in_time_is_whole(self) -> None:
        model = toy_model()
        with contextlib.closing(model.engine):
            assert post(make_app(opened(model), answer_limit=60.0), chat()).status_code == 200


class TestBrokenEngine:
    def test_mid_stream(self) -> None:
        model = toy_model(step_delay=0.01, context_length=10_000)
        with serving(make_app(opened(model))) as url:
            connection, lines = open_stream(url, chat(stream=True, max_tokens=5000, ignore_eos=True))
            with connection:
                next(lines)
                model.engine.close()
                events = EventParser().feed(b"".join(lines))
            assert events[-1].data == "[DONE]"
            assert json.loads(events[-2].data)["error"]["code"] == "engine_failed"
        assert post(make_app(opened(model)), chat()).status_code == 500


@pytest.fixture(scope="module")
def tiny_model() -> Iterator[Model]:
    torch = pytest.importorskip("torch")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from runtime.engine.batched import BatchedEngine
    from runtime.engine.serial import TokenizerCodec

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={"</s>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        eos_token="</s>",
        chat_template="{% if tools %}{{ tools | tojson }}\n{% endif %}"
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:",
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
    )
    raw = LlamaForCausalLM(config)
    codec = TokenizerCodec(tokenizer)
    engine = BatchedEngine(raw, codec, revision="tiny", memory=32 << 20, threads=1)
    yield Model("tiny", "tiny", codec, engine, tokenizer=tokenizer, raw=raw, defaults=SamplingParams(0.0))
    engine.close()


class TestBatchedEngine:
    """The same routes on a transformers model."""

    def test_sdk(self, tiny_model: Model) -> None:
        import torch

        with (
            serving(make_app(opened(tiny_model))) as url,
            openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ):
            asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 24}
            ids = tiny_model.encode(messages=HELLO)
            want = tiny_model.raw.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=0)
            text = tiny_model.tokenizer.decode(want[0, len(ids) :], skip_special_tokens=True)
            whole = client.chat.completions.create(**asked)
            assert whole.choices[0].message.content == text
            streamed = client.chat.completions.create(**asked, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text
            with pytest.raises(openai.BadRequestError, match="no tools"):
                client.chat.completions.create(**asked | {"messages": [{"role": "tool", "content": "x"}]})
            vectors = client.embeddings.create(model="tiny", input=["abc", "abd"]).data
            assert sum(x * x for x in vectors[0].embedding) == pytest.approx(1.0, abs=1e-5)

    def test_async_streams_in_one_batch(self, tiny_model: Model) -> None:
        prompts = [f"prompt number {number} " * (1 + number % 4) for number in range(12)]
        want = [tiny_model.generate(prompt, max_tokens=20, temperature=1.0, seed=5) for prompt in prompts]

        async def ask(url: str) -> list[str]:
            async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

                async def one(prompt: str) -> str:
                    stream = await client.completions.create(
                        model="tiny", prompt=prompt, max_tokens=20, temperature=1.0, seed=5, stream=True
                    )
                    return "".join([chunk.choices[0].text async for chunk in stream])

                return list(await asyncio.gather(*map(one, prompts)))

        with serving(make_app(opened(tiny_model))) as url:
            assert asyncio.run(ask(url)) == want

    def test_tools_reach_the_chat_template(self, tiny_model: Model) -> None:
        tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
        app = make_app(opened(tiny_model))
        sizes = {}
        for name, more in (("none", {}), ("tools", {"tools": tools}), ("off", {"tools": tools, "tool_choice": "none"})):
            answer = post(app, {"messages": HELLO, "max_tokens": 2, **more}).get_json()
            sizes[name] = answer["usage"]["prompt_tokens"]
        assert sizes["tools"] - sizes["none"] == len(json.dumps(tools)) + 1
        assert sizes["off"] == sizes["none"]

    def test_logprobs(self, tiny_model: Model) -> None:
        with (
            serving(make_app(opened(tiny_model))) as url,
            openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client,
        ):
            asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 30, "seed": 1, "temperature": 1}
            whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3).choices[0].logprobs
            assert whole is not None
            assert whole.content is not None
            assert len(whole.content) == 30
            for token in whole.content:
                chances = [top.logprob for top in token.top_logprobs]
                assert len(chances) == 3
                assert chances == sorted(chances, reverse=True)
                assert token.logprob <= chances[0] <= 0
                assert token.bytes is None or bytes(token.bytes).decode() == token.token
            pieces = [
                chunk.choices[0].logprobs.content or []
                for chunk in client.chat.completions.create(**asked, logprobs=True, top_logprobs=3, stream=True)
                if chunk.choices[0].logprobs is not None
            ]
            assert [token.token for piece in pieces for token in piece] == [token.token for token in whole.content]
            plain = client.chat.completions.create(**asked, logprobs=True).choices[0].logprobs
            assert plain is not None
            assert plain.content is not None
            assert plain.content[0].top_logprobs == []
            old = client.completions.create(model="tiny", prompt="abc", max_tokens=9, logprobs=2, temperature=0)
            chances = old.choices[0].logprobs
            assert chances is not None
            assert chances.tokens is not None
            assert chances.text_offset is not None
            assert chances.top_logprobs is not None
            assert chances.token_logprobs is not None
            assert len(chances.tokens) == 9
            assert chances.text_offset[0] == 0
            for value, top in zip(chances.token_logprobs, chances.top_logprobs, strict=True):
                assert value == max(top.values())

    def test_deterministic_is_a_field(self, tiny_model: Model) -> None:
        app = make_app(opened(tiny_model))
        answers = [
            post(app, {"messages": HELLO, "max_tokens": 9, "deterministic": wanted}).get_json()["choices"]
            for wanted in (True, False)
        ]
        assert answers[0] == answers[1]
