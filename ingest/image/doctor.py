"""What decodes and stores images on this machine: the rows that `ingest doctor` adds to the shared ones."""

import importlib.metadata
from pathlib import Path
from typing import Any

from cluster.doctor import Finding, load, package_check

# The one pair that is built from the same source; any other version of Pillow beside it is another codec.
SIMD_VERSION = "12.1.1.post0"
HEADERS = "libjpeg-dev zlib1g-dev libwebp-dev libtiff-dev liblcms2-dev"
INSTALL_SIMD = (
    f"apt-get install gcc python3-dev {HEADERS}, then make clean install "
    "(Pillow is used until then: same results up to rounding, about half as fast)"
)
# Without the cache: pip keeps what it built, with the libraries that were there at the time.
REINSTALL = "pip install --no-deps --force-reinstall --no-cache-dir"
# What Pillow can be built without, and what becomes of images then.
PARTS = (
    ("PNG", "zlib", "PNG files would be rejected as undecodable"),
    ("WebP", "webp", "WebP files would be rejected as undecodable"),
    ("TIFF", "libtiff", "compressed TIFF files would fail as no_decoder"),
    ("AVIF", "avif", "AVIF files would be rejected as format_not_supported"),
    ("colours", "littlecms2", "colour profiles would be taken out and not followed"),
)
# 256-bit integer instructions (VEX map 0F38): a build with -mavx2 has about a thousand, one without has none.
AVX2_OPCODE = b"\xc4\xe2\x7d"
AVX2_BUILD_COUNT = 100


def image_checks() -> list[Finding]:
    """The decoder that is active, the codecs it was built with, and the packages of the dataset's format."""
    pil, found = load("PIL")
    if pil is None:
        remedy = "pip install 'pillow>=11.3'"
        decoder = [Finding(name="decoder", status="missing", detail=found, remedy=remedy, required=True)]
    else:
        decoder = [decoder_check(pil), *codec_checks(pil)]
    simplejpeg = package_check(
        "simplejpeg", remedy="nothing to do: Pillow decodes instead", purpose="faster JPEG decoding"
    )
    return [
        *decoder,
        simplejpeg,
        package_check("pyarrow", remedy="pip install 'pyarrow>=20'", purpose="metadata", required=True),
        package_check(
            "webdataset", remedy="pip install 'webdataset>=1.0'", purpose="reading shards elsewhere"
        ),
    ]


def decoder_check(pil: Any, cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    """Which of Pillow and pillow-simd owns the module PIL, and whether it was built for this processor."""
    version = str(pil.__version__)
    processor_has_avx2 = " avx2 " in _text(cpuinfo).replace("\n", " ")
    if ".post" not in version:
        try:
            overwritten = importlib.metadata.version("pillow-simd")
        except importlib.metadata.PackageNotFoundError:
            detail = f"Pillow {version}"
            if not processor_has_avx2:
                return Finding(name="decoder", status="ok", detail=detail, required=True)
            return Finding(
                name="decoder", status="warning", detail=detail, remedy=INSTALL_SIMD, required=True
            )
        detail = f"Pillow {version} has overwritten pillow-simd {overwritten}: both own the module PIL"
        remedy = f"make install, or: pip install --no-deps --force-reinstall pillow-simd=={SIMD_VERSION}"
        return Finding(name="decoder", status="warning", detail=detail, remedy=remedy, required=True)
    if not processor_has_avx2:
        return Finding(name="decoder", status="ok", detail=f"pillow-simd {version}, SSE4", required=True)
    if not built_with_avx2():
        detail = f"pillow-simd {version}, built without AVX2, which this processor has"
        remedy = f'CC="cc -mavx2" {REINSTALL} pillow-simd=={SIMD_VERSION}'
        return Finding(name="decoder", status="warning", detail=detail, remedy=remedy, required=True)
    return Finding(name="decoder", status="ok", detail=f"pillow-simd {version}, AVX2", required=True)


def built_with_avx2() -> bool:
    """pillow-simd chooses its instructions when compiled and does not say which: look into the build."""
    from PIL import _imaging

    return Path(_imaging.__file__).read_bytes().count(AVX2_OPCODE) >= AVX2_BUILD_COUNT


def codec_checks(pil: Any) -> list[Finding]:
    """JPEG through libjpeg-turbo, and the parts that a build may lack."""
    from PIL import features

    rebuild = _rebuild(str(pil.__version__))
    turbo = features.version("libjpeg_turbo")
    if turbo:
        checks = [Finding(name="JPEG", status="ok", detail=f"libjpeg-turbo {turbo}", required=True)]
    elif features.check("jpg"):
        detail = f"libjpeg {features.version('jpg')}, not libjpeg-turbo: decodes several times slower"
        checks = [Finding(name="JPEG", status="warning", detail=detail, remedy=rebuild, required=True)]
    else:
        detail = "PIL was built without JPEG"
        checks = [Finding(name="JPEG", status="missing", detail=detail, remedy=rebuild, required=True)]
    for name, feature, without in PARTS:
        if features.check(feature):
            checks.append(Finding(name=name, status="ok", detail=f"{feature} {features.version(feature)}"))
        else:
            detail = f"PIL was built without {feature}: {without}"
            # Debian's libavif is too old for Pillow, whose wheel brings its own, and stays below pillow-simd.
            remedy = (
                "make clean install" if feature == "avif" and ".post" in str(pil.__version__) else rebuild
            )
            checks.append(Finding(name=name, status="warning", detail=detail, remedy=remedy))
    return checks


def _rebuild(version: str) -> str:
    """How to get this decoder with all its parts."""
    if ".post" not in version:
        # Its wheels have them all.
        return f"{REINSTALL} --only-binary :all: pillow=={version}"
    install = f'CC="cc -mavx2" {REINSTALL} pillow-simd=={SIMD_VERSION}'
    return f"apt-get install gcc python3-dev {HEADERS}, then {install}"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
