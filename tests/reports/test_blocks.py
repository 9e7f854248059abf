"""The further sections: every table that the record holds is on the page, and none that it does not hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planted_record import full_isolation, planted_isolation

from av_lens.reports import words, write_report
from av_lens.reports.blocks import blocks
from av_lens.results.tables import table

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
        written = words.number(row[column], sign=True)
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
