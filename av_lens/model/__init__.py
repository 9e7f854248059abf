"""A model in hand: loading, its self-check, the wrapper, and TransformerLens's side of it."""

from av_lens.model.bringing import BroughtModel
from av_lens.model.loading import load, short_names
from av_lens.model.selfcheck import Check, CheckReport, check_model
from av_lens.model.wrapper import HookedAVLLM

__all__ = ["BroughtModel", "Check", "CheckReport", "HookedAVLLM", "check_model", "load", "short_names"]
