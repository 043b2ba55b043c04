"""Reports, galleries, figures and cards: ours are handed out, and can do nothing; no other file is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from serving import asked, make_run, serving, told
from yarl import URL

import ingest.report
from pipeline.report.page import environment

POLICY = environment().get_template("policy.html").render()


def write_page(path: Path, title: str = "A report") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"<!doctype html><html><head>{POLICY}<title>{title}</title></head>{'x' * 600_000}</html>")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = tmp_path / "runs"
    make_run(runs / "a")
    write_page(runs / "a" / "report.html", "&lt;b&gt;bold&lt;/b&gt; &amp; hostile")
    write_page(runs / "demo" / "figures-0123456789ab" / "figures.html")
    charts = runs / "demo" / "figures-0123456789ab" / "charts"
    charts.mkdir()
    (charts / "top1.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"></svg>')
    (runs / "trunk").mkdir()
    (runs / "trunk" / "README.md").write_text("# A <script>card</script>\n")
    (runs / "trunk" / "trunk.json").write_text("{}")
    # None of these is ours.
    (runs / "a" / "other.html").write_text("<!doctype html><script>alert(1)</script>")
    (runs / "README.md").write_text("anybody's")
    (runs / "a" / "drawing.svg").write_text("<svg></svg>")
    write_page(runs / "a" / "checkpoints" / "report.html")
    write_page(tmp_path / "elsewhere" / "report.html", "Elsewhere")
    (runs / "a" / "linked.html").symlink_to(tmp_path / "elsewhere" / "report.html")
    (runs / "linked").symlink_to(tmp_path / "elsewhere")
    return runs


def test_S1_only_what_we_have_written_is_handed_out_and_can_do_nothing(folder: Path) -> None:
    async def ask(client: Any) -> list[tuple[dict[str, Any], Any, str]]:
        found = []
        for page in (await told(client, "/api/pages"))["pages"]:
            async with client.get(f"/file/{page['id']}") as answer:
                assert answer.status == 200
                found.append((page, answer.headers, await answer.text()))
        return found

    found = asked(folder, ask)
    assert {(f"{page['folder']}/{page['name']}", page["kind"]) for page, *_ in found} == {
        ("runs/a/report.html", "page"),
        ("runs/demo/figures-0123456789ab/figures.html", "page"),
        ("runs/demo/figures-0123456789ab/charts/top1.svg", "figure"),
        ("runs/trunk/README.md", "card"),
    }
    for page, headers, text in found:
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("sandbox; default-src 'none'; ") and "allow-" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "script-src" not in policy and "connect-src" not in policy
        assert text == (folder.parent / page["folder"] / page["name"]).read_text()
    kinds = {page["name"]: headers["Content-Type"] for page, headers, _ in found}
    assert kinds["README.md"] == "text/plain; charset=utf-8" and kinds["top1.svg"].startswith("image/svg+xml")
    assert "<b>bold</b> & hostile" in {page["title"] for page, *_ in found}  # the page shows it as text


def test_S1_a_file_that_has_become_a_link_since_is_refused(folder: Path) -> None:
    page = folder / "a" / "report.html"

    async def ask(client: Any) -> list[int]:
        known = {each["name"]: each["id"] for each in (await told(client, "/api/pages"))["pages"]}
        statuses = []
        page.unlink()
        page.symlink_to("/etc/passwd")
        (folder / "demo").rename(folder / "moved")
        (folder / "demo").symlink_to(folder / "moved")
        for name in ("report.html", "figures.html"):
            async with client.get(f"/file/{known[name]}") as answer:
                assert "links are not followed here" in (answer.reason or "") + await answer.text()
                statuses.append(answer.status)
        return statuses

    assert asked(folder, ask) == [404, 404]


@pytest.mark.parametrize(
    "path",
    [
        "/file/a/report.html",
        "/file/../a/report.html",
        "/file/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "/file//etc/passwd",
        "/serve.js/../page.html",
        "/../../../../etc/passwd",
        "/page.html",
        "/app.py",
        "/file/" + "0" * 20,
    ],
)
def test_S1_no_path_leads_to_a_file(folder: Path, path: str) -> None:
    async def ask(client: Any) -> int:
        url = URL(f"http://127.0.0.1:{client.port}{path}", encoded=True)
        async with client.session.get(url) as answer:
            return int(answer.status)

    assert asked(folder, ask) == 404


def test_a_gallery_of_ingest_is_known_and_a_run_leads_to_its_own_pages(folder: Path, tmp_path: Path) -> None:
    gallery = (Path(ingest.report.__file__).parent / "gallery.html").read_text()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "web.html").write_text(gallery)

    async def run() -> None:
        async with serving(folder, tmp_path / "out") as client:
            pages = (await told(client, "/api/pages"))["pages"]
            assert "out/web.html" in {f"{page['folder']}/{page['name']}" for page in pages}
            (one,) = (await told(client, "/api/runs"))["runs"]
            about = await told(client, "/api/run", id=one["id"])
            assert [page["name"] for page in about["pages"]] == ["report.html"]

    asyncio.run(run())
