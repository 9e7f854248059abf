"""Embedded models: tiny real Qwen2.5-Omni thinkers of a synthetic audio-visual world, and that world.

What is known about each by construction, and what each proves and does not prove, is said in `lab.training.courses`.
"""

from av_lens.organism.evaluation import Evaluation, evaluate
from av_lens.organism.footage import classes, clip, colours

__all__ = ["Evaluation", "classes", "clip", "colours", "evaluate"]
