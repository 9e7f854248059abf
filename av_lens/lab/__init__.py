"""Research programs: training and planting the embedded models, the benches, and studies at scale."""

from av_lens.lab.calibration import calibrate, planted_truth
from av_lens.lab.demonstration import Demonstration, isolate_into, run_demo
from av_lens.lab.guarantees import check
from av_lens.lab.plantbench.bench import run_plantbench
from av_lens.lab.planting.planting import plant
from av_lens.lab.seeds import run_seeds
from av_lens.lab.training.courses import train

__all__ = ["Demonstration", "calibrate", "check", "isolate_into", "plant", "planted_truth", "run_demo"]
__all__ += ["run_plantbench", "run_seeds", "train"]
