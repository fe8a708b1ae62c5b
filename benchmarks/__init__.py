"""Compare the engine with the algorithms as the papers' code runs them. See ``python -m benchmarks --help``."""
