"""Results: labelled numbers and findings, their statistics and provenance. No torch here."""

from av_lens.results.circuit import Circuit
from av_lens.results.edge_scores import EdgeScores
from av_lens.results.grid import Grid
from av_lens.results.record import Isolation
from av_lens.results.tabled import Tabled

__all__ = ["Circuit", "EdgeScores", "Grid", "Isolation", "Tabled"]
