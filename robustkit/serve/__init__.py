"""The production scenario: an image-classification API under attack (extra `serve`).

Nothing outside this package imports it, except its commands in `robustkit.cli`, when they are called.
"""
