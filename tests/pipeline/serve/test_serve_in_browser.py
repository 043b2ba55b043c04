"""The live page in a real browser: what is clicked, typed and seen, and what it never asks for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from aiohttp.test_utils import TestServer
from browser import Tab, browser
from serving import add_rows, make_run
from test_serve_graphs import finish, key
from test_serve_pages import write_page

from cluster.host import Process
from cluster.job import State
from cluster.run.folder import RunFolder
from cluster.run.status import Failure
from pipeline.recipe.stages import CompareRecipe
from pipeline.report.compare import PANELS, ComparedRun, comparison_page
from pipeline.report.curve import Curve
from pipeline.serve.app import make_app

HOSTILE = "<img src=x onerror=window.ran=1><script>window.ran=1</script>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs of which one goes on, one is hostile in all that it says, and a graph."""
    runs = tmp_path / "runs"
    live = make_run(runs / "live", state=State.RUNNING, launcher=Process.current(), started=1.0)
    live.log(0).write_text("the first line\n")
    live.log(1).write_text("of rank 1\n")
    progress(live, 10)
    other = make_run(runs / "other")
    add_rows(other, range(1, 30), lr=0.1, rankme=9.0)
    failure = Failure(rank=0, type="RuntimeError", message=HOSTILE, log_tail=(HOSTILE,))
    # A folder's name has no slash.
    hostile = make_run(runs / HOSTILE.replace("/", "|"), state=State.FAILED, failure=failure)
    add_rows(hostile, range(1, 30), **{HOSTILE[:50]: 1.0})
    hostile.log(0).write_text(f"{HOSTILE}\n")
    (hostile.path / "stacks").mkdir()
    (hostile.path / "stacks" / "rank-0.txt").write_text(f"stacks {HOSTILE}\n")
    (hostile.path / "recipe.yaml").write_text(HOSTILE)
    (hostile.path / "attempts.jsonl").write_text(json.dumps({"time": 1.0, "host": HOSTILE}) + "\n")
    write_page(hostile.path / "report.html", HOSTILE.replace("<", "&lt;"))
    finish(runs / "demo", "shards", "data", recipe={"source": HOSTILE}, metrics={HOSTILE: HOSTILE})
    finish(runs / "demo", "knn", "knn", latest=HOSTILE.replace("/", "|"), inputs={HOSTILE: f"{key('data')}/"})
    for number in range(230):
        make_run(runs / "many" / f"run-{number}", submitted=0.5)
    return runs


def progress(run: RunFolder, step: int) -> None:
    values = {"step": step, "total_steps": 100, "loss": 1 / step, "images_per_second": 1234.0}
    (run.path / "progress.json").write_text(json.dumps(values | {"seconds_left": 90.0}))
    add_rows(run, range(step - 9, step + 1), lr=0.1)


def seen(
    folder: Path, look: Callable[[Tab], Awaitable[None]], *, token: str | None = None, **how: Any
) -> None:
    """Look at the page of a server of this folder. Nothing of a run's runs, and nothing else is asked for."""

    async def run() -> None:
        server = TestServer(make_app(folder, (), host="127.0.0.1", token=token))
        async with server, browser(folder.parent / "browser") as tab:
            await tab.open(str(server.make_url(f"/?token={token}" if token else "/")), **how)
            await look(tab)
            assert await tab.value("window.ran") is None
            assert await tab.count("main :is(img, script, iframe, link)") == 0
            hosts = {urlsplit(url).netloc for url in tab.asked if not url.startswith("data:")}
            assert hosts == {f"127.0.0.1:{server.port}"}
            assert tab.said == []  # no error, no dialog, nothing that the policy had to stop

    asyncio.run(run())


@pytest.mark.slow
def test_one_clicks_through_runs_graphs_reports_and_datasets(folder: Path) -> None:
    async def look(tab: Tab) -> None:
        await tab.until_count("tbody tr", 200)
        assert await tab.value("location.search") == ""  # the token is in a cookie now
        assert "233 of 233 runs" in await tab.text("main")
        first = " ".join((await tab.text("tbody tr")).split())
        assert first.startswith("live running 10 / 100 0.1000 1,234 1 min 30 s")
        await tab.click("Show all 233")
        await tab.until_count("tbody tr", 233)
        # Of a run its curves, its log, and that of another rank.
        await tab.click("live")
        await tab.until_count(".charts svg", 2)
        await tab.until_text("pre.log", "the first line")
        await tab.enter("#text", "logs/rank-1.log")
        await tab.until_text("pre.log", "of rank 1")
        assert "the first line" not in await tab.text("pre.log")
        await tab.click("← all runs")
        # Two of them in one chart.
        for name in ("other", "live"):
            await tab.until("document.querySelector('tbody tr')")
            await tab.enter("#filter", name)
            await tab.until_count("tbody tr", 1)
            await tab.value("document.querySelector('tbody input').click()")
        await tab.click("Curves of 2 marked")
        await tab.until_count(".charts svg", 3)
        assert await tab.count(".charts .line.t2") == 2
        assert await tab.text(".legend") == "other\nlive"
        # The graph, and from a stage to that which it was made from.
        await tab.click("Graphs")
        await tab.click("runs/demo")
        await tab.until_count("details.stage", 2)
        assert await tab.count(".graph rect") == 2
        await tab.value("document.querySelectorAll('details.stage')[1].open = true")
        await tab.click("data")
        assert await tab.value("document.activeElement.innerText.startsWith('data')")
        assert HOSTILE in await tab.text("details.stage")
        await tab.click("Datasets")
        await tab.until_text("main", "No datasets here")
        await tab.click("Reports")
        await tab.until_count(".files a", 1)

    seen(folder, look, token="a-token-of-a-test")


