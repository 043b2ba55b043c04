"""VOC's labels: `ImageSets/Main/{class}_{split}.txt`, each with a line `{image} {1, 0 or -1}` per image.

1: the class is in the image; -1: it is not; 0: it is, but is hard to see, and is to be ignored.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from cluster.errors import UserError
from cluster.small_file import read_small
from ingest.labels.said import NOTHING, Said, joined
from ingest.problem import Problem
from ingest.sources.opening import is_list, open_images

_NAME = re.compile(r"(?P<label>[^/]+)_(?P<split>train|val|trainval|test)\.txt")
_PLACE = re.compile(rf"(?:^|/)ImageSets/Main/{_NAME.pattern}$")
# All files of one class have some 200 KB, and those of all classes 6 MB.
_LARGEST, _LARGEST_TOGETHER = 4 << 20, 32 << 20


def files_in_folder(folder: Path) -> dict[str, bytes]:
    """The split files of a folder, by their names.

    Raises:
        UserError: one cannot be read, or is too large.
    """
    paths = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
    found: dict[str, bytes] = {}
    together = 0
    for path in paths:
        try:
            found[path.name] = read_small(path, most=_LARGEST)
        except OSError as error:
            raise UserError(f"the labels in {path} cannot be read: {error.strerror}") from error
        together += len(found[path.name])
        _refuse_large(together, path.name)
    return found


def _refuse_large(together: int, name: str) -> None:
    """Before all that files say is held in memory.

    Raises:
        UserError: they are larger than those of any such data set.
    """
    if together > _LARGEST_TOGETHER:
        raise UserError(
            f"the files of labels beside {name} have more than {_LARGEST_TOGETHER >> 20} MB, "
            "as no data set of VOC's layout has: give the labels with --labels, as a .csv or .parquet"
        )


def files_in_source(place: str) -> dict[str, bytes]:
    """The split files within a folder or a tar of VOC's layout; or beside a list, or its JPEGImages.

    Raises:
        UserError: the source cannot be used.
    """
    found = {} if is_list(place) else _files_within(place)
    beside = Path(place).resolve().parent / "ImageSets" / "Main"
    return found or (files_in_folder(beside) if beside.is_dir() else {})


def _files_within(place: str) -> dict[str, bytes]:
    source = open_images(place)
    try:
        items = [item for item in source.items() if _PLACE.search(item.path.decode("utf-8", "replace"))]
        found: dict[str, bytes] = {}
        together = 0
        for item, data in zip(items, source.read(items, max_bytes=_LARGEST), strict=True):
            if isinstance(data, Problem):
                shown = item.path.decode("utf-8", "backslashreplace")
                raise UserError(f"{place}: the labels in {shown} cannot be read: {data.reason}")
            name = item.path.rpartition(b"/")[2].decode("utf-8", "replace")
            found[name] = data
            together += len(data)
            _refuse_large(together, name)
        return found
    finally:
        source.close()


def read_split_files(files: Mapping[str, bytes]) -> dict[str, Said]:
    """What the files say, by the images' names: those of masks and annotations have other endings.

    `train`, `val` and `test` are the splits; `trainval` is one where it is all that is known.

    Raises:
        UserError: a line is not of this form.
    """
    said: dict[str, Said] = {}
    for name in sorted(files):
        named = _NAME.fullmatch(name)
        assert named is not None
        label, split = named["label"], None if named["split"] == "trainval" else named["split"]
        for number, line in enumerate(files[name].decode("utf-8", "replace").splitlines(), 1):
            if not (words := line.split()):
                continue
            if len(words) != 2 or words[1] not in ("1", "0", "-1"):
                raise UserError(f"{name}, line {number}: write an image's name and 1, 0 or -1, not {line!r}")
            image, value = words
            new = Said(
                labels=(label,) if value == "1" else (),
                split=split,
                ignore=(label,) if value == "0" else (),
            )
            both = joined(said.get(image, NOTHING), new)
            if both is None:
                raise UserError(f"{name}, line {number}: {image} is in the split {said[image].split}, too")
            said[image] = both
    return {
        f"{image}.jpg": each if each.split else Said(each.labels, "trainval", each.ignore)
        for image, each in said.items()
    }
