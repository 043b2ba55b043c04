"""Colour profiles are followed, in every format and mode; and a hostile one costs nothing but itself."""

import io
import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features
from profiles import SPACES, cmyk_profile, grey_profile, rgb_profile, srgb_of

from ingest.dataset.plan_record import Flags, Identity
from ingest.image import colour
from ingest.image.check import Treatment, check
from ingest.image.decode import decode
from ingest.plan.plan import fingerprint_of
from ingest.plan.settings import CrawlSettings, builds, identity_of

COLOUR = (200, 100, 50)
LOSSLESS = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
LOSSLESS["AVIF"] = {"quality": 100, "subsampling": "4:4:4", "speed": 10}
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])]


def flat(mode, colour, side=64):
    return Image.new(mode, (side, side), colour)


def middle(data):
    return np.array(decode(data).getpixel((30, 30)), int)


def levels(data, expected):
    return np.abs(middle(data) - np.asarray(expected)).max()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("space", SPACES)
def test_a_profile_becomes_srgb_when_it_is_decoded_or_encoded_again(space, kind, encode):
    profile, right = rgb_profile(*SPACES[space]), srgb_of(COLOUR, *SPACES[space])
    data = encode(flat("RGB", COLOUR), kind, icc_profile=profile, **LOSSLESS.get(kind, {}))
    # A level of littlecms's rounding, and those of the codec.
    tolerance = {"PNG": 1.5, "TIFF": 1.5, "WEBP": 1.5}.get(kind, 4)
    assert levels(data, right) <= tolerance
    kept = check(data, Treatment())
    stored = data if kept.data is None else kept.data
    assert Image.open(io.BytesIO(stored)).info["icc_profile"] == profile
    assert levels(stored, right) <= tolerance
    small = check(data, Treatment(resize=32, quality=100)).data
    assert "icc_profile" not in Image.open(io.BytesIO(small)).info
    assert levels(check(data, Treatment(resize=64, quality=100)).data, right) <= tolerance + 2
    assert np.abs(np.array(Image.open(io.BytesIO(small)).getpixel((15, 15))) - right).max() <= tolerance + 2


@pytest.mark.parametrize("kind", FORMATS)
def test_without_profiles_the_numbers_stay_and_the_profile_goes(kind, encode):
    data = encode(flat("RGB", COLOUR), kind, icc_profile=rgb_profile(*SPACES["p3"]), **LOSSLESS.get(kind, {}))
    for treatment in (Treatment(icc=False), Treatment(icc=False, resize=64, quality=100)):
        stored = check(data, treatment).data
        assert "icc_profile" not in Image.open(io.BytesIO(stored)).info
        assert levels(stored, COLOUR) <= 3


def test_a_part_of_a_large_jpeg_is_converted_too(encode):
    data = encode(flat("RGB", COLOUR, 512), "JPEG", quality=100, icc_profile=rgb_profile(*SPACES["p3"]))
    picture = decode(data, at_least=lambda width, height: (64, 64))
    assert picture.size == (64, 64)
    assert np.abs(np.array(picture.getpixel((9, 9))) - srgb_of(COLOUR, *SPACES["p3"])).max() <= 4


def test_modes_and_profiles_that_belong_together(encode):
    grey, p3, inks = grey_profile(1.0), rgb_profile(*SPACES["p3"]), cmyk_profile()
    lighter = srgb_of((100,) * 3, SPACES["gamma18"][0], 1.0)
    assert lighter[0] > 160
    assert levels(encode(flat("L", 100), "PNG", icc_profile=grey), lighter) <= 1.5
    sixteen = Image.fromarray(np.full((64, 64), 100 << 8, np.uint16))
    assert levels(encode(sixteen, "PNG", icc_profile=grey), lighter) <= 1.5
    # Grey photographs often carry the profile of their editor's colours.
    editors = rgb_profile(*SPACES["gamma18"])
    assert (
        levels(encode(flat("L", 100), "PNG", icc_profile=editors), srgb_of((100,) * 3, *SPACES["gamma18"]))
        <= 1.5
    )
    palette = flat("RGB", COLOUR).quantize(4)
    assert levels(encode(palette, "PNG", icc_profile=p3), srgb_of(COLOUR, *SPACES["p3"])) <= 1.5
    half = (np.array(srgb_of(COLOUR, *SPACES["p3"])) + 255) / 2
    assert levels(encode(flat("RGBA", (*COLOUR, 128)), "PNG", icc_profile=p3), half) <= 2
    half = (lighter + 255) / 2
    assert levels(encode(flat("LA", (100, 128)), "PNG", icc_profile=grey), half) <= 2
    # The darkest ink is black: luminances of L* 20, 60 and 100 are spread from 0 to 1.
    for ink, level in (((0, 0, 0, 255), 0), ((255, 0, 0, 0), 139), ((0, 0, 0, 0), 255)):
        data = encode(flat("CMYK", ink), "JPEG", quality=100, icc_profile=inks)
        assert levels(data, (level,) * 3) <= 2
        assert levels(check(data, Treatment(resize=64, quality=100)).data, (level,) * 3) <= 3


