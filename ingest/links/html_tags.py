"""The tags of a web page and their attributes, as the HTML standard's tokenizer finds them.

No tree is built. The places of images need none, and trees are where pages hurt: by the standard's own rules
37 kB of unclosed <b> and <p> make a tree of gigabytes, and 500 kB of nested <div> take half a minute. One
pass over the text takes time and memory in proportion to it, whatever it says.
"""

import codecs
import html
import re
from collections.abc import Iterator
from html.entities import html5

# WHATWG labels that mean another encoding in browsers than in Python.
_BROWSERS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    # A page that says so in ASCII is not in it.
    "utf-16": "utf-8",
    "utf-16-le": "utf-8",
    "utf-16-be": "utf-8",
}
# Python's names of the encodings of the web; its others, such as unicode_escape and idna, are no page's.
_ENCODINGS = frozenset(
    ["utf-8", "gb18030", "cp932", "cp949", "big5", "big5hkscs", "euc_jp", "iso2022_jp", "koi8-r", "koi8-u"]
    + ["cp866", "cp874", "mac-roman", "mac-cyrillic"]
    + [f"cp125{number}" for number in range(9)]
    + [f"iso8859-{number}" for number in (2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15, 16)]
)
_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_META_CHARSET = re.compile(rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.IGNORECASE)
_PRESCAN = 1024

_SPACE = r"\t\n\f\r "
# One attribute. A value whose quote never ends takes the rest of the page, and its tag with it.
_ATTRIBUTE = (
    rf"([^{_SPACE}/>][^{_SPACE}/>=]*+)"
    rf"(?:[{_SPACE}]*+=[{_SPACE}]*+(?:\"([^\"]*+)(?:\"|\Z)|'([^']*+)(?:'|\Z)|([^{_SPACE}>\"'][^{_SPACE}>]*+)?+))?+"
)
_GROUPLESS = re.sub(r"[(](?![?])", "(?:", _ATTRIBUTE)
# Possessive throughout: no input makes it go back.
_TAG = re.compile(rf"<(/?+)([A-Za-z][^{_SPACE}/>]*+)((?:[{_SPACE}/]++|{_GROUPLESS})*+)(>|\Z)")
_ATTRIBUTES = re.compile(_ATTRIBUTE)
_COMMENT_END = re.compile(r"--!?>")
_SCRIPT_TOKEN = re.compile(rf"<!--|-->|<(/?)script(?=[{_SPACE}/>])", re.IGNORECASE)
# Possessive, too: of `&param=` nothing may be taken back, or `&para` would be a paragraph sign.
_REFERENCE = re.compile(
    r"&(?:#[0-9]{1,10};?|#[xX][0-9A-Fa-f]{1,10};?|([A-Za-z][A-Za-z0-9]{0,40}+(?:;|(?!=))))"
)
# Elements whose content is text up to their own end tag.
_TEXT_ONLY = frozenset(["title", "textarea", "style", "xmp", "iframe", "noembed", "noframes", "script"])
# Elements that can tell of an image.
_TELLING_NAMES = frozenset(
    ["img", "image", "amp-img", "amp-anim", "picture", "source", "base", "meta", "link"]
)
_NAMES = _TELLING_NAMES | _TEXT_ONLY | {"plaintext", "svg", "math"}
# Text and tags that tell nothing; most of a page is passed over in one match.
_IDLE = re.compile(
    rf"(?:[^<]++|<(?![A-Za-z!?/])|<(?!/?(?i:{'|'.join(sorted(_NAMES))})[{_SPACE}/>])"
    rf"/?[A-Za-z][^{_SPACE}/>]*+(?:[{_SPACE}/]++|{_GROUPLESS})*+>)*+"
)


def decode_page(data: bytes, charset: str | None = None) -> str:
    """The page as text: by its byte-order mark, the HTTP header, a <meta>, or else UTF-8 or windows-1252.

    Args:
        data: the page.
        charset: of the Content-Type header, if it has one.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding, "replace")
    declared = _META_CHARSET.search(data, 0, _PRESCAN)
    for label in (charset, declared and declared[1].decode("ascii", "replace")):
        encoding_named = _encoding(label) if label else None
        if encoding_named:
            return data.decode(encoding_named, "replace")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("cp1252", "replace")


def _encoding(label: str) -> str | None:
    try:
        name = codecs.lookup(label.strip()).name
    except (LookupError, ValueError):
        return None
    name = _BROWSERS.get(name, name)
    return name if name in _ENCODINGS else None


def tags(page: str) -> Iterator[tuple[str, str]]:
    """Every start tag in order: its name in lower case, and the text of its attributes, for `attributes`.

    Of end tags only "/picture". Comments, scripts and other text that only looks like tags is passed over.
    """
    at = 0
    # Within <svg> and <math>, <style/> and <title/> are empty; elsewhere the slash means nothing.
    foreign = 0
    while (idle := _IDLE.match(page, at)) and (at := idle.end()) < len(page):
        tag = _TAG.match(page, at)
        if tag is None:
            at = _after_no_tag(page, at)
            continue
        slash, name, text, end = tag.groups()
        at, name = tag.end(), name.lower()
        if not end or name == "plaintext":
            return
        if name in ("svg", "math"):
            foreign = max(0, foreign - 1) if slash else foreign + (not text.endswith("/"))
        if slash:
            if name == "picture":
                yield "/picture", ""
            continue
        if name in _TELLING_NAMES:
            yield name, text
        if name in _TEXT_ONLY and not (foreign and text.endswith("/")):
            at = _end_of_script(page, at) if name == "script" else _end_of_text(page, at, name)


def attributes(text: str) -> dict[str, str]:
    """A tag's attributes by name in lower case, character references decoded; the first of a name wins."""
    found: dict[str, str] = {}
    for name, double, single, bare in _ATTRIBUTES.findall(text):
        found.setdefault(name.lower(), _REFERENCE.sub(_referred, double or single or bare))
    return found


def _referred(match: re.Match[str]) -> str:
    """In attributes, a name without semicolon counts only if nothing that could be its end follows."""
    name = match[1]
    if name is None:
        return html.unescape(match[0])
    return html5.get(name, match[0])


def _after_no_tag(page: str, at: int) -> int:
    """Past a comment, a declaration, an instruction, or an end tag without a name."""
    if page.startswith("<!--", at):
        at += 4
        for empty in (">", "->"):
            if page.startswith(empty, at):
                return at + len(empty)
        end = _COMMENT_END.search(page, at)
        return end.end() if end else len(page)
    end_at = page.find(">", at)
    return end_at + 1 if end_at >= 0 else len(page)


def _end_of_text(page: str, at: int, name: str) -> int:
    end = _END_TAGS[name].search(page, at)
    return end.start() if end else len(page)


def _end_of_script(page: str, at: int) -> int:
    """A script that opens a comment and, in it, another script, ends after both are closed."""
    commented = doubled = False
    for token in _SCRIPT_TOKEN.finditer(page, at):
        match token[0].lower():
            case "<!--":
                commented = True
            case "-->":
                commented = doubled = False
            case "<script":
                doubled = commented
            case _ if doubled:
                doubled = False
            case _:
                return token.start()
    return len(page)


_END_TAGS = {name: re.compile(rf"</{name}(?=[{_SPACE}/>])", re.IGNORECASE) for name in _TEXT_ONLY}
