"""The main job: which heads keep the model from saying what it hears, by what mechanism, and how sure are we?"""

from av_lens.isolation.running.comparing import compare
from av_lens.isolation.running.pipeline import isolate

__all__ = ["compare", "isolate"]
