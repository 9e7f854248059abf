"""A made-up isolation of the size of the demo: 8 layers of 8 heads, three of them guilty, some not measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from av_lens.results.record import Isolation, table

LAYERS = HEADS = 8
N = 22
G, C = 8.2, -4.1
GUILTY = {(5, 2): ("picture writer", 0.46, True), (5, 3): ("picture writer", 0.38, True), (3, 4): ("gate", 0.17, False)}
DONORS = {"blank_muted": 1.0, "mean_other": 0.8, "zero": 0.93}
HALVES = ("discovery", "confirmation")
CLASSES = ("dog", "siren", "bell", "drum")


def planted_isolation(seed: int = 0, *, stamps: tuple[str, ...] = ("exploratory",)) -> Isolation:
    """Build the record; every number follows from the seed."""
    rng = np.random.default_rng(seed)
    evidence = _evidence(rng)
    return Isolation(
        verdict="Two heads of layer 5 keep the sound from being said: edited together on held-out conflicts they give "
        "back 81% of G (76% to 87%), and the model says the sound in 78% of conflicts instead of 5%.",
        n_layers=LAYERS,
        n_heads=HEADS,
        verdict_kind="suppression",
        stamps=stamps,
        reasons=tuple(f"{s}: 22 and 22 competent conflicts in the halves; a verdict needs 60 in each." for s in stamps),
        summary={"G": G, "C": C, "gap": G - C, "delta": 0.1 * G, "power": 0.21},
        heads=table("heads", _heads()),
        evidence=table("evidence", evidence),
        sets=table("sets", [_set()]),
        ablation=table("ablation", _ablation(rng)),
        specificity=table("specificity", _specificity()),
        behaviour=table("behaviour", _behaviour()),
        conflicts=table("conflicts", _conflicts(rng)),
        arrays=_arrays(evidence, np.random.default_rng(seed + 1)),
        protocol={"s": 0.1, "sites": ["suffix"], "donors": list(DONORS), "seed": 0, "hash": "0f3a" * 16},
        provenance={
            "av_lens": "0.1.0",
            "versions": {"torch": "2.14.1", "transformers": "5.23.0"},
            "model": "av-tiny",
            "weights_sha256": "ab" * 32,
            "seconds": 61.5,
            "choices": ["q is Benjamini-Hochberg over one site set.", "Fewer than 59 items: specificity is untested."],
        },
    )


def stopped_isolation() -> Isolation:
    """Build a record whose search was refused: behaviour, and nothing else."""
    return Isolation(
        verdict="No suppression: the gap is below a quarter of G (upper bound -0.4 logits).",
        n_layers=LAYERS,
        n_heads=HEADS,
        verdict_kind="no suppression",
        reasons=("The gap's upper bound lies below a quarter of G, so there is nothing to explain.",),
        summary={"G": G, "C": G, "gap": 0.0, "power": float("nan")},
        behaviour=table("behaviour", _behaviour()),
        provenance={"av_lens": "0.1.0", "model": "av-tiny-balanced"},
    )


def _evidence(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    kinds = [("release", donor) for donor in DONORS]
    kinds += [
        ("direct", "blank_muted"),
        ("reads picture", "wa"),
        ("reads sound", "vw"),
        ("sufficiency", "va"),
        ("dla", ""),
    ]
    for half in HALVES:
        for estimand, donor in kinds:
            for layer in range(LAYERS):
                for head in range(HEADS):
                    share = float(rng.normal(0, 0.006))
                    if (layer, head) in GUILTY and estimand != "reads sound":
                        share += GUILTY[layer, head][1] * DONORS.get(donor, 1.0) * (-1 if estimand == "dla" else 1)
                    if estimand == "sufficiency" and layer == 7:
                        share = float("nan")
                    base = dict(half=half, site="suffix", layer=layer, head=head, estimand=estimand, donor=donor, n=N)
                    spread = 0.02 + 0.1 * abs(share)
                    figures = dict(share=share, share_low=share - spread, share_high=share + spread)
                    logits = dict(mean=share * G, low=(share - spread) * G, high=(share + spread) * G)
                    rows.append({**base, **figures, **logits})
    return rows


def _arrays(evidence: list[dict[str, Any]], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Spread each mean over the conflicts it would come from."""
    arrays = {f"{half}/{name}": rng.normal(value, 0.5, N) for half in HALVES for name, value in (("G", G), ("C", C))}
    for row in evidence:
        key = "/".join(row[name] for name in ("half", "site", "estimand", "donor"))
        spread = rng.normal(0, 0.2, N)
        values = arrays.setdefault(key, np.full((N, LAYERS, HEADS), np.nan))
        values[:, row["layer"], row["head"]] = row["mean"] + spread - spread.mean()
    return arrays


def _heads() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for (layer, head), (role, share, confirmed) in GUILTY.items():
        common = dict(layer=layer, head=head, site="suffix", role=role, member_of="forward", estimand="release")
        figures = dict(effect=share * G, low=share * G - 0.4, high=share * G + 0.4, share=share, share_low=share - 0.05)
        found = dict(discovery_effect=share * G + 0.2, discovery_low=share * G - 0.3, discovery_high=share * G + 0.7)
        more = dict(
            share_high=share + 0.05, direct_share=0.97 if role == "picture writer" else 0.12, q=0.0012, p_maxt=0.002
        )
        reads = dict(
            reads_picture=share * G * 0.9, reads_sound=0.11, sufficiency=1.4, silenced=0.2, carries=0.04, dla=-2.1
        )
        donors = dict(release_blank_muted=share * G, release_mean_other=share * G * 0.8, release_zero=share * G * 0.93)
        rest = dict(donor="blank_muted", confirmed=confirmed, p_holm=0.0021 if confirmed else 0.081)
        rest |= dict(status="confirmed" if confirmed else "not replicated", would_confirm=confirmed, role_alone=role)
        rows.append({**common, **figures, **found, **more, **reads, **donors, **rest})
    return rows


