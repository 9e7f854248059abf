"""A small made-up finding: two named heads out of eight, for tests of the record and of what is drawn from it."""

from __future__ import annotations

import numpy as np

from av_lens.results.record import Isolation
from av_lens.results.tables import table

LAYERS, HEADS, EXAMPLES = 2, 4, 6


def example_isolation(seed: int = 0) -> Isolation:
    """Build a complete, consistent-looking record without any model."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    evidence = []
    for estimand, donor in [
        ("release", "blank_muted"),
        ("release", "mean_other"),
        ("release", "zero"),
        ("direct", "blank_muted"),
        ("reads picture", "wa"),
        ("reads sound", "vw"),
        ("sufficiency", "va"),
        ("silenced", "blank_a-blank_muted"),
        ("carries", "blank_muted"),
        ("dla", ""),
    ]:
        values = rng.normal(0, 0.05, size=(EXAMPLES, LAYERS, HEADS))
        if estimand not in ("reads sound", "carries", "silenced"):
            values[:, 1, 2] += 3.0
            values[:, 1, 3] += 1.5
        arrays[f"discovery/suffix/{estimand}/{donor}"] = values
        for layer in range(LAYERS):
            for head in range(HEADS):
                mean = float(values[:, layer, head].mean())
                evidence.append(
                    dict(
                        half="discovery",
                        site="suffix",
                        layer=layer,
                        head=head,
                        estimand=estimand,
                        donor=donor,
                        mean=mean,
                        low=mean - 0.1,
                        high=mean + 0.1,
                        share=mean / 8,
                        share_low=mean / 8 - 0.02,
                        share_high=mean / 8 + 0.02,
                        n=EXAMPLES,
                    )
                )
    arrays["discovery/G"] = rng.normal(8, 0.5, size=EXAMPLES)
    arrays["discovery/C"] = rng.normal(-3, 0.5, size=EXAMPLES)
    common = dict(site="suffix", estimand="release", donor="blank_muted", member_of="named", flags="")
    heads = [
        dict(
            layer=1,
            head=2,
            role="picture writer",
            effect=3.0,
            low=2.7,
            high=3.3,
            direct_share=0.97,
            q=0.001,
            p_maxt=0.002,
            confirmed=True,
            share=0.375,
            share_low=0.33,
            share_high=0.42,
            p_holm=0.002,
            discovery_effect=3.1,
            discovery_low=2.8,
            discovery_high=3.4,
            discovery_share=0.38,
            discovery_direct_share=0.98,
            discovery_p=0.0005,
            reads_picture=2.9,
            reads_sound=0.1,
            sufficiency=2.0,
            silenced=0.2,
            carries=0.0,
            dla=-2.8,
            release_blank_muted=3.0,
            release_mean_other=2.0,
            release_zero=2.5,
            question_share=0.5,
            **common,
        ),
        dict(
            layer=1,
            head=3,
            role="gate",
            effect=1.5,
            low=1.2,
            high=1.8,
            direct_share=0.1,
            q=0.004,
            p_maxt=0.01,
            confirmed=False,
            share=0.19,
            discovery_effect=1.6,
            discovery_low=1.3,
            discovery_high=1.9,
            discovery_share=0.2,
            p_holm=0.08,
            **common,
        ),
    ]
    behaviour = [
        dict(
            half=half, chosen="competent", quantity=quantity, value=value, low=value - 0.3, high=value + 0.3, n=EXAMPLES
        )
        for half in ("discovery", "confirmation")
        for quantity, value in [
            ("E_A", 2.0),
            ("E_V", 8.0),
            ("I", 0.5),
            ("shortcut index", 0.8),
            ("C", -3.0),
            ("G", 8.0),
            ("gap", 11.0),
        ]
    ] + [
        dict(
            half="discovery",
            chosen="competent",
            quantity="accuracy",
            cell=cell,
            rule="two",
            value=value,
            low=value - 0.1,
            high=min(1, value + 0.1),
            n=6,
        )
        for cell, value in [("va", 0.1), ("aa", 1.0), ("vv", 1.0), ("blank_a", 0.95), ("audio_only", 0.97)]
    ]
    ablation = [
        dict(
            arm="set",
            k=1,
            draw=-1,
            members="L1H2",
            donor="blank_muted",
            release=3.0,
            low=2.7,
            high=3.3,
            share=0.37,
            says_sound=0.4,
            says_picture=0.5,
        ),
        dict(
            arm="set",
            k=2,
            draw=-1,
            members="L1H2 L1H3",
            donor="blank_muted",
            release=6.0,
            low=5.5,
            high=6.5,
            share=0.75,
            says_sound=0.8,
            says_picture=0.1,
        ),
        dict(
            arm="see heads",
            k=2,
            draw=-1,
            members="L0H0 L1H2",
            donor="blank_muted",
            release=3.1,
            share=0.38,
            says_sound=0.4,
            says_picture=0.5,
        ),
        *(
            dict(
                arm="random",
                k=2,
                draw=i,
                members="L0H1 L0H2",
                donor="blank_muted",
                release=float(rng.normal(0, 0.2)),
                says_sound=0.1,
                says_picture=0.8,
            )
            for i in range(20)
        ),
    ]
    sets = [
        dict(
            name="named",
            site="suffix",
            members="L1H2 L1H3",
            k=2,
            donor="blank_muted",
            screen="release",
            chosen=True,
            discovery_release=6.2,
            discovery_share=0.78,
            release=6.0,
            low=5.5,
            high=6.5,
            share=0.75,
            share_low=0.7,
            share_high=0.8,
            says_sound_before=0.1,
            says_sound=0.8,
            says_picture_before=0.8,
            says_picture=0.1,
            random_n=20,
            random_mean=0.0,
            random_high=0.3,
            random_max=0.4,
            p_random=0.048,
            p_floor=0.048,
            confirmed=True,
        )
    ]
    specificity = [
        dict(control="see", n=60, before=1.0, after=1.0, fall=0.0, bound=0.049, margin=0.05, verdict="specific"),
        dict(
            control="audio-only",
            n=20,
            before=1.0,
            after=0.9,
            fall=0.1,
            bound=float("nan"),
            margin=0.05,
            verdict="untested",
        ),
    ]
    conflicts = [
        dict(
            id=f"c{i}",
            half="discovery" if i < 6 else "confirmation",
            component=i,
            competent=True,
            sound_answer="siren",
            picture_answer="dog",
            says="dog",
            M_va=-3.0,
            M_av=3.0,
            M_blank_a=8.0,
            M_blank_v=-8.0,
            C=-3.0,
            G=8.0,
        )
        for i in range(12)
    ]
    return Isolation(
        verdict="Two heads keep the sound from being said.",
        n_layers=LAYERS,
        n_heads=HEADS,
        verdict_kind="suppression",
        stamps=("exploratory",),
        reasons=("the control is untested: 20 items, 59 are needed",),
        summary={"G": 8.0, "C": -3.0, "gap": 11.0, "delta": 0.8, "power": float("nan")},
        heads=table("heads", heads),
        evidence=table("evidence", evidence),
        sets=table("sets", sets),
        ablation=table("ablation", ablation),
        specificity=table("specificity", specificity),
        behaviour=table("behaviour", behaviour),
        conflicts=table("conflicts", conflicts),
        arrays=arrays,
        protocol={
            "s": 0.1,
            "sites": ["suffix"],
            "donors": ["blank_muted", "mean_other", "zero"],
            "seed": 0,
            "hash": "0" * 64,
        },
        provenance={"av_lens": "0.1.0", "model": "made up", "choices": ["none: an example"]},
    )
