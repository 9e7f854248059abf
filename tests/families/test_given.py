"""`Given`: what it refuses, in which words; what it says of its positions; that files give it back to the bit."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from av_lens.bring import Given
from av_lens.errors import InputError

ROLES = ("boundary", "video", "video", "audio", "question", "header", "generation")
NAN = float("nan")
TIMES = [(NAN, NAN), (0.0, 1.0), (1.0, 2.0), (0.0, 0.5), *[(NAN, NAN)] * 3]


def given(**changed: Any) -> Given:
    torch.manual_seed(0)
    columns = {"times": TIMES, "row": [-1, 0, 1, *[-1] * 4], "col": [-1, 0, 0, *[-1] * 4], "ids": range(7)}
    return Given(**({"embeds": torch.randn(7, 4), "roles": ROLES} | columns | changed))


def with_roles(*roles: str) -> dict[str, Any]:
    return {"roles": roles, "embeds": torch.zeros(len(roles), 4), "times": None, "row": None, "col": None, "ids": None}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"embeds": torch.zeros(1, 7, 4)},
            r"embeds is \[1, 7, 4\] torch.float32: give one prompt's .* \[pos, d_model\]",
        ),
        ({"embeds": torch.zeros(7, 4, dtype=torch.long)}, r"embeds is \[7, 4\] torch.int64"),
        ({"embeds": torch.full((7, 4), NAN)}, r"embeds\[0\] \(boundary\) holds numbers that are NaN or infinite"),
        ({"roles": ROLES[1:]}, "roles names 6 positions, and embeds has 7"),
        (with_roles("vidoe", "generation"), r"roles\[0\]: unknown role 'vidoe'.*Did you mean 'video'"),
        (
            with_roles("generation", "header"),
            "roles has 1 'generation' and ends with 'header': the last position, and no",
        ),
        (with_roles("generation", "generation"), "roles has 2 'generation' and ends with 'generation'"),
        ({"ids": [1, 2]}, r"ids has the shape \[2\] and should have \[7\]"),
        ({"ids": [0.5] * 7}, "ids holds float64, and takes whole numbers"),
        ({"ids": [-1, *range(6)]}, "ids holds numbers below 0"),
        ({"ids": [[1], [2, 3]]}, r"ids is no array .*: give \[7\] numbers"),
        ({"tokens": ["a"]}, "tokens has 1 of 7"),
        ({"times": [(0.0, 1.0)] * 7}, r"times\[0\] \(boundary\) has a time and is no media position: NaN there"),
        ({"times": [TIMES[0], (0.0, NAN), *TIMES[2:]]}, r"times\[1\] \(video\) has a start or an end alone"),
        ({"times": [TIMES[0], (2.0, 1.0), *TIMES[2:]]}, r"times\[1\] \(video\) runs back"),
        ({"times": [1.0] * 7}, r"times has the shape \[7\] and should have \[7, 2\]"),
        ({"col": None}, "row and col come together: give both, or neither"),
        ({"row": [0] * 7}, r"row\[0\] \(boundary\) is no position of a picture: -1 there"),
        ({"row": [-1] * 7}, r"row\[1\] \(video\) has a row or a column alone"),
        ({"position_ids": [[0] * 6] * 3}, r"position_ids has the shape \[3, 6\] and should have \[3, 7\]"),
        ({"position_ids": torch.arange(7) - 1}, "position_ids holds numbers below 0"),
        ({"layout": "woven"}, "unknown layout 'woven'"),
    ],
)
def test_what_cannot_be_is_refused(changed, said):
    with pytest.raises(InputError, match=said):
        given(**changed)


def test_it_says_what_each_position_is():
    spans = given().span_map(ROLES)
    assert spans.video.positions.tolist() == [1, 2]
    assert spans.video.between(1.0, 2.0).positions.tolist() == [2]
    assert spans.video.box(row=1).positions.tolist() == [2]
    assert spans.audio.between(0.0, 0.5, clock="source").positions.tolist() == [3]
    assert spans.generation_position == 6
    assert repr(given()) == (
        "Given(7 positions of 4, separate: audio 1, video 2, boundary 1, question 1, header 1, generation 1)"
    )


@pytest.mark.parametrize(
    ("media", "layout"),
    [
        ("", "text"),
        ("audio", "audio_only"),
        ("video boundary video", "video_only"),
        ("image", "image"),
        ("image audio", "image_audio"),
        ("video video audio", "separate"),
        ("audio boundary video", "separate"),
        ("video audio boundary video audio", "in_video"),
    ],
)
def test_the_layout_is_read_off_the_roles(media, layout):
    roles = [*media.split(), "question", "generation"]
    assert Given(torch.zeros(len(roles), 2), roles).layout == layout


def test_positions_go_on_and_streams_fit_the_decoder():
    plain, own = given(), given(position_ids=[[0, 5, 5, 5, 8, 9, 10]] * 3)
    assert plain.streams(1).tolist() == [[0, 1, 2, 3, 4, 5, 6]]
    assert torch.equal(plain.streams(3), plain.streams(1).expand(3, -1))
    longer = own.followed(torch.ones(2, 4), [7, 8], ["a", "b"])
    assert longer.roles[-4:] == ("header", "header", "header", "generation")
    assert longer.streams(3)[1].tolist() == [0, 5, 5, 5, 8, 9, 10, 11, 12]
    assert plain.followed(torch.ones(2, 4), [7, 8], ["a", "b"]).ids.tolist() == [*range(7), 7, 8]
    with pytest.raises(InputError, match=r"position_ids has 3 streams and this decoder turns by 1: give \[pos\]"):
        own.streams(1)


def equal(one: Given, other: Given) -> bool:
    columns = ("ids", "times", "row", "col")
    same = all(np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name == "times") for name in columns)
    told = all(getattr(one, name) == getattr(other, name) for name in ("roles", "tokens", "question", "layout"))
    return same and told and torch.equal(one.embeds, other.embeds) and torch.equal(one.streams(3), other.streams(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_it_back_to_the_bit(tmp_path, dtype):
    one = given(embeds=torch.randn(7, 4).to(dtype), tokens="abcdefg", question="Wüßte?", position_ids=[range(7)] * 3)
    path = one.save(tmp_path / "one")
    assert path == tmp_path / "one.safetensors"
    assert equal(one, Given.load(path))
    assert [file.name for file in tmp_path.iterdir()] == ["one.safetensors"]
    with pytest.raises(InputError, match=r"cannot save to .*: there is no folder"):
        one.save(tmp_path / "no" / "one")


def written(path: Path, told: Any, **tensors: torch.Tensor) -> Path:
    metadata = {
        "schema": "av_lens.Given",
        "schema_version": "1",
        "told": told if isinstance(told, str) else json.dumps(told),
    }
    save_file({"embeds": torch.zeros(1, 2)} | tensors, path, metadata=metadata)
    return path


def test_foreign_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"no such file: .*ne.safetensors. Did you mean .*one.safetensors"):
        Given.load((given().save(tmp_path / "one"), tmp_path / "ne.safetensors")[1])
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match=r"text is not a saved Given, or damaged .*Export it again"):
        Given.load(tmp_path / "text")
    save_file({"w": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(
        InputError, match=r"holds safetensors of something else; this av_lens reads av_lens.Given, version 1"
    ):
        Given.load(tmp_path / "weights")
    cut = (tmp_path / "one.safetensors").read_bytes()
    (tmp_path / "cut").write_bytes(cut[:-20])
    with pytest.raises(InputError, match=r"is not a saved Given, or damaged"):
        Given.load(tmp_path / "cut")
    role = {"roles": ["generation"]}
    for told, tensors, said in (
        ({}, {}, "is not a saved Given, or damaged .*roles"),
        ("{", {}, "is not a saved Given, or damaged"),
        (role | {"odd": 1}, {}, "unknown field of a Given 'odd'"),
        (role, {"odd": torch.zeros(1)}, "unknown field of a Given 'odd'"),
        ({"roles": ["question"]}, {}, r"file: roles has 0 'generation'"),
    ):
        with pytest.raises(InputError, match=said):
            Given.load(written(tmp_path / "file", told, **tensors))


def exporter() -> str:
    """The block of the documentation that is pasted elsewhere."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "bring.md").read_text()
    return next(one for one in re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S) if "def export" in one)


