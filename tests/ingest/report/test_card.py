"""The dataset card: what its files say, for people and for the hub, and no markup from the wild."""

import json
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from sealed_rows import seal_rows
from small_web import crawl_small_web
from typer.testing import CliRunner

from ingest import cli
from ingest.crawl.index import index_tars
from ingest.dataset.open import sealed_units
from ingest.dataset.plan_record import PlanRecord
from ingest.dataset.records import canonical_json
from ingest.dataset.view import write_view
from ingest.plan.settings import CrawlSettings
from ingest.report.card import LABELS_LISTED, _code, _size_category, dataset_card
from ingest.report.provenance import opt_outs, read_generations
from ingest.report.stats import count


def card_of(path, name="a dataset"):
    return dataset_card(str(path), count(path, progress=lambda done, total: None), name=name)


def test_the_card_of_tars_in_their_place_names_them(tmp_path, scene):
    for path in (tmp_path / "out" / "own.tar", tmp_path / "other.tar"):
        path.parent.mkdir(exist_ok=True)
        scene(len(path.name)).save(tmp_path / "a.png")
        with tarfile.open(path, "w") as tar:
            tar.add(tmp_path / "a.png", "a.png")
    places = [str(tmp_path / "out" / "own.tar"), str(tmp_path / "other.tar")]
    index_tars(places, tmp_path / "out", CrawlSettings(), workers=1, progress=lambda counts: None)
    card = card_of(tmp_path / "out")
    front = yaml.safe_load(card.split("---")[1])
    assert front["configs"][0]["data_files"] == [{"split": "train", "path": ["own.tar"]}]
    assert f"{tmp_path}/other.tar" in section(card, "Sources")
    assert "Shards are WebDataset tars" not in card
    assert "Images lie in the WebDataset tars that are named as sources" in section(card, "How to read it")


def section(card, title):
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


def words(text):
    return " ".join(text.split())


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    folder = tmp_path_factory.mktemp("web")
    report = crawl_small_web(folder)
    slots = sealed_units(folder / "web", report.root).to_pylist()
    keeps = {row["unit"]: np.arange(row["kept"]) % 2 == 0 for row in slots if row["kept"]}
    write_view(folder / "web", "half", root=report.root, keeps=keeps)
    write_view(folder / "web", "old", root="0" * 64, keeps=keeps)
    (folder / "web" / "views" / "half.duplicates.parquet").write_bytes(b"no view")
    return folder / "web"


def test_card_of_a_web_crawl_says_what_was_honoured_and_left_out_and_whom_to_ask(web):
    card = card_of(web)
    assert section(card, "Opt-outs").split("\n")[1:3] == [
        "- robots.txt: honoured; 2 URLs left out because of it",
        "- X-Robots-Tag: honoured; 2 URLs left out because of it",
    ]
    licences = words(section(card, "Licences and removal"))
    assert "licence of each image is unknown" in licences
    assert "To have an image removed, write to `https://example.org/removal`" in licences
    assert "`urls list.parquet: sha256 " in section(card, "Sources")


def test_card_tells_of_every_way_to_opt_out_and_does_not_say_that_unknown_ones_were_honoured(web):
    assert "- Content-Usage: honoured; 0 URLs" in section(card_of(web), "Opt-outs")
    plan = read_generations(web, [0])[0].plain()
    del plan["settings"]["--ignore-content-usage"]
    plan["settings"]["--ignore-tdm-reservation"] = True
    plan["sources"] = [plan["sources"][0] | {"kind": "warc"}]
    told = opt_outs(PlanRecord.read(canonical_json(plan), where="plan", remedy=""))
    assert told == {
        "robots.txt": "not asked for, as the answers are archived",
        "X-Robots-Tag": "honoured",
        "TDM-Reservation": "IGNORED (--ignore-tdm-reservation)",
        "Content-Signal": "honoured",
        "Content-Usage": "not looked for by the version that planned it",
    }


def test_card_says_that_robots_txt_was_ignored(tmp_path):
    crawl_small_web(tmp_path, robots=False)
    outs = section(card_of(tmp_path / "web"), "Opt-outs")
    assert "robots.txt: IGNORED (--ignore-robots); 0 URLs" in outs
    assert "X-Robots-Tag: honoured; 2 URLs" in outs


def test_D2_every_attempt_is_in_the_cards_table(web):
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section(card_of(web), "What became of the attempts").splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    assert {(row[0], row[1]): row[2] for row in rows[1:]} == {
        ("kept", ""): "8", ("rejected", "`robots_disallowed`"): "2", ("rejected", "`x_robots_tag`"): "2",
        ("rejected", "`not_an_image`"): "1", ("failed", "`http_404`"): "2", ("failed", "`http_503`"): "1",
        ("**all**", ""): "16",
    }  # fmt: skip


