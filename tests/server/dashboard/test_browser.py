"""The console in a real Chromium, on runs that are in progress.

The runs' coordinators, the centres and the console are processes of their own. Skipped where there is no
Chromium (Debian: apt install chromium), playwright or axe (pip install 'consilium[dev]').
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
from tests.deploy.process_group import find_free_port, wait_until

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'consilium[dev]'")
axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="no axe-playwright-python: pip install 'consilium[dev]'"
)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ROOT = Path(__file__).resolve().parents[3]
PAGE_TIMEOUT = 240_000  # ms: other people's work shares the cores
RUN_PAGES = ("", "/learning", "/privacy", "/data", "/evidence", "/order/resume")
PAGES = [
    "/",
    "/runs",
    "/start",
    "/audit",
    "/accounts",
    "/compare?run=first&run=second",
    *(f"/runs/first{page}" for page in RUN_PAGES),
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.xdist_group("simulation"),
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt install chromium"),
]


class Console(NamedTuple):
    """A running console, an operator's browser, and the folder of its runs."""

    url: str
    runs: Path
    page: Any  # playwright's


def start_python(*arguments: str) -> subprocess.Popen[bytes]:
    """Start Python in a session of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, start_new_session=True)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start_live_run(folder: Path, run_id: str, delay: float, *overrides: str) -> subprocess.Popen[bytes]:
    """Start a run whose centres delay their training replies by so many seconds."""
    paths = (str(folder / "phantom"), str(folder / "runs"))
    return start_python("-m", "tests.server.dashboard.live_run", *paths, run_id, str(delay), *overrides)


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """A finished run, the console, and a browser in which an operator has logged in."""
    folder = tmp_path_factory.mktemp("console")
    runs = folder / "runs"
    first_run = start_live_run(folder, "first", 0, "stage.rounds=2", "evaluation.cross_site=last")
    assert first_run.wait(600) == 0
    port = find_free_port()
    password = accounts.create_account(open_ledger(runs), "anna", "operator", "the test")
    options = ("--runs", str(runs), "--port", str(port))
    server = start_python("-c", "from server.cli import main; main()", "dashboard", *options)
    url = f"http://127.0.0.1:{port}"
    errors: list[str] = []
    try:
        wait_until("the console answers", 120, lambda: _is_healthy(url))
        with playwright.sync_playwright() as tools:
            browser = tools.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox"] if os.getuid() == 0 else []
            )
            page = _open_page(browser, errors)
            page.goto(f"{url}/runs/first")
            assert page.url == f"{url}/login?next=/runs/first"
            page.fill("input[name=name]", "anna")
            page.fill("input[name=password]", password)
            page.click("text=Log in")
            page.wait_for_url(f"{url}/runs/first")
            yield Console(url, runs, page)
            browser.close()
        # No style or script was refused, and no script raised an exception.
        assert [error for error in errors if "ERR_" not in error] == []
    finally:
        end_session(server)


def _open_page(browser: Any, errors: list[str]) -> Any:
    """Open a page that appends what goes wrong in it to `errors`."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    context.set_default_timeout(PAGE_TIMEOUT)
    page = context.new_page()

    def note_error(message: Any) -> None:
        if message.type == "error":
            errors.append(message.text)

    page.on("console", note_error)
    page.on("pageerror", lambda error: errors.append(str(error)))
    return page


def _is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).text == "ok"
    except httpx.HTTPError:
        return False


def give_command(console: Console, command: str, reason: str) -> None:
    """Give a command by its button on the run's page."""
    console.page.click(f".orders >> text={command}")
    console.page.fill("textarea[name=why]", reason)
    console.page.click(f"button:has-text('{command}')")


