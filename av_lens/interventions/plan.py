"""A plan: edits and cuts that run together, compiled to hooks that keep a firing record.

A hook that never fires looks like a null result: `verify` raises when an edit fired another number of times than once
in the prompt's forward for each layer, and once more at each decoding step if its positions grow. The same compiled
edits serve hooked runs (`fwd_hooks`) and restarts (`steps`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from av_lens.brief import Brief
from av_lens.errors import InterventionError
from av_lens.families.decoder import hook_name
from av_lens.interventions.edges import BoundCut, Cut, cut_scores_, silence_
from av_lens.interventions.edits import BoundEdit, Edit, ModelSpec, Site
from av_lens.interventions.plan_files import read_plan, write_plan
from av_lens.spans import SpanMap


@dataclass(frozen=True, eq=False, repr=False)
class Plan(Brief):
    """Edits and cuts to be made in one run.

    Attributes:
        edits: what to do, in this order where two meet at one hook.
    """

    edits: tuple[Edit | Cut, ...]

    def __init__(self, edits: Edit | Cut | Iterable[Any] = ()) -> None:
        found = (edits,) if isinstance(edits, Edit | Cut) else tuple(edits)
        for edit in found:
            if not isinstance(edit, Edit | Cut):
                raise InterventionError(
                    f"a plan holds edits and cuts, not {type(edit).__name__}: write Plan([zero(Site('z', 5, head=3))])."
                )
        object.__setattr__(self, "edits", found)

    def __add__(self, other: Plan) -> Plan:
        return Plan((*self.edits, *other.edits))

    def __len__(self) -> int:
        return len(self.edits)

    def __iter__(self) -> Iterator[Edit | Cut]:
        return iter(self.edits)

    @property
    def first_layer(self) -> int:
        """The first layer that the plan can change; -1 for an empty plan."""
        return min((edit.first_layer for edit in self.edits), default=-1)

    def first_position(self, spans: SpanMap) -> int:
        """Find the first position that the plan can change.

        Args:
            spans: the `SpanMap` of the input.

        Returns:
            The smallest position of its edits; the input's length for an empty plan.
        """
        return min((e.first_position(spans) for e in self.edits), default=len(spans))

    def compile(self, spec: ModelSpec, spans: SpanMap, *, batch: int | None = None) -> CompiledPlan:
        """Check every edit against a model and an input, and make hooks of them.

        Args:
            spec: the model's sizes.
            spans: the `SpanMap` of the input.
            batch: examples in the input, if known.

        Returns:
            The compiled plan, for one run.

        Raises:
            InterventionError: an edit does not fit the model or the input.
        """
        made = (_steps_of(number, edit, spec, spans, batch) for number, edit in enumerate(self.edits))
        steps = tuple(step for steps in made for step in steps)
        return CompiledPlan(steps, len(spans), self.first_layer, self.first_position(spans))

    def save(self, path: str | Path, *, model: Any, note: str = "") -> Path:
        """Save the plan as json, its tensors beside it as safetensors.

        Args:
            path: the file; ".json" is added where it has no ending.
            model: the model that the plan was made for; its sizes stand in the file.
            note: a sentence for whoever opens the file.

        Returns:
            The json file that was written.

        Raises:
            InterventionError: the plan does not fit the model, or names positions by number.
        """
        for edit in self.edits:
            if isinstance(edit, Edit):
                edit.site.check(model.spec)
        return write_plan(self.edits, path, model=model, note=note)

    @classmethod
    def load(cls, path: str | Path, *, model: Any = None) -> Plan:
        """Open a saved plan.

        Args:
            path: the json file.
            model: the model that it is for; one of other sizes is refused. None leaves this to the run.

        Returns:
            The plan.

        Raises:
            InterventionError: no plan there, an unknown version or kind, or a model of other sizes.
        """
        return cls(read_plan(path, model=model))


@dataclass(eq=False, repr=False)
class Step(Brief):
    """One edit at one hook."""

    number: int  # the edit's place in the plan
    component: str  # the component it acts on
    layer: int | None  # its layer, or None
    # writes into `[batch, pos, head, d]` (scores and pattern: `[batch, head, query_pos, key_pos]`) in place, given the
    # absolute position of the first row; says whether anything was there to write
    apply_: Callable[[Tensor, int], bool]
    in_prompt: int  # firings expected in the prompt's forward, 0 or 1
    in_decode: int  # firings expected at each decoding step, 0 or 1
    rowwise: bool = True  # whether it does to each row the same whichever other rows it is shown
    fired: int = 0  # firings so far

    def __call__(self, activation: Tensor, offset: int) -> None:
        """Apply the edit and count it."""
        self.fired += int(self.apply_(activation, offset))


@dataclass(eq=False, repr=False)
class CompiledPlan(Brief):
    """A plan on one model and one prompt, for one run."""

    steps: tuple[Step, ...]  # every edit at every hook that it touches
    n_prompt: int  # positions of the prompt
    first_layer: int  # the first layer that it can change; -1 for an empty plan
    first_position: int  # the first position that it can change; `n_prompt` for an empty plan
    _offsets: dict[str, int] = field(default_factory=dict)

    @property
    def fwd_hooks(self) -> list[tuple[str, Callable[..., Tensor]]]:
        """Hooks in TransformerLens's form, one for each place, which apply the edits and count them."""
        places: dict[str, list[Step]] = {}
        for step in self.steps:
            places.setdefault(hook_name(step.component, step.layer), []).append(step)
        return [(name, partial(self._edited, name, steps)) for name, steps in places.items()]

    def _edited(self, name: str, steps: list[Step], activation: Tensor, hook: Any = None) -> Tensor:
        new, site = activation.clone(), Site(steps[0].component, steps[0].layer)
        view = new.transpose(1, 2) if site.heads_first and not site.is_edges else new
        offset = self._offset(name, view.shape[2 if site.is_edges else 1])
        if site.is_edges:
            offset = view.shape[3] - view.shape[2]
        for step in steps:
            step(view, offset)
        return new

    def _offset(self, name: str, length: int) -> int:
        """Count the positions that this hook has seen: where a decoding step starts."""
        offset = self._offsets.get(name, 0)
        if offset == 0 and length != self.n_prompt:
            raise InterventionError(
                f"the plan was compiled for a prompt of {self.n_prompt} positions, but {name} saw {length} first. "
                "Compile the plan anew for this input."
            )
        if offset and length == self.n_prompt and length > 1:
            raise InterventionError("a compiled plan serves one run: compile it again for another.")
        self._offsets[name] = offset + length
        return offset

    @property
    def fired(self) -> dict[tuple[int, str], int]:
        """How often each edit fired: `(number of the edit, hook name) -> count`."""
        record = Counter[tuple[int, str]]()
        for step in self.steps:
            record[step.number, hook_name(step.component, step.layer)] += step.fired
        return dict(record)

    def verify(self, *, decode_steps: int = 0) -> None:
        """Raise if an edit did not fire as often as it should have."""
        for step in self.steps:
            expected = step.in_prompt + decode_steps * step.in_decode
            if step.fired != expected:
                raise InterventionError(
                    f"edit {step.number} at {hook_name(step.component, step.layer)} fired {step.fired} times, "
                    f"expected {expected} ({step.in_prompt} in the prompt, {decode_steps} decoding steps): the run "
                    "did not pass through its hook. Its result would be a silent no-op."
                )