@pytest.mark.slow
def test_a_run_that_goes_on_is_seen_to_without_a_reload(folder: Path) -> None:
    live = RunFolder(folder / "live")

    async def look(tab: Tab) -> None:
        await tab.value("window.same = true")
        await tab.until_text("tbody tr", "10 / 100")
        progress(live, 20)
        await tab.until_text("tbody tr", "20 / 100")
        await tab.click("live")
        chart = "document.querySelector('.charts svg')?.getAttribute('aria-label')"
        await tab.until(f"{chart}?.includes('live: from 1 to 0.05')")
        with live.log(0).open("a") as file:
            file.write("the second line\n")
        progress(live, 40)
        await tab.until(f"{chart}?.includes('live: from 1 to 0.025')")
        await tab.until_text("pre.log", "the first line\nthe second line\n")
        await tab.until_text("main", "step 40 of 100")
        make_run(live.path)
        await tab.until_text(".badge", "completed")
        assert await tab.value("window.same")

    seen(folder, look)


@pytest.mark.slow
def test_a_chart_is_read_by_pointer_by_keyboard_and_by_touch(folder: Path) -> None:
    live, curve = RunFolder(folder / "live"), Curve()
    for step in range(10, 60, 10):
        curve.add(step, step / 4)
    compared = [
        ComparedRun(
            name=name,
            folder="",
            differs={},
            last={"step": 50},
            collapse=[],
            curves={key: curve if key == "loss" else Curve() for key, *_ in PANELS},
            branch="",
        )
        for name in ("one", "other")
    ]
    (folder / "compare.html").write_text(comparison_page(compared, CompareRecipe(title="Two runs")))
    read = (
        "[...document.querySelectorAll('.reading text')]"
        ".filter(each => getComputedStyle(each).visibility === 'visible')"
        ".map(each => [...each.children].map(row => row.textContent).join(' | ')).join(' and ')"
    )

    async def look(tab: Tab) -> None:
        await tab.click("live")
        await tab.until_count(".charts svg", 2)
        await tab.point("main .at input", 1)
        await tab.until(f"{read} === 'step 2 | 0.5'")
        await tab.point("h1", 0)
        await tab.until(f"{read} === ''")
        # By keyboard; and a chart that is drawn anew meanwhile is still being read.
        await tab.value("document.querySelector('main .at input').focus()")
        await tab.until(f"{read} === 'step 1 | 1'")
        await tab.press("ArrowRight")
        await tab.until(f"{read} === 'step 2 | 0.5'")
        progress(live, 20)
        await tab.until_count("figure:first-child .at", 20)
        await tab.until(f"{read} === 'step 2 | 0.5'")
        await tab.press("ArrowRight")
        await tab.until(f"{read} === 'step 3 | 0.3333'")
        # A report is read in the same way, without a script.
        await tab.click("Reports")
        await tab.until_count(".files a", 2)
        link = "[...document.querySelectorAll('.files a')].find(each => each.innerText === 'Two runs').href"
        await tab.call("Page.navigate", url=await tab.value(link))
        await tab.until("location.pathname.startsWith('/file/') && document.readyState === 'complete'")
        await tab.value("document.querySelector('.at input').focus()")
        await tab.press("ArrowRight")
        await tab.until(f"{read} === 'step 20 | 5 one | 5 other'")
        await tab.point(".at input", 2, tap=True)
        await tab.until(f"{read} === 'step 30 | 7.5 one | 7.5 other'")

    seen(folder, look, width=390, height=800)


@pytest.mark.slow
def test_S1_what_a_run_says_is_text_on_a_narrow_dark_screen_and_by_keyboard(folder: Path) -> None:
    fits = "document.documentElement.scrollWidth <= innerWidth"

    async def look(tab: Tab) -> None:
        await tab.until_count("tbody tr", 200)
        # By keyboard alone: to the filter, to the run that it leaves, and in.
        await tab.press("/", "/")
        await tab.call("Input.insertText", text="onerror")
        await tab.until_count("tbody tr", 1)
        name = HOSTILE.replace("/", "|")
        for _ in range(12):
            await tab.press("Tab")
            if await tab.value("document.activeElement.innerText") == name:
                break
        assert await tab.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        await tab.press("Enter", "\r")
        await tab.until_text("h1", name)
        await tab.until_count(".charts svg", 2)
        await tab.until_text("pre.log", "window.ran")
        await tab.value("document.querySelectorAll('details').forEach(each => each.open = true)")
        # Why it failed, the end of its log, the log, its start, its recipe.
        assert (await tab.text("main")).count(HOSTILE) >= 5
        assert await tab.value(fits)
        assert await tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 26)"
        for words in ("Graphs", "Datasets", "Runs", "Reports"):
            await tab.click(words)
            await tab.until_text("h1", words)
            await asyncio.sleep(0.1)
            assert await tab.value(fits)
        # Its report opens as nobody, without a script.
        await tab.until_count(".files a", 1)
        await tab.call("Page.navigate", url=await tab.value("document.querySelector('.files a').href"))
        await tab.until("location.pathname.startsWith('/file/') && document.readyState === 'complete'")
        assert await tab.value("origin") == "null"

    seen(folder, look, width=390, height=800, dark=True)
