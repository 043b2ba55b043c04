"""Labels of data sets as they are found: from paths, from files beside the images, from VOC's split files."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy import array, object_
from scipy.io import savemat

from cluster.errors import UserError
from ingest.crawl.crawl import plan_shards
from ingest.dataset.open import open_dataset
from ingest.image.check import Treatment
from ingest.labels.label_list import read_label_list
from ingest.labels.rule import PRESETS, read_rule
from ingest.labels.said import Said
from ingest.plan.plan import items_of
from ingest.plan.settings import CrawlSettings
from ingest.progress.counts import Counts
from ingest.web.settings import FetchSettings

KEEP_BYTES = Treatment(phash=False)


def files(root, *names):
    """A folder with such files, which nobody opens while planning."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image")
    return root


def plan_of(tmp_path, *sources, output="out", unit_rows=16_384, **options):
    return plan_shards(
        [str(source) for source in sources],
        tmp_path / output,
        CrawlSettings(unit_rows=unit_rows),
        progress=lambda counts: None,
        counts=Counts(),
        **options,
    )


def said_of(plan):
    """What a plan says of each path."""
    return {
        item.path.decode(): Said(item.labels, item.extra.get("split"), tuple(item.extra.get("ignore") or ()))
        for unit in plan.units
        for _, item in items_of(plan.table(unit))
    }


def labels_of(plan):
    return {path: said.labels for path, said in said_of(plan).items()}


@pytest.mark.parametrize(
    ("preset", "path", "label", "split"),
    [
        ("imagefolder", "pets/cat/1.jpg", "cat", None),
        ("imagefolder", "pets/train/cat/1.jpg", "cat", "train"),
        ("imagefolder", "val/cat/1.jpg", "cat", "val"),
        ("imagefolder", "train.tar.gz/cat/black/1.jpg", "cat", "train"),
        ("imagenet", "ILSVRC2012_img_train.tar/n01440764.tar/n01440764_10.JPEG", "n01440764", None),
        ("imagenet", "ILSVRC/Data/CLS-LOC/train/n01440764/n01440764_10.JPEG", "n01440764", "train"),
        ("imagenet", "val/n01440764/ILSVRC2012_val_00000293.JPEG", "n01440764", "val"),
        ("imagenet", "train/n01440764_10.JPEG", "n01440764", None),
        ("places365", "places/data_256/a/abbey/00000001.jpg", "abbey", None),
        ("places365", "data_256/b/bow_window/indoor/00000001.jpg", "bow_window/indoor", None),
        ("places365", "b/bow_window/outdoor/00000001.jpg", "bow_window/outdoor", None),
        ("places365", "places365_standard/val/bow_window-indoor/1.jpg", "bow_window-indoor", "val"),
        ("inat18", "inat/train_val2018/Aves/2800/02.jpg", "2800", None),
        ("inat18", "train_val2018/Plantae/5690/02.jpg", "5690", None),
    ],
)
def test_presets_know_the_layouts_of_their_data_sets(preset, path, label, split):
    assert read_rule(preset).of(path) == Said((label,), split)


@pytest.mark.parametrize("preset", ["imagenet", "places365", "inat18", "imagefolder"])
def test_what_a_preset_does_not_know_has_no_label(preset):
    assert read_rule(preset).of("flat/1.jpg") == Said()


def test_a_rule_of_ones_own(tmp_path):
    source = files(tmp_path / "shop", "2021/dev/shoe-7.jpg", "2021/test/hat-8.jpg", "readme")
    plan = plan_of(tmp_path, source, labels_from=r"path:/(?P<split>dev|test)/(?P<label>[a-z]+)-\d+\.jpg$")
    assert said_of(plan) == {
        "2021/dev/shoe-7.jpg": Said(("shoe",), "dev"),
        "2021/test/hat-8.jpg": Said(("hat",), "test"),
        "readme": Said(),
    }


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("imgenet", "is not known: use path:REGEX"),
        ("path:(", "is no regular expression"),
        ("path:.*", "name the group of the label"),
        ("path:(?P<class>.*)", "name the group of the label"),
    ],
)
def test_what_is_no_rule_is_told(rule, says):
    with pytest.raises(UserError, match=re.escape(says)):
        read_rule(rule)


