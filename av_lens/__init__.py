"""av_lens: TransformerLens for audio-visual language models.

Which heads of the fusion layers keep a model from saying what it hears, and how do we know?

```python
import av_lens as avl

model = avl.load("av-tiny")
clip = avl.organism.clip("dog", seed=0).with_sound(avl.organism.clip("siren", seed=0))
x = model.encode(clip, "What do you hear?")
logits, cache = model.run_with_cache(x)
```

Importing is silent and light: every name below loads the module it lives in on first use.
"""

from typing import TYPE_CHECKING, Any

from av_lens import upstairs

__version__ = "0.1.0"

# Public name -> the module it lives in. The one list of what av_lens offers.
_HOMES = {
    name: home
    for home, names in {
        "media": "Clip load_clip",
        "errors": "AvLensError",
        "inputs": "AVInputs Conflict Pair conflicts",
        "families.registry": "register_family",
        "model": "HookedAVLLM load",
        "interventions": "Site Plan add cut mean noise replace scale zero",
        "metrics": "logit_diff measure",
        "core": "run",
        "replay": "Trace sweep",
        "methods": "attention_flow attribution_patch caption causal_trace direct_attribution edge_attribution "
        "find_circuit find_sinks knockout logit_lens patch path_patch probe steer",
        "results": "Grid Isolation",
        "isolation": "compare isolate",
    }.items()
    for name in names.split()
}
_ROOMS = ("errors", "interventions", "methods", "metrics", "organism", "plots", "results")

__all__ = ["__version__", *_HOMES, *_ROOMS]  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:  # the same names for editors and type checkers; a test compares them
    from av_lens import errors as errors
    from av_lens import interventions as interventions
    from av_lens import methods as methods
    from av_lens import metrics as metrics
    from av_lens import organism as organism
    from av_lens import plots as plots
    from av_lens import results as results
    from av_lens.core import run as run
    from av_lens.errors import AvLensError as AvLensError
    from av_lens.families.registry import register_family as register_family
    from av_lens.inputs import AVInputs as AVInputs
    from av_lens.inputs import Conflict as Conflict
    from av_lens.inputs import Pair as Pair
    from av_lens.inputs import conflicts as conflicts
    from av_lens.interventions import Plan as Plan
    from av_lens.interventions import Site as Site
    from av_lens.interventions import add as add
    from av_lens.interventions import cut as cut
    from av_lens.interventions import mean as mean
    from av_lens.interventions import noise as noise
    from av_lens.interventions import replace as replace
    from av_lens.interventions import scale as scale
    from av_lens.interventions import zero as zero
    from av_lens.isolation import compare as compare
    from av_lens.isolation import isolate as isolate
    from av_lens.media import Clip as Clip
    from av_lens.media import load_clip as load_clip
    from av_lens.methods import attention_flow as attention_flow
    from av_lens.methods import attribution_patch as attribution_patch
    from av_lens.methods import caption as caption
    from av_lens.methods import causal_trace as causal_trace
    from av_lens.methods import direct_attribution as direct_attribution
    from av_lens.methods import edge_attribution as edge_attribution
    from av_lens.methods import find_circuit as find_circuit
    from av_lens.methods import find_sinks as find_sinks
    from av_lens.methods import knockout as knockout
    from av_lens.methods import logit_lens as logit_lens
    from av_lens.methods import patch as patch
    from av_lens.methods import path_patch as path_patch
    from av_lens.methods import probe as probe
    from av_lens.methods import steer as steer
    from av_lens.metrics import logit_diff as logit_diff
    from av_lens.metrics import measure as measure
    from av_lens.model import HookedAVLLM as HookedAVLLM
    from av_lens.model import load as load
    from av_lens.replay import Trace as Trace
    from av_lens.replay import sweep as sweep
    from av_lens.results import Grid as Grid
    from av_lens.results import Isolation as Isolation


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return upstairs.upstairs(name)
    if name in _HOMES:
        value = getattr(upstairs.upstairs(_HOMES[name]), name)
        globals()[name] = value
        return value
    from av_lens.errors import unknown

    for room in () if name.startswith("_") else _ROOMS:
        if name in getattr(upstairs.upstairs(room), "__all__", ()):
            raise AttributeError(f"av_lens: {name!r} stands in a room of the package: write av_lens.{room}.{name}.")
    raise AttributeError(f"av_lens: {unknown('name', name, __all__)}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
