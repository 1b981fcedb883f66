"""The console in a real Chromium on runs that are going on: their coordinator, their centres and the console are processes of their own.

Skipped where there is no Chromium (Debian: apt install chromium) or no playwright and axe (pip install 'consilium[dev]').
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from server.dashboard import accounts
from server.rounds.run_lifecycle import open_ledger
from tests.deploy.processes import free_port, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'consilium[dev]'")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="no axe-playwright-python: pip install 'consilium[dev]'"
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ROOT = Path(__file__).resolve().parents[3]
PATIENCE = 240_000  # ms: other people's work shares the cores
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.xdist_group("simulation"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt install chromium"),
]


class Place(NamedTuple):
    """Where the console is, and what lies beside it."""

    url: str
    runs: Path
    page: Any  # playwright's


def python(*arguments: str, **more: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, start_new_session=True)


def end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def live(place: Path, run: str, slower: float, *overrides: str) -> subprocess.Popen[bytes]:
    return python(
        "-m",
        "tests.server.dashboard.live_run",
        str(place / "phantom"),
        str(place / "runs"),
        run,
        str(slower),
        *overrides,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A finished run, the console, and a browser that an operator has logged in."""
    folder = tmp_path_factory.mktemp("console")
    runs = folder / "runs"
    first = live(folder, "first", 0, "stage.rounds=2", "evaluation.cross_site=last")
    assert first.wait(600) == 0
    port = free_port()
    password = accounts.create_account(open_ledger(runs), "anna", "operator", "the test")
    console = python(
        "-c", "from server.cli import main; main()", "dashboard", "--runs", str(runs), "--port", str(port)
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until("the console answers", 120, lambda: _answers(url))
        with playwright.sync_playwright() as tools:
            browser = tools.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox"] if os.getuid() == 0 else []
            )
            context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
            context.set_default_timeout(PATIENCE)
            page = context.new_page()
            said: list[str] = []
            page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda e: said.append(str(e)))
            page.goto(f"{url}/runs/first")
            assert page.url == f"{url}/login?next=/runs/first"
            page.fill("input[name=name]", "anna")
            page.fill("input[name=password]", password)
            page.click("text=Log in")
            page.wait_for_url(f"{url}/runs/first")
            yield Place(url, runs, page)
            browser.close()
            assert [
                text for text in said if "ERR_" not in text
            ] == []  # no refused style or script, no exception
    finally:
        end(console)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).text == "ok"
    except httpx.HTTPError:
        return False


def order(place: Place, what: str, why: str) -> None:
    place.page.click(f".orders >> text={what}")
    place.page.fill("textarea[name=why]", why)
    place.page.click(f"button:has-text('{what}')")


def test_a_run_is_watched_a_centre_killed_and_the_run_paused_and_resumed(place: Place) -> None:
    page, url = place.page, place.url
    run = live(
        place.runs.parent, "second", 1.5, "stage.rounds=400", "federation.quorum=0.5", "aggregation.tau=0"
    )
    try:
        ledger = open_ledger(place.runs)
        wait_until("the second run goes", 240, lambda: len(ledger.read_rounds("second")) > 1)
        page.goto(url)
        for centre in ("north", "east", "south", "west"):
            assert "online" in page.inner_text(f"#centres tr:has(th:has-text('{centre}'))")

        page.goto(f"{url}/runs/second")
        page.evaluate("window.marked = true")
        before = int(re.search(r"round\n(\d+)", page.inner_text("#now"))[1])  # type: ignore[index]
        page.wait_for_function(
            "n => parseInt(document.querySelectorAll('#now .numbers b')[1].textContent) > n + 1", arg=before
        )
        assert page.evaluate("window.marked"), "the page was loaded anew"

        page.goto(url)
        page.evaluate("window.marked = true")
        os.kill(int((place.runs / "west.pid").read_text()), signal.SIGKILL)
        page.wait_for_selector("#centres tr:has(th:has-text('west')) .offline")
        assert "connection was lost" in page.inner_text("#centres tr:has(th:has-text('west'))")
        assert "west is offline" in page.inner_text(".attention")
        assert page.evaluate("window.marked")

        page.goto(f"{url}/runs/second")
        order(place, "Pause", "west's line is being mended")
        page.wait_for_selector("#status.paused")
        assert run.wait(60) == 1
        assert "by order of anna: west's line is being mended" in page.inner_text("#now")

        order(place, "Resume", "the line is mended")  # by Flower's simulation, which the console starts
        page.wait_for_selector("#status.resumed")
        (resumed,) = (e["time"] for e in ledger.read_events("second") if e["kind"] == "resumed")
        wait_until(
            "a round of the resumed run", 400, lambda: ledger.read_rounds("second")[-1]["started"] > resumed
        )
        page.goto(f"{url}/runs/second")
        order(place, "Stop", "seen enough")
        page.wait_for_selector("#status.stopped")
        assert [e["action"] for e in ledger.read_audit("second")] == ["pause", "resume", "stop"]
    finally:
        end(run)


def test_two_runs_are_compared_and_a_model_card_is_kept(place: Place, tmp_path: Path) -> None:
    page, url = place.page, place.url
    if len(open_ledger(place.runs).read_runs()) < 2:
        assert live(place.runs.parent, "second", 0, "stage.rounds=1", "aggregation.tau=0").wait(600) == 0
    page.goto(f"{url}/runs")
    for box in page.query_selector_all("input[name=run]"):
        box.check()
    page.click("text=Compare selected runs")
    page.wait_for_selector(".js-plotly-plot .trace")
    assert "aggregation.tau" in page.inner_text("main")
    assert "federation.data_root" not in page.inner_text("main"), "what is equal is not shown"
    page.goto(f"{url}/runs/first/evidence")
    with page.expect_download() as coming:
        page.click("text=model-card.html")
    coming.value.save_as(tmp_path / "card.html")
    assert "Model card" in (tmp_path / "card.html").read_text()


OF_RUN = [
    f"/runs/first{page}" for page in ("", "/learning", "/privacy", "/data", "/evidence", "/order/resume")
]
PAGES = ["/", "/runs", "/start", "/audit", "/accounts", "/compare?run=first&run=second", *OF_RUN]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_usable_by_everybody(place: Place, scheme: str) -> None:
    """axe finds nothing serious, nothing is wider than the screen, light and dark; with $CONSILIUM_SHOTS, a picture of each page is kept there."""
    page = place.page
    page.emulate_media(color_scheme=scheme)
    wrong: list[str] = []
    for path in PAGES:
        page.goto(place.url + path)
        if page.query_selector(".plot"):
            page.wait_for_selector(".js-plotly-plot .main-svg")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            time.sleep(0.5)
            if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
                wrong.append(f"{path} is wider than {width} px")
            if shots := os.environ.get("CONSILIUM_SHOTS"):
                name = re.sub(r"\W+", "-", path).strip("-") or "federation"
                page.screenshot(path=f"{shots}/{name}-{width}-{scheme}.png", full_page=True)
        found = axe.Axe().run(page).response["violations"]
        wrong += [
            f"{path}: {v['id']}: {v['nodes'][0]['html'][:200]}"
            for v in found
            if v["impact"] in ("serious", "critical")
        ]
    page.set_viewport_size({"width": 1280, "height": 900})
    assert wrong == []
