"""A model in hand: loading, forward runs, caches, generation, traces, metrics."""

from av_lens.runs.asked import each
from av_lens.runs.execution import Run, run
from av_lens.runs.judging import Judge
from av_lens.runs.loading import load, short_names
from av_lens.runs.measurement import measure, measure_plans
from av_lens.runs.metrics import Metric, kl, log_prob, logit, logit_diff, prob, rank
from av_lens.runs.selfcheck import CheckReport, check_model
from av_lens.runs.sweeps import sweep
from av_lens.runs.traces import Trace
from av_lens.runs.wrapper import HookedAVLLM

__all__ = [
    "CheckReport",
    "HookedAVLLM",
    "Judge",
    "Metric",
    "Run",
    "Trace",
    "check_model",
    "each",
    "kl",
    "load",
    "log_prob",
    "logit",
    "logit_diff",
    "measure",
    "measure_plans",
    "prob",
    "rank",
    "run",
    "short_names",
    "sweep",
]
