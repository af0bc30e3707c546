"""The dashboard in a real browser, on a real agent: its contents, its screens, and what it must never do."""

from __future__ import annotations

import re
import socket
import struct
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from cache_agent.client import handoff as handoffs
from cache_agent.ledger import Span
from cache_agent.wire.layers import Layer, LayersReport
from cache_agent.wire.operations import Started
from cache_agent.wire.requests import HandoffOutcome

HOSTILE = "<img src=x onerror=\"document.title='broken in'\">"
LOOK = "document.dispatchEvent(new Event('visibilitychange'))"  # a page asks again at once when it is looked at
THERE = "document.getElementById('main')?.getAttribute('aria-busy') === 'false'"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def started(name: str, model: str, *phases: tuple[str, str, float, float], **more: Any) -> Started:
    now = time.monotonic_ns()
    spans = [Span(owner, phase, now + int(b * 1e9), now + int(e * 1e9)) for owner, phase, b, e in phases]
    return Started(f"start-{name}", name, model, "cold", spans, **more)


COLD = (
    ("shim", "python", 0.0, 0.1),
    ("worker", "http", 0.1, 0.3),
    ("worker", "imports", 0.3, 1.3),
    ("agent", "transfer", 0.2, 4.3),
    ("worker", "weights", 1.3, 4.3),
    ("worker", "first token", 4.4, 4.5),
)


MB = 10**6


def layers(since: float) -> list[Layer]:
    """Return three layers: one gone, one that expires, one without an end."""
    built = {"user": (0.3, 100 * MB), "model": (0.2, 50 * MB), "lang": (3.0, 300 * MB)}
    made = {level: Layer(level, "idle", since=since, seconds=s, bytes=b) for level, (s, b) in built.items()}
    gone = {"state": "absent", "hold": 0.0}
    goes = {"hold": 100_000.0, "why": "held for 28 h: because"}
    replace = msgspec.structs.replace
    return [replace(made["user"], **gone), replace(made["model"], **goes), made["lang"]]


HANDED = (
    HandoffOutcome("chat", "req-1", "worker-1", "worker-9", 12, 0.042, "kv", "moved"),
    HandoffOutcome("chat", HOSTILE, "worker-1", "", 3, 0.5, "recompute", "lost", "no other replica took it"),
)


