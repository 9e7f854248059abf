"""Methods: one technique per file. Each takes a model and inputs and returns labelled numbers."""

from av_lens.methods.activation_patching import patch
from av_lens.methods.attention import attention_flow
from av_lens.methods.attribution import direct_attribution
from av_lens.methods.edges import edge_attribution
from av_lens.methods.sinks import Sinks, find_sinks
from av_lens.methods.steering import mean_difference, reweighed, steer

__all__ = [
    "Sinks",
    "attention_flow",
    "direct_attribution",
    "edge_attribution",
    "find_sinks",
    "mean_difference",
    "patch",
    "reweighed",
    "steer",
]
