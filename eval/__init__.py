"""The evaluator: trains fresh networks on a set under a named protocol and scores them on real test data.

``subject``    a set with its data: images for training, for choices after distillation, and for scoring.
``protocol``   how networks are trained: named, frozen settings with a hash.
``evaluate``   trains and scores networks for each architecture and seed.
``results``    the results with their provenance, and the file that stores them.
``baselines``  the same for sets of other recipes and for all training data.
"""
