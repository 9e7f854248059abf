"""Asked to describe the clip, does the model name what sounds once the set is edited? Protocol section 8."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from av_lens.errors import InputError
from av_lens.inputs.answers import words_of
from av_lens.interventions import Plan, cut, zero
from av_lens.isolation.explaining.knowledge import Known
from av_lens.isolation.measuring.bench import DESCRIBE, Bench, Chunk, shared_out
from av_lens.isolation.measuring.effects import trace_of
from av_lens.isolation.measuring.engine import Node, site_of
from av_lens.isolation.measuring.halves import columns
from av_lens.isolation.measuring.store import Arrays
from av_lens.isolation.sets.confirmation import top_see_heads
from av_lens.isolation.sets.sets import head_names, release_of_sets
from av_lens.results.events import Lexicon

CELLS = ("va", "av")
NEW_TOKENS, RANDOM = 64, 20
EDITED = "suffix|generated"
FIGURES = ("heard", "seen", "hallucinated")
SHOWN = ("none", "set", "set by its donor", "see heads", "cut")
"""Arms whose captions are kept."""


@dataclass(frozen=True)
class Arm:
    """What is edited while the model writes; `donor` is "" where no head is, `draw` the number of a random set."""

    name: str
    members: tuple[Node, ...] = ()
    donor: str = ""
    draw: int = -1

    def plan(self, chunk: Chunk, cell: str) -> Plan:
        """Write the edit of one cell."""
        if self.name == "cut":
            return Plan(cut("generated", "video|image"))
        if self.donor == "zero":
            return Plan([zero(site_of(node, EDITED)) for node in self.members])
        values = chunk.z(cell, self.members, self.donor, DESCRIBE) if self.members else {}
        return chunk.run(cell, DESCRIBE).plan(values) if values else Plan()


def arms_of(known: Known) -> list[Arm]:
    """List what is edited; where no set was built, nothing and the cut alone."""
    built = known.held.chosen
    if built is None:
        return [Arm("none"), Arm("cut")]
    members = tuple(built.members)
    see = tuple(top_see_heads(known.searched.first.chunks, len(members)))
    arms = [Arm("none"), Arm("set", members, "zero"), Arm("set by its donor", members, built.donor)]
    arms += [Arm("see heads", see, "zero"), Arm("cut")]
    arms += [Arm("member", (one,), "zero") for one in members if len(members) > 1]
    return arms + [Arm("random", tuple(one), "zero", n) for n, one in enumerate(built.random[:RANDOM])]


def caption_tables(known: Known) -> tuple[dict[str, list[dict[str, Any]]], dict[str, np.ndarray]]:
    """Let the model describe the clips: rows of `captions` and of `caption_texts`, and what each caption names."""
    half, arms = known.confirmation, arms_of(known)
    chunks = known.bench.chunks(half.examples.tolist(), "suffix")
    for chunk in chunks:
        chunk.means = known.searched.means.get("suffix")
    lexicon = answers_lexicon(known.bench)
    depends = {"arms": [vars(arm) for arm in arms], "words": lexicon.words, "tokens": NEW_TOKENS}
    said = np.full((len(arms), len(half.examples), len(CELLS)), "", dtype=object)
    done = 0

    def write(chunk: Chunk) -> None:
        nonlocal done
        made = chunk.remember("captions", depends, partial(_written, chunk, arms))
        said[:, chunk.rows(half.examples)] = made["text"]
        done += 1
        known.bench.progress("captions", done, len(chunks))

    shared_out(chunks, write)
    found, one_word = _named(said, known, lexicon), _one_word(known, arms)
    rows = [_row(arm, found[:, i], found[0, 0], known) | {"one_word": float(one_word[i])} for i, arm in enumerate(arms)]
    ids = [known.bench.conflicts[int(i)].id for i in half.examples]
    texts = [
        {"id": name, "cell": cell, "arm": arm.name, "caption": said[i, place, c]}
        for i, arm in enumerate(arms) if arm.name in SHOWN
        for place, name in enumerate(ids) for c, cell in enumerate(CELLS)
    ]  # fmt: skip
    return {"captions": rows, "caption_texts": texts}, {f"{half.name}/captions": found}


def _written(chunk: Chunk, arms: Sequence[Arm]) -> Arrays:
    out = np.empty((len(arms), len(chunk.examples), len(CELLS)), dtype=object)
    for place, cell in enumerate(CELLS):
        plans = [arm.plan(chunk, cell) for arm in arms]
        for number, made in enumerate(trace_of(chunk, cell, DESCRIBE).generate(plans, max_new_tokens=NEW_TOKENS)):
            out[number, :, place] = [text.strip() for text in made.text]
    chunk.drop_traces(*CELLS, question=DESCRIBE)
    return {"text": out.astype(str)}


def answers_lexicon(bench: Bench) -> Lexicon:
    """The words of every answer: those given, and the lexicon of sounds' where one answer alone claims them."""
    words: dict[str, dict[str, None]] = defaultdict(dict)
    candidates, tokenizer = bench.candidates, bench.engine.model.tokenizer
    for conflict, *owners in zip(bench.conflicts, candidates.sound, candidates.picture, strict=True):
        for owner, answer in zip(owners, conflict.answers, strict=True):
            spelled = words_of(answer) or [tokenizer.decode([int(i)]) for i in candidates.ids[owner] if i >= 0]
            words[candidates.names[owner]] |= dict.fromkeys(word.strip().casefold() for word in spelled)
    sounds = Lexicon.of_sounds()
    events = {name: _events(sounds, listed) for name, listed in words.items()}
    for event, listed in sounds.words:
        owners = [name for name, known in events.items() if event in known]
        if len(owners) == 1:
            taken = {word for name, other in words.items() if name != owners[0] for word in other}
            words[owners[0]] |= dict.fromkeys(word for word in listed if word not in taken)
    return Lexicon(tuple((name, tuple(listed)) for name, listed in words.items()))


