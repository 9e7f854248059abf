"""Recorded runs that restart anywhere: record, replay, score, differentiate, sweep."""

from av_lens.replay.sweeps import sweep
from av_lens.replay.traces import Trace, measure_plans

__all__ = ["Trace", "measure_plans", "sweep"]
