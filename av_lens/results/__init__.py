"""Results: labelled numbers and findings, their statistics and provenance. No torch here."""

from av_lens.results.grid import Grid
from av_lens.results.record import Isolation

__all__ = ["Grid", "Isolation"]
