"""The evaluator: fresh networks trained on a set under a named protocol, scored on real test data.

``protocol``   how networks are trained: frozen, named, hashed values.
``crossarch``  networks x seeds -> results, each with everything that decides its number.
``baselines``  what the whole training set gives.
"""
