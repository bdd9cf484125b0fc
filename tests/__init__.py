"""A package, so that no other `tests` on the path (robustbench installs one) takes its place."""
