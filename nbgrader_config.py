"""Lets `nbgrader` and formgrader find the course: they read this name in the folder they start in."""

from pathlib import Path

load_subconfig("nbgrader_config.py", path=str(Path(__file__).resolve().parent / "grading"))  # noqa: F821
