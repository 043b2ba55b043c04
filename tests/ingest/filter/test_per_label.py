"""Draws of so many images of each label, and lists of file names."""

from collections import Counter

import pyarrow as pa
import pytest
from sealed_rows import seal_rows
from typer.testing import CliRunner

from cluster.errors import UserError
from cluster.map.processes import processes
from ingest.cli import app
from ingest.dataset.open import open_dataset
from ingest.dataset.schema import LABELS
from ingest.filter import filter as filtering
from ingest.filter.filter import Filter, FilterReport, filter_view
from ingest.filter.per_label import PerLabel

IGNORE = pa.schema([pa.field("ignore", LABELS)])
ROWS = [
    *({"data": f"cat {n}".encode(), "labels": ["cat"], "url": f"in/cat/c_{n}.JPEG"} for n in range(40)),
    *({"data": f"dog {n}".encode(), "labels": ["dog"], "url": f"in/dog/d_{n}.JPEG"} for n in range(40)),
    *({"data": f"rare {n}".encode(), "labels": ["rare"], "url": f"in/rare/r_{n}.JPEG"} for n in range(2)),
    {"data": b"nothing", "url": "in/x.JPEG"},
]


def view_of(path, units, wanted=None, *, workers=1, **filters) -> FilterReport:
    if units is not None:
        seal_rows(path, units, extra=IGNORE)
    with processes(workers) as map_tasks:
        return filter_view(path, "v", Filter(per_label=wanted, **filters), map_tasks=map_tasks)


def kept(path) -> list[str]:
    opened = open_dataset(path, view="v")
    return sorted(
        url for unit in range(len(opened.units)) for url in opened.kept_rows(unit)["url"].to_pylist()
    )


def test_so_many_of_each_label_and_all_of_one_that_has_fewer(tmp_path):
    report = view_of(tmp_path / "out", [ROWS[::2], ROWS[1::2]], PerLabel(count=5))
    assert Counter(url.split("/")[1] for url in kept(tmp_path / "out")) == {"cat": 5, "dog": 5, "rare": 2}
    assert report.kept == 12
    assert report.drawn is not None
    assert (report.drawn.labels, report.drawn.short, report.drawn.shared) == (3, {"rare": 2}, 0)
    assert [(step.step, step.dropped) for step in report.steps] == [("5 per label, seed 0", 71)]


def test_D1_a_draw_depends_on_the_seed_and_not_on_units_tasks_or_workers(tmp_path, monkeypatch):
    wanted = PerLabel(count=7, seed=3)
    view_of(tmp_path / "one", [ROWS], wanted)
    monkeypatch.setattr(filtering, "ROWS_PER_TASK", 1)
    view_of(tmp_path / "two", [ROWS[50:], ROWS[:7], ROWS[7:50]], wanted, workers=2)
    view_of(tmp_path / "other", [ROWS], PerLabel(count=7, seed=4))
    assert kept(tmp_path / "one") == kept(tmp_path / "two") != kept(tmp_path / "other")


def test_a_larger_draw_has_the_smaller_one(tmp_path):
    view_of(tmp_path / "few", [ROWS], PerLabel(count=3))
    view_of(tmp_path / "many", [ROWS], PerLabel(count=9))
    assert set(kept(tmp_path / "few")) < set(kept(tmp_path / "many"))


def test_only_what_the_other_conditions_leave_is_drawn(tmp_path):
    few = tuple(f"in/cat/c_{n}.JPEG" for n in range(30, 36))
    report = view_of(
        tmp_path / "out", [ROWS], PerLabel(count=4), where=(f"url in [{', '.join(few)}] or label = dog",)
    )
    names = kept(tmp_path / "out")
    assert sum(name in few for name in names) == 4
    assert len(names) == 8
    assert report.samples == report.kept + sum(step.dropped for step in report.steps)


def test_an_image_of_several_labels_is_drawn_for_each_and_labels_to_ignore_do_not_count(tmp_path):
    rows = [
        {"data": b"both", "labels": ["cat", "dog"], "url": "both.jpg"},
        {"data": b"cat", "labels": ["cat", "dog"], "ignore": ["dog"], "url": "cat.jpg"},
        {"data": b"none", "labels": ["dog"], "ignore": ["dog"], "url": "none.jpg"},
    ]
    report = view_of(tmp_path / "out", [rows], PerLabel(count=2))
    assert kept(tmp_path / "out") == ["both.jpg", "cat.jpg"]
    assert report.drawn is not None
    assert (report.drawn.labels, report.drawn.short, report.drawn.shared) == (2, {"dog": 1}, 1)


def test_a_dataset_without_labels_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"no label to draw images of: crawl it with --labels-from"):
        view_of(tmp_path / "out", [ROWS[-1:]], PerLabel(count=1))


def test_a_list_of_file_names_is_compared_with_the_last_part_of_each_path(tmp_path):
    (tmp_path / "names.txt").write_text("c_3.JPEG\nd_0.JPEG\ngone.JPEG\n")
    far = {"data": b"far", "url": "https://example.org/a/d_0.JPEG?size=1"}
    odd = {"data": b"odd", "url": "https://[odd/gone.PNG"}
    report = view_of(tmp_path / "out", [ROWS, [far, odd]], keep=(str(tmp_path / "names.txt"),))
    assert kept(tmp_path / "out") == [far["url"], "in/cat/c_3.JPEG", "in/dog/d_0.JPEG"]
    listed = report.lists[0]
    assert (listed.by_file_name, listed.lines, listed.unmatched, listed.samples) == (True, 3, 1, 3)


@pytest.mark.parametrize("line", ["in/cat/c_4.JPEG", "0000000000004"])
def test_a_list_with_a_path_or_a_key_is_compared_as_it_is(tmp_path, line):
    (tmp_path / "names.txt").write_text(f"c_3.JPEG\n{line}\n")
    report = view_of(tmp_path / "out", [ROWS], keep=(str(tmp_path / "names.txt"),))
    assert kept(tmp_path / "out") == ["in/cat/c_4.JPEG"]
    assert (report.lists[0].by_file_name, report.lists[0].named) == (False, ("c_3.JPEG",))


def test_nothing_is_removed_for_its_file_name_alone(tmp_path):
    (tmp_path / "names.txt").write_text("c_3.JPEG\n")
    report = view_of(tmp_path / "out", [ROWS], remove=(str(tmp_path / "names.txt"),))
    assert (report.kept, report.lists[0].unmatched) == (83, 1)


def test_the_command_tells_what_was_drawn_and_what_a_list_did_not_find(tmp_path):
    seal_rows(tmp_path / "out", [ROWS])

    def told(*options):
        return CliRunner().invoke(app(), ["view", str(tmp_path / "out"), "--workers", "1", *options])

    drawn = told("--name", "few", "--per-label", "3", "--seed", "1")
    assert drawn.exit_code == 0
    assert "careful  1 label with fewer images, all of which are kept: rare (2)" in drawn.output
    (tmp_path / "names.txt").write_text("c_3.JPEG\nc_4.JPEG\n")
    listed = told("--name", "listed", "--keep", str(tmp_path / "names.txt"))
    assert "2 of 2 lines of" in listed.output
    assert "name 2 images, by the last part of their paths" in listed.output
    (tmp_path / "names.txt").write_text("n01_3.JPEG\n")
    nothing = told("--name", "nothing", "--keep", str(tmp_path / "names.txt"))
    assert nothing.exit_code != 0
    assert "name no sample: n01_3.JPEG; the dataset has such as in/cat/c_0.JPEG" in nothing.output
    assert isinstance(told("--name", "seed", "--seed", "1").exception, UserError | SystemExit)
