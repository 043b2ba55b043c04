"""Numbers and hostile text, as people read them."""


def visible(text: str, *, but: str = "") -> str:
    """The text with every unprintable character as an escape: controls, bidirectional marks, lone surrogates.

    Paths and labels come from the wild: raw, they could move a terminal's cursor or reverse a page's lines.

    Args:
        but: characters that stay, such as the line breaks of a log.
    """
    return "".join(
        c if c.isprintable() or c in but else c.encode("unicode_escape").decode("ascii") for c in text
    )


def in_bytes(count: float) -> str:
    """A number of bytes, in decimal units: 12 B, 4.0 kB, 250 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def duration(seconds: float) -> str:
    """A time: 0.4 s, 42 s, 3 min 5 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def several(count: int, noun: str) -> str:
    """1 unit, 2 units, 1,024 units."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
