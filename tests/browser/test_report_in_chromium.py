"""The report in a real browser, without a network: no console error, no request, figures drawn, clips that play."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from planted_record import planted_isolation

from av_lens.media import Clip
from av_lens.reports import write_report

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
REQUIRED = os.environ.get("AV_LENS_REQUIRE_BROWSER") == "1"

pytestmark = pytest.mark.browser


def absent(reason: str) -> None:
    if REQUIRED:
        pytest.fail(f"AV_LENS_REQUIRE_BROWSER=1, and {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.exists():
        absent(f"{CHROMIUM} is not installed")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        absent("playwright is not installed")
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    given = os.environ.get("AV_LENS_REPORT")  # a finished demo's page, when one should be looked at instead
    if given:
        return Path(given).resolve()
    frames = np.zeros((8, 56, 56, 3), np.uint8)
    frames[:, 16:40, 16:40] = (220, 120, 40)
    wave = (0.2 * np.sin(np.arange(16000) / 10)).astype(np.float32)
    clip = Clip.from_arrays(frames=frames, fps=8.0, waveform=wave, rate=16000)
    path = tmp_path_factory.mktemp("browser") / "report.html"
    return write_report(planted_isolation(), path, clips={"0000": clip, "0001": clip})


@pytest.fixture(params=[("light", 1280), ("dark", 390)], ids=["light-wide", "dark-narrow"])
def opened(request, browser, report):
    scheme, width = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: page.said.append(f"error: {error}"))
    page.on("request", lambda sent: page.asked.append(sent.url))
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-drawn]", timeout=60_000)
    yield page, scheme, width
    context.close()


def wait_until(page, condition: str, *, seconds: float = 60.0) -> None:
    """Poll a condition; playwright's own wait evaluates a string in the page, which its content policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never came true: {condition}"
        page.wait_for_timeout(100)


def test_the_page_is_quiet_drawn_and_plays(opened, report, tmp_path):
    page, scheme, width = opened
    assert page.evaluate("document.documentElement.dataset.drawn") == scheme
    drawn = page.evaluate("[...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('svg.main-svg').length)")
    assert drawn
    assert min(drawn) > 0
    page.evaluate("document.querySelectorAll('video').forEach(v => { v.preload = 'auto'; v.load(); })")
    wait_until(page, "[...document.querySelectorAll('video')].every(v => v.readyState >= 3)")
    videos = page.evaluate(
        "Promise.all([...document.querySelectorAll('video')].slice(0, 2).map(async v => {"
        " v.muted = true; await v.play(); v.pause(); return [v.duration, v.videoWidth, v.error]; }))"
    )
    assert videos
    assert all(duration > 0.5 and size > 0 and error is None for duration, size, error in videos)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert [url for url in page.asked if not url.startswith(("data:", "blob:"))] == [report.as_uri()]
    assert page.said == []
    shot = tmp_path / f"{scheme}.png"
    page.screenshot(path=str(shot), full_page=True)
    assert shot.stat().st_size > 50_000


def test_the_figures_follow_a_change_of_theme(opened):
    page, scheme, _ = opened
    other = "dark" if scheme == "light" else "light"
    ink = "getComputedStyle(document.querySelector('#plot-release .xtitle')).fill"
    mark = "getComputedStyle(document.querySelector('#plot-behaviour .points path')).stroke"
    before = {colour: page.evaluate(colour) for colour in (ink, mark)}
    page.emulate_media(color_scheme=other)
    page.wait_for_selector(f"html[data-drawn={other}]", timeout=30_000)
    for colour, was in before.items():
        wait_until(page, f"{colour} !== {was!r}")
    assert page.said == []


def test_a_keyboard_reaches_the_verdict_first(opened):
    page, _, _ = opened
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#verdict"
