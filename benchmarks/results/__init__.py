"""Measured results: a table of rows (``results/table.yaml``), a queue that fills it, and the pages made from the rows.

A row is distilled and evaluated with commands of ``condense``, and its result is one JSON file in ``results/rows``. The
page ``docs/results.md``, its figures and the table of the README are made from these files alone.
"""