def _steps_of(number: int, edit: Edit | Cut, spec: ModelSpec, spans: SpanMap, batch: int | None) -> list[Step]:
    if isinstance(edit, Edit):
        bound = edit.bound(spec, spans, batch)
        apply_ = partial(_on_edges, bound) if edit.site.is_edges else bound.apply_
        prompt, decode = int(len(bound.positions) > 0), int(bound.positions.decode)
        return [Step(number, edit.site.component, edit.site.layer, apply_, prompt, decode, bound.rowwise)]
    edges = edit.bound(spec, spans, batch)
    return [step for layer in edges.layers for step in _steps_of_cut(number, edges, layer)]


def _on_edges(bound: BoundEdit, activation: Tensor, offset: int) -> bool:
    """Edit `[batch, head, query_pos, key_pos]`, whose rows are queries."""
    return bound.apply_(activation.transpose(1, 2), offset)


def _steps_of_cut(number: int, bound: BoundCut, layer: int) -> list[Step]:
    """Make the one or two steps of a cut: scores before the softmax and empty rows after it, or the pattern alone."""
    prompt, decode = int(len(bound.queries) > 0), int(bound.queries.decode)
    dead: list[Tensor] = []

    def before(scores: Tensor, offset: int) -> bool:
        dead.clear()
        mask = bound.mask(*scores.shape[1:], offset=offset)
        if mask is None:
            return False
        dead.append(cut_scores_(scores, mask))
        return True

    def after(pattern: Tensor, offset: int) -> bool:
        if dead:
            silence_(pattern, dead[0])
        return bool(dead)

    def weights(pattern: Tensor, offset: int) -> bool:
        mask = bound.mask(*pattern.shape[1:], offset=offset)
        if mask is not None:
            pattern.masked_fill_(mask.to(pattern.device, non_blocking=True)[None], 0.0)
        return mask is not None

    acts = {"scores": before, "pattern": after} if bound.edit.renormalize else {"pattern": weights}
    return [Step(number, component, layer, act, prompt, decode) for component, act in acts.items()]
