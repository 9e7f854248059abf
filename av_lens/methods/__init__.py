"""Methods: one technique per file. Each takes a model and inputs and returns labelled numbers."""

from av_lens.methods.activation_patching import patch
from av_lens.methods.attention import attention_flow
from av_lens.methods.attribution import direct_attribution
from av_lens.methods.edges import edge_attribution
from av_lens.methods.gradients import attribution_patch
from av_lens.methods.knockouts import knockout
from av_lens.methods.path_patching import path_patch
from av_lens.methods.sinks import Sinks, find_sinks
from av_lens.methods.steering import mean_difference, reweighed, steer

__all__ = [
    "Sinks",
    "attention_flow",
    "attribution_patch",
    "direct_attribution",
    "edge_attribution",
    "find_sinks",
    "knockout",
    "mean_difference",
    "patch",
    "path_patch",
    "reweighed",
    "steer",
]
