"""A model in hand: loading, forward runs, caches, generation, traces, metrics."""

from av_lens.runs.loading import load, short_names
from av_lens.runs.selfcheck import CheckReport, check_model
from av_lens.runs.wrapper import HookedAVLLM

__all__ = ["CheckReport", "HookedAVLLM", "check_model", "load", "short_names"]