CONTENTS = {
    "labels.csv": 'path,label,split\nx/1.jpg,cat,train\nx/2.jpg,"a, b",\n',
    "labels.tsv": "file_name\tclass\tsplit\nx/1.jpg\tcat\ttrain\nx/2.jpg\ta, b\t\n",
    "labels.jsonl": '{"path": "x/1.jpg", "label": "cat", "split": "train"}\n\n'
    '{"path": "x/2.jpg", "label": "a, b", "split": null}\n',
    "labels.json": '[{"path": "x/1.jpg", "label": "cat", "split": "train"}, '
    '{"path": "x/2.jpg", "label": "a, b"}]',
    "labels.txt": "x/1.jpg cat\nx/2.jpg b\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("name", CONTENTS)
def test_lists_of_every_format(tmp_path, name, encoding):
    (tmp_path / name).write_text(CONTENTS[name], encoding)
    second = "b" if name.endswith("txt") else "a, b"
    split = None if name.endswith("txt") else "train"
    assert read_label_list(str(tmp_path / name)).said == {
        "x/1.jpg": Said(("cat",), split),
        "x/2.jpg": Said((second,)),
    }


def test_lists_in_parquet_have_several_labels_and_some_to_ignore(tmp_path):
    rows = {"name": ["1", "2", None], "labels": [["cat", "dog"], [], ["x"]], "ignore": [["sofa"], None, None]}
    pq.write_table(pa.table(rows), tmp_path / "l.parquet")
    assert read_label_list(str(tmp_path / "l.parquet")).said == {
        "1": Said(("cat", "dog"), None, ("sofa",)),
        "2": Said(),
    }


def test_lists_of_cocos_form(tmp_path):
    value = {
        "images": [{"id": 7, "file_name": "val/1.jpg"}, {"id": 9, "file_name": "val/2.jpg"}],
        "annotations": [
            {"image_id": image, "category_id": kind} for image, kind in ((7, 2), (7, 2), (7, 1), (9, 3))
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3}],
    }
    (tmp_path / "instances_val.json").write_text(json.dumps(value))
    assert read_label_list(str(tmp_path / "instances_val.json")).said == {
        "val/1.jpg": Said(("dog", "cat")),
        "val/2.jpg": Said(("3",)),
    }


def test_values_of_lists_stay_what_they_are_spelled(tmp_path):
    (tmp_path / "l.csv").write_text("key,label\n0001,007\n0002,1e3\n0003,true\n")
    (tmp_path / "l.jsonl").write_text(
        '{"image_id": 7, "labels": [3, "x"]}\n{"image_id": "8", "label": 2.0}\n'
    )
    assert [each.labels for each in read_label_list(str(tmp_path / "l.csv")).said.values()] == [
        ("007",),
        ("1e3",),
        ("true",),
    ]
    assert read_label_list(str(tmp_path / "l.jsonl")).said["7"] == Said(("3", "x"))


def test_rows_may_lack_what_others_have(tmp_path):
    (tmp_path / "l.jsonl").write_text(
        '{"path": "1"}\n{"path": "2", "label": "cat"}\n{"path": "3", "split": "val"}\n'
    )
    (tmp_path / "l.csv").write_text("path,label,split\n1\n2,cat\n\n3,,val\n")
    expected = {"1": Said(), "2": Said(("cat",)), "3": Said((), "val")}
    assert read_label_list(str(tmp_path / "l.jsonl")).said == expected
    assert read_label_list(str(tmp_path / "l.csv")).said == expected


def test_a_quote_in_a_tsv_swallows_nothing(tmp_path):
    (tmp_path / "l.tsv").write_text('name\tlabel\n1\t"odd\n2\teven\n')
    assert read_label_list(str(tmp_path / "l.tsv")).said == {"1": Said(('"odd',)), "2": Said(("even",))}


