"""How sites say that their images are not to be used: one vocabulary for headers, pages and robots.txt.

Headers come with the answer, whether it was just fetched or lies in an archive; a page may say the same in a
<meta>. In a robots.txt stand Content-Signal and Content-Usage, for all of a site or for some of its paths.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum

# What robots.txt and X-Robots-Tag call us.
TOKEN = "seer-ingest"
_OF_IMAGES = frozenset(["noai", "noimageai", "noimageindex"])
# `none` means noindex and nofollow.
_OF_THE_ANSWER = _OF_IMAGES | {"noindex", "none"}
# Directives with a colon of their own: no robot's name.
_VALUED = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
# What training is called, the narrowest name first: it decides. The last are those of earlier drafts.
_TRAINING = ("train-ai", "ai", "tdm", "bots")
# Of all values of a header; nobody says yes at such length, and to read it all would hold up other sites.
_LONGEST = 4096
_SIGNAL = re.compile(r"\s*(content-signal|content-usage)\s*:\s*(?:([/*]\S*)\s+)?([^#]*)", re.IGNORECASE)


class OptOut(StrEnum):
    """A way to opt out, by the reason that it gives a row."""

    X_ROBOTS_TAG = "x_robots_tag"
    TDM_RESERVATION = "tdm_reservation"
    CONTENT_SIGNAL = "content_signal"
    CONTENT_USAGE = "content_usage"

    @property
    def header(self) -> str:
        """Its name in HTTP."""
        return _HEADERS[self]

    @property
    def option(self) -> str:
        """Of commands, that ignores it."""
        return "--ignore-" + self.value.removesuffix("_tag").replace("_", "-")


_HEADERS = {
    OptOut.X_ROBOTS_TAG: "X-Robots-Tag",
    OptOut.TDM_RESERVATION: "TDM-Reservation",
    OptOut.CONTENT_SIGNAL: "Content-Signal",
    OptOut.CONTENT_USAGE: "Content-Usage",
}
ALL = frozenset(OptOut)
# What headers say: the values of the one that is asked for.
Said = Callable[[str], Sequence[str]]


def image_opt_out(said: Said, heeded: frozenset[OptOut] = ALL) -> OptOut | None:
    """The way in which an answer keeps its image from us, or from all robots, of those that are heeded."""
    for opt_out, header in _HEADERS.items():
        # Few answers have any of them.
        values = said(header)
        if values and opt_out in heeded and _opts_out(opt_out, values, _OF_THE_ANSWER):
            return opt_out
    return None


def page_opt_outs(said: Said) -> frozenset[OptOut]:
    """The ways in which a page's headers keep its images from us, or from all robots.

    `noindex` and `none` are about the page itself, which is not what is fetched: its images may be shown on
    others, and say for themselves what they want.
    """
    return frozenset(each for each in OptOut if _opts_out(each, said(each.header), _OF_IMAGES))


def meta_opt_outs(name: str, content: str) -> frozenset[OptOut]:
    """The ways in which a page's <meta> does so."""
    name = name.strip().lower()
    if name in ("robots", TOKEN):
        name = OptOut.X_ROBOTS_TAG.header.lower()
    return page_opt_outs(lambda header: [content] if header.lower() == name else [])


def robots_txt_rule(line: str) -> tuple[OptOut, str, bool] | None:
    """A line of a robots.txt that says whether there may be trained on what lies below a path.

    Returns:
        The way, the path as of Disallow, and whether it opts out; None of any other line.
    """
    found = _SIGNAL.match(line)
    if found is None:
        return None
    opt_out = OptOut(found[1].lower().replace("-", "_"))
    out = _keeps_from_training(opt_out, found[3])
    return None if out is None else (opt_out, found[2] or "/", out)


def _opts_out(opt_out: OptOut, values: Sequence[str], directives: frozenset[str]) -> bool:
    if sum(map(len, values)) > _LONGEST:
        return True
    match opt_out:
        case OptOut.X_ROBOTS_TAG:
            return any(not directives.isdisjoint(_directives(value)) for value in values)
        case OptOut.TDM_RESERVATION:
            return any(value.strip(' "') == "1" for value in values)
        case _:
            return any(_keeps_from_training(opt_out, value) for value in values)


def _keeps_from_training(opt_out: OptOut, text: str) -> bool | None:
    """What a value of Content-Signal or Content-Usage says of training; None for nothing."""
    pairs = (each.partition(";")[0].partition("=") for each in text.lower().split(","))
    said = {name.strip(): value.strip() for name, _, value in pairs}
    names = _TRAINING if opt_out is OptOut.CONTENT_USAGE else ("ai-train",)
    answers = (said[name] for name in names if said.get(name) in ("y", "n", "yes", "no"))
    answer = next(answers, None)
    return None if answer is None else answer.startswith("n")


def _directives(text: str) -> Iterator[str]:
    """Those that concern us; a robot's name limits what follows to the robot of that name."""
    concerns_us = True
    for item in text.lower().split(","):
        name, colon, directive = item.partition(":")
        if colon and name.strip() not in _VALUED:
            concerns_us = name.strip() in (TOKEN, "*")
        else:
            directive = item
        if concerns_us:
            yield directive.strip()
