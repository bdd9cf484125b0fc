"""Rotation and translation: the lattice against SciPy's geometry, and membership of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from robustkit.attacks import fgsm, noise, pgd, rs_fgsm, spatial_grid, spatial_random, square
from robustkit.device import seeded
from robustkit.errors import RobustkitError
from robustkit.evaluate import check_candidates, evaluate
from robustkit.results import Evaluation
from robustkit.threat import Ball, RotationTranslation, ThreatModel
from tests.oracle import dataset, evaluation, linear

THREAT = RotationTranslation(30, 2)


def images(n: int = 6, height: int = 9, width: int = 12) -> torch.Tensor:
    return torch.rand(n, 2, height, width, generator=seeded("images"))


# --- the threat model ------------------------------------------------------------------------------


def by_scipy(image: np.ndarray, degrees: float, right: float, down: float) -> np.ndarray:
    """Turned counter-clockwise as one sees it (rows run down), then shifted: by scipy.ndimage."""
    radians = np.deg2rad(degrees)
    # From an output (row, column) offset back to where it came from.
    back = np.array([[np.cos(radians), np.sin(radians)], [-np.sin(radians), np.cos(radians)]])
    centre = (np.array(image.shape) - 1) / 2
    offset = centre - back @ (centre + np.array([down, right]))
    found = ndimage.affine_transform(image.astype(np.float64), back, offset, order=1, mode="grid-constant")
    return np.asarray(found)


@pytest.mark.parametrize(
    "transform", [(0, 2, 0), (0, 0, -1), (90, 0, 0), (-90, 1, 2), (17, 0, 0), (-30, 1.5, -2), (180, 0, 0.5)]
)
def test_a_transform_is_scipys(transform):
    x = images()
    found = THREAT.transformed(x, torch.tensor([transform]).expand(len(x), 3))
    for image, turned in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        if transform[0] == 17:  # one direction, known without any library: the top goes to the left
            assert not np.allclose(by_scipy(image.numpy(), -17, 0, 0), turned, atol=1e-2)
        np.testing.assert_allclose(turned, by_scipy(image.numpy(), *transform), atol=2e-5)


def test_directions_are_as_documented():
    square = torch.zeros(1, 1, 5, 5)
    square[0, 0, 0, 2] = 1  # the middle of the top row

    def where(*transform: float) -> list[int]:
        return (
            THREAT.transformed(square, torch.tensor([transform]))[0, 0].round().nonzero().flatten().tolist()
        )

    assert where(90, 0, 0) == [2, 0]  # counter-clockwise: to the left
    assert where(0, 1, 0) == [0, 3]
    assert where(0, 0, 1) == [1, 2]
    assert where(90, 1, 0) == [2, 1]  # the shift comes after the turn, in the image's own axes


def test_each_image_gets_its_own_transform():
    x = images(3)
    transforms = torch.tensor([[0.0, 1, 0], [0, 0, 0], [30, 0, 2]])
    together = THREAT.transformed(x, transforms)
    alone = torch.cat([THREAT.transformed(x[i : i + 1], transforms[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone)
    assert torch.equal(together[1], x[1])


def test_the_lattice_is_engstroms_grid_with_the_identity_in_it():
    lattice = THREAT.transforms()
    assert lattice.shape == (31 * 5 * 5, 3)
    assert len(lattice.unique(dim=0)) == len(lattice)
    assert sorted(set(lattice[:, 0].tolist())) == pytest.approx(np.linspace(-30, 30, 31))
    for column in (1, 2):
        assert sorted(set(lattice[:, column].tolist())) == [-2, -1, 0, 1, 2]
    for threat in (THREAT, RotationTranslation(10.3, 1.7)):
        assert (threat.transforms() == 0).all(1).sum() == 1


def test_members_are_contained_and_nothing_else_is():
    x = images(8)
    lattice = THREAT.transforms()
    rows = torch.randint(len(lattice), (len(x),), generator=seeded(1))
    members = THREAT.transformed(x, lattice[rows])
    assert THREAT.contains(x, members).all()
    assert THREAT.contains(x, x).all()
    assert not THREAT.contains(x, x.roll(1, 0)).any()  # another image of the batch
    assert not THREAT.contains(x, (members + 0.002).clamp(0, 1)).any()
    one_pixel = members.clone()
    one_pixel[:, 0, 4, 6] = (one_pixel[:, 0, 4, 6] + 0.5) % 1
    assert not THREAT.contains(x, one_pixel).any()
    further = THREAT.transformed(x, torch.tensor([[31.0, 0, 0]]).expand(8, 3))
    between = THREAT.transformed(x, torch.tensor([[1.0, 0, 0]]).expand(8, 3))
    outside = THREAT.transformed(x, torch.tensor([[0.0, 3, 0]]).expand(8, 3))
    for wrong in (further, between, outside):
        assert not THREAT.contains(x, wrong).any()
    mixed = members.clone()
    mixed[3] = further[3]
    assert THREAT.contains(x, mixed).tolist() == [i != 3 for i in range(8)]


def test_the_size_to_plot_and_the_sentence():
    assert (THREAT.norm, THREAT.eps) == ("rotation-translation", 30)
    assert str(THREAT) == "rotation-translation up to 30 degrees and 2 pixels"
    assert "up to 30 degrees" in str(ThreatModel(THREAT, "score-based", "untargeted", 775))


@pytest.mark.parametrize(
    ("degrees", "pixels", "words"),
    [
        (-1, 0, r"\[0, 180\]; got -1"),
        (181, 0, "got 181"),
        (float("nan"), 0, "got nan"),
        (10, -1, "zero or larger; got -1"),
        (10, float("inf"), "got inf"),
    ],
)
def test_sizes_that_mean_nothing_are_refused(degrees, pixels, words):
    with pytest.raises(RobustkitError, match=words):
        RotationTranslation(degrees, pixels)


def test_only_images_can_be_turned():
    with pytest.raises(RobustkitError, match=r"images of shape .* got \(4, 3\)"):
        THREAT.transformed(torch.rand(4, 3), torch.zeros(4, 3))


@pytest.mark.parametrize("ball", [THREAT, Ball("L2", 0.5)])
def test_a_result_with_either_threat_model_survives_json(ball):
    found = Evaluation.from_json(evaluation(ball=ball).to_json())
    assert found.threat.ball == ball
    assert type(found.threat.ball) is type(ball)


def test_a_record_that_is_neither_is_refused():
    text = evaluation(ball=THREAT).to_json()
    for old, new in (('"degrees"', '"turns"'), ('"degrees": 30', '"degrees": "30"')):
        assert old in text
        with pytest.raises(RobustkitError, match="not a complete Evaluation"):
            Evaluation.from_json(text.replace(old, new))


@pytest.mark.parametrize("attack", [fgsm, rs_fgsm, pgd, noise, square])
def test_an_lp_attack_refuses_it_in_a_sentence(attack):
    x = torch.rand(4, 3, 2, 2, generator=seeded(0))
    with pytest.raises(RobustkitError, match=r"no Lp ball|no rotation-translation form"):
        attack(linear(), x, torch.zeros(4, dtype=torch.int64), THREAT, generator=seeded(0))


def test_the_judge_refuses_an_image_that_no_transform_gives():
    x = images()
    with pytest.raises(RobustkitError, match=r"left its ball on 6 of 6 images: no transform"):
        check_candidates("an attack", x, (x + 0.01).clamp(0, 1), THREAT)
    check_candidates("an attack", x, x.clone(), THREAT)


# --- the attacks -----------------------------------------------------------------------------------


class Template(nn.Module):
    """Class 1 where one transform of the image is near: fooled by that transform and its neighbours."""

    def __init__(self, targets: torch.Tensor, reach: float) -> None:
        super().__init__()
        self.targets, self.reach, self.asked = targets, reach, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked += len(x)
        distance = (x[:, None] - self.targets).flatten(2).norm(dim=2).amin(1)
        return torch.stack([distance - self.reach, self.reach - distance], 1)


@pytest.mark.parametrize("row", [0, 3, 386, 387, 388, 550, 774])
def test_the_grid_finds_the_one_transform_that_fools(row):
    """Nothing but one point of the lattice fools the model; a grid without shifts, say, misses it."""
    x = images(2)
    target = THREAT.transformed(x, THREAT.transforms()[row].expand(2, 3))
    model = Template(target, 1e-3)
    y = torch.zeros(2, dtype=torch.int64)
    found = spatial_grid(model, x, y, THREAT)
    torch.testing.assert_close(found, target, atol=1e-6, rtol=0)
    assert model.asked == 2 * (row + 1)  # in order, and no further than needed
    assert THREAT.contains(x, found).all()


def test_the_grid_returns_the_nearest_miss_where_nothing_fools():
    x = images(3)
    lattice = THREAT.transforms()
    wanted = lattice[torch.tensor([70, 400, 700])]
    target = THREAT.transformed(x, wanted)
    # The true class wins everywhere, least at the target.
    model = Template(target, -1.0)
    found = spatial_grid(model, x, torch.zeros(3, dtype=torch.int64), THREAT)
    torch.testing.assert_close(found, target, atol=1e-6, rtol=0)
    assert model.asked == 3 * len(lattice)


def test_random_draws_are_the_lattices_each_example_its_own_and_the_worst_is_kept():
    x = images(1).expand(400, -1, -1, -1).clone()
    y = torch.zeros(400, dtype=torch.int64)
    threat = RotationTranslation(30, 2)
    far = Template(torch.full((1, 2, 9, 12), 5.0), 0.0)  # never fooled
    one = spatial_random(far, x, y, threat, draws=1, generator=seeded(0))
    members = threat.transformed(x[:1].expand(775, -1, -1, -1), threat.transforms())
    nearest = torch.cdist(
        one.flatten(1), members.flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
    ).min(1)
    assert nearest.values.max() < 1e-3
    rows = nearest.indices
    # 400 uniform draws from 775: 312 different ones are expected, standard deviation about 7.
    assert 280 < len(rows.unique()) < 345
    drawn = threat.transforms()[rows]
    for column, levels in ((0, 31), (1, 5), (2, 5)):
        assert len(drawn[:, column].unique()) == levels
    with torch.no_grad():
        losses = [
            (
                far(spatial_random(far, x, y, threat, draws=draws, generator=seeded(0)))
                * torch.tensor([-1, 1])
            ).sum(1)
            for draws in (1, 10)
        ]
    assert (losses[1] >= losses[0]).float().mean() > 0.85  # worst of ten against one
    assert far.asked == 400 * (1 + 1 + 10 + 2)


def test_random_draws_stay_on_the_lattice():
    x, y = images(40), torch.zeros(40, dtype=torch.int64)
    near = Template(THREAT.transformed(x, torch.tensor([[60.0, 4, 4]]).expand(40, 3)), -1.0)
    assert THREAT.contains(x, spatial_random(near, x, y, THREAT, draws=10, generator=seeded(0))).all()


def test_random_stops_at_what_fools_and_the_grid_breaks_no_less():
    x = images(30)
    y = torch.zeros(30, dtype=torch.int64)
    lattice = THREAT.transforms()
    model = Template(THREAT.transformed(x, lattice[torch.arange(30) * 25]), 0.9)
    by_random = spatial_random(model, x, y, THREAT, draws=20, generator=seeded(0))
    by_grid = spatial_grid(model, x, y, THREAT)
    with torch.no_grad():
        random_wins, grid_wins = (model(found).argmax(1) == 1 for found in (by_random, by_grid))
    assert 0 < random_wins.sum() < 30
    assert (random_wins <= grid_wins).all()
    assert grid_wins.all()


@pytest.mark.parametrize("attack", [spatial_grid, spatial_random])
def test_a_spatial_attack_refuses_a_ball_and_what_is_no_image(attack):
    y = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RobustkitError, match=r"needs a RotationTranslation; got a ball, Linf eps=0.1"):
        attack(linear(), torch.rand(4, 3, 2, 2), y, Ball("Linf", 0.1))
    with pytest.raises(RobustkitError, match=r"images of shape"):
        attack(linear(), torch.rand(4, 12), y, THREAT)
    with pytest.raises(RobustkitError, match="at least 1 query"):
        spatial_random(linear(), torch.rand(4, 3, 2, 2), y, THREAT, draws=0)


def test_no_turn_and_no_shift_change_nothing():
    x = images()
    y = torch.zeros(6, dtype=torch.int64)
    model = Template(torch.full((1, 2, 9, 12), 5.0), 0.0)
    for attack in (spatial_grid, spatial_random):
        assert torch.equal(attack(model, x, y, RotationTranslation(0, 0), generator=seeded(0)), x)


def test_an_evaluation_under_rotation_and_translation():
    """Judged from end to end; an Lp attack among the spatial ones is refused."""
    x = images(20)
    lattice = THREAT.transforms()
    reachable = THREAT.transformed(x[:8], lattice[torch.arange(8) * 90])
    model = Template(reachable, 1e-3).eval()
    data = dataset(x, torch.zeros(20, dtype=torch.int64))
    attacks = {"spatial-random": spatial_random, "spatial-grid": spatial_grid}
    found = evaluate(model, data, THREAT, attacks, model_name="template", tier="smoke", progress=False)
    assert [name is not None for name in found.broken_by] == [i < 8 for i in range(20)]
    assert Evaluation.from_json(found.to_json()) == found
    assert str(THREAT) in str(found.threat)
    with pytest.raises(RobustkitError, match="no Lp ball"):
        evaluate(model, data, THREAT, {"fgsm": fgsm}, model_name="t", tier="smoke", progress=False)
