"""What runs a model: its sizes, gates, budgets and modes; running with hooks and keeping what was asked for."""

from av_lens.core.budget import Progress, watched
from av_lens.core.execution import Run, run
from av_lens.core.readings import read_layers

__all__ = ["Progress", "Run", "read_layers", "run", "watched"]
