"""The engine against the algorithms as the papers' code runs them. ``python -m benchmarks --help``."""
