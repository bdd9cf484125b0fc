"""Augmentations: every view is one that the definition allows, and all of those occur."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from robustkit.augment import AUGMENTATIONS, _view, crop_shift, erase, flip_crop
from robustkit.device import seeded

SIDE = 8
# No two pixels of this image are alike, and none is black: a view tells where each of its pixels is from.
IMAGE = (1 + torch.arange(3 * SIDE * SIDE).float().view(1, 3, SIDE, SIDE)) / (3 * SIDE * SIDE)


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """The image moved by whole pixels, black where nothing comes from: by slices, not by gathering."""
    padded = torch.zeros(3, 3 * SIDE, 3 * SIDE)
    padded[:, SIDE + down : 2 * SIDE + down, SIDE + right : 2 * SIDE + right] = image[0]
    return padded[None, :, SIDE : 2 * SIDE, SIDE : 2 * SIDE]


VIEWS = {
    (mirrored, down, right): shifted(IMAGE.flip(3) if mirrored else IMAGE, down, right)
    for mirrored in (False, True)
    for down in range(-4, 5)
    for right in range(-4, 5)
}


def seen_by(augment, n: int = 3000) -> Counter:
    """How often each view of the image occurs; None is a view that there should not be."""
    stacked = torch.cat(list(VIEWS.values()))
    views = augment(IMAGE.expand(n, -1, -1, -1), seeded("augment"))
    same = (views[:, None] == stacked[None]).flatten(2).all(2)
    keys = list(VIEWS)
    return Counter(keys[int(row.nonzero()[0])] if row.any() else None for row in same)


def flaws_of_flip_crop(augment) -> set[str]:
    seen = seen_by(augment)
    flaws = set()
    if None in seen:
        flaws.add("another view")
    if len(seen.keys() - {None}) < len(VIEWS):
        flaws.add("a view that never occurs")
    mirrored = sum(count for view, count in seen.items() if view and view[0])
    if not 0.45 < mirrored / 3000 < 0.55:  # five standard errors of a fair coin
        flaws.add("mirrored too often or too seldom")
    return flaws


def rolled(x, generator):
    """What leaves on one side comes back on the other."""
    down, right = torch.randint(-4, 5, (2,), generator=generator).tolist()
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x, x.flip(3)).roll(
        (down, right), (2, 3)
    )


def all_alike(x, generator):
    return flip_crop(x[:1], generator).expand(len(x), -1, -1, -1)


def unmirrored(x, generator):
    n = len(x)
    move = torch.randint(-4, 5, (2, n, 1), generator=generator)
    return _view(x, torch.arange(SIDE) + move[0], torch.arange(SIDE) + move[1])


def test_flip_crop_gives_every_mirrored_and_moved_view_and_no_other():
    assert flaws_of_flip_crop(flip_crop) == set()


@pytest.mark.parametrize(
    ("mutant", "flaw"),
    [
        (rolled, "another view"),
        (all_alike, "a view that never occurs"),
        (unmirrored, "mirrored too often or too seldom"),
        (lambda x, generator: flip_crop(x, generator, margin=5), "another view"),
        (lambda x, generator: flip_crop(x, generator, margin=3), "a view that never occurs"),
    ],
    ids=["rolled", "all alike", "unmirrored", "too far", "too near"],
)
def test_a_wrong_flip_crop_shows(mutant, flaw):
    assert flaw in flaws_of_flip_crop(mutant)


def test_crop_shift_keeps_one_window_of_the_image_and_puts_it_anywhere():
    image = IMAGE.repeat(1, 1, 2, 2) + torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat_interleave(
        8, 0
    ).repeat_interleave(8, 1)
    views = crop_shift(image.expand(500, -1, -1, -1), seeded("shift"))
    cuts = set()
    for view in views:
        there = view[0] > 0
        rows, columns = there.any(1).nonzero().flatten(), there.any(0).nonzero().flatten()
        assert there.sum() == len(rows) * len(columns)  # one rectangle
        window = view[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        height, width = window.shape[1:]
        assert (16 - height) + (16 - width) <= 10
        found = [
            bool((candidate[0, :, top : top + height, left : left + width] == window).all())
            for candidate in (image, image.flip(3))
            for top in range(17 - height)
            for left in range(17 - width)
        ]
        assert any(found)
        cuts.add((16 - height) + (16 - width))
    assert cuts == set(range(11))


def test_erase_blackens_one_rectangle_of_half_of_the_images():
    views = erase(torch.ones(2000, 3, 32, 32), seeded("erase"))
    holes = views == 0
    assert torch.equal(holes[:, 0], holes[:, 1])
    assert torch.equal(holes[:, 0], holes[:, 2])
    erased = [hole[0] for hole in holes if hole.any()]
    assert 0.44 < len(erased) / 2000 < 0.56
    for hole in erased:
        rows, columns = hole.any(1).sum(), hole.any(0).sum()
        assert hole.sum() == rows * columns
        assert 0.01 < hole.float().mean() < 0.36  # 2 to 33 %, by whole pixels
    tops = {int(hole.any(1).nonzero()[0]) for hole in erased}
    assert {0, 10, 20} <= tops


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_follows_its_generator_alone_and_stays_in_the_box(name):
    x = torch.rand(40, 3, 32, 32, generator=seeded("x"))
    kept, before = x.clone(), torch.random.get_rng_state()
    first, again, other = (AUGMENTATIONS[name](x, seeded(key)) for key in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (name == "none")
    assert torch.equal(x, kept)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first.shape == x.shape
    assert first.min() >= 0
    assert first.max() <= 1
