"""Numbers about a single input, for graphs and triage. Never a gate.

Detectors that look at one input were broken one after the other by attackers who knew them (Carlini and Wagner 2017;
He et al. 2017 for ensembles of weak ones, feature squeezing among them; Tramer et al. 2020). So nothing here is
compared with a threshold: a change of its distribution is a reason to look, no reason to reject.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Scores = NDArray[np.floating]


def fewer_bits(images: Images, bits: int) -> Images:
    """Each grey level rounded to the nearest of 2**bits. Shapes: any, uint8."""
    steps = 2**bits - 1
    rounded: Images = np.rint(np.rint(images / 255 * steps) / steps * 255).astype(np.uint8)
    return rounded


def smoothed(images: Images) -> Images:
    """The median of each 2x2 neighbourhood, channel by channel. Shapes: (n, h, w, c) uint8."""
    padded = np.pad(images, ((0, 0), (1, 0), (1, 0), (0, 0)), mode="edge")
    corners = [padded[:, i : i + images.shape[1], j : j + images.shape[2]] for i in (0, 1) for j in (0, 1)]
    middle: Images = np.rint(np.median(corners, axis=0)).astype(np.uint8)
    return middle


def squeezing(predict: Callable[[Images], Scores], images: Images, *, bits: int = 5) -> NDArray[np.float64]:
    """How far the scores move when colours are coarsened or the picture is smoothed: the larger L1 distance.

    Source: Xu, Evans and Qi, Feature squeezing (NDSS 2018), whose detector compares this with a threshold.
    Costs three predictions. Shapes: (n, h, w, c) -> (n,); `predict` gives scores (n, classes) that sum to 1.
    Units: L1 distance of distributions, in [0, 2].
    """
    plain = np.asarray(predict(images), np.float64)
    moved = [
        np.abs(np.asarray(predict(squeezed), np.float64) - plain).sum(1)
        for squeezed in (fewer_bits(images, bits), smoothed(images))
    ]
    larger: NDArray[np.float64] = np.maximum(*moved)
    return larger


def roughness(images: Images) -> NDArray[np.float64]:
    """Mean absolute difference of neighbouring pixels, of grey levels in [0, 1]: noise and patterns raise it.

    Shapes: (n, h, w, c) -> (n,).
    """
    unit = images / 255
    across, down = np.abs(np.diff(unit, axis=2)), np.abs(np.diff(unit, axis=1))
    rough: NDArray[np.float64] = (across.mean((1, 2, 3)) + down.mean((1, 2, 3))) / 2
    return rough
