"""The parts of the benches."""
