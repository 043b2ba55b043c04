"""Features as a map in two dimensions, of the images themselves: what is alike to a trunk lies together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch.nn.functional as F
from markupsafe import Markup
from numpy.typing import NDArray
from torch import Tensor

from pipeline.report.figures import svg
from pipeline.report.gallery import Samples, data_uri

MOST = 600  # images: t-SNE's time grows faster than their number
_LEAST = 12  # of fewer a map says nothing
_WIDTH, _HEIGHT, _PICTURE = 640, 440, 24
_THUMBNAIL = 48  # pixels: a screen may have two for one of the page
_NEIGHBOURS = 30.0  # t-SNE's perplexity


def map_of(
    keys: Tensor, x: Tensor, samples: Samples, labels: Mapping[int, str], *, seed: int
) -> Markup | None:
    """The map of the first images of some, MOST at most.

    Args:
        keys, x: (n,) of samples in an order drawn by chance, and their features (n, d).
        labels: sample key → label, where it is known.
    """
    found = sorted(keys[:MOST].tolist())  # in the order of the shards: each is opened once
    pictures = {key: data_uri(samples.image(key), longest=_THUMBNAIL) for key in found}
    shown = keys[:MOST].tolist()
    return feature_map(
        x[:MOST], [pictures[key] for key in shown], [labels.get(key) for key in shown], seed=seed
    )


def feature_map(
    x: Tensor, pictures: Sequence[str], names: Sequence[str | None], *, seed: int
) -> Markup | None:
    """A map by t-SNE (van der Maaten & Hinton, 2008, https://jmlr.org/papers/v9/vandermaaten08a.html) of the
    directions of features; None of too few, or of features that are all the same.

    Where pictures would cover each other, the first is shown, and others are dots.

    Args:
        x: (n, d), n at most MOST.
        pictures: data URIs of the n images, small.
        names: what is said of each where one points at it.
    """
    places = _places(F.normalize(x.float(), dim=1).numpy().astype(np.float64), seed=seed)
    if places is None:
        return None
    shown, dots, taken = list[Markup](), list[Markup](), list[NDArray[np.float64]]()
    for place, picture, name in zip(places, pictures, names, strict=True):
        title = Markup("<title>{}</title>").format(name) if name else ""
        if taken and np.abs(np.array(taken) - place).max(axis=1).min() < _PICTURE:
            dots.append(
                Markup('<circle class="t1" cx="{:.1f}" cy="{:.1f}" r="2">{}</circle>').format(*place, title)
            )
            continue
        taken.append(place)
        corner = place - _PICTURE / 2
        shown.append(
            Markup('<image x="{:.1f}" y="{:.1f}" width="{}" height="{}" href="{}">{}</image>').format(
                *corner, _PICTURE, _PICTURE, picture, title
            )
        )
    description = f"{len(x)} images, those with similar features near each other"
    return svg("Map of features", description, [*dots, *shown], _WIDTH, _HEIGHT)


def _places(x: NDArray[np.float64], *, seed: int) -> NDArray[np.float64] | None:
    """(n, 2) within the picture."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if len(x) < _LEAST or not (np.ptp(x, axis=0) > 1e-6).any():
        return None
    # What t-SNE's authors do first, too: distances hardly change, and its time does not depend on the width.
    x = PCA(min(50, *x.shape), random_state=seed).fit_transform(x)
    map_ = TSNE(perplexity=min(_NEIGHBOURS, (len(x) - 1) / 3), init="random", random_state=seed)
    found = np.asarray(map_.fit_transform(x), np.float64)
    low, extent = found.min(axis=0), np.maximum(np.ptp(found, axis=0), 1e-9)
    room = np.array([_WIDTH, _HEIGHT]) - _PICTURE
    return np.asarray(_PICTURE / 2 + (found - low) / extent * room)
