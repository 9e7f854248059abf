"""Results: labelled numbers and findings, their statistics and provenance. No torch here."""

from av_lens.results.circuit import Circuit, EdgeScores
from av_lens.results.comparison import Comparison
from av_lens.results.grid import Grid, Tabled
from av_lens.results.record import Isolation

__all__ = ["Circuit", "Comparison", "EdgeScores", "Grid", "Isolation", "Tabled"]
