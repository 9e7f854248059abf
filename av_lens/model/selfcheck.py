"""Is the model in hand the one whose hooks we think we turn? A self-check at the door.

Writing an activation back must change nothing, to the bit; turning it to another *direction* must change the logits (a
pure rescale is a bad probe: the next norm undoes it); rows of the pattern must sum to one; the stream must be the sum
of what was written to it. Not guaranteed: that another input takes the same road through a tower.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from av_lens.errors import InterventionError, ModelError
from av_lens.families.decoder import COMPONENTS, Component, hook_name
from av_lens.families.registry import family_of
from av_lens.families.weights import fetched
from av_lens.model.wrapper import HookedAVLLM
from av_lens.whole_files import write_whole

DOOR = ("resid_mid", "z", "pattern")  # what `load` checks, in the last layer
_RULE = "|---|---|---|"


@dataclass(frozen=True)
class Check:
    """One guarantee.

    Attributes:
        name: what is guaranteed.
        held: whether it held; None where it was not checked, or is a figure without a limit.
        found: what was measured, or why nothing was.
    """

    name: str
    held: bool | None
    found: str = ""

    @property
    def state(self) -> str:
        """In a word."""
        return {True: "held", False: "FAILED", None: "-"}[self.held]


@dataclass(frozen=True)
class CheckReport:
    """What was checked, and what failed.

    Attributes:
        checks: every guarantee, in the order of checking.
        about: the model, the machine and the versions, as plain data.
    """

    checks: tuple[Check, ...]
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def passed(self) -> tuple[str, ...]:
        """The names of what held."""
        return tuple(check.name for check in self.checks if check.held)

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of what did not hold."""
        return tuple(check.name for check in self.checks if check.held is False)

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failed

    def __str__(self) -> str:
        wrong = (f"FAILED {one.name}{one.found and f': {one.found}'}" for one in self.checks if one.held is False)
        return "\n".join([f"{len(self.passed)} checks passed, {len(self.failed)} failed", *wrong])

    def save(self, path: str | Path) -> Path:
        """Save the report, to be kept or sent: as data, and beside it as a table to read.

        Args:
            path: the json file; the table has the same name and ends in ".md".

        Returns:
            The json file.

        Raises:
            FileError: it cannot be written.
        """
        target = Path(path).with_suffix(".json")
        data = {"checks": [asdict(check) for check in self.checks], "about": self.about, "ok": self.ok}
        rows = [f"| {one.name} | {one.state} | {one.found.replace('|', '/')} |" for one in self.checks]
        told = [f"- {name}: {value}" for name, value in self.about.items()]
        table = ["# What was checked", str(self), "\n".join(told), "\n".join(["| guarantee | | found |", _RULE, *rows])]
        write_whole(target.with_suffix(".md"), "\n\n".join(table) + "\n")
        write_whole(target, json.dumps(data, indent=1) + "\n")
        return target


def check_model(model: HookedAVLLM, x: Any = None, *, full: bool = True) -> CheckReport:
    """Prove that this model's hooks are on the road.

    Args:
        model: the model.
        x: an input to check on, for its media too; None for random ids of text.
        full: every hook of every layer; else a few of the last one, as `load` does.

    Returns:
        What was checked.

    Raises:
        ModelError: a check failed; the message lists them all.
    """
    report = examined(model, x, full=full)
    if report.failed:
        raise ModelError(f"{model!r} failed its self-check, so its numbers cannot be trusted. {report}")
    return report


def examined(model: HookedAVLLM, x: Any = None, *, full: bool = True) -> CheckReport:
    """Check as `check_model` does, and report what failed instead of raising."""
    found = _checks(model, _random_ids(model) if x is None else x, x is not None, full)
    return CheckReport(tuple(Check(line, held) for line, held in found))


def check_weights(hf_model: Any, tokenizer: Any, name: str) -> None:
    """Refuse weights that are NaN or infinite, and a tokenizer that has more tokens than the model."""
    for weight, tensor in ((one, fetched(hf_model, one)) for one, _ in hf_model.named_parameters()):
        if tensor.numel() and not all(bool(torch.isfinite(bound)) for bound in torch.aminmax(tensor.detach())):
            wrong = int((~torch.isfinite(tensor)).sum())
            raise ModelError(
                f"the weight {weight} of {name!r} holds {wrong} numbers of {tensor.numel()} that are NaN or infinite "
                f"in {tensor.dtype}: the checkpoint is damaged (download it again), or does not fit that dtype."
            )
    rows, tokens = hf_model.get_input_embeddings().weight.shape[0], len(tokenizer)
    if tokens > rows:
        raise ModelError(
            f"the tokenizer of {name!r} is another model's: it has {tokens} tokens, the model {rows}. Take the "
            "checkpoint's own files."
        )


