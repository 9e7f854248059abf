"""The run at true shapes: sizes of the checkpoints, windows, what a search is worked out to cost; slow: the run."""

from __future__ import annotations

import json

import pytest
import torch

from av_lens.errors import InputError
from av_lens.inputs import conflicts
from av_lens.lab import true_shape_costs, true_shapes
from av_lens.lab.true_shape_costs import Card, worked_out
from av_lens.lab.true_shapes import SIZES, Sizes, config_of, stage_windows
from av_lens.organism.anatomy import build_model


def test_sizes_are_those_of_huggingfaces_module_at_that_width():
    sizes = Sizes("small", 2, 64, 4, 2, 96, 2000, audio=(2, 32, 4, 64), vision=(2, 32, 4, 48))
    model = build_model(config_of(sizes, n_layers=2, tower_layers=2), seed=0).model
    text = model.language_model.layers
    assert sum(p.numel() for p in text.parameters() if p.ndim == 2) == 2 * sizes.layer_weights
    towers = [p for part in (model.audio_tower.layers, model.visual.blocks) for p in part.parameters()]
    assert sum(p.numel() for p in towers if p.ndim == 2) == sizes.tower_weights


def test_the_two_checkpoints_weigh_what_they_should():
    # The thinker of the 3B has 4.7 billion weights with its towers, that of the 7B 8.9 billion.
    assert SIZES["3B"].weights / 1e9 == pytest.approx(4.7, abs=0.1)
    assert SIZES["7B"].weights / 1e9 == pytest.approx(8.9, abs=0.1)


def test_windows_are_disjoint_and_sounds_differ(real_clip_path, tmp_path):
    listed = conflicts(stage_windows(real_clip_path, tmp_path, n=3))
    for conflict in listed:
        sound, picture = conflict.sound.load(), conflict.picture.load()
        assert sound.picture_end == pytest.approx(1.0, abs=0.05)
        assert sound.picture_hash != picture.picture_hash
        assert sound.sound_hash != picture.sound_hash
    with pytest.raises(InputError, match=r"nowhere\.mp4 is not there"):
        stage_windows(tmp_path / "nowhere.mp4", tmp_path, n=1)
    with pytest.raises(InputError, match="two windows of 8 s are needed"):
        stage_windows(real_clip_path, tmp_path, n=1, seconds=8.0)


def made_record():
    return {
        "size": "3B", "layers": {"fusion": 4, "towers": 2}, "conflicts": 40, "quick": False, "threads": 2,
        "product_gflops": 100.0,
        "roles": {"video": 300, "audio": 25, "question": 8}, "stamps": ["not interpretable"], "peak_gb": 5.0,
        "seconds": {"search": 30.0, "towers": {"audio": 1.0, "vision": 2.0}},
        "stages": {
            "reading every cell": {"seconds": 10.0, "gflop": 500.0},
            "exact effects of 64 heads at suffix, discovery": {"seconds": 10.0, "gflop": 250.0},
            "exact effects of 3 heads at suffix, confirmation": {"seconds": 10.0, "gflop": 20.0},
            "sets of heads by zero": {"seconds": 10.0, "gflop": 100.0},
            "groups, MLPs, attentions and layers at suffix": {"seconds": 10.0, "gflop": 100.0},
            "robustness: noise mute": {"seconds": 10.0, "gflop": 200.0},
            "robustness: bootstraps of clips": {"seconds": 10.0, "gflop": 0.0},
            "paths": {"seconds": 10.0, "gflop": 100.0},
        },
    }  # fmt: skip


def test_what_a_search_would_cost_is_the_sum_on_paper():
    cost = worked_out(made_record(), Card("x", 24, 100.0), SIZES["3B"], conflicts=80)
    # Twice the conflicts; 36 layers for 4, of which 37/5 as many come after; 576 heads for 64; 40 candidates for 64.
    after = 2 * 37 / 5
    grown = [
        (500 * 2 * 9, 0.5), (250 * after * 9, 0.25), (20 * after, 0.02), (100 * after * 40 / 64, 0.1),
        (100 * after * 9, 0.1), (200 * after * 9, 0.2), (100 * after, 0.1),
    ]  # fmt: skip
    assert cost["pflop"] == pytest.approx(sum(gflop for gflop, _ in grown) / 1e6)
    seconds = sum(gflop / (100e3 * share) for gflop, share in grown)  # at the share of the peak that each reached
    assert cost["minutes"] == pytest.approx(seconds / 60)
    assert cost["minutes_of_robustness"] == pytest.approx(200 * after * 9 / (100e3 * 0.2) / 60)
    assert cost["trace_gb"] == pytest.approx(333 * 36 * (2048 + 2 * 2 * 128) * 2 / 1e9)


def test_the_other_precision_counts_where_a_second_copy_of_the_weights_fits():
    record = made_record()
    record["stages"][true_shape_costs.OTHER_PRECISION] = {"seconds": 20.0, "gflop": 100.0}
    for gigabytes, counted in ((24, 0.0), (80, 1.0)):  # 9.4 GB of weights, 18.7 in float32
        cost, without = (
            worked_out(made, Card("x", gigabytes, 100.0), SIZES["3B"], conflicts=40) for made in (record, made_record())
        )
        assert cost["pflop"] - without["pflop"] == pytest.approx(counted * 100 * 9 * 37 / 5 / 1e6)


def test_the_page_is_written_from_the_record(tmp_path):
    record = made_record()
    path = true_shape_costs.store(record, tmp_path)
    text = path.read_text(encoding="utf-8")
    assert json.loads((tmp_path / "true_shapes.json").read_text()) == record
    assert "| reading every cell | 10 | 0.5 | 0.50 | layers |" in text
    assert "| exact effects of 3 heads at suffix, confirmation | 10 | 0.0 | 0.02 | layers after |" in text
    assert "| robustness: bootstraps of clips | 10 | 0.0 | 0.00 | no operations to speak of |" in text
    assert "| | 3B, 24 GB (RTX 4090) | 3B, 80 GB (A100) | 7B, 24 GB (RTX 4090) | 7B, 80 GB (A100) |" in text
    assert "| their copy in float32 (GB) | 18.6 | 18.6 | 35.5 | 35.5 |" in text


@pytest.mark.slow
@torch.no_grad()
def test_the_whole_search_runs_at_the_3bs_true_shapes(real_clip_path, tmp_path, capsys):
    record = true_shapes.run_at_true_shapes(real_clip_path, tmp_path)
    with capsys.disabled():
        print("\n" + true_shape_costs.page(record))
    assert "not interpretable" in record["stamps"]
    assert record["peak_gb"] <= 20
    assert record["seconds"]["towers"]["audio"] > 0