def test_card_names_root_settings_builds_and_views_of_this_root(web):
    card = card_of(web)
    head = json.loads((web / "DATASET.json").read_bytes())
    assert f"Root: `{head['sealed']}`" in card
    views = section(card, "Views")
    assert "| `half` |" in views
    kept = sum((row["kept"] + 1) // 2 for row in sealed_units(web, head["sealed"]).to_pylist())
    assert f"| {kept} |" in views
    assert "old" not in views
    assert "duplicates" not in views
    made = section(card, "How it was made")
    assert "| `--unit-rows` | `7` |" in made
    assert "| `pillow` |" in made
    assert "--quality" not in made, "nothing was encoded"
    assert json.loads((web / "plan/0/plan.json").read_bytes())["fingerprint"] in made


def test_card_is_the_same_each_time(web):
    assert card_of(web) == card_of(web)


def test_front_matter_is_what_the_hub_reads(web):
    name = 'a "name": [x]\n---\u202e'
    head = yaml.safe_load(card_of(web, name=name).split("---\n")[1])
    assert head["pretty_name"] == 'a "name": [x]\\n---\\u202e'
    assert head["license"] == "unknown"
    assert head["size_categories"] == ["n<1K"]
    paths = head["configs"][0]["data_files"][0]["path"]
    assert sorted(web.glob(paths)) == sorted((web / "shards").rglob("*.tar"))


@pytest.mark.parametrize(
    ("images", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (10**9, "1B<n<10B"), (10**12 - 1, "100B<n<1T"),
     (10**12, "n>1T")],
)  # fmt: skip
def test_size_categories(images, category):
    assert _size_category(images) == category


def test_card_of_folders_needs_no_opt_outs_and_no_plan(folder, crawl, tmp_path):
    crawl([folder("<b>`odd`|name")], tmp_path / "out")
    card = card_of(tmp_path / "out")
    assert "No image of this dataset was fetched from the web" in section(card, "Opt-outs")
    assert "no contact on record" in section(card, "Licences and removal")
    assert "`` folder <b>`odd`|name: 11 files, sha256 of their list" in section(card, "Sources")
    assert "## Hosts" not in card
    (tmp_path / "out" / "plan" / "0" / "plan.json").unlink()
    assert "its plan is not here" in card_of(tmp_path / "out")


def test_card_of_nothing_kept(tmp_path, crawl):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jpg").write_text("no picture")
    crawl([source], tmp_path / "out")
    assert section(card_of(tmp_path / "out"), "Images").strip() == "There are none."


@given(st.text(alphabet="`a |\n\x1b<", max_size=12))
def test_code_from_the_wild_ends_where_it_should(text):
    """Between the two fences there is no run of as many backticks (CommonMark, 6.1)."""
    code = _code(text)
    fence = code[: len(code) - len(code.lstrip("`"))]
    inside = code[len(fence) : -len(fence)]
    assert code.endswith(fence)
    assert fence not in inside
    assert not inside.startswith("`")
    assert not inside.endswith("`")
    assert "\n" not in code


def test_command_prints_or_writes_the_card(web, tmp_path):
    printed = CliRunner().invoke(cli.app(), ["card", str(web)])
    assert printed.stdout == card_of(web, name="web")
    assert (
        CliRunner().invoke(cli.app(), ["card", str(web), "--output", str(tmp_path / "README.md")]).stdout
        == ""
    )
    assert (tmp_path / "README.md").read_text() == printed.stdout
    wrong = CliRunner().invoke(cli.app(), ["card", str(web), "--output", str(tmp_path)])
    assert wrong.exit_code == 2
    assert "name one in a folder that exists" in wrong.stderr


def test_card_names_classes_splits_and_how_many_images_have_them(tmp_path):
    rows = [
        {"labels": ["cat"], "split": "train"},
        {"labels": ["cat", "do`g"], "split": "train"},
        {"labels": [], "split": "val"},
        {"labels": ["cat"], "split": None},
    ]
    seal_rows(tmp_path / "out", [rows], extra=pa.schema([pa.field("split", pa.string())]))
    labels = section(card_of(tmp_path / "out"), "Labels")
    assert "2 labels on 3 images, of which 1 have several; 1 image without one." in labels
    assert "Splits: `train` 2, `val` 1." in labels
    assert labels.rstrip().endswith("`cat` 3, `` do`g `` 1.")
    seal_rows(tmp_path / "bare", [[{}]])
    assert "## Labels" not in card_of(tmp_path / "bare")
    many = [[{"labels": [f"class {number:04}"]} for number in range(LABELS_LISTED + 5)]]
    seal_rows(tmp_path / "many", many)
    labels = section(card_of(tmp_path / "many"), "Labels")
    assert "1,005 labels" in labels
    assert "The 1,000 most frequent: `class 0000` 1, " in labels
    assert "`class 1000`" not in labels
