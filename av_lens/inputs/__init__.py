"""Clips and questions become model inputs that know what each position is; pairs and conflicts of them."""

from av_lens.inputs.answers import Answer, Grammar, answer_pair, resolve
from av_lens.inputs.conflict import Cells, Conflict, conflicts
from av_lens.inputs.designs import Design, design_conflicts
from av_lens.inputs.encoder import Encoder
from av_lens.inputs.model_inputs import AVInputs
from av_lens.inputs.pairs import Pair

__all__ = ["AVInputs", "Answer", "Cells", "Conflict", "Design", "Encoder", "Grammar", "Pair"]
__all__ += ["answer_pair", "conflicts", "design_conflicts", "resolve"]
