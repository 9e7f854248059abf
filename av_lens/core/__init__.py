"""What runs a model: its sizes, gates, budgets and modes; running with hooks and keeping what was asked for."""

from __future__ import annotations

from av_lens.core.execution import Run, run

__all__ = ["Run", "run"]
