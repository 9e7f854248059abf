"""Bring your own model: a text decoder that av_lens knows, fed by encoders and a template that it does not.

See "Bring your own in 30 lines" in the documentation.
"""

from av_lens.families.given import Given
from av_lens.model.bringing import BroughtModel, Saved, load_text_model, wrap

__all__ = ["BroughtModel", "Given", "Saved", "load_text_model", "wrap"]
