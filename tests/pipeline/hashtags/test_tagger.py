"""Nouns in captions and hashtags."""

import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.hashtags.pack_wordnet import packed
from pipeline.hashtags.tagger import Tagger
from pipeline.hashtags.wordnet import FILES, PACKED, wordnet
from pipeline.hashtags.words import phrases, words
from pipeline.recipe.stages import DEPICTABLE

EVERYTHING = Tagger(wordnet(), FILES)
DEPICTED = Tagger(wordnet(), DEPICTABLE)
SYNSETS = list(wordnet().synsets())
NOUNS = [(noun, synset) for synset in SYNSETS for noun in synset.nouns]
FULL_WIDTH = {code: code + 0xFEE0 for code in range(ord("!"), ord("~") + 1)}


def named(found: dict[str, object]) -> list[str]:
    return list(found)


@given(
    st.sampled_from(NOUNS), st.sampled_from([str.upper, str.title, lambda text: text.translate(FULL_WIDTH)])
)
def test_every_noun_of_three_words_is_found_in_its_first_sense_however_it_is_written(noun, written) -> None:
    text, synset = noun
    if len(text.split()) <= 3:
        assert named(EVERYTHING.of_label(written(text))) == [synset.name]
        assert named(EVERYTHING.of_label(f"#{written(text).replace(' ', '_')}")) == [synset.name]


@given(st.sampled_from([noun for noun, _ in NOUNS if " " in noun]))
def test_several_words_joined_to_a_hashtag_mean_what_they_mean_apart_unless_they_are_a_word(
    noun: str,
) -> None:
    joined = noun.replace(" ", "")
    (found,) = EVERYTHING.of_label(f"#{joined}").values()
    assert found == wordnet().find(joined) or any(each.replace(" ", "") == joined for each in found.nouns)


@given(st.text())
def test_any_text_gives_tags_and_the_words_of_its_words_are_the_same_words(text: str) -> None:
    assert words(" ".join(words(text))) == words(text)
    assert [word for _, phrase in phrases(text) for word in phrase] == words(text)
    assert {synset.file for synset in DEPICTED.of_caption(text).values()} <= set(DEPICTABLE)


@given(st.lists(st.sampled_from(["brown", "bear", "dog", "house", "grass", "hot", "the"]), max_size=7))
def test_the_longest_noun_wins_and_no_word_is_used_twice(phrase: list[str]) -> None:
    def longest(rest: list[str]) -> list[str]:
        for length in (3, 2, 1):
            synset = wordnet().find(" ".join(rest[:length])) if len(rest) >= length else None
            if synset is not None and rest[:length] != ["the"]:
                return [synset.name, *longest(rest[length:])]
        return longest(rest[1:]) if rest else []

    assert named(EVERYTHING.of_caption(" ".join(phrase))) == list(dict.fromkeys(longest(phrase)))


@pytest.mark.parametrize(
    ("caption", "nouns"),
    [
        ("Two brown bears, and a goose", ["brown bear", "goose"]),
        ("brown. Bear", ["bear"]),
        ("#brownbears at the lake #UrsusArctos", ["brown bear", "lake"]),
        ("brownbears", []),
        ("The dog's bowl; mice & axes", ["dog", "bowl", "mouse", "axe"]),
        ("You can see what is behind and back again", []),
        ("#can", ["can"]),
        ("a #hash # dog", ["hash", "dog"]),
        ("", []),
    ],
)
def test_captions(caption: str, nouns: list[str]) -> None:
    expected = [wordnet().find(noun) for noun in nouns]
    found = DEPICTED.of_caption(caption)
    assert list(found.values()) == [synset for synset in expected if synset and synset.file in DEPICTABLE]


def test_synsets_are_named_as_imagenet_names_its_classes() -> None:
    assert named(DEPICTED.of_label("brownbear")) == named(DEPICTED.of_label("ursus arctos")) == ["n02132136"]
    assert {noun: wordnet().find(noun).name for noun in ("tench", "goldfish", "toilet tissue")} == {  # type: ignore[union-attr]
        "tench": "n01440764",
        "goldfish": "n01443537",
        "toilet tissue": "n15075141",
    }


def test_the_package_s_file_is_small_and_has_its_licence_beside_it() -> None:
    assert PACKED.stat().st_size < 1_000_000
    assert "WordNet 3.0 Copyright 2006" in PACKED.with_name("WORDNET-LICENSE.txt").read_text()
    assert (len(SYNSETS), len(NOUNS)) == (70_234, 117_578)
    assert all(" ".join(words(noun)) == noun for noun, _ in NOUNS)


def test_the_file_is_packed_from_wordnet_s_database(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(
        "  1 licence\n"
        "00000010 05 n 02 Brown_Bear 0 ursus_arctos 0 000 | a bear\n"
        "00000020 06 n 01 bear 0 000 | a toy\n"
        "00000030 04 n 01 st._bear 0 000 | a feast\n"
    )
    (tmp_path / "index.noun").write_text(
        "  1 licence\n"
        "bear n 2 0 2 0 00000020 00000010\n"
        "brown_bear n 1 1 @ 1 0 00000010\n"
        "st._bear n 1 1 @ 1 0 00000030\n"
        "ursus_arctos n 1 1 @ 1 0 00000010\n"
    )
    (tmp_path / "noun.exc").write_text("beares bear\n")
    assert lzma.decompress(packed(tmp_path)).decode() == (
        "00000010 05 brown_bear ursus_arctos\n00000020 06 bear\n00000030 04 st_bear\n\nbeares bear\n"
    )