def test_lists_label_urls_too(tmp_path):
    (tmp_path / "urls.txt").write_text("https://a.org/cat/1.jpg\nhttps://a.org/dog/2.jpg\n")
    (tmp_path / "l.csv").write_text("url,label\nhttps://a.org/cat/1.jpg,tiger\n")
    plan = plan_shards(
        [str(tmp_path / "urls.txt")],
        tmp_path / "out",
        CrawlSettings(fetch=FetchSettings(contact="a@b.org")),
        progress=lambda counts: None,
        counts=Counts(),
        labels=[str(tmp_path / "l.csv")],
        labels_from="path:/(?P<label>[^/]+)/[^/]+$",
    )
    assert sorted(labels_of(plan).items()) == [
        ("https://a.org/cat/1.jpg", ("tiger",)),
        ("https://a.org/dog/2.jpg", ("dog",)),
    ]


def test_rows_about_one_image_add_up_and_may_not_contradict_each_other(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("path,label,split\n1,cat,val\n1,dog,\n1,cat,val\n")
    assert read_label_list(str(path)).said == {"1": Said(("cat", "dog"), "val")}
    path.write_text("path,label,split\n1,cat,val\n\n1,dog,train\n")
    with pytest.raises(UserError, match=r"row 3: 1 is in the split train, and before in val"):
        read_label_list(str(path))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("l.csv", "a,b\n1,2\n", "has the columns a, b: call that of the images path, name or key"),
        ("l.csv", "path,colour\n1,2\n", "call that of the images"),
        ("l.csv", 'path,label\n"1,2\n', "is damaged, or not csv"),
        ("l.csv", "path,label\n1,tench, Tinca\n", "row 1 has 3 values, and the header has 2: put quotes"),
        ("l.csv", "path,label\n", "has no rows"),
        ("l.jsonl", "{\n", "is damaged, or not jsonl"),
        ("l.json", '{"images": [], "annotations": [{}], "categories": []}', "do not fit"),
        ("l.json", "[", "is damaged, or not json"),
        ("l.parquet", "no", "is damaged, or not parquet"),
        ("l.csv.gz", "no", "is damaged, or not csv"),
        ("l.json", '{"1.jpg": "cat"}', "is neither a list, as"),
        ("l.json", '["1.jpg"]', "is no object with a path and labels"),
        ("l.jsonl", '{"path": "1.jpg", "label": "cat"}\n"2.jpg"\n', "is no object"),
        ("l.txt", "one\n", "as 'one' has one word only"),
        ("l.txt", "", "is no list of lines `image label`: a file"),
        ("l.csv", "path,label\n" + "".join(f"1,{n}\n" for n in range(1_001)), "1 has more than 1,000 labels"),
        ("l.xlsx", "no", "is not named like a list"),
    ],
)
def test_what_is_no_list_of_labels_is_told(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(says)):
        read_label_list(str(tmp_path / name))


def test_an_address_that_is_none_is_told():
    with pytest.raises(UserError, match="is no URL"):
        read_label_list("https://[x/y.csv")


def test_images_are_found_by_path_key_or_name(tmp_path):
    source = files(tmp_path / "set", "a/1.x.jpg", "a/2.jpg", "b/3.jpg", "b/4.tar.png", "5.jpg")
    (tmp_path / "l.csv").write_text("name,label\nset/a/1.x.jpg,one\na/2,two\n3.jpg,three\n4.tar,four\n")
    plan = plan_of(tmp_path, source, labels=[str(tmp_path / "l.csv")])
    assert labels_of(plan) == {
        "5.jpg": (),
        "a/1.x.jpg": ("one",),
        "a/2.jpg": ("two",),
        "b/3.jpg": ("three",),
        "b/4.tar.png": ("four",),
    }


def test_a_name_that_two_images_have_is_told_and_not_guessed(tmp_path):
    source = files(tmp_path / "set", "a/1.jpg", "b/1.jpg")
    (tmp_path / "l.csv").write_text("name,label\n1,one\n")
    with pytest.raises(UserError, match=r"names 1, which is the name of set/a/1.jpg and of set/b/1.jpg"):
        plan_of(tmp_path, source, labels=[str(tmp_path / "l.csv")])


def test_a_list_that_names_nothing_is_told(tmp_path):
    (tmp_path / "l.csv").write_text("path,label\nother/9.jpg,one\n")
    with pytest.raises(
        UserError, match=r"names none of the 1 image of the sources: it has names like other/9.jpg"
    ):
        plan_of(tmp_path, files(tmp_path / "set", "1.jpg"), labels=[str(tmp_path / "l.csv")])


