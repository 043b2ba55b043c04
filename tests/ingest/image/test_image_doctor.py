"""The doctor's rows about decoders: each state of Pillow and pillow-simd is told apart."""

import importlib.metadata
import types

import pytest
from PIL import features

from ingest.image import doctor


@pytest.fixture
def cpuinfo(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("flags\t\t: fpu sse4_2 avx avx2\n")
    return path


def pillow(version):
    return types.SimpleNamespace(__version__=version)


def without_simd_package(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_rows_of_this_machine():
    rows = {check.name: check for check in doctor.image_checks()}
    parts = {"JPEG", "PNG", "WebP", "TIFF", "AVIF", "colours"}
    assert {"decoder", *parts, "simplejpeg", "pyarrow", "webdataset"} == set(rows)
    assert rows["decoder"].required
    assert rows["pyarrow"].status == "ok"


def test_plain_pillow_is_a_warning_where_simd_would_help(cpuinfo, monkeypatch, tmp_path):
    without_simd_package(monkeypatch)
    check = doctor.decoder_check(pillow("12.1.1"), cpuinfo)
    assert (check.status, check.detail) == ("warning", "Pillow 12.1.1")
    assert "libjpeg-dev" in check.remedy
    assert doctor.decoder_check(pillow("12.1.1"), tmp_path / "no cpuinfo").status == "ok"


def test_overwritten_pillow_simd_is_told(cpuinfo, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "12.1.1.post0")
    check = doctor.decoder_check(pillow("13.0.0"), cpuinfo)
    assert check.status == "warning"
    assert check.detail.startswith("Pillow 13.0.0 has overwritten pillow-simd 12.1.1.post0")
    assert "--force-reinstall" in check.remedy


def test_simd_without_avx2_is_told(cpuinfo, monkeypatch):
    monkeypatch.setattr(doctor, "built_with_avx2", lambda: False)
    check = doctor.decoder_check(pillow("12.1.1.post0"), cpuinfo)
    assert check.status == "warning"
    assert check.remedy.startswith('CC="cc -mavx2" pip install')
    monkeypatch.setattr(doctor, "built_with_avx2", lambda: True)
    assert doctor.decoder_check(pillow("12.1.1.post0"), cpuinfo).detail == "pillow-simd 12.1.1.post0, AVX2"


@pytest.mark.parametrize(
    ("turbo", "jpeg", "status"), [("2.1.5", True, "ok"), (None, True, "warning"), (None, False, "missing")]
)
def test_jpeg_decoder(monkeypatch, turbo, jpeg, status):
    monkeypatch.setattr(features, "version", lambda name: turbo if name == "libjpeg_turbo" else "8.0")
    monkeypatch.setattr(features, "check", lambda name: jpeg)
    check = doctor.codec_checks(pillow("12.1.1"))[0]
    assert (check.name, check.status) == ("JPEG", status)
    assert bool(check.remedy) == (status != "ok")


@pytest.mark.parametrize("feature", ["zlib", "webp", "libtiff", "avif", "littlecms2"])
def test_a_part_that_a_build_lacks_is_told_and_the_remedy_installs_it(feature, monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name != feature)
    for version in ("12.1.1", "12.1.1.post0"):
        told = [check for check in doctor.codec_checks(pillow(version)) if check.status != "ok"]
        assert [check.status for check in told] == ["warning"]
        assert f"without {feature}" in told[0].detail
        if version == "12.1.1":
            # Wheels have all parts.
            assert told[0].remedy.endswith("--only-binary :all: pillow==12.1.1")
        elif feature == "avif":
            assert told[0].remedy == "make clean install"
        else:
            headers = {"zlib": "zlib1g", "webp": "libwebp", "libtiff": "libtiff", "littlecms2": "liblcms2"}
            assert f"{headers[feature]}-dev" in told[0].remedy
            # What pip built before, it would install again.
            assert "--no-cache-dir pillow-simd" in told[0].remedy


def test_pillow_that_cannot_be_imported_is_a_row(monkeypatch):
    real = doctor.load
    broken = (None, "installed, but cannot be imported: ImportError: libjpeg.so.62")
    monkeypatch.setattr(doctor, "load", lambda module: broken if module == "PIL" else real(module))
    check = doctor.image_checks()[0]
    assert (check.name, check.status, check.required) == ("decoder", "missing", True)
    assert "libjpeg.so.62" in check.detail