def _events(sounds: Lexicon, words: Sequence[str] | dict[str, None]) -> set[str]:
    found: set[str] = set()
    for word in words:
        try:
            found.add(sounds.event(word))
        except InputError:
            continue
    return found


def _named(said: np.ndarray, known: Known, lexicon: Lexicon) -> np.ndarray:
    """Whether captions name what is heard, what is seen, another answer: `[figure, arm, example]`, cells averaged."""
    candidates, examples = known.bench.candidates, known.confirmation.examples
    out = np.zeros((len(FIGURES), *said.shape))
    for place in np.ndindex(*said.shape):
        example = int(examples[place[1]])
        sides = [candidates.names[of[example]] for of in (candidates.sound, candidates.picture)]
        heard, seen = sides if CELLS[place[2]] == "va" else sides[::-1]
        events = {match.event for match in lexicon.found(str(said[place]))}
        out[(slice(None), *place)] = heard in events, seen in events, bool(events - {heard, seen})
    return out.mean(-1)


def _one_word(known: Known, arms: Sequence[Arm]) -> np.ndarray:
    """Each arm's release of the one-word answer over G, by the set's donor; NaN for arms that edit no head."""
    built, half = known.held.chosen, known.confirmation
    out = np.full(len(arms), np.nan)
    edited = [i for i, arm in enumerate(arms) if arm.members]
    if built is not None and edited:
        chunks, sets = known.chunks(known.searched.first.site), [arms[i].members for i in edited]
        effect = release_of_sets(chunks, sets, [built.donor] * len(sets), half.examples, "the arms of captions")
        out[edited] = half.shares(effect.release.T).value
    return out


def _row(arm: Arm, found: np.ndarray, unedited: np.ndarray, known: Known) -> dict[str, Any]:
    half, row = known.confirmation, {"arm": arm.name, "k": len(arm.members), "draw": arm.draw, "donor": arm.donor}
    row |= {"members": head_names(arm.members), "n": len(unedited)}
    for name, values in zip(FIGURES, found, strict=True):
        row |= columns(half.boot.mean(values), name, f"{name}_low", f"{name}_high")
    return row | half.bounded(found[0] - unedited, "release")
