"""What AVID's bank remembers of a video, computed anew: embeddings of clips and of their sound, which can be
compared with each other.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.errors import UserError
from cluster.typed_yaml import load_recipe
from pipeline.checkpoint.files import newest, read_tensors
from pipeline.data.clip.evaluation import AudioPreprocessing, ClipPreprocessing
from pipeline.data.clip.statistics import read_statistics
from pipeline.methods.build import assemble_method
from pipeline.recipe.pretrain import PretrainRecipe


class Embedder(nn.Module):
    """Both trunks of a run and their heads.

    Args:
        video, audio: clips and spectrograms to embeddings of one length.

    Attributes:
        clip, sound: how a video becomes their inputs.
    """

    def __init__(
        self, video: nn.Module, audio: nn.Module, *, clip: ClipPreprocessing, sound: AudioPreprocessing
    ) -> None:
        super().__init__()
        self.video, self.audio = video, audio
        self.clip, self.sound = clip, sound

    def forward(self, clips: Tensor, spectrograms: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 3, T, S, S) and (n, 1, frames, bins) to two of (n, dim), of unit length."""
        return F.normalize(self.video(clips), dim=1), F.normalize(self.audio(spectrograms), dim=1)


def load_embedder(run: Path) -> Embedder:
    """The trunks and heads of a run's newest checkpoint, in evaluation mode, on the CPU.

    Raises:
        UserError: if there is no whole checkpoint there, or it is not one of AVID's.
    """
    checkpoint = newest(run)
    recipe = load_recipe(PretrainRecipe, str(run / "recipe.yaml"), kind="pretrain")
    data = recipe.data
    if recipe.method.name != "avid" or data.clip is None or data.audio is None:
        raise UserError(
            f"{run} was trained by {recipe.method.name}, which compares no pictures with sound: give a run "
            "of avid"
        )
    with torch.device("meta"):
        method = assemble_method(recipe, total_steps=1, group=None)
    parts = {}
    for name in ("trunk", "head", "audio_trunk", "audio_head"):
        parts[name] = method.get_submodule(name)
        tensors = read_tensors(checkpoint, prefix=f"{name}.")
        parts[name].load_state_dict(tensors, strict=True, assign=True)
    embedder = Embedder(
        nn.Sequential(parts["trunk"], parts["head"]),
        nn.Sequential(parts["audio_trunk"], parts["audio_head"]),
        clip=ClipPreprocessing.of(data.clip, data),
        sound=AudioPreprocessing.of(data.audio, read_statistics(run)),
    )
    return embedder.float().eval()  # whatever the run's precision was
