"""What runs a model: its sizes, gates, budgets and modes; running with hooks and keeping what was asked for."""

from __future__ import annotations

from av_lens.core.execution import Run, run
from av_lens.core.passing import read_layers
from av_lens.core.progress import Progress, watched

__all__ = ["Progress", "Run", "read_layers", "run", "watched"]