def test_lists_come_before_the_rule(tmp_path):
    source = files(tmp_path / "set", "cat/1.jpg", "flat/2.jpg")
    (tmp_path / "l.csv").write_text("path,label,split\nflat/2.jpg,dog,val\n")
    plan = plan_of(tmp_path, source, labels=[str(tmp_path / "l.csv")], labels_from="imagefolder")
    assert said_of(plan) == {"cat/1.jpg": Said(("cat",)), "flat/2.jpg": Said(("dog",), "val")}


def test_what_says_splits_alone_leaves_the_labels_as_they_are(tmp_path):
    source = files(tmp_path / "set", "cat/1.jpg", "dog/2.jpg")
    splits, labels = tmp_path / "s.csv", tmp_path / "l.csv"
    splits.write_text("path,split\ncat/1.jpg,val\ndog/2.jpg,train\n")
    labels.write_text("path,label\ncat/1.jpg,lion\n")
    expected = {"cat/1.jpg": Said(("cat",), "val"), "dog/2.jpg": Said(("dog",), "train")}
    rule = "path:/(?P<label>[^/]+)/[^/]+$"
    for output, options in enumerate(({}, {"labels_from": rule}, {"labels_from": "path:(?P<split>set)"})):
        plan = plan_of(tmp_path, source, output=f"{output}", labels=[str(splits)], **options)
        assert said_of(plan) == expected
    plan = plan_of(tmp_path, source, output="both", labels=[str(splits), str(labels)])
    assert said_of(plan) == {"cat/1.jpg": Said(("lion",), "val"), "dog/2.jpg": Said((), "train")}