def test_pages_follow_a_run_through_lost_centre_pause_resume_and_stop(console: Console) -> None:
    page, url = console.page, console.url
    overrides = ("stage.rounds=400", "federation.quorum=0.5", "aggregation.tau=0")
    run = start_live_run(console.runs.parent, "second", 1.5, *overrides)
    try:
        ledger = open_ledger(console.runs)
        wait_until("the second run has rounds", 240, lambda: len(ledger.read_rounds("second")) > 1)
        page.goto(url)
        for centre in ("north", "east", "south", "west"):
            assert "online" in page.inner_text(f"#centres tr:has(th:has-text('{centre}'))")

        page.goto(f"{url}/runs/second")
        page.evaluate("window.marked = true")
        first_round = int(re.search(r"round\n(\d+)", page.inner_text("#now"))[1])  # type: ignore[index]
        page.wait_for_function(
            "n => parseInt(document.querySelectorAll('#now .numbers b')[1].textContent) > n + 1",
            arg=first_round,
        )
        assert page.evaluate("window.marked"), "the page was reloaded as a whole"

        page.goto(url)
        page.evaluate("window.marked = true")
        os.kill(int((console.runs / "west.pid").read_text()), signal.SIGKILL)
        page.wait_for_selector("#centres tr:has(th:has-text('west')) .offline")
        assert "connection was lost" in page.inner_text("#centres tr:has(th:has-text('west'))")
        assert "west is offline" in page.inner_text(".attention")
        assert page.evaluate("window.marked")

        page.goto(f"{url}/runs/second")
        give_command(console, "Pause", "west's line is being repaired")
        page.wait_for_selector("#status.paused")
        assert run.wait(60) == 1
        assert "by order of anna: west's line is being repaired" in page.inner_text("#now")

        give_command(console, "Resume", "the line is repaired")  # the console starts Flower's simulation
        page.wait_for_selector("#status.resumed")
        (resumed,) = (event["time"] for event in ledger.read_events("second") if event["kind"] == "resumed")
        wait_until(
            "the resumed run has a round",
            400,
            lambda: ledger.read_rounds("second")[-1]["started"] > resumed,
        )
        page.goto(f"{url}/runs/second")
        give_command(console, "Stop", "seen enough")
        page.wait_for_selector("#status.stopped")
        actions = [entry["action"] for entry in ledger.read_audit("second")]
        assert actions == ["pause", "resume", "stop"]
    finally:
        end_session(run)


def test_two_runs_are_compared_and_a_model_card_is_downloaded(console: Console, tmp_path: Path) -> None:
    page, url = console.page, console.url
    if len(open_ledger(console.runs).read_runs()) < 2:
        second_run = start_live_run(console.runs.parent, "second", 0, "stage.rounds=1", "aggregation.tau=0")
        assert second_run.wait(600) == 0
    page.goto(f"{url}/runs")
    for box in page.query_selector_all("input[name=run]"):
        box.check()
    page.click("text=Compare selected runs")
    page.wait_for_selector(".js-plotly-plot .trace")
    assert "aggregation.tau" in page.inner_text("main")
    assert "federation.data_root" not in page.inner_text("main"), "settings that are equal are not shown"
    page.goto(f"{url}/runs/first/evidence")
    with page.expect_download() as download:
        page.click("text=model-card.html")
    download.value.save_as(tmp_path / "card.html")
    assert "Model card" in (tmp_path / "card.html").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible_and_fit_the_screen(console: Console, scheme: str) -> None:
    """axe finds nothing serious, and no page is wider than the screen.

    With $CONSILIUM_SHOTS, a screenshot of each page is saved in that folder.
    """
    page = console.page
    page.emulate_media(color_scheme=scheme)
    problems: list[str] = []
    for path in PAGES:
        page.goto(console.url + path)
        if page.query_selector(".plot"):
            page.wait_for_selector(".js-plotly-plot .main-svg")
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            time.sleep(0.5)
            if page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth"):
                problems.append(f"{path} is wider than {width} px")
            if shots := os.environ.get("CONSILIUM_SHOTS"):
                name = re.sub(r"\W+", "-", path).strip("-") or "federation"
                page.screenshot(path=f"{shots}/{name}-{width}-{scheme}.png", full_page=True)
        for violation in axe.Axe().run(page).response["violations"]:
            if violation["impact"] in ("serious", "critical"):
                element = violation["nodes"][0]["html"][:200]
                problems.append(f"{path}: {violation['id']}: {element}")
    page.set_viewport_size({"width": 1280, "height": 900})
    assert problems == []