def _set() -> dict[str, Any]:
    said = dict(says_sound_before=0.05, says_sound=0.78, says_picture_before=0.85, says_picture=0.09)
    figures = dict(release=0.81 * G, low=0.76 * G, high=0.87 * G, share=0.81, share_low=0.76, share_high=0.87)
    random = dict(random_n=40, random_mean=0.02, random_high=0.31, random_max=0.4, p_random=0.0244, p_floor=0.0244)
    base = dict(name="forward", site="suffix", members="L5H2 L5H3 L3H4", k=3, donor="blank_muted", screen="release")
    return {**base, **said, **figures, **random, "chosen": True, "confirmed": True, "discovery_release": 0.85 * G}


def _ablation(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    members = ["L5H2", "L5H3", "L3H4"]
    for k, share, sound, picture in ((1, 0.44, 0.32, 0.51), (2, 0.7, 0.61, 0.22), (3, 0.81, 0.78, 0.09)):
        ends = dict(release=share * G, low=(share - 0.05) * G, high=(share + 0.05) * G, share=share)
        said = dict(says_sound=sound, says_picture=picture)
        rows.append(dict(arm="set", k=k, draw=-1, members=" ".join(members[:k]), donor="blank_muted", **ends, **said))
    rows.append(
        dict(arm="see heads", k=3, draw=-1, members="L4H1 L6H0 L6H7", donor="blank_muted", release=0.4, share=0.05)
    )
    for draw in range(40):
        pick = " ".join(f"L{rng.integers(3, 7)}H{rng.integers(8)}" for _ in range(3))
        said = dict(says_sound=0.05 + 0.03 * rng.random(), says_picture=0.85 - 0.05 * rng.random())
        rows.append(
            dict(
                arm="random",
                k=3,
                draw=draw,
                members=pick,
                donor="blank_muted",
                release=float(rng.normal(0, 0.15)),
                **said,
            )
        )
    return rows


def _specificity() -> list[dict[str, Any]]:
    return [
        dict(control="see", n=60, before=0.98, after=0.98, fall=0.0, bound=0.049, margin=0.05, verdict="specific"),
        dict(
            control="factual heard",
            n=60,
            before=1.0,
            after=0.9,
            fall=0.1,
            bound=0.17,
            margin=0.05,
            verdict="not specific",
        ),
        dict(control="audio-only", n=22, before=1.0, after=1.0, fall=0.0, bound=0.13, margin=0.05, verdict="untested"),
    ]


def _behaviour() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    logits = [("E_A", 4.2), ("E_V", 12.4), ("I", 0.6), ("shortcut index", 0.75), ("C", C), ("G", G), ("gap", G - C)]
    rates = [("va", 0.05), ("aa", 1.0), ("vv", 0.98), ("blank_a", 0.96), ("audio_only", 0.99)]
    for half, shift in (("discovery", 0.0), ("confirmation", 0.1)):
        for quantity, value in logits:
            at = value + shift if quantity != "shortcut index" else value
            rows.append(
                dict(half=half, chosen="competent", quantity=quantity, value=at, low=at - 0.3, high=at + 0.3, n=N)
            )
        for rule in ("two", "vocabulary"):
            for cell, value in rates:
                ends = dict(low=max(0.0, value - 0.06), high=min(1.0, value + 0.06))
                what = dict(quantity="accuracy", cell=cell, rule=rule)
                rows.append(dict(half=half, chosen="competent", value=value, n=N, **what, **ends))
    return rows


def _conflicts(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for i in range(2 * N + 4):
        sound, picture = CLASSES[i % 4], CLASSES[(i + 1 + i // 4 % 3) % 4]
        half = "discovery" if i % 2 else "confirmation"
        logits = dict(M_va=-4.0 + rng.normal(), M_av=4.1 + rng.normal(), M_blank_a=8.0, M_blank_v=-8.3, C=C, G=G)
        who = dict(
            id=f"{i:04d}",
            half=half,
            component=i,
            competent=i < 2 * N,
            analysed=i < 2 * N,
            sound_answer=sound,
            picture_answer=picture,
        )
        rows.append({**who, "says": picture if i % 11 else sound, **logits})
    return rows


def full_isolation(seed: int = 0) -> Isolation:
    """The same record with two made-up rows in every further table; every word and number is told apart."""
    from dataclasses import replace

    from av_lens.results.record import TABLES

    rng = np.random.default_rng(seed + 7)
    makers = {
        "text": lambda column: f"{column} {rng.integers(1000)}",
        "int": lambda _: int(rng.integers(8)),
        "float": lambda _: float(rng.normal(0, 3)),
        "flag": lambda _: True,
    }
    further = (
        "units", "members", "steps", "synergies", "cards", "cuts", "knowledge", "routes", "repair", "robustness",
    )  # fmt: skip
    rows = {
        name: [{column: makers[kind](column) for column, kind in TABLES[name].items()} for _ in range(2)]
        for name in further
    }
    return replace(planted_isolation(seed), **{name: table(name, made) for name, made in rows.items()})
