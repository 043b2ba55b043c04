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
        help="The dataset's folder or bucket (s3://, gs://, az://); a crawl that stopped is continued there."
    ),
]
Extend = Annotated[
    bool,
    typer.Option(
        "--extend",
        help="Add what a dataset does not have: from other sources, or from its own if they have grown.",
    ),
]
FollowLinks = Annotated[
    bool,
    typer.Option(
        "--follow-links",
        help="In folders, also follow links to other folders, and links that lead out of them.",
    ),
]

# What is made of an image.
Resize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Resize the shorter side to this many pixels; by default, files are kept as they are."
    ),
]
CropOption = Annotated[
    Crop | None,
    typer.Option(
        "--crop",
        help="With --resize: keep all of the image, or only its central square. [default: keep_ratio]",
    ),
]
EncodingOption = Annotated[
    Encoding | None, typer.Option("--encoding", help="With --resize: the format to store. [default: jpeg]")
]
Quality = Annotated[
    int | None, typer.Option(min=1, max=100, help="With --resize: the quality of the encoding. [default: 95]")
]
Icc = Annotated[
    bool,
    typer.Option(
        "--icc/--no-icc",
        help="Honour colour profiles: with --resize, convert to sRGB; otherwise keep them in the file. "
        "--no-icc drops them and leaves the pixel values as they are.",
    ),
]
Phash = Annotated[
    bool,
    typer.Option(
        help="Compute a perceptual hash; without it, a JPEG that is kept as it is need not be decoded."
    ),
]

# Bounds, of which videos have others.
UnitRows = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=KEY_SLOTS,
        help=f"Rows per work unit and shard. [default: {_D.unit_rows}; {VIDEOS.unit_rows} with --video]",
    ),
]
MaxBytes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Reject larger files unread. [default: {_D.treatment.limits.max_bytes}; "
        f"{VIDEOS.treatment.limits.max_bytes} with --video]",
    ),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Reject images and frames that claim more, without decoding them. [default: "
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
    bool, typer.Option("--video", help="Read the sources as videos, and cut them into clips with sound.")
]
SegmentSeconds = Annotated[
    float | None,
    typer.Option(
        help="With --video: cut longer videos into clips of this length, at keyframes. [default: 10]"
    ),
]
AllowSilent = Annotated[
    bool, typer.Option("--allow-silent", help="With --video: also keep clips without sound.")
]
Decode = Annotated[
    bool,
    typer.Option(
        "--decode/--no-decode",
        help="With --video: decode every clip to its end; otherwise damage, loudness and hash are unknown.",
    ),
]

# How lists are read.
UrlColumn = Annotated[
    str | None, typer.Option(help="In lists: the column of URLs. [default: recognised by its name]")
]
CaptionColumn = Annotated[str | None, typer.Option(help="In lists: the column of captions or alt texts.")]
LabelColumn = Annotated[str | None, typer.Option(help="In lists: the column of labels or hashtags.")]
ColumnNames = Annotated[
    str | None,
    typer.Option(metavar="NAME,…", help="The columns of a csv or tsv without a header, in order."),
]
ColumnTypes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=TYPE",
        help=f"The type of a column in csv, tsv and JSON, otherwise text: {', '.join(TYPES)}. Repeatable.",
    ),
]

# How sites are asked.
Contact = Annotated[
    str | None,
    typer.Option(
        envvar="INGEST_CONTACT",
        help="A URL or e-mail address where webmasters can reach you; part of the User-Agent.",
    ),
]
Deadline = Annotated[float, typer.Option(min=0.1, help="Seconds for one request, including redirects.")]
Tries = Annotated[
    int, typer.Option("--attempts", min=1, help="How many times to try a URL that may succeed later.")
]
MaxRedirects = Annotated[int, typer.Option(min=0, help="How many redirects to follow.")]
PerHost = Annotated[int, typer.Option(min=1, help="Simultaneous connections to one host.")]
PerAddress = Annotated[
    int, typer.Option(min=1, help="Simultaneous connections to one IP address, whichever hosts it serves.")
]
PerHostRate = Annotated[float | None, typer.Option(min=0.001, help="Requests per second to one host.")]
HostLimitsPath = Annotated[
    Path | None,
    typer.Option(
        "--host-limits",
        help="A file of limits for single hosts, one per line: HOST CONNECTIONS RATE; - keeps the general "
        "limit, *.HOST means every subdomain. A Crawl-delay is obeyed all the same.",
    ),
]
Connections = Annotated[int, typer.Option(min=1, help="Simultaneous connections to all hosts together.")]
PerSite = Annotated[
    int | None,
    typer.Option(min=1, help="The most URLs to plan for one site (all of its hosts): the first ones listed."),
]
GiveUp = Annotated[
    float | None,
    typer.Option(
        metavar="HOURS",
        min=0,
        help="Stop this long after planning. URLs not tried by then fail (given_up), and "
        "`ingest retry` tries them.",
    ),
]
IgnoreRobots = Annotated[
    bool, typer.Option("--ignore-robots", help="Ignore robots.txt; the dataset records this.")
]
AllowPrivate = Annotated[
    list[str] | None,
    typer.Option(
        help="A network (CIDR) that may be accessed although it is private; addresses of this machine and "
        "of cloud services must be given one by one. Repeatable."
    ),
]
DenyNetwork = Annotated[
    list[str] | None,
    typer.Option(help="A network (CIDR) never to access, whatever else is allowed. Repeatable."),
]

MetricsPath = Annotated[
    Path | None,
    typer.Option(
        "--metrics-file",
        help="A file of metrics for Prometheus, written every ten seconds: for node-exporter, *.prom in its "
        "textfile folder.",
    ),
]
