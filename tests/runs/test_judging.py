"""The judge against a local server: right answers, garbage, server errors, timeouts, and what is sent and kept."""

from __future__ import annotations

import json
import math
import socket

import pytest
from judge_server import said, serving

from av_lens.errors import InputError, ModelError
from av_lens.methods.captions.judging import Judge, parsed


def judge(server, **options):
    return Judge(**{"server": server.address, "model": "judge-1", "wait_s": 0.001, "timeout_s": 5.0} | options)


def nobody() -> str:
    """An address at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def test_a_right_answer_and_what_was_sent():
    with serving(lambda request, number: said('{"score": 0.75}')) as server:
        verdict = judge(server).score("a dog barks", ["A dog.", "Barking of dogs."], aspect="audio")
    assert (verdict.score, verdict.failed, verdict.reply) == (0.75, "", '{"score": 0.75}')
    (request,) = server.requests
    assert (request["model"], request["temperature"]) == ("judge-1", 0)
    system, user = (message["content"] for message in request["messages"])
    assert "what is heard" in system
    assert user == "Reference 1: A dog.\nReference 2: Barking of dogs.\nCaption: a dog barks"


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 0}', 0.0),
        ('{"score": 1.0, "why": "all of it"}', 1.0),
        ('{"score": 1e-3}', 0.001),
        ('{"score": 0.9e-1}', 0.09),
        ('{"score": 1e-400}', 0.0),
        ('<think>{"score": 0.1}, no, more</think>\n {"score": 0.5}\n', 0.5),
        ('```json\n{"score": 0.25}\n```', 0.25),
        ('```\n{"score": 0.25}\n```', 0.25),
        ('```json {"score": 0.25} ```', None),
        ('Here: ```json\n{"score": 0.25}\n```', None),
        ('{"score": 0.2}\nmax score: 1', None),
        ('max score: 1\n{"score": 0.2}', None),
        ('{"score": 0.2} {"score": 0.9}', None),
        ('{"score": 0.2, "score": 0.9}', None),
        ("Score: 0.5", None),
        ("0.5", None),
        ('["score", 0.5]', None),
        ('[{"score": 0.5}]', None),
        ('{"Score": 0.5}', None),
        ('{"score": "1.0"}', None),
        ('{"score": true}', None),
        ('{"score": [1]}', None),
        ('{"score": {"score": 1}}', None),
        ('{"score": NaN}', None),
        ('{"score": Infinity}', None),
        ('{"score": 1e999}', None),
        ('{"score": 1.0000001}', None),
        ('{"score": 7}', None),
        ('{"score": -0.5}', None),
        ('{"score": null}', None),
        ('{"score": ' + "9" * 5000 + "}", None),
        ('{"score": ' + "[" * 100_000, None),
        ('{"a": ' * 100_000 + "1" + "}" * 100_000, None),
        ('{"score": 0.5, "why": "\\ud800"}', None),
        ("<think>score: 0.1", None),
        ("I would say that it is good.", None),
        ("", None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_reading_a_reply(reply, score):
    assert parsed(reply) == score


@pytest.mark.parametrize(
    "garbage", [said("no idea"), (200, "<html>"), (200, '{"choices": []}'), (200, "{}"), (200, "[" * 100_000)]
)
def test_garbage_is_counted_and_never_zero(garbage, tmp_path):
    with serving(lambda request, number: garbage) as server:
        verdict = judge(server, cache=tmp_path).score("a dog", ["a dog"], aspect="video")
        assert verdict.failed == "unreadable"
        assert math.isnan(verdict.score)
        assert len(server.requests) == 1  # asked once: the same words would come again
        assert not list(tmp_path.iterdir())


def test_server_errors_are_tried_again():
    replies = [(500, "busy"), (429, "slow down"), (503, "starting"), said('{"score": 1}')]
    with serving(lambda request, number: replies[number]) as server:
        assert judge(server).score("a", ["a"], aspect="audio").score == 1.0
        assert len(server.requests) == 4


def test_a_server_that_stays_broken_is_a_failure_with_its_reason():
    with serving(lambda request, number: (500, "out of memory")) as server:
        verdict = judge(server, retries=2).score("a", ["a"], aspect="audio")
        assert len(server.requests) == 3
    assert (verdict.failed, verdict.reply) == ("server", "500: out of memory")
    assert math.isnan(verdict.score)
    with serving(lambda request, number: (400, "bad request")) as server:
        assert judge(server).score("a", ["a"], aspect="audio").failed == "server"
        assert len(server.requests) == 1


def test_timeouts_are_tried_again():
    with serving(lambda request, number: 0.5 if number == 0 else said('{"score": 0.25}')) as server:
        assert judge(server, timeout_s=0.1).score("a", ["a"], aspect="audio").score == 0.25
    with serving(lambda request, number: 0.5) as server:
        verdict = judge(server, timeout_s=0.05, retries=1).score("a", ["a"], aspect="audio")
    assert verdict.failed == "server"
    assert "timed out" in verdict.reply


def test_replies_are_kept_by_content(tmp_path):
    with serving() as server:
        one = judge(server, cache=tmp_path)
        items = [("a", ["x"], "audio"), ("a", ["x"], "video"), ("a", ["y"], "audio"), ("b", ["x"], "audio")]
        one.score_all(items)
        assert len(server.requests) == 4
        assert [verdict.score for verdict in one.score_all(items)] == [0.5] * 4
        assert len(server.requests) == 4
        judge(server, cache=tmp_path, model="judge-2").score("a", ["x"], aspect="audio")
        assert len(server.requests) == 5
        kept = sorted(tmp_path.iterdir())
        assert len(kept) == 5
        kept[0].write_text(kept[0].read_text()[:20])  # cut short: asked again, never trusted
        one.score_all(items)
        judge(server, cache=tmp_path, model="judge-2").score("a", ["x"], aspect="audio")
        assert len(server.requests) == 6
        one, two = sorted(tmp_path.iterdir())[1:3]
        held = one.read_text()
        one.write_text(two.read_text())  # exchanged: both asked again
        two.write_text(held)
        judge(server, cache=tmp_path).score_all(items)
        judge(server, cache=tmp_path, model="judge-2").score("a", ["x"], aspect="audio")
        assert len(server.requests) == 8


def test_the_key_is_sent_and_stands_nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with serving() as server:
        one = judge(server, key_env="MY_KEY", cache=tmp_path)
        one.check()
        one.score("a", ["a"], aspect="audio")
        assert server.keys == ["Bearer s3cret"] * 2
        assert "s3cret" not in repr(one) + "".join(path.read_text() for path in tmp_path.iterdir())
        monkeypatch.delenv("MY_KEY")
        with pytest.raises(ModelError, match="in the environment variable MY_KEY, which is empty"):
            one.check()
        assert len(server.keys) == 2
    with serving() as server:
        judge(server).score("a", ["a"], aspect="audio")
        assert server.keys == [None]


def test_a_redirect_is_not_followed(monkeypatch):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with serving() as elsewhere, serving(
        lambda request, number: (307, "", ("Location", elsewhere.address + "/chat/completions"))
    ) as server:  # fmt: skip
        assert judge(server, key_env="MY_KEY").score("a", ["a"], aspect="audio").failed == "server"
        assert elsewhere.requests == elsewhere.keys == []


def test_a_server_that_goes_away_is_not_asked_to_the_end(tmp_path):
    def reply(request, number):
        return said('{"score": 0.5}') if number < 2 else (500, "gone")

    with serving(reply) as server:
        one = judge(server, retries=0, parallel=1, cache=tmp_path)
        items = [(f"caption {i}", ["x"], "audio") for i in range(9)]
        one.score("caption 7", ["x"], aspect="audio")
        done: list[int] = []
        verdicts = one.score_all(items, finished=done.append)
        assert len(server.requests) == 5
    assert [verdict.failed for verdict in verdicts] == ["", *["server"] * 3, *["not asked"] * 3, "", "not asked"]
    assert done == list(range(1, 10))


def test_check_refuses_early():
    with pytest.raises(
        ModelError, match=r"the judge at http://127\.0\.0\.1:\d+/v1 cannot be reached .*refused.*nothing"
    ):
        Judge(server=nobody(), model="judge-1").check()
    with serving(models=("judge-1", "other")) as server:
        judge(server).check()
        with pytest.raises(ModelError, match=r"unknown model 'judge-2'\. Did you mean 'judge-1'"):
            judge(server, model="judge-2").check()
    for status, text in ((401, "refuses the key .401.; name the variable that holds it"), (503, "is not ready .503.")):
        with serving(models=status) as server, pytest.raises(ModelError, match=text):
            judge(server).check()
    with serving(models=404) as server:
        judge(server).check()  # a server need not list its models


def test_refusals():
    for address in ("localhost:8000", "file:///etc/passwd", "", "https://key@host/v1"):
        with pytest.raises(InputError, match=r"an address such as http://localhost:8000/v1") as refused:
            Judge(server=address, model="m")
        assert "key@" not in str(refused.value)
    with pytest.raises(InputError, match="name of a model"):
        Judge(server="http://localhost:1/v1", model="")
    with pytest.raises(InputError, match="retries must be at least 0"):
        Judge(server="http://localhost:1/v1", model="m", retries=-1)
    one = Judge(server=nobody(), model="m")
    with pytest.raises(InputError, match="unknown aspect 'sound'"):
        one.score("a", ["a"], aspect="sound")
    with pytest.raises(InputError, match="needs references of what is heard; got"):
        one.score("a", [], aspect="audio")


def test_what_is_kept_says_what_was_asked(tmp_path):
    with serving() as server:
        judge(server, cache=tmp_path / "new" / "folder").score("a", ["x"], aspect="audio")
    (kept,) = (tmp_path / "new" / "folder").iterdir()
    assert json.loads(kept.read_text())["asked"]["messages"][1]["content"].endswith("Caption: a")