def check_parts(hf_model: Any, processor: Any, name: str) -> None:
    """Refuse weights as above, and a processor that lacks a part or is another model's."""
    media = family_of(type(hf_model)).media
    missing = [part for part in media.parts if getattr(processor, part, None) is None]
    if missing:
        raise ModelError(
            f"the processor of {name!r} is {type(processor).__name__}, without {', '.join(missing)}: a file such as "
            "processor_config.json or preprocessor_config.json is missing. Complete the folder, or pass processor=."
        )
    check_weights(hf_model, processor.tokenizer, name)
    other = f"tokenizer of {name!r} is another model's"
    for kind, known in media.placeholders(hf_model.config).items():
        token = getattr(processor, f"{kind}_token", None)
        found = None if token is None else processor.tokenizer.convert_tokens_to_ids(token)
        if token is not None and found != known:
            raise ModelError(
                f"the {other}: its {token!r} has the id {found}, the model's {kind} token is {known}. Take the "
                "checkpoint's own files."
            )


def turned(value: torch.Tensor, component: Component) -> torch.Tensor:
    """Another direction, legal for its kind: patterns look at key 0, scores favour it, the rest varies or is rolled."""
    new = torch.zeros_like(value) if component.name == "pattern" else value.clone()
    if component.name in ("pattern", "scores"):
        new[..., 0] += {"pattern": 1.0, "scores": 3.0}[component.name]
    elif component.axes[-1] == "one":
        new[:, ::2] *= 1.5
    else:
        new = 0.5 * value + 0.5 * value.roll(1, dims=-1)
    return new


def _random_ids(model: HookedAVLLM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.spec.d_vocab, (1, 12), generator=generator)
    safe = next(i for i in range(model.spec.d_vocab) if i not in model.placeholders)
    for placeholder in model.placeholders:
        ids[ids == placeholder] = safe
    return ids


def _checks(model: HookedAVLLM, x: Any, given: bool, full: bool) -> Iterator[tuple[str, bool]]:
    last = model.spec.n_layers - 1
    layers = {True: range(last + 1), False: (None,)}
    absent: set[tuple[str, int | None]] = {*model.spec.lacking}
    if "inputs_embeds" in getattr(x, "tensors", ()):  # ids are not looked up: a hook there does not fire
        absent.add(("embed_text", None))
    everywhere = ((one, layer) for one in COMPONENTS.values() for layer in layers[one.layered])
    everywhere = (place for place in everywhere if (place[0].name, place[1]) not in absent)
    with torch.no_grad():
        logits = model(x)
        yield "logits are finite", bool(torch.isfinite(logits).all())
        for component, layer in everywhere if full else ((COMPONENTS[name], last) for name in DOOR):
            name = hook_name(component.name, layer)
            same = _edited(model, x, name, torch.clone)
            yield f"writing {name} back changes nothing", torch.equal(same, logits)
            if component.writable:
                other = _edited(model, x, name, lambda value, component=component: turned(value, component))
                yield f"turning {name} changes the logits", not torch.equal(other, logits)
        parts = ("pattern", "resid_pre", "resid_mid", "attn_out", "mlp_out", "resid_post")
        names = [hook_name(part, last) for part in parts]
        fires = f"the hooks of layer {last} fire"
        try:
            _, cache = model.run_with_cache(x, names, budget_gb=float("inf"))
        except InterventionError as error:
            yield f"{fires} ({error})", False
            return
    yield fires, True
    rows = cache[names[0]].sum(-1, dtype=torch.float32)
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.02
    yield f"rows of {names[0]} sum to one", bool((rows - 1).abs().max() < tolerance)
    total = cache[names[1]] + cache[names[3]]
    yield f"{names[2]} is the stream plus attention's write", torch.equal(total, cache[names[2]])
    if not model.family.replay_traits(model.config).layers:
        yield f"{names[5]} is that plus the MLP's", torch.equal(total + cache[names[4]], cache[names[5]])
    if given and hasattr(x, "spans"):
        yield "the spans cover the input", len(x.spans) == x.tensors["input_ids"].shape[1]


def _edited(model: HookedAVLLM, x: Any, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    with model.hooks(fwd_hooks=[(name, lambda value, hook: edit(value))]):  # one that never fires is for the report
        return model(x)
