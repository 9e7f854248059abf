"""What does the model do when some heads are edited already? The trace of an edited run.

The search for sets asks the same question about many sets that share members. An edited run is therefore made once and
kept like a recorded one (`ModelEngine.record_edited`), and every further edit restarts there, at the further head's own
layer, instead of at the first layer of the whole set. Members of a set are measured in the same way, on the run in
which the other members are edited.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from av_lens.interventions import CompiledPlan, Plan
from av_lens.replay.rerun import Taps, rerun, start_of
from av_lens.replay.traces import Trace


class _Keeping(Taps):
    """Taps that keep every layer's z, after its edits."""

    def __init__(self, plan: CompiledPlan, offset: int) -> None:
        super().__init__([plan], offset)
        self.z: dict[int, Tensor] = {}

    def __call__(self, component: str, layer: int | None, activation: Tensor, rows: slice | None = None) -> Tensor:
        """Apply the edits at one place, and keep z."""
        found = super().__call__(component, layer, activation, rows)
        if component == "z" and layer is not None:
            self.z[layer] = found[0]
        return found


def edited_run(trace: Trace, plan: Plan) -> tuple[Trace, dict[int, Float[Tensor, "batch pos head d_head"]], int]:
    """Run a plan on a recorded input: the edited run's trace, every recomputed layer's z, and from where it is new."""
    trace.require_standing()
    compiled = plan.compile(trace.model.spec, trace.spans, batch=trace.batch)
    start = start_of(trace, compiled)
    taps = _Keeping(compiled, start)
    found = rerun(trace, taps)
    compiled.verify()
    return found, taps.z, start
