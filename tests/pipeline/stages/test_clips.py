"""Made-up clips: what is drawn, what is heard, and the files."""

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression

from cluster.errors import UserError
from pipeline.recipe.stages import ClipsRecipe
from pipeline.stages.clip import FPS, RATE
from pipeline.stages.clips import identity, make_clips
from pipeline.stages.synthetic_clips import synthesise
from pipeline.stages.tuxpaint_clips import read_pairs


def small(**values: object) -> ClipsRecipe:
    fewer = {"train_clips": 8, "test_clips": 4, "side": 16, "seconds": 1.0, "run": {"workers": 1}}
    return ClipsRecipe.model_validate({**fewer, **values})


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.mp4"))


def read(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    with av.open(path) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        file.seek(0)
        sound = [frame.to_ndarray()[0] for frame in file.decode(audio=0)]
    return np.stack(frames), np.concatenate(sound) / 2.0**15


def test_D1_a_seed_draws_the_same_clips_and_another_seed_others(tmp_path: Path) -> None:
    drawn = [
        make_clips(small(seed=seed, train_clips=count), tmp_path / str(number))
        for number, (seed, count) in enumerate([(0, 8), (0, 8), (1, 8)])
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0]["drawn"] != drawn[2]["drawn"]
    assert files(tmp_path / "0") == files(tmp_path / "1")
    train, test = ((tmp_path / "0" / split).iterdir() for split in ("train", "test"))
    assert len([*train]) == drawn[0]["labels"] == 8
    assert len([*test]) == 4


def test_a_file_holds_what_was_drawn(tmp_path: Path) -> None:
    make_clips(small(train_clips=1, test_clips=1, side=64), tmp_path)
    drawn = synthesise("disc", "bounce", np.random.default_rng((0, 0, 0)), side=64, seconds=1.0)
    frames, sound = read(tmp_path / "train" / "disc_bounce" / "000000.mp4")
    assert frames.shape == (FPS, 64, 64, 3)
    assert np.abs(frames.astype(int) - drawn.frames).mean() < 8  # of 255: H.264 has fewer colours than pixels
    assert len(sound) == len(drawn.sound) == RATE
    assert np.abs(sound - drawn.sound).max() <= 1 / 2**15


@pytest.fixture(scope="module")
def examples() -> tuple[NDArray[Any], ...]:
    """Of 80 clips: the class of each, whether it moves up or sideways, whether it sounds slow, its timbre."""
    classes, moves, slow, timbre = [], [], [], []
    for number in range(80):
        shape = ("disc", "square", "triangle", "cross")[number % 4]
        motion = ("bounce", "shake")[number // 4 % 2]
        clip = synthesise(shape, motion, np.random.default_rng(number), side=24, seconds=2.0)
        pixels = clip.frames.astype(float).mean(3)
        rows, columns = (np.abs(np.diff(pixels.mean(axis), axis=0)).mean() for axis in (2, 1))
        loudness = (clip.sound.reshape(-1, 320) ** 2).mean(1)
        beat = np.abs(np.fft.rfft(loudness - loudness.mean()))[:40]
        power = np.convolve(np.abs(np.fft.rfft(clip.sound)) ** 2, np.ones(5), "same")
        above = np.log(
            power[np.minimum(power.argmax() * np.arange(2, 40) // 4, len(power) - 1)] / power.max()
        )
        classes.append(number % 8)
        moves.append([np.log(rows / columns)])
        slow.append([np.log(beat[3:6].sum() / beat.sum())])  # 1.5 to 2.5 strikes a second
        timbre.append(above)
    return tuple(map(np.array, (classes, moves, slow, timbre)))


def test_motion_is_seen_and_motion_and_shape_are_heard(examples: tuple[NDArray[Any], ...]) -> None:
    classes, moves, slow, timbre = examples
    train, test = slice(0, 56), slice(56, None)
    for x, y in ((moves, classes // 4), (slow, classes // 4), (timbre, classes % 4)):
        found = LogisticRegression(max_iter=2_000).fit(x[train], y[train]).score(x[test], y[test])
        assert found > 0.85


def test_a_larger_thing_sounds_lower() -> None:
    size, pitch = [], []
    for number in range(12):
        clip = synthesise("disc", "bounce", np.random.default_rng(number), side=32, seconds=1.0)
        grey = clip.frames[8].astype(float).mean(2)
        corner = np.median(grey[[0, 0, -1, -1], [0, -1, 0, -1]])
        size.append((np.abs(grey - corner) > 50).sum())
        pitch.append(np.abs(np.fft.rfft(clip.sound)).argmax())
    assert np.corrcoef(size, np.log(pitch))[0, 1] < -0.9


def stamps(folder: Path) -> Path:
    """Two kinds of eight pictures, each of which two voices name."""
    tone = (np.sin(np.arange(24_000) * 0.06) * 16_000).astype(np.int16)
    for kind, colour in (("animals", "red"), ("food", "green")):
        for number in range(8):
            path = folder / kind / "some" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGBA", (20, 12), colour).save(path)
            for language in ("", "_fr"):
                with av.open(path.with_name(f"{number}_desc{language}.ogg"), "w") as file:
                    stream = file.add_stream("libopus", rate=48_000, layout="mono")
                    frame = av.AudioFrame.from_ndarray(tone[None], format="s16", layout="mono")
                    frame.sample_rate = 48_000
                    file.mux(stream.encode(frame))
                    file.mux(stream.encode(None))
    return folder


def test_tuxpaint_pictures_are_shown_while_their_names_are_said(tmp_path: Path) -> None:
    recipe = small(source="tuxpaint", stamps=str(stamps(tmp_path / "stamps")), side=32)
    metrics = make_clips(recipe, tmp_path / "made")
    assert (metrics["labels"], metrics["train_clips"], metrics["test_clips"]) == (2, 8, 4)
    assert {name.split("/")[1] for name in files(tmp_path / "made")} == {"animals", "food"}
    frames, sound = read(tmp_path / "made" / files(tmp_path / "made" / "train")[0].join(("train/", "")))
    reddest = frames[4].reshape(-1, 3).astype(int)
    assert (reddest[:, 0] - reddest[:, 1:].max(1)).max() > 150
    assert np.abs(np.fft.rfft(sound)).argmax() == pytest.approx(0.06 * 48_000 / (2 * np.pi), abs=5)


def test_no_picture_is_in_training_and_in_the_test(tmp_path: Path) -> None:
    pairs = read_pairs(stamps(tmp_path), np.random.default_rng(0))
    train, test = ({pair.picture for pair in pairs[split]} for split in ("train", "test"))
    assert (len(train), len(test)) == (12, 4)
    assert not train & test
    assert len(pairs["train"]) == 24


def test_without_stamps_one_sentence_says_where_they_come_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get install tuxpaint-stamps-default"):
        identity(small(source="tuxpaint", stamps=str(tmp_path / "none")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has 0 kinds .* apt-get install tuxpaint-stamps-default"):
        make_clips(small(source="tuxpaint", stamps=str(tmp_path / "empty")), tmp_path / "made")
