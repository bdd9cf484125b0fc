"""Everybody's PGD and FGSM behind one signature: (model, ball, steps) gives a function (x, y) -> candidates.

All start at the image itself and step by 2.5 * eps / steps, so all walk the same path, and robust
accuracies can be compared to the point. Nobody is given a frozen or a prepared model but ourselves.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robustkit._torchvision import import_torchvision
from robustkit.attacks import fgsm, pgd
from robustkit.device import attackable, batch_size, prepare
from robustkit.evaluate import Job
from robustkit.scale import forks
from robustkit.threat import Ball

Run = Callable[[Tensor, Tensor], Tensor]
Contestant = Callable[[nn.Module, Tensor, Ball, int], Run]


PEERS = ("cleverhans", "art", "foolbox", "torchattacks", "adv_lib", "pyautoattack")


def find_peers(folder: Path, wanted: Iterable[str] = PEERS) -> list[str]:
    """Import the peers, some of which may be in `folder`, and name those that are not to be had.

    torchattacks pins an old requests and adv-lib draws with visdom, so neither goes into the environment.
    """
    sys.path.append(str(folder))  # last: torchattacks brings a robustbench of its own
    import_torchvision()
    sys.modules.setdefault("visdom", types.ModuleType("visdom"))  # adv-lib imports it to draw, and we do not
    missing = []
    for module in wanted:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import_module("adv_lib.attacks" if module == "adv_lib" else module)
        except ImportError as error:
            missing.append(f"{module} ({error})")
    return missing


def here(module: str) -> bool:
    return module in sys.modules


# --- floors ------------------------------------------------------------------------------------------


def _passes(model: nn.Module, steps: int, x: Tensor, y: Tensor) -> Tensor:
    """`steps` forward and backward passes to the input and nothing else."""
    for _ in range(steps):
        images = x.detach().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(model(images), y, reduction="sum")
        torch.autograd.grad(loss, images)
    return x


def _frozen(model: Any, run: Run) -> Run:
    def inside(x: Tensor, y: Tensor) -> Tensor:
        with attackable(model):
            return run(x, y)

    return inside


def plain_floor(model: nn.Module, x: Tensor, ball: Ball, steps: int) -> Run:
    return _frozen(model, partial(_passes, model, steps))


def tuned_floor(model: nn.Module, x: Tensor, ball: Ball, steps: int) -> Run:
    ready: Any = prepare(model, x)
    return _frozen(ready, partial(_passes, ready, steps))


# --- robustkit -----------------------------------------------------------------------------------------


def ours(model: nn.Module, x: Tensor, ball: Ball, steps: int) -> Run:
    ready = prepare(model, x)

    def run(x: Tensor, y: Tensor) -> Tensor:
        return fgsm(ready, x, y, ball) if steps == 1 else pgd(ready, x, y, ball, steps=steps, start=x)

    return run


def ours_unprepared(model: nn.Module, x: Tensor, ball: Ball, steps: int) -> Run:
    def run(x: Tensor, y: Tensor) -> Tensor:
        return fgsm(model, x, y, ball) if steps == 1 else pgd(model, x, y, ball, steps=steps, start=x)

    return run


# --- peers ---------------------------------------------------------------------------------------------


def cleverhans(model: nn.Module, x: Tensor, ball: Ball, steps: int) -> Run:
    attacks = "cleverhans.torch.attacks"
    norm = np.inf if ball.norm == "Linf" else 2
    if steps == 1:
        fast = import_module(f"{attacks}.fast_gradient_method").fast_gradient_method
        return lambda x, y: fast(model, x, ball.eps, norm, clip_min=0, clip_max=1, y=y)
    descent = import_module(f"{attacks}.projected_gradient_descent").projected_gradient_descent
    return lambda x, y: descent(
        model,
        x,
        ball.eps,
        2.5 * ball.eps / steps,
        steps,
        norm,
        clip_min=0,
        clip_max=1,
        y=y,
        rand_init=False,
        sanity_checks=False,
    )


def art(model: nn.Module, x: Tensor, ball: Ball, steps: int) -> Run:
    evasion = import_module("art.attacks.evasion")
    estimator = import_module("art.estimators.classification").PyTorchClassifier(
        model,
        nn.CrossEntropyLoss(),
        tuple(x.shape[1:]),
        10,
        clip_values=(0.0, 1.0),
        device_type=x.device.type,
    )
    norm = np.inf if ball.norm == "Linf" else 2
    if steps == 1:
        attack = evasion.FastGradientMethod(estimator, norm, ball.eps, batch_size=len(x))
    else:
        attack = evasion.ProjectedGradientDescentPyTorch(
            estimator,
            norm,
            ball.eps,
            2.5 * ball.eps / steps,
            max_iter=steps,
            num_random_init=0,
            batch_size=len(x),
            verbose=False,
        )
    return lambda x, y: torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(x)


def foolbox(model: nn.Module, x: Tensor, ball: Ball, steps: int) -> Run:
    module = import_module("foolbox")
    wrapped = module.PyTorchModel(model.eval(), bounds=(0, 1), device=x.device)
    if steps == 1:
        attack = module.attacks.LinfFastGradientAttack(random_start=False)
    else:
        kind = module.attacks.LinfPGD if ball.norm == "Linf" else module.attacks.L2PGD
        attack = kind(abs_stepsize=2.5 * ball.eps / steps, steps=steps, random_start=False)
    return lambda x, y: attack.run(wrapped, x, y, epsilon=ball.eps)


def torchattacks(model: nn.Module, x: Tensor, ball: Ball, steps: int) -> Run:
    module = import_module("torchattacks")
    if steps == 1:
        return module.FGSM(model, ball.eps)  # type: ignore[no-any-return]
    kind = module.PGD if ball.norm == "Linf" else module.PGDL2
    return kind(model, ball.eps, 2.5 * ball.eps / steps, steps, random_start=False)  # type: ignore[no-any-return]


def adv_lib(model: nn.Module, x: Tensor, ball: Ball, steps: int) -> Run:
    attack = import_module("adv_lib.attacks").pgd_linf
    return lambda x, y: attack(
        model, x, y, ball.eps, steps=steps, random_init=False, absolute_step_size=2.5 * ball.eps / steps
    )


FLOORS: dict[str, Contestant] = {"floor": plain_floor, "tuned floor": tuned_floor}
OURS: dict[str, Contestant] = {"robustkit": ours, "robustkit, model not prepared": ours_unprepared}
_PEERS: dict[str, Contestant] = {
    "cleverhans": cleverhans,
    "art": art,
    "foolbox": foolbox,
    "torchattacks": torchattacks,
    "adv_lib": adv_lib,
}


def peers(ball: Ball, steps: int) -> dict[str, Contestant]:
    """The peers that are here and have this attack: adv-lib has PGD in Linf alone."""
    absent = {"adv_lib"} if ball.norm != "Linf" or steps == 1 else set()
    return {name: peer for name, peer in _PEERS.items() if here(name) and name not in absent}


# --- the work of one round -------------------------------------------------------------------------------


def in_batches(run: Run, size: int) -> Run:
    """One batch after the other."""
    return lambda x, y: torch.cat([run(a, b) for a, b in zip(x.split(size), y.split(size), strict=True)])


@contextmanager
def in_forks(run: Run, size: int, x: Tensor) -> Iterator[Run]:
    """Batches shared by forks of this process, as `robustkit evaluate` has it, for rounds of up to len(x) images.

    The forks start with the first round, which nobody times, and stay; images come and go in shared memory.
    """
    images, found = (torch.empty_like(x).share_memory_() for _ in range(2))
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device).share_memory_()

    def work(job: Job) -> list[int]:
        rows = list(job.rows)
        found[rows] = run(images[rows], labels[rows])
        return []

    with forks() as runner:

        def shared(x: Tensor, y: Tensor) -> Tensor:
            images[: len(x)], labels[: len(x)] = x, y
            rows = torch.arange(len(x)).split(min(size, -(-len(x) // 2)))
            for _ in runner(work, [Job("", tuple(part.tolist())) for part in rows]):
                pass
            whole: Tensor = found[: len(x)].clone()
            return whole

        yield shared


def best_batch(model: nn.Module, x: Tensor) -> int:
    return batch_size(prepare(model, x), x)