USE = """
import sys
import numpy
times = [(float("nan"), float("nan")), (0.0, 0.2), (float("nan"), float("nan"))]
export(sys.argv[1], ["header", "audio", "generation"], "Why?", embeds=torch.full((3, 2), 0.1), times=times,
       ids=numpy.arange(3, dtype="int32"), position_ids=[[0, 1, 2]])
assert not [name for name in sys.modules if name.startswith("av_lens")]
"""


def test_what_the_pasted_exporter_writes_is_read(tmp_path):
    path = tmp_path / "one.safetensors"
    code = [line for line in exporter().splitlines() if line.strip()]
    assert len(code) <= 27  # some 20 beside its imports
    subprocess.run([sys.executable, "-c", exporter() + USE, str(path)], check=True, timeout=120)
    found = Given.load(path)
    wanted = Given(torch.full((3, 2), 0.1), ["header", "audio", "generation"], range(3), question="Why?")
    assert torch.equal(found.embeds, wanted.embeds)
    assert found.times[1].tolist() == [0.0, 0.2]
    assert (found.roles, found.ids.tolist(), found.question) == (wanted.roles, [0, 1, 2], "Why?")
    assert [file.name for file in tmp_path.iterdir()] == ["one.safetensors"]
    with safe_open(path, framework="pt") as file:
        assert set(file.metadata()) == {"schema", "schema_version", "told"}
