"""Interventions: where (sites), what (edits, cuts of attention edges), and the plan that runs them and proves it."""

from av_lens.interventions.edges import KV, Cut, cut
from av_lens.interventions.edits import Edit, Site, add, mean, noise, replace, resample, scale, zero
from av_lens.interventions.plan import CompiledPlan, Plan, Step

__all__ = ["KV", "CompiledPlan", "Cut", "Edit", "Plan", "Site", "Step"]
__all__ += ["add", "cut", "mean", "noise", "replace", "resample", "scale", "zero"]
