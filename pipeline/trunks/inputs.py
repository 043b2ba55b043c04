"""Pictures and videos, however they come, as inputs of a trunk or a classifier: what evaluations show it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from cluster.errors import UserError
from ingest.image.decode import ImageError, decode, decoded
from pipeline.data.clip.evaluation import ClipPreprocessing, middle_clip, middle_sound
from pipeline.data.evaluation import Preprocessing, fit_image, normalise
from pipeline.data.shown import AnyPreprocessing

Source = Image.Image | NDArray[np.generic] | Tensor | bytes | str | Path
_THREADS = 8
_CPU = torch.device("cpu")


def input_of(source: Source, view: AnyPreprocessing) -> Tensor:
    """One normalised input, float32, on the CPU.

    Args:
        source: a picture of any size: an image of Pillow's; an array (H, W), (H, W, 3) or (H, W, 4); a tensor
            (H, W), (3, H, W) or (4, H, W); both of uint8, or of floats from 0 to 1; the bytes of a file, or
            its path. Of a video, the bytes or the path: its middle is shown.

    Raises:
        UserError: a file cannot be read, or its picture not be decoded.
        TypeError, ValueError: it is no such thing.
    """
    named = str(source) if isinstance(source, str | Path) else f"the {type(source).__name__} given"
    try:
        data = Path(source).read_bytes() if isinstance(source, str | Path) else source
        if isinstance(view, Preprocessing):
            image = decode(data) if isinstance(data, bytes) else decoded(_image_of(data))
            pixels = torch.from_numpy(np.array(fit_image(image, view))).permute(2, 0, 1)
            return normalise(pixels[None], view, _CPU)[0]
        if not isinstance(data, bytes):
            raise TypeError(f"{named} is no video: give a file's path, or its bytes")
        return middle_clip(data, view) if isinstance(view, ClipPreprocessing) else middle_sound(data, view)
    except OSError as error:
        raise UserError(f"{named} cannot be read: {error.strerror or error}") from error
    except ImageError as error:
        raise UserError(f"{named} holds no picture that can be shown ({error}): leave it out") from error


def inputs_of(sources: Iterable[Source], view: AnyPreprocessing, *, batch_size: int) -> Iterator[Tensor]:
    """Batches of the inputs of many sources, in their order. Threads decode; no process is started."""
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        left = iter(sources)
        while batch := list(islice(left, batch_size)):
            yield torch.stack(list(pool.map(lambda source: input_of(source, view), batch)))


def outputs_of(
    network: nn.Module, sources: Iterable[Source], view: AnyPreprocessing, *, width: int, batch_size: int
) -> Tensor:
    """What a network, in evaluation mode, makes of many sources: (N, width) float32, on the CPU.

    Raises:
        UserError, TypeError, ValueError: as `input_of` does, or for one source in the place of many.
    """
    _refuse_one(sources)
    device = next((tensor.device for tensor in network.parameters()), _CPU)
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            found = [
                network(inputs.to(device)).float().cpu()
                for inputs in inputs_of(sources, view, batch_size=batch_size)
            ]
    finally:
        network.train(was_training)
    return torch.cat([torch.empty(0, width), *found])


def _refuse_one(sources: Iterable[Source]) -> None:
    """A name has letters and a picture has rows: each would be taken for a picture."""
    rows = isinstance(sources, Tensor | np.ndarray) and sources.ndim < 4
    if rows or isinstance(sources, str | bytes | Path | Image.Image):
        raise TypeError(f"one {type(sources).__name__} is given where many are taken: give a list, [picture]")


def _image_of(source: Image.Image | NDArray[np.generic] | Tensor) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, Tensor | np.ndarray):
        raise TypeError(
            f"the {type(source).__name__} given is no picture: give an image, an array, a tensor or a path"
        )
    pixels = torch.as_tensor(source).detach().cpu()
    if isinstance(source, Tensor) and pixels.ndim == 3:
        pixels = pixels.permute(1, 2, 0)
    if 0 in pixels.shape or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise ValueError(
            f"pixels of shape {tuple(source.shape)} are no picture: give (H, W), an array (H, W, 3) or a "
            "tensor (3, H, W); four channels are with alpha"
        )
    if pixels.is_floating_point() and 0 <= float(pixels.min()) <= float(pixels.max()) <= 1:
        pixels = (pixels * 255).round().to(torch.uint8)
    if pixels.dtype != torch.uint8:
        raise ValueError(
            f"pixels are uint8, or floats from 0 to 1, and these are {pixels.dtype}: what is normalised "
            "already goes to the trunk itself, trunk(inputs)"
        )
    return Image.fromarray(pixels.numpy())
