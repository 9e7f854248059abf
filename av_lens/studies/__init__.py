"""Durable runs over sets of clips: the demonstration, the calibration, an isolation from start to page."""

from av_lens.studies.calibration import calibrate, planted_truth
from av_lens.studies.demonstration import Demonstration, run_demo
from av_lens.studies.isolations import isolate_into
from av_lens.studies.plantbench import run_plantbench
from av_lens.studies.seeds import run_seeds

__all__ = ["Demonstration", "calibrate", "isolate_into", "planted_truth", "run_demo", "run_plantbench", "run_seeds"]
