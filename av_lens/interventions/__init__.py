"""Interventions: where (sites), what (edits, cuts of attention edges), and the plan that runs them and proves it."""

from av_lens.interventions.edges import KV as KV
from av_lens.interventions.edges import Cut as Cut
from av_lens.interventions.edges import cut as cut
from av_lens.interventions.edits import Edit as Edit
from av_lens.interventions.edits import Site as Site
from av_lens.interventions.edits import add as add
from av_lens.interventions.edits import mean as mean
from av_lens.interventions.edits import noise as noise
from av_lens.interventions.edits import replace as replace
from av_lens.interventions.edits import resample as resample
from av_lens.interventions.edits import scale as scale
from av_lens.interventions.edits import zero as zero
from av_lens.interventions.plan import CompiledPlan as CompiledPlan
from av_lens.interventions.plan import Plan as Plan
from av_lens.interventions.plan import Step as Step
