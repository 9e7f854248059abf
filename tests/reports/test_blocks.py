"""The further sections: every table that the record holds is on the page, and none that it does not hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planted_record import full_isolation, planted_isolation

from av_lens.reports import sections, write_report
from av_lens.reports.blocks import blocks, card_lines
from av_lens.results.record import table

NAMES = ["sets", "mechanisms", "knowledge", "routes", "robustness", "repair"]


def test_a_section_for_each_table_and_none_without():
    assert [block.name for block in blocks(full_isolation())] == NAMES
    assert blocks(planted_isolation()) == []


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("members", "without"),
        ("steps", "gain"),
        ("synergies", "synergy"),
        ("cards", "value"),
        ("cuts", "release"),
        ("units", "mean"),
        ("knowledge", "excess"),
        ("routes", "effect"),
        ("robustness", "jaccard"),
    ],
)
def test_every_number_is_there_with_its_interval(name, column):
    found = full_isolation()
    cells = [cell for block in blocks(found) for sheet in block.sheets for row in sheet.rows for cell in row]
    for row in getattr(found, name).to_dict("records"):
        written = sections.number(row[column], sign=True)
        assert any(cell == written or cell.startswith(f"{written} (") for cell in cells), (name, written)


def test_rates_logits_and_nats_are_told_apart_in_the_repair():
    rows = [
        {"quantity": "C", "n": 60, "before": -3.2, "after": 3.0, "change": 6.2},
        {"quantity": "see", "n": 60, "before": 0.98, "after": 0.95, "change": -0.03, "bound": 0.07, "verdict": "no"},
        {"quantity": "text-only", "n": 60, "before": 0.0, "after": 0.25, "verdict": "reported: KL in nats"},
    ]
    (block,) = blocks(replace(planted_isolation(), repair=table("repair", rows)))
    assert block.sheets[0].rows == (
        ("C", "60", "−3.20", "+3.00", "+6.20", "–", "–"),
        ("see", "60", "98%", "95%", "−3%", "7%", "no"),
        ("text-only", "60", "0.00", "0.25", "–", "–", "reported: KL in nats"),
    )


def test_the_page_shows_them(tmp_path):
    text = write_report(full_isolation(), tmp_path / "report.html").read_text(encoding="utf-8")
    for name in NAMES:
        assert f'<section id="{name}"' in text
        assert f'<a href="#{name}">' in text
    assert "model.generate(x, plan=plan" in text


def test_a_card_in_short_is_read_off_the_cards():
    head = {"layer": 4, "head": 7, "site": "suffix", "cell": "va"}
    looks = [("va", "video", 0.98), ("va", "audio", 0.01), ("blank_a", "audio", 0.8), ("blank_a", "header", 0.09)]
    paths = {"direct": 0.29, "queries": 0.61, "L5H0.q": 0.04, "L6H3.q": 0.07, "L6H3.k": 0.001, "L6H2.q": -0.2}
    rows = [
        *({**head, "cell": cell, "part": "attention", "what": f"generation -> {role}", "value": value}
          for cell, role, value in looks),
        {**head, "part": "ov", "what": "its write, on the sound's - picture's", "value": -0.29},
        {**head, "part": "pattern", "what": "driven by the queries (blank_muted)", "value": 0.02},
        *({**head, "part": "path", "what": what, "value": value, "unit": "share of total"}
          for what, value in paths.items()),
        {**head, "part": "path", "what": "direct", "value": 1.18, "unit": "logit"},
    ]  # fmt: skip
    assert [tuple(line.values()) for line in card_lines(table("cards", rows))] == [
        (
            "L4 H7", "video 98%", "audio 80%, header 9%", "−0.29", "2%", "29%", "–", "61%", "–", "–",
            "L6H2.q −20%, L6H3.q 7%, L5H0.q 4%",
        ),
    ]  # fmt: skip
