"""Auto-PGD against closed forms, and point by point against pyautoattack from the same starts."""

from __future__ import annotations

import numpy as np
import pytest

from robustkit.attacks import apgd
from robustkit.device import seeded
from robustkit.threat import NORMS, Ball
from tests.oracle import DUAL, interior, linear, margins

each_norm = pytest.mark.parametrize("norm", NORMS)
EPS = {"Linf": 0.05, "L2": 0.15, "L1": 0.25}


@each_norm
def test_apgd_breaks_exactly_what_the_closed_form_says(norm):
    x = interior(n=400)
    model = linear()
    y = model(x).argmax(1)
    ball = Ball(norm, EPS[norm])
    limit = EPS[norm] * np.linalg.norm(model.w.detach().double().numpy(), ord=DUAL[norm])
    m = margins(model, x, y)
    broken = margins(model, apgd(model, x, y, ball, steps=50, generator=seeded(0)), y) < 0
    assert not (broken & (m > limit * 1.0001)).any()
    # An L1 step never moves fewer than two coordinates, and the optimum lies along one.
    assert (broken | (m > limit * (0.8 if norm == "L1" else 0.999))).all()
    assert 40 < broken.sum() < 360
