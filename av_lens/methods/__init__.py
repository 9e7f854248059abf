"""Methods: one technique per file. Each takes a model and inputs and returns labelled numbers."""

from av_lens.methods.activation_patching import patch
from av_lens.methods.attribution import direct_attribution
from av_lens.methods.steering import mean_difference, reweighed, steer

__all__ = ["direct_attribution", "mean_difference", "patch", "reweighed", "steer"]
