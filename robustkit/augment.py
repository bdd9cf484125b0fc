"""Augmentations: a batch of images to another view of it, on the device where the batch is.

Shapes: (n, c, h, w) -> the same. Units: images in [0, 1]; what comes from outside an image is 0, black.
Randomness: `generator` alone, which must live on the device of the images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def untouched(x: Tensor, generator: torch.Generator) -> Tensor:
    """The images as they are."""
    return x


def flip_crop(x: Tensor, generator: torch.Generator, *, margin: int = 4) -> Tensor:
    """Each image mirrored with probability 1/2, and moved by up to `margin` pixels along both axes.

    Source: He et al. 2016 (arXiv 1512.03385), section 4.2: a random crop of the image in a black frame.
    """
    n, _, height, width = x.shape
    down, right = (_whole(n, 2 * margin, x, generator) - margin for _ in range(2))
    rows = torch.arange(height, device=x.device) - down
    columns = torch.arange(width, device=x.device) - right
    return _view(x, rows, _mirrored(columns, x, generator))


def strong(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored, cropped and shifted, and half of the images with a black rectangle: against robust overfitting.

    Source: Li & Spratling 2023 (arXiv 2301.09879), whose IDBH policy begins with the same three parts.
    """
    return erase(crop_shift(x, generator), generator)


def crop_shift(x: Tensor, generator: torch.Generator, *, most: int = 10) -> Tensor:
    """Up to `most` rows and columns together are cut off; what is left lands anywhere in a black frame.

    Each image is mirrored with probability 1/2 as well.
    Source: Li & Spratling 2023 (arXiv 2301.09879), section 4.
    """
    n, _, height, width = x.shape
    cut = _whole(n, most, x, generator)
    fewer_columns = _whole(n, cut, x, generator)
    rows = _window(height, cut - fewer_columns, x, generator)
    columns = _window(width, fewer_columns, x, generator)
    return _view(x, rows, _mirrored(columns, x, generator))


def erase(x: Tensor, generator: torch.Generator, *, probability: float = 0.5) -> Tensor:
    """A black rectangle of 2 to 33 % of the area, its sides in a ratio up to 3.3, in some of the images.

    Source: Zhong et al. 2020 (arXiv 1708.04896), algorithm 1. Difference: a rectangle that does not fit is
    cut to the image and not drawn again, so that a batch needs no loop.
    """
    n, _, height, width = x.shape

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, generator=generator, device=x.device)

    area = uniform(0.02, 0.33) * height * width
    ratio = uniform(-1.0, 1.0).mul(torch.tensor(3.3, device=x.device).log()).exp()
    chosen = uniform(0, 1) < probability
    inside = []
    for side, length in ((height, (area * ratio).sqrt()), (width, (area / ratio).sqrt())):
        size = length.round().clamp(1, side)
        first = (uniform(0, 1) * (side - size + 1)).floor()
        place = torch.arange(side, device=x.device)
        inside.append((place >= first) & (place < first + size))
    hole = inside[0][:, :, None] & inside[1][:, None, :] & chosen[:, :, None]
    return x.masked_fill(hole[:, None], 0.0)


def _whole(n: int, most: int | Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """Whole numbers from 0 to `most`, one for each image. Shapes: (n, 1)."""
    uniform = torch.rand(n, 1, generator=generator, device=x.device)
    return (uniform * (most + 1)).long().clamp_max(most)  # a product of float32 can round up to the bound


def _window(side: int, cut: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    """From which row each row comes when all but `cut` of them are kept and moved; -1 is from none."""
    source, place = (_whole(len(x), cut, x, generator) for _ in range(2))
    rows = torch.arange(side, device=x.device)
    return torch.where((rows >= place) & (rows < place + side - cut), rows - place + source, -1)


def _mirrored(columns: Tensor, x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.where(_whole(len(x), 1, x, generator) == 1, columns.flip(1), columns)


def _view(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The images with their rows and columns taken from these places. Shapes: (n, c, h, w), (n, h), (n, w)."""
    n, channels, height, width = x.shape
    there = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[
        :, None, None
    ]
    each = torch.arange(n, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[:, None, None]
    taken = x[
        each, channel, rows.clamp(0, height - 1)[:, None, :, None], columns.clamp(0, width - 1)[:, None, None]
    ]
    return taken * there


AUGMENTATIONS: dict[str, Augmentation] = {"none": untouched, "flip-crop": flip_crop, "strong": strong}