@pytest.fixture(scope="module")
def node(
    agent_process: Callable[..., Any],
    write_checkpoint: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """Give an agent with a past: two models, one pinned, an eviction, three starts."""
    port = free_port()
    place = tmp_path_factory.mktemp("models")
    with agent_process("--node", "node-a", "--status", f"127.0.0.1:{port}", "--ssd", str(place / "ssd")) as agent:
        models = [f"file://{write_checkpoint(place / name, seed=n)}" for n, name in enumerate(("one", "two", "three"))]
        for model in models:
            with agent.client.lease(model) as lease:
                lease.wait_ready(time.monotonic() + 30)
        agent.client.pin(models[0])
        agent.evict(models[2])
        agent.client.report_start(started("summarise", models[1], *COLD, tier="origin", bytes=2 << 20))
        agent.client.report_start(started(HOSTILE, HOSTILE, error="no room [no_capacity]"))
        agent.client.report_start(started("chat", models[0], *COLD, tier="ssd", bytes=2 << 20))
        agent.client.tell_layers(LayersReport("1", "chat", "pod", 60.0, layers(time.monotonic() - 40)))
        pool = [Layer("lang", "used", seconds=3.0, bytes=5 * MB)]
        agent.client.tell_layers(LayersReport("2", HOSTILE, "pool", 60.0, pool))
        handoffs.report(agent.client, HANDED)
        yield SimpleNamespace(agent=agent, url=f"http://127.0.0.1:{port}/dashboard", models=models, port=port)


@pytest.fixture
def fresh(opened: Callable[..., Any], node: Any) -> Any:
    """Give a new page, for a test that changes it or watches it load."""
    page = opened(node.url)
    page.until(THERE, "the page has its data")
    return page


@pytest.fixture(scope="module")
def page(browser: Any, node: Any) -> Any:
    """Give one page, for all tests that only look."""
    page = browser.page(node.url)
    page.until(THERE, "the page has its data")
    page.until("document.querySelectorAll('#events li').length > 2", "events")
    return page


def test_it_shows_the_node(page: Any, node: Any) -> None:
    text = page.until("document.querySelectorAll('#events li').length > 2 && document.body.innerText", "events")
    assert "node node-a" in text
    assert "This node holds 2 models" in text
    for model in node.models:
        assert model in text
    assert "pinned" in text
    assert "evicted" in text
    assert page.js("document.querySelectorAll('#tiers .meter').length") == 2, "memory and SSD"
    assert page.js("document.querySelectorAll('#start-list details').length") == 3
    assert page.js("document.title") == "node-a · Glowplug"
    page.until("document.getElementById('live').textContent === 'live'", "it is live")


def test_a_start_is_a_waterfall_with_its_bottleneck(page: Any) -> None:
    first = "document.querySelector('#start-list details')"
    assert page.js(f"{first}.open"), "the newest is open"
    assert "transfer from ssd took 68% of 4.40 s" in page.js(f"{first}.querySelector('.why').textContent")
    rows = page.js(
        f"[...{first}.querySelectorAll('.row')].map(row => {{"
        " const bar = row.querySelector('.bar').getBoundingClientRect(), track = bar && row.querySelector('.track')"
        ".getBoundingClientRect(); return [row.querySelector('.name').textContent,"
        " (bar.left - track.left) / track.width, bar.width / track.width] })"
    )
    assert [name for name, _, _ in rows] == [f"{owner} {phase}" for owner, phase, _, _ in sorted(COLD, key=by_begin)]
    for (_, _, begin, end), (_, left, width) in zip(sorted(COLD, key=by_begin), rows, strict=True):
        length = 4.4  # the wait for the first request is left out
        begin, end = (begin - 0.1, end - 0.1) if begin == 4.4 else (begin, end)
        assert left == pytest.approx(begin / length, abs=0.01)
        assert width == pytest.approx((end - begin) / length, abs=0.01)


def by_begin(phase: tuple[str, str, float, float]) -> float:
    return phase[2]


def test_layers_stand_on_one_another_with_their_price_and_what_is_left(page: Any) -> None:
    nested = page.js(
        "(found => { const walk = list => [...list.children].map(li => [li.querySelector('b').textContent,"
        " [...li.children].filter(e => e.tagName === 'UL').flatMap(walk)]);"
        " return walk(found) })(document.querySelector('#layers > .tree'))"
    )
    assert nested == [[HOSTILE, [["lang", []]]], ["chat", [["lang", [["model", [["user", []]]]]]]]]
    text = page.js("document.getElementById('layers').innerText")
    assert "a second of start is worth 60 GB·s" in text
    assert "300 MB · 3.00 s to build · worth 10 min of holding" in text
    assert re.search(r"lang idle for \d+ s, no end", text), text
    assert re.search(r"model idle for \d+ s, 28 h left", text), text
    assert "held for 28 h: because" in text
    assert re.search(r"user absent\b", text), text


def test_hand_offs_say_from_where_to_where_how_long_and_why(page: Any) -> None:
    rows = page.js(
        "[...document.querySelectorAll('#handoffs tbody tr')].map(r => [...r.children].map(c => c.innerText))"
    )
    lost, moved = [[" ".join(cell.split()) for cell in row[:-1]] for row in rows]
    assert moved == ["chat req-1", "moved its rows went along", "worker-1", "worker-9", "12", "42 ms"]
    assert lost == [f"chat {HOSTILE}", "lost no other replica took it", "worker-1", "–", "3", "500 ms"]


def test_what_comes_from_outside_is_text(page: Any) -> None:
    assert HOSTILE in page.text()
    assert page.js("document.querySelectorAll('img').length") == 0
    assert page.js("document.title") == "node-a · Glowplug"


def test_it_loads_nothing_from_elsewhere_and_breaks_no_policy(fresh: Any, node: Any) -> None:
    fresh.until("document.querySelectorAll('#events li').length > 2", "events")
    assert fresh.errors() == []
    assert all(url.startswith((f"http://127.0.0.1:{node.port}/", "data:")) for url in fresh.requests())
    with urllib.request.urlopen(node.url, timeout=10) as response:
        policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    inline = "const s = document.createElement('script'); s.textContent = 'window.broken = 1'; document.body.append(s)"
    fresh.js(inline)
    assert fresh.js("window.broken === undefined"), "the policy holds"


def test_events_arrive_as_they_happen(fresh: Any, node: Any) -> None:
    fresh.until("document.querySelectorAll('#events li').length > 2", "events")
    with node.agent.client.lease(node.models[2]) as lease:
        lease.wait_ready(time.monotonic() + 30)
        fresh.until(
            "document.getElementById('models').innerText.includes('three')",
            "the model is there",
        )
        fresh.until("document.querySelector('#events .text').innerText.includes('three')", "its event is the newest")
    node.agent.evict(node.models[2])
    fresh.until("document.querySelector('#events li').innerText.includes('evicted')", "the eviction is the newest")


def test_events_can_be_chosen_by_kind(fresh: Any) -> None:
    fresh.until("[...document.getElementById('kind').options].some(each => each.value === 'evicted')", "kinds")
    fresh.js(
        "(kind => { kind.value = 'evicted'; kind.dispatchEvent(new Event('change')) })(document.getElementById('kind'))"
    )
    kinds = fresh.js("[...document.querySelectorAll('#events .chip')].map(chip => chip.textContent)")
    assert set(kinds) == {"evicted"}


@pytest.fixture
def looked_at(page: Any) -> Iterator[Callable[..., None]]:
    """Give `looked_at(width, dark=False)`: the page on another screen, until the test ends."""
    yield page.look
    page.look(1440)


@pytest.mark.parametrize(("width", "dark"), [(1440, False), (1440, True), (390, False), (320, True)])
def test_nothing_is_cut_off(width: int, dark: bool, page: Any, looked_at: Callable[..., None]) -> None:
    looked_at(width, 800, dark=dark)
    assert page.js("document.documentElement.scrollWidth") <= width
    outside = page.js(
        "[...document.querySelectorAll('main *')].filter(each => each.getBoundingClientRect().right > innerWidth + 1 &&"
        " !each.closest('thead')).map(each => each.outerHTML.slice(0, 200))"
    )
    assert outside == []
    assert struct.unpack(">II", page.picture()[16:24])[0] == width


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_contrast(dark: bool, page: Any, looked_at: Callable[..., None]) -> None:
    """WCAG 2: 4.5 to 1 between each text's colour and the nearest background that is painted."""
    looked_at(1440, dark=dark)
    poor = page.js(
        """(() => {
          const channel = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
          const light = colour => {
            const [r, g, b] = colour.match(/[\\d.]+/g).map(Number);
            return .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
          };
          const ground = e => {
            for (; e; e = e.parentElement) {
              const colour = getComputedStyle(e).backgroundColor;
              if (colour !== 'rgba(0, 0, 0, 0)' && colour !== 'transparent') return colour;
            }
            return 'rgb(255, 255, 255)';
          };
          const ratio = e => {
            const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
            return (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
          };
          const says = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
          return [...document.querySelectorAll('body *')].filter(e => says(e) && e.checkVisibility())
            .map(e => [ratio(e), e.outerHTML.slice(0, 99)]).filter(([found]) => found < 4.5);
        })()"""
    )
    assert poor == []


def test_it_can_be_read_without_colour(page: Any) -> None:
    """Owners differ in pattern and have their name in each row; states are words."""
    patterns = {
        owner: page.js(f"getComputedStyle(document.querySelector('.waterfall .bar.{owner}')).backgroundImage")
        for owner in ("shim", "worker", "agent")
    }
    assert patterns["agent"] != "none"
    assert patterns["shim"] == patterns["worker"] == "none"
    light = "getComputedStyle(document.querySelector('.waterfall .bar.{}')).backgroundColor"
    assert page.js(light.format("shim")) != page.js(light.format("worker"))
    names = page.js("[...document.querySelectorAll('.waterfall .row .name')].map(each => each.textContent)")
    assert all(name.split()[0] in patterns for name in names)


def test_it_works_with_the_keyboard(fresh: Any) -> None:
    fresh.press("Tab", 9)
    assert fresh.js("document.activeElement.className") == "skip"
    fresh.press("Enter", 13)
    fresh.until("location.hash === '#starts'", "the link was followed")
    fresh.press("Tab", 9)
    assert fresh.js("document.activeElement.tagName") == "SUMMARY"
    assert fresh.js("getComputedStyle(document.activeElement).outlineStyle") == "solid", "one sees where one is"
    fresh.press("Enter", 13)
    fresh.until("!document.querySelector('#start-list details').open", "it was closed")


def test_those_who_do_not_see_it_are_told(page: Any) -> None:
    tree = page.ask("Accessibility.getFullAXTree")["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node.get("ignored")]
    assert ("heading", "Glowplug") in named
    regions = {name for role, name in named if role == "region"}
    assert {
        "Memory and disk",
        "Models",
        "Starts",
        "What happened, and why",
        "Cluster",
        "Layers",
        "Hand-offs",
    } <= regions
    meters = [name for role, name in named if role == "image" and " in use" in name]
    assert len(meters) == 2
    assert not [role for role, name in named if role in ("combobox", "button", "textbox", "link") and not name]


def test_an_agent_that_is_away_is_missed(
    opened: Callable[..., Any], start_agent: Callable[..., Any], tmp_path: Path, write_checkpoint: Callable[..., Path]
) -> None:
    early, late = (f"file://{write_checkpoint(tmp_path / name, seed=n)}" for n, name in enumerate(("early", "late")))
    port = free_port()
    agent = start_agent("--status", f"127.0.0.1:{port}")
    page = opened(f"http://127.0.0.1:{port}/dashboard")
    page.until(THERE, "the page has its data")
    for _ in range(3):
        with agent.client.lease(early) as lease:
            lease.wait_ready(time.monotonic() + 30)
        agent.evict(early)
    page.until("document.querySelectorAll('#events li').length > 3", "events")
    agent.stop()
    page.js(LOOK)
    page.until("document.getElementById('live').textContent.startsWith('no answer')", "it says so")
    agent.start()
    page.js(LOOK)
    page.until("document.getElementById('live').textContent === 'live'", "it is there again")
    with agent.client.lease(late) as lease:
        lease.wait_ready(time.monotonic() + 30)
    page.until("document.querySelector('#events .text')?.innerText.includes('late')", "events of the new agent, too")


def test_an_instant_after_ten_years_has_its_place(opened: Callable[..., Any], start_agent: Callable[..., Any]) -> None:
    """Ten years in nanoseconds exceed the integers that a browser's numbers represent exactly."""
    port, at = free_port(), 10 * 365 * 86400 * 10**9
    agent = start_agent("--status", f"127.0.0.1:{port}")
    agent.client.report_start(Started("start-1", "chat", "file:///m", "cold", [Span("shim", "python", at, at)]))
    page = opened(f"http://127.0.0.1:{port}/dashboard")
    page.until(THERE, "the page has its data")
    assert page.js("document.querySelector('#start-list .bar').style.width") == "0%"


def test_where_a_token_is_asked_for(
    opened: Callable[..., Any], start_agent: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("the-operators-token\n")
    port = free_port()
    agent = start_agent("--status", f"127.0.0.1:{port}", "--token-file", str(tmp_path / "token"))
    assert agent.pid
    page = opened(f"http://127.0.0.1:{port}/dashboard")
    page.until("document.getElementById('unlock')?.hidden === false", "it asks for the token")
    assert page.js("document.getElementById('main').hidden")
    assert page.js("document.activeElement.id") == "token"
    for letter in "wrong":
        page.ask("Input.insertText", text=letter)
    page.press("Enter", 13)
    page.until("document.getElementById('denied').textContent.length > 10", "it says that it was wrong")
    page.js("document.getElementById('token').value = ''")
    page.ask("Input.insertText", text="the-operators-token")
    page.press("Enter", 13)
    page.until(f"{THERE} && !document.getElementById('main').hidden", "it shows the node")
    assert "the-operators-token" not in page.js("document.documentElement.outerHTML")
    assert not page.js("document.cookie")
