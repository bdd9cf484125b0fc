"""robustkit: attacks, training, evaluation and teaching checks for adversarial robustness."""

__version__ = "0.1.0"
