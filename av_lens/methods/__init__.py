"""Methods: one technique per file. Each takes a model and inputs and returns labelled numbers."""

from av_lens.methods.activation_patching import patch
from av_lens.methods.attention import attention_flow
from av_lens.methods.attribution import direct_attribution
from av_lens.methods.base_model.grafting import graft, weight_change
from av_lens.methods.base_model.inheritance import base_shift
from av_lens.methods.captions.captioning import caption
from av_lens.methods.captions.judging import Judge
from av_lens.methods.circuits.finding import find_circuit
from av_lens.methods.edges import edge_attribution
from av_lens.methods.gradients import attribution_patch
from av_lens.methods.knockouts import knockout
from av_lens.methods.lens import logit_lens
from av_lens.methods.path_patching.patching import path_patch
from av_lens.methods.probes import at_chosen_layer, probe, read_streams
from av_lens.methods.sinks import Sinks, find_sinks
from av_lens.methods.steering import mean_difference, reweighed, steer
from av_lens.methods.tracing import causal_trace

__all__ = ["Judge", "Sinks", "at_chosen_layer", "attention_flow", "attribution_patch", "base_shift", "caption"]
__all__ += ["causal_trace", "direct_attribution", "edge_attribution", "find_circuit", "find_sinks", "graft", "knockout"]
__all__ += ["logit_lens", "mean_difference", "patch", "path_patch", "probe", "read_streams", "reweighed", "steer"]
__all__ += ["weight_change"]
