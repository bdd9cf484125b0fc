"""robustkit: attacks, training, evaluation and teaching checks for adversarial robustness.

Every name of `__all__` can be imported from here, and is loaded at its first use: `import robustkit`
itself costs nothing and needs no torch. `robustkit.evaluate`, `robustkit.train` and
`robustkit.report` are always the modules; the functions of the same names are in them:

    from robustkit.evaluate import evaluate
    from robustkit.train import train
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from robustkit import attacks as attacks
    from robustkit import data as data
    from robustkit import evaluate as evaluate
    from robustkit import losses as losses
    from robustkit import models as models
    from robustkit import report as report
    from robustkit import results as results
    from robustkit import threat as threat
    from robustkit import train as train
    from robustkit.attacks import Attack as Attack
    from robustkit.attacks.apgd import apgd as apgd
    from robustkit.attacks.apgd import apgd_targeted as apgd_targeted
    from robustkit.attacks.fab import fab_targeted as fab_targeted
    from robustkit.attacks.fgsm import fgsm as fgsm
    from robustkit.attacks.fgsm import rs_fgsm as rs_fgsm
    from robustkit.attacks.library import LIBRARY as LIBRARY
    from robustkit.attacks.noise import noise as noise
    from robustkit.attacks.pgd import early_stopped_pgd as early_stopped_pgd
    from robustkit.attacks.pgd import pgd as pgd
    from robustkit.attacks.spatial import spatial_grid as spatial_grid
    from robustkit.attacks.spatial import spatial_random as spatial_random
    from robustkit.attacks.square import square as square
    from robustkit.attacks.transfer import transfer as transfer
    from robustkit.data import Dataset as Dataset
    from robustkit.data import load as load
    from robustkit.defences import DEFENCES as DEFENCES
    from robustkit.device import TIERS as TIERS
    from robustkit.device import pick_device as pick_device
    from robustkit.device import seeded as seeded
    from robustkit.device import tier as tier
    from robustkit.errors import RobustkitError as RobustkitError
    from robustkit.evaluate import ATTACKS as ATTACKS
    from robustkit.evaluate import predict as predict
    from robustkit.lessons import check as check
    from robustkit.models import MODELS as MODELS
    from robustkit.models import Normalize as Normalize
    from robustkit.models import build as build
    from robustkit.models import load_weights as load_weights
    from robustkit.models import pretrained as pretrained
    from robustkit.models import save_weights as save_weights
    from robustkit.recipes import RECIPES as RECIPES
    from robustkit.recipes import Recipe as Recipe
    from robustkit.recipes import find_recipe as find_recipe
    from robustkit.results import Evaluation as Evaluation
    from robustkit.results import Interval as Interval
    from robustkit.results import Provenance as Provenance
    from robustkit.results import read_evaluation as read_evaluation
    from robustkit.threat import Ball as Ball
    from robustkit.threat import RotationTranslation as RotationTranslation
    from robustkit.threat import ThreatModel as ThreatModel
    from robustkit.threat import white_box as white_box
    from robustkit.train import Schedule as Schedule
    from robustkit.wrappers import BPDA as BPDA
    from robustkit.wrappers import EOT as EOT

# Where each public name is; modules stand for themselves.
_HOME = {
    name: module
    for module, names in {
        "attacks": "attacks Attack apgd apgd_targeted early_stopped_pgd fab_targeted fgsm noise pgd rs_fgsm "
        "spatial_grid spatial_random square transfer",
        "attacks.library": "LIBRARY",
        "data": "data Dataset load",
        "defences": "DEFENCES",
        "device": "TIERS pick_device seeded tier",
        "errors": "RobustkitError",
        "evaluate": "evaluate ATTACKS predict",
        "lessons": "check",
        "losses": "losses",
        "models": "models MODELS Normalize build load_weights pretrained save_weights",
        "report": "report",
        "results": "results Evaluation Interval Provenance read_evaluation",
        "threat": "threat Ball RotationTranslation ThreatModel white_box",
        "recipes": "RECIPES Recipe find_recipe",
        "train": "train Schedule",
        "wrappers": "BPDA EOT",
    }.items()
    for name in names.split()
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'robustkit' has no attribute {name!r}")
    module = import_module(f"robustkit.{_HOME[name]}")
    value = module if name == _HOME[name] else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
