"""The options of `ingest crawl-shards`, some of which are also those of `ingest retry`."""

from pathlib import Path
from typing import Annotated

import typer

from ingest.dataset.keys import KEY_SLOTS
from ingest.image.check import Crop, Encoding
from ingest.plan.settings import VIDEOS, CrawlSettings
from ingest.sources.url_list import TYPES

_D = CrawlSettings()

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Folders, tars, WARCs, tables of images (.parquet), and lists of URLs or files (.parquet, .csv, "
        ".tsv, .json, .jsonl, .txt; .gz, .zst); local, s3://, gs://, az:// or http://; * in the name.",
    ),
]
Output = Annotated[
    str,
    typer.Option(
        help="The dataset's folder or bucket (s3://, gs://, az://); a crawl that stopped goes on there."
    ),
]
Extend = Annotated[
    bool,
    typer.Option(
        "--extend",
        help="Add to a dataset what it does not have: of other sources, or of its own that have grown.",
    ),
]
FollowLinks = Annotated[
    bool,
    typer.Option("--follow-links", help="Of folders, also those that lead out of them, and to folders."),
]

# What is made of an image.
Resize = Annotated[
    int | None, typer.Option(min=1, help="Shorter side in pixels; without it, bytes are kept.")
]
CropOption = Annotated[
    Crop | None,
    typer.Option("--crop", help="All of it, or its middle square, with --resize. [default: keep_ratio]"),
]
EncodingOption = Annotated[
    Encoding | None, typer.Option("--encoding", help="What is stored, with --resize. [default: jpeg]")
]
Quality = Annotated[
    int | None, typer.Option(min=1, max=100, help="Of the encoder, with --resize. [default: 95]")
]
Icc = Annotated[
    bool,
    typer.Option(
        "--icc/--no-icc",
        help="Follow colour profiles: to sRGB with --resize, otherwise they stay in the file. Without, "
        "they are left out, and the numbers stay.",
    ),
]
Phash = Annotated[
    bool, typer.Option(help="Make the perceptual hash; without it, the pixels of a kept JPEG stay unread.")
]

# Bounds, of which videos have others.
UnitRows = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=KEY_SLOTS,
        help=f"Attempts per work unit and shard. [default: {_D.unit_rows}; {VIDEOS.unit_rows} with --video]",
    ),
]
MaxBytes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Larger files are rejected unread. [default: {_D.treatment.limits.max_bytes}; "
        f"{VIDEOS.treatment.limits.max_bytes} with --video]",
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Pictures and frames that claim more are rejected undecoded. [default: "
        f"{_D.treatment.limits.max_pixels}; {VIDEOS.treatment.limits.max_pixels} with --video]",
    ),
]
Seconds = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        help="CPU time that checking one image or clip may take. [default: "
        f"{_D.seconds:g}; {VIDEOS.seconds:g} with --video]",
    ),
]
MemoryMb = Annotated[
    int | None,
    typer.Option(
        min=64,
        help="Memory that checking one image or clip may take, MiB. [default: "
        f"{_D.memory_mb}; {VIDEOS.memory_mb} with --video]",
    ),
]

# What is made of a video.
Video = Annotated[
    bool, typer.Option("--video", help="Sources are videos: they become clips with their sound.")
]
SegmentSeconds = Annotated[
    float | None,
    typer.Option(help="With --video: a longer one becomes several clips, cut at keyframes. [default: 10]"),
]
AllowSilent = Annotated[
    bool, typer.Option("--allow-silent", help="With --video: clips without a sound are kept, too.")
]
Decode = Annotated[
    bool,
    typer.Option(
        "--decode/--no-decode",
        help="With --video: decode clips to their end. Without, damage, loudness and hash stay unknown.",
    ),
]

# How lists are read.
UrlColumn = Annotated[str | None, typer.Option(help="Of lists. [default: seen from the names]")]
CaptionColumn = Annotated[str | None, typer.Option(help="Of lists: alt text or caption.")]
LabelColumn = Annotated[str | None, typer.Option(help="Of lists: labels or hashtags.")]
ColumnNames = Annotated[
    str | None,
    typer.Option(metavar="NAME,…", help="Of a csv or tsv without a header: its columns, in their order."),
]
ColumnTypes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=TYPE",
        help=f"Of csv, tsv and JSON, whose values are text: {', '.join(TYPES)}. Repeatable.",
    ),
]

# How sites are asked.
Contact = Annotated[
    str | None,
    typer.Option(
        envvar="INGEST_CONTACT", help="Where webmasters reach you: a URL or an e-mail, in the User-Agent."
    ),
]
Deadline = Annotated[float, typer.Option(min=0.1, help="Seconds for one try of a URL, redirects included.")]
Tries = Annotated[
    int, typer.Option("--attempts", min=1, help="How often a URL is tried that may succeed later.")
]
MaxRedirects = Annotated[int, typer.Option(min=0, help="Followed in one try.")]
PerHost = Annotated[int, typer.Option(min=1, help="Connections to a host at a time.")]
PerAddress = Annotated[
    int, typer.Option(min=1, help="Connections to an address at a time, whichever hosts it serves.")
]
PerHostRate = Annotated[float | None, typer.Option(min=0.001, help="Requests to a host per second.")]
HostLimitsPath = Annotated[
    Path | None,
    typer.Option(
        "--host-limits",
        help="Hosts with limits of their own, a line each: HOST CONNECTIONS RATE; - for that of others, "
        "*.HOST for each host below. A Crawl-delay is kept all the same.",
    ),
]
Connections = Annotated[int, typer.Option(min=1, help="At a time, over all hosts.")]
PerSite = Annotated[
    int | None,
    typer.Option(
        min=1, help="URLs of a site (of all its hosts) that are planned at most: the first of the lists."
    ),
]
GiveUp = Annotated[
    float | None,
    typer.Option(
        metavar="HOURS",
        min=0,
        help="After planning; what was not asked for by then fails (given_up): `ingest retry` asks for it.",
    ),
]
IgnoreRobots = Annotated[
    bool, typer.Option("--ignore-robots", help="Do not ask for robots.txt; the dataset says so.")
]
AllowPrivate = Annotated[
    list[str] | None,
    typer.Option(
        help="A network, as CIDR, that may be asked though it is not public; addresses of this machine "
        "and of a cloud's services, one by one. Repeatable."
    ),
]
DenyNetwork = Annotated[
    list[str] | None,
    typer.Option(help="A network, as CIDR, that may not be asked, whatever is allowed. Repeatable."),
]

MetricsPath = Annotated[
    Path | None,
    typer.Option(
        "--metrics-file",
        help="Written every ten seconds, for Prometheus; *.prom in node-exporter's textfile folder.",
    ),
]
