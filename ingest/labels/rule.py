"""Labels from paths: a regular expression, or the layout of a data set that is known by its name.

The path begins with the source's own name, as `train/` or `images.tar/`; that of an image which a list names
by a URL is the URL.
"""

import re
from dataclasses import dataclass

from cluster.errors import UserError
from ingest.labels.said import NOTHING, Said

_SPLITS = r"(?P<split>train|training|val|valid|validation|dev|test)"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How labels, and splits, are seen from paths.

    Attributes:
        given: what --labels-from says.
        patterns: the first that is found in a path counts; groups `label` and `split`.
        classes: how many the whole data set has, if that is known.
        split_files: labels come from VOC's files in the sources instead.
    """

    given: str
    patterns: tuple[re.Pattern[str], ...] = ()
    classes: int | None = None
    split_files: bool = False

    @property
    def has_labels(self) -> bool:
        """Whether it says labels, and not only splits."""
        return self.split_files or any("label" in pattern.groupindex for pattern in self.patterns)

    def of(self, path: str) -> Said:
        """What the path says."""
        for pattern in self.patterns:
            if found := pattern.search(path):
                named = found.groupdict()
                label = named.get("label")
                return Said(labels=(label,) if label else (), split=named.get("split") or None)
        return NOTHING


def _preset(name: str, *patterns: str, classes: int | None = None, split_files: bool = False) -> Rule:
    return Rule(
        given=name,
        patterns=tuple(map(re.compile, patterns)),
        classes=classes,
        split_files=split_files,
    )


PRESETS = {
    rule.given: rule
    for rule in (
        # torchvision's: one folder per class; Hugging Face's: these below a folder per split.
        _preset(
            "imagefolder",
            rf"^{_SPLITS}(?:\.tar[.\w]*)?/(?P<label>[^/]+)/",
            rf"^[^/]+/{_SPLITS}/(?P<label>[^/]+)/",
            r"^[^/]+/(?P<label>[^/]+)/",
        ),
        # Folders, or the tars in a tar, are called by WordNet's ids, and so are the images of Kaggle's.
        _preset(
            "imagenet",
            r"(?:^|/)(?P<split>train|val)/(?P<label>n\d{8})(?:\.tar)?/",
            r"(?:^|/)(?P<label>n\d{8})(?:\.tar)?/",
            r"(?:^|/)(?P<label>n\d{8})_\d+\.",
            classes=1_000,
        ),
        # {letter}/{class}[/{kind}]/x.jpg; or, as one folder per class, {train,val}/{class}/x.jpg.
        _preset(
            "places365",
            rf"(?:^|/){_SPLITS}/(?P<label>[^/]{{2,}})/[^/]+$",
            r"(?:^|/)[a-z]/(?P<label>[^/]+(?:/[^/]+)?)/[^/]+$",
            classes=365,
        ),
        # {super-category}/{class}/x.jpg.
        _preset("inat18", r"/[^/]+/(?P<label>[^/]+)/[^/]+$", classes=8_142),
        _preset("voc07", classes=20, split_files=True),
    )
}


def read_rule(given: str) -> Rule:
    """The rule that --labels-from names.

    Raises:
        UserError: it is none.
    """
    if given in PRESETS:
        return PRESETS[given]
    kind, colon, expression = given.partition(":")
    if kind != "path" or not colon:
        raise UserError(
            f"--labels-from {given} is not known: use path:REGEX with a group (?P<label>…), or one of "
            + ", ".join(PRESETS)
        )
    try:
        pattern = re.compile(expression)
    except re.error as error:
        raise UserError(f"--labels-from {given} is no regular expression: {error}") from error
    groups = set(pattern.groupindex)
    if not groups or groups - {"label", "split"}:
        raise UserError(
            f"--labels-from {given} must say what it finds: name the group of the label, as in "
            "'path:/(?P<label>[^/]+)/[^/]+$', and that of the split, if there is one, (?P<split>…)"
        )
    return Rule(given=given, patterns=(pattern,))