def test_profiles_for_other_modes_are_passed_over(encode):
    for mode, number, profile in (("RGB", COLOUR, grey_profile(1.0)), ("L", 100, cmyk_profile())):
        data = encode(flat(mode, number), "PNG", icc_profile=profile)
        assert levels(data, number) == 0
        assert check(data, Treatment()).status == "kept"


def test_a_profile_that_says_srgb_costs_nothing(encode):
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),):
        assert colour.conversion(profile).transform is None
        picture = flat("RGB", COLOUR)
        assert colour.conversion(profile)(picture) is picture
        assert levels(encode(picture, "PNG", icc_profile=profile), COLOUR) == 0
    assert colour.conversion(rgb_profile(*SPACES["p3"])) is colour.conversion(rgb_profile(*SPACES["p3"]))


def chained(profile):
    """The same with a tag of any number of steps."""
    at = int.from_bytes(profile[136:140], "big")
    return profile[:at] + b"mpet" + profile[at + 4 :]


@pytest.mark.parametrize(
    "change",
    [
        lambda profile: profile + bytes(colour.MAX_BYTES),
        lambda profile: b"",
        lambda profile: profile[:100],
        lambda profile: profile[:200],
        lambda profile: profile.replace(b"acsp", b"ascp"),
        lambda profile: profile.replace(b"mntr", b"link"),
        lambda profile: profile.replace(b"RGB ", b"6CLR"),
        lambda profile: profile.replace(b"curv", b"vruc"),
        lambda profile: profile[:128] + struct.pack(">I", 1 << 30) + profile[132:],
        chained,
        lambda profile: b"colours" * 50,
    ],
)
def test_D4_a_profile_that_cannot_be_used_is_passed_over(change, encode):
    profile = change(rgb_profile(*SPACES["p3"]))
    assert colour.conversion(profile) is None
    for kind in ("JPEG", "WEBP"):
        data = encode(flat("RGB", COLOUR), kind, icc_profile=profile, **LOSSLESS[kind])
        for treatment in (Treatment(), Treatment(resize=64, quality=100)):
            verdict = check(data, treatment)
            assert verdict.status == "kept"
            assert levels(data if verdict.data is None else verdict.data, COLOUR) <= 3


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    profile=st.sampled_from([rgb_profile(*SPACES["p3"]), grey_profile(1.8), cmyk_profile()]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_D4_any_damage_of_a_profile_ends_in_a_picture(profile, edits):
    damaged = bytearray(profile)
    for place, value in edits:
        damaged[int(place**2 * len(damaged))] = value
    found = colour.conversion(bytes(damaged))
    if found is not None:
        assert found(flat(found.space, 0, 4)).size == (4, 4)


def test_the_fingerprint_holds_whether_profiles_are_followed_and_by_what():
    followed, raw = (
        identity_of(CrawlSettings(treatment=Treatment(icc=icc)), [], extends=()) for icc in (True, False)
    )
    assert fingerprint_of(followed) != fingerprint_of(raw)
    assert raw.settings.plain()["--no-icc"] is True
    assert CrawlSettings.from_flags(raw.settings).treatment.icc is False
    assert {"pillow", "libjpeg_turbo", "littlecms2", "avif"} <= builds().keys()


def test_a_plan_made_before_profiles_were_followed_is_read_with_the_same_fingerprint():
    plain = identity_of(CrawlSettings(), [], extends=()).plain()
    del plain["settings"]["--no-icc"]
    before = Identity.model_validate_json(json.dumps(plain))
    assert "--no-icc" not in before.plain()["settings"]
    assert fingerprint_of(before) == fingerprint_of(Identity.model_validate_json(before.to_bytes()))
    assert isinstance(before.settings, Flags)
    CrawlSettings.from_flags(before.settings)
