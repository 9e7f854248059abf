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

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from av_lens import upstairs

__version__ = "0.1.0"

# Public name -> the module it lives in. The one list of what av_lens offers.
_HOMES = {
    name: home
    for home, names in {
        "media": "Clip ClipFile load_clip",
        "spans": "Span SpanMap",
        "inputs": "AVInputs Conflict Pair conflicts",
        "model": "HookedAVLLM check_model load",
        "methods": "Judge attention_flow find_circuit find_sinks knockout logit_lens direct_attribution "
        "edge_attribution attribution_patch causal_trace patch read_streams at_chosen_layer probe caption graft "
        "weight_change base_shift path_patch mean_difference reweighed steer",
        "interventions": "KV Site Edit Plan add cut mean noise replace resample scale zero",
        "metrics": "kl log_prob logit logit_diff prob rank",
        "replay": "measure Trace sweep",
        "core": "run",
        "results": "Circuit EdgeScores Grid Isolation Tabled",
        "isolation": "isolate",
        "errors": "AvLensError",
    }.items()
    for name in names.split()
}
_ROOMS = ("errors", "lab", "organism", "plots", "reports")

__all__ = [
    "KV",
    "AVInputs",
    "AvLensError",
    "Circuit",
    "Clip",
    "ClipFile",
    "Conflict",
    "EdgeScores",
    "Edit",
    "Grid",
    "HookedAVLLM",
    "Isolation",
    "Judge",
    "Pair",
    "Plan",
    "Site",
    "Span",
    "SpanMap",
    "Tabled",
    "Trace",
    "__version__",
    "add",
    "at_chosen_layer",
    "attention_flow",
    "attribution_patch",
    "base_shift",
    "caption",
    "causal_trace",
    "check_model",
    "conflicts",
    "cut",
    "direct_attribution",
    "edge_attribution",
    "errors",
    "find_circuit",
    "find_sinks",
    "graft",
    "isolate",
    "kl",
    "knockout",
    "lab",
    "load",
    "load_clip",
    "log_prob",
    "logit",
    "logit_diff",
    "logit_lens",
    "mean",
    "mean_difference",
    "measure",
    "noise",
    "organism",
    "patch",
    "path_patch",
    "plots",
    "prob",
    "probe",
    "rank",
    "read_streams",
    "replace",
    "reports",
    "resample",
    "reweighed",
    "run",
    "scale",
    "steer",
    "sweep",
    "weight_change",
    "zero",
]

if TYPE_CHECKING:
    from av_lens import errors, lab, organism, plots, reports
    from av_lens.core import run
    from av_lens.errors import AvLensError
    from av_lens.inputs import AVInputs, Conflict, Pair, conflicts
    from av_lens.interventions import KV, Edit, Plan, Site, add, cut, mean, noise, replace, resample, scale, zero
    from av_lens.isolation import isolate
    from av_lens.media import Clip, ClipFile, load_clip
    from av_lens.methods import (
        Judge,
        at_chosen_layer,
        attention_flow,
        attribution_patch,
        base_shift,
        caption,
        causal_trace,
        direct_attribution,
        edge_attribution,
        find_circuit,
        find_sinks,
        graft,
        knockout,
        logit_lens,
        mean_difference,
        patch,
        path_patch,
        probe,
        read_streams,
        reweighed,
        steer,
        weight_change,
    )
    from av_lens.metrics import kl, log_prob, logit, logit_diff, prob, rank
    from av_lens.model import HookedAVLLM, check_model, load
    from av_lens.replay import Trace, measure, sweep
    from av_lens.results import Circuit, EdgeScores, Grid, Isolation, Tabled
    from av_lens.spans import Span, SpanMap


def _room(name: str) -> Any:
    return importlib.import_module(f"av_lens.{name}")


upstairs.install(_room)


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return _room(name)
    if name in _HOMES:
        value = getattr(_room(_HOMES[name]), name)
        globals()[name] = value
        return value
    from av_lens.errors import unknown

    raise AttributeError(f"av_lens: {unknown('name', name, __all__)}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
