"""Certificates: robustness that is proved, by randomized smoothing (L2) or interval bounds (Linf).

`smoothing` certifies any classifier with high probability; `bounds` proves the margins of a small ReLU
network outright. `confidence`, `certificates` and `page` need no torch.
"""
