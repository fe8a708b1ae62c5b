"""The evaluator: fresh networks trained on a set under a named protocol, scored on real test data.

``subject``    a set with its data: images to train on, to choose on and to score on.
``protocol``   how networks are trained: frozen, named, hashed values.
``evaluate``   networks x seeds: trains and scores them.
``results``    what came out, each number with its provenance, and the file that holds it.
``baselines``  the same for sets of other recipes and for all training data.
"""
