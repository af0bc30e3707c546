"""What supervisors tell an agent of their layers: from the wire to the status, for as long as they live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from cache_agent.errors import AgentError
from cache_agent.journal.layers import KEPT, SILENT_SECONDS, Layers
from cache_agent.wire.layers import MOST, Layer, LayersReport, LayerStatus

LANG = Layer("lang", "idle", since=100.0, seconds=3.0, bytes=300_000_000, hold=120.0, why="held for 120 s")


def told(*layers: Layer, of: str = "a", function: str = "chat") -> LayersReport:
    return LayersReport(of, function, "pod", 60.0, list(layers))


@pytest.fixture
def layers(clock: Any) -> Layers:
    clock.now = 130.0
    return Layers(clock)


def only(layers: Layers) -> LayerStatus:
    (function,) = layers.status()
    (layer,) = function.layers
    return layer


def test_age_price_and_time_left(layers: Layers, clock: Any) -> None:
    layers.add(told(LANG))
    layer = only(layers)
    assert (layer.idle_seconds, layer.left_seconds) == (30.0, 90.0)
    assert (layer.worth_seconds, layer.build_seconds, layer.why) == (pytest.approx(600.0), 3.0, "held for 120 s")
    clock.now = 140.0
    assert only(layers).left_seconds == 80.0, "it runs, though nothing new was told"


@pytest.mark.parametrize(
    ("changed", "left"),
    [
        ({"hold": 31.0}, 1.0),
        ({"hold": 20.0}, None),
        ({"hold": None}, None),
        ({"state": "used", "since": None}, None),
        ({"state": "building", "since": None}, None),
        ({"state": "absent", "hold": 0.0}, None),
    ],
)
def test_what_becomes_of_it(layers: Layers, changed: dict[str, Any], left: float | None) -> None:
    layers.add(told(msgspec.structs.replace(LANG, **changed)))
    assert only(layers).left_seconds == left


def test_a_function_of_an_older_image_is_understood(layers: Layers) -> None:
    """Its supervisor tells of a window, too, in which it builds the layer ahead of a request."""
    window = {"state": "absent", "hold": 0.0, "rebuild": 50.0, "until": 70.0}
    sent = msgspec.to_builtins(told(LANG)) | {"layers": [{**msgspec.to_builtins(LANG), **window}]}
    layers.add(msgspec.json.decode(msgspec.json.encode(sent), type=LayersReport))
    assert (only(layers).state, only(layers).left_seconds) == ("absent", None)


def test_a_layer_that_takes_no_memory_is_worth_holding_for_ever(layers: Layers) -> None:
    layers.add(told(msgspec.structs.replace(LANG, bytes=0)))
    assert only(layers).worth_seconds is None


def test_the_last_word_counts_and_none_at_all_is_an_end(layers: Layers) -> None:
    layers.add(told(LANG))
    layers.add(told(LANG, of="b", function="another"))
    layers.add(told(LANG, LANG))
    assert [(each.function, len(each.layers)) for each in layers.status()] == [("another", 1), ("chat", 2)]
    layers.add(told())
    layers.add(told(of="never seen"))
    assert [each.function for each in layers.status()] == ["another"]


def test_who_is_silent_has_ended(layers: Layers, clock: Any) -> None:
    layers.add(told(LANG))
    clock.now += SILENT_SECONDS
    layers.add(told(LANG, of="b", function="another"))
    clock.now += 1
    assert [each.function for each in layers.status()] == ["another"]


def test_there_are_not_more_than_so_many(layers: Layers) -> None:
    for number in range(KEPT + 3):
        layers.add(told(LANG, of=str(number), function=f"{number:04}"))
    assert [each.function for each in layers.status()] == [f"{number:04}" for number in range(3, KEPT + 3)]


def test_over_the_wire(start_local_agent: Callable[..., Any]) -> None:
    client = start_local_agent().client
    client.tell_layers(told(LANG))
    (function,) = client.status().layers
    assert (function.function, function.mode, function.price) == ("chat", "pod", 60.0)
    assert function.layers[0].level == "lang"
    client.tell_layers(told())
    assert client.status().layers == []


@pytest.mark.parametrize(
    "bad", [{"seconds": -1.0}, {"bytes": -1}, {"hold": -0.1}, {"why": "x" * 5000}, {"level": "x" * 300}]
)
def test_nonsense_is_refused(bad: dict[str, Any], start_local_agent: Callable[..., Any]) -> None:
    client = start_local_agent().client
    with pytest.raises(AgentError):
        client.tell_layers(told(msgspec.structs.replace(LANG, **bad)))
    with pytest.raises(AgentError):
        client.tell_layers(told(*[LANG] * (MOST + 1)))
    assert client.status().layers == []