def imagenet_val(tmp_path):
    return files(tmp_path / "val", *(f"ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3)))


def test_imagenet_validation_by_the_devkits_ground_truth(tmp_path, caplog):
    truth = tmp_path / "data" / "ILSVRC2012_validation_ground_truth.txt"
    truth.parent.mkdir()
    truth.write_text("490\n361\n490\n")
    source = imagenet_val(tmp_path)
    plan = plan_of(tmp_path, source, labels=[str(truth)])
    assert list(labels_of(plan).values()) == [("490",), ("361",), ("490",)]
    assert "are numbers" in caplog.text
    caplog.clear()
    # With the devkit's own table beside it, they have the names that the training images have.
    kind = [("ILSVRC2012_ID", object_), ("WNID", object_), ("words", object_)]
    synsets = array([(490, "n02056570", "king penguin"), (361, "n02115913", "dhole")], dtype=kind)
    savemat(truth.parent / "meta.mat", {"synsets": synsets})
    named = plan_of(tmp_path, source, output="named", labels=[str(truth)])
    assert list(labels_of(named).values()) == [("n02056570",), ("n02115913",), ("n02056570",)]
    assert not caplog.messages
    assert named.fingerprint != plan.fingerprint


def test_imagenet_validation_by_kaggles_list(tmp_path):
    path = tmp_path / "LOC_val_solution.csv"
    path.write_text(
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000002,n03995372 85 1 499 272 n03995372 1 2 3 4 \n"
        "ILSVRC2012_val_00000001,n03481172 131 0 499 254 \n"
    )
    labels = labels_of(plan_of(tmp_path, imagenet_val(tmp_path), labels=[str(path)]))
    assert list(labels.values()) == [("n03481172",), ("n03995372",), ()]


def test_a_text_of_paths_as_find_writes_them(tmp_path):
    (tmp_path / "l.txt").write_text("./a b/1.jpg cat\n./a b/1.jpg dog\n./2.jpg cat\n")
    said = read_label_list(str(tmp_path / "l.txt")).said
    assert said == {"a b/1.jpg": Said(("cat", "dog")), "2.jpg": Said(("cat",))}


def test_places_validation_takes_names_from_the_list_of_categories(tmp_path):
    (tmp_path / "places365_val.txt").write_text("Places365_val_00000001.jpg 58\n")
    (tmp_path / "categories_places365.txt").write_text("/a/airfield 0\n/b/bow_window/indoor 58\n")
    assert read_label_list(str(tmp_path / "places365_val.txt")).said == {
        "Places365_val_00000001.jpg": Said(("bow_window/indoor",))
    }


def voc(root):
    """Three images: cat and a difficult dog; dog; both."""
    files(
        root,
        *(f"VOC2007/JPEGImages/{number:06d}.jpg" for number in (5, 7, 9)),
        "VOC2007/Annotations/000005.xml",
    )
    main = root / "VOC2007/ImageSets/Main"
    main.mkdir(parents=True)
    contents = {
        "cat_train": "000005  1\n000007 -1\n",
        "dog_train": "000005  0\n000007  1\n",
        "cat_test": "000009  1\n",
        "dog_test": "000009  1\n",
        "cat_trainval": "000005  1\n000007 -1\n",
        "dog_trainval": "000005  0\n000007  1\n",
    }
    for name, content in contents.items():
        (main / f"{name}.txt").write_text(content)
    (main / "train.txt").write_text("000005\n000007\n")
    return root


EXPECTED_OF_VOC = {
    "000005.jpg": Said(("cat",), "train", ("dog",)),
    "000007.jpg": Said(("dog",), "train"),
    "000009.jpg": Said(("cat", "dog"), "test"),
}


def images_of(plan):
    return {path.rpartition("/")[2]: said for path, said in said_of(plan).items() if path.endswith(".jpg")}


def test_voc_by_its_split_files_wherever_they_are(tmp_path):
    root = voc(tmp_path / "VOCdevkit")
    images, main = root / "VOC2007/JPEGImages", root / "VOC2007/ImageSets/Main"
    found = [
        plan_of(tmp_path, root, output="1", labels_from="voc07"),
        plan_of(tmp_path, images, output="2", labels_from="voc07"),
        plan_of(tmp_path, images, output="3", labels=[str(main)]),
    ]
    assert [images_of(plan) for plan in found] == [EXPECTED_OF_VOC] * 3
    assert said_of(found[0])["VOC2007/Annotations/000005.xml"] == Said()


def test_voc_in_its_tar(tmp_path):
    import tarfile

    root = voc(tmp_path / "VOCdevkit")
    with tarfile.open(tmp_path / "voc.tar", "w") as tar:
        tar.add(root, "VOCdevkit")
    assert images_of(plan_of(tmp_path, tmp_path / "voc.tar", labels_from="voc07")) == EXPECTED_OF_VOC


def test_voc_of_which_a_list_names_the_images(tmp_path):
    root = voc(tmp_path) / "VOC2007"
    names = "".join(f"JPEGImages/{name}\n" for name in EXPECTED_OF_VOC)
    (root / "images.csv").write_text(f"path\n{names}")
    assert images_of(plan_of(tmp_path, root / "images.csv", labels_from="voc07")) == EXPECTED_OF_VOC


def test_voc_without_split_files_is_told(tmp_path):
    with pytest.raises(UserError, match="finds no ImageSets/Main"):
        plan_of(tmp_path, files(tmp_path / "set", "1.jpg"), labels_from="voc07")


def test_what_labels_are_made_of_belongs_to_the_fingerprint(tmp_path):
    source = files(tmp_path / "set", "cat/1.jpg")
    plain = plan_of(tmp_path, source)
    assert "--labels" not in json.dumps(plain.record.settings.plain())
    with pytest.raises(UserError, match="without --labels-from, not with --labels-from imagefolder"):
        plan_of(tmp_path, source, labels_from="imagefolder")
    labels = tmp_path / "l.csv"
    labels.write_text("path,label\ncat/1.jpg,cat\n")
    plan_of(tmp_path, source, output="listed", labels=[str(labels)])
    assert plan_of(tmp_path, source, output="listed", labels=[str(labels)]).units == range(1)
    with pytest.raises(UserError, match=r"with --labels l.csv \(sha256 [0-9a-f]{16}\), not without"):
        plan_of(tmp_path, source, output="listed")
    labels.write_text("path,label\ncat/1.jpg,dog\n")
    with pytest.raises(UserError, match=r"with --labels l.csv \(sha256 [0-9a-f]{16}\), not l.csv"):
        plan_of(tmp_path, source, output="listed", labels=[str(labels)])


@pytest.mark.parametrize(
    ("names", "rule", "says"),
    [
        (["only/1.jpg", "only/2.jpg"], None, "one label only"),
        (["a/abbey/1.jpg", "b/bar/1.jpg"], None, "single letters (a, b)"),
        (["Aves/2800/1.jpg", "Plantae/5690/1.jpg"], None, "lie in folders below those, such as Aves/2800"),
        (["train/cat/1.jpg", "val/cat/2.jpg"], None, "the labels are train, val, which are splits"),
        (["a/abbey/1.jpg"], "places365", "1 label, and places365 has 365 classes"),
        (["n01440764/1.jpg"], "imagenet", "1 label, and imagenet has 1,000 classes"),
        (["JPEGImages/1.jpg", "SegmentationClass/1.png"], None, "see --labels-from voc07"),
        (["flat/1.jpg"], "imagenet", "none of the 1 file has a label by --labels-from imagenet"),
        (["n01440764/1.jpg", "flat/1.jpg"], "imagenet", "1 of the 2 files have no label"),
    ],
)
def test_doubtful_labels_are_told_before_the_crawl(tmp_path, names, rule, says, caplog):
    plan_of(tmp_path, files(tmp_path / "set", *names), labels_from=rule)
    assert any(says in record.message for record in caplog.records), caplog.messages


def test_usual_labels_are_not_doubted(tmp_path, caplog):
    plan_of(tmp_path, files(tmp_path / "set", "cat/1.jpg", "dog/2.jpg", "0/3.jpg"))
    plan_of(tmp_path, files(tmp_path / "flat", "1.jpg"), output="other")
    plan_of(tmp_path, files(tmp_path / "digits", "0/1.jpg", "1/2.jpg"), output="third")
    # Of the first unit no file has a label.
    plan_of(tmp_path, files(tmp_path / "mixed", "1.jpg", "cat/1.jpg", "dog/2.jpg"), output="4", unit_rows=1)
    assert not caplog.messages


def test_entries_that_name_nothing_are_counted(tmp_path, caplog):
    (tmp_path / "l.csv").write_text("path,label\n1.jpg,cat\n2.jpg,dog\n3.jpg,dog\n")
    plan = plan_of(tmp_path, files(tmp_path / "set", "1.jpg", "4.jpg"), labels=[str(tmp_path / "l.csv")])
    assert plan.record.labels_unused == 2
    assert "2 entries of --labels name no file" in caplog.text
    assert "1 of the 2 files have no label by --labels" in caplog.text


def test_presets_know_how_many_classes_there_are():
    assert {name: rule.classes for name, rule in PRESETS.items() if rule.classes} == {
        "imagenet": 1_000,
        "places365": 365,
        "inat18": 8_142,
        "voc07": 20,
    }


def test_labels_splits_and_what_to_ignore_are_columns_of_the_rows(tmp_path, folder, crawl):
    source = folder(count=4)
    (tmp_path / "l.csv").write_text(
        'path,labels,split,ignore\ncat/000.jpg,"cat,pet",val,dog\ndog/001.png,dog,,\n'
    )
    from ingest.crawl.crawl import crawl_shards

    crawl_shards(
        [str(source)],
        tmp_path / "out",
        CrawlSettings(treatment=KEEP_BYTES),
        workers=1,
        progress=lambda counts: None,
        labels=[str(tmp_path / "l.csv")],
    )
    rows = open_dataset(tmp_path / "out").kept_rows(0, ["labels", "split", "ignore"]).to_pylist()
    assert [(row["labels"], row["split"], row["ignore"]) for row in rows] == [
        (["cat", "pet"], "val", ["dog"]),
        ([], None, None),
        (["dog"], None, None),
        ([], None, None),
    ]
    crawl([source], tmp_path / "plain", treatment=KEEP_BYTES)
    assert "split" not in open_dataset(tmp_path / "plain").kept_rows(0).column_names


def test_a_damaged_list_of_categories_is_told_by_its_name(tmp_path):
    (tmp_path / "places365_val.txt").write_text("a.jpg 0\n")
    (tmp_path / "categories_places365.txt").write_text("/a/airfield 0 3\n")
    with pytest.raises(
        UserError, match=r"the categories_places365\.txt beside .* '/a/airfield 0 3': restore"
    ):
        read_label_list(str(tmp_path / "places365_val.txt"))
