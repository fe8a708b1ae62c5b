"""Runs as one page: ``collect`` reads the folders, ``figures`` draws, ``page`` writes the HTML."""

from condense.eval.report.collect import Run, collect, steps_of, uses_of
from condense.eval.report.figures import readable_bytes
from condense.eval.report.page import render

__all__ = ["Run", "collect", "readable_bytes", "render", "steps_of", "uses_of"]
