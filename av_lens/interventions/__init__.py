"""Interventions: where (sites), what (edits, cuts of attention edges), and the plan that runs them and proves it."""

from av_lens.interventions.edges import Cut, cut
from av_lens.interventions.edits import Edit, add, mean, noise, replace, resample, scale, zero
from av_lens.interventions.nodes import KV
from av_lens.interventions.plan import CompiledPlan, Plan, Step
from av_lens.interventions.sites import Site

__all__ = [
    "KV",
    "CompiledPlan",
    "Cut",
    "Edit",
    "Plan",
    "Site",
    "Step",
    "add",
    "cut",
    "mean",
    "noise",
    "replace",
    "resample",
    "scale",
    "zero",
]
