"""`Judge`: a language model on any OpenAI-compatible server scores a caption against references, 0 to 1.

What is sent is text alone, by `POST server/chat/completions`. The key is read from the environment when a request is
made, and stands in no result, cache or message.

    score      the number in the reply's json {"score": ...}, from 0 to 1
    failed     "unreadable" where the reply is no such json, alone or in one fence: the score is NaN, counted, never 0;
               "server" where no reply came after all retries; "not asked" after three such in a row

Server errors (429, 5xx), timeouts and broken connections are retried. Readable replies are kept on disk under the hash
of what was asked (model, instruction, caption, references).

Source: the study's judge is Qwen3-32B with one score for the sound and one for the picture; its code scores an
unreadable reply 0 and reads the first reference only. Not done: comparing judges with people.
"""

import hashlib
import json
import math
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from av_lens.checks import parse_json, require_at_least, require_choice
from av_lens.errors import InputError, ModelError, unknown
from av_lens.whole_files import make_folder, stored, write_whole

ASPECTS = {"audio": "what is heard", "video": "what is seen"}
INSTRUCTION = (
    "You compare a caption of a video clip with references that describe {what} in the same clip. Judge only {what}; "
    "leave the rest aside. Score how much of what the references describe the caption conveys, and how little it adds "
    "that contradicts them, from 0 (none of it) to 1 (all of it). The references describe one clip: use all of them. "
    'Answer with json alone: {{"score": <number from 0 to 1>}}'
)
VERSION = 1
GIVE_UP_AFTER = 3
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Judged:
    """One verdict."""

    score: float  # 0 to 1, NaN where there is none
    failed: str = ""  # "", "unreadable", "server" or "not asked"
    reply: str = ""  # what the server said, or why nothing came


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A language model that scores captions; see the module for what is sent and what counts as a failure.

    Attributes:
        server: the address up to its version, such as "http://localhost:8000/v1".
        model: the model's name on that server.
        key_env: the environment variable that holds the key; empty where none is needed.
        cache: a folder for replies; None keeps none.
        retries: how often a request is tried again.
        wait_s: seconds before the first retry; each wait is twice the one before.
        timeout_s: seconds after which a request counts as broken.
        parallel: requests at a time.
        max_tokens: of a reply, thinking included.
    """

    server: str
    model: str
    key_env: str = ""
    cache: str | Path | None = None
    retries: int = 4
    wait_s: float | int = 1.0
    timeout_s: float | int = 60.0
    parallel: int = 4
    max_tokens: int = 2048
    _opener: Any = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.server)
        if parts.scheme not in ("http", "https") or not parts.netloc or "@" in parts.netloc:
            raise InputError(
                f"a judge's server is an address such as http://localhost:8000/v1 (keys go into key_env=); "
                f"got {parts.scheme + '://...' if '@' in parts.netloc else repr(self.server)}."
            )
        for name, least in (("retries", 0), ("wait_s", 0), ("timeout_s", 0.001), ("parallel", 1), ("max_tokens", 1)):
            require_at_least(name, getattr(self, name), least)
        if not self.model:
            raise InputError("a judge needs the name of a model on its server.")
        object.__setattr__(self, "_opener", urllib.request.build_opener(_NoRedirect))

    def check(self) -> None:
        """Ask the server for its models, before anything is paid for.

        Raises:
            ModelError: the key's variable is not set, the server cannot be reached or refuses the key, or it says that
                it does not have the model.
        """
        try:
            status, reply = self._send("models", None)
        except (OSError, HTTPException, ValueError) as error:
            raise ModelError(
                f"the judge at {self.server} cannot be reached ({_why(error)}). Start the server, mend the address, or "
                "leave judge= out; nothing was generated."
            ) from error
        if status in (401, 403):
            key = f"it was read from {self.key_env}" if self.key_env else "name the variable that holds it: key_env="
            raise ModelError(f"the judge at {self.server} refuses the key ({status}); {key}.")
        if status >= 500:
            raise ModelError(f"the judge at {self.server} is not ready ({status}): {reply[:200]!r}.")
        names = status == 200 and _picked(reply, lambda said: [str(entry["id"]) for entry in said["data"]])
        if names and self.model not in names:
            raise ModelError(f"the judge at {self.server}: {unknown('model', self.model, names)}")

    def score(self, caption: str, references: Sequence[str], *, aspect: str) -> Judged:
        """Score one caption.

        Args:
            caption: the caption.
            references: all that is known of the clip in this respect.
            aspect: "audio" or "video".

        Returns:
            The verdict.

        Raises:
            InputError: an unknown aspect, or no reference.
            ModelError: the key's variable is not set.
        """
        asked = self._asked(caption, references, aspect)
        return self._kept(asked) or self._ask(asked)

    def score_all(
        self,
        items: Sequence[tuple[str, Sequence[str], str]],
        *,
        finished: Callable[[int], None] | None = None,
        into: list[Judged] | None = None,
    ) -> list[Judged]:
        """Score many captions, several at a time; a server that has gone is not asked to the end.

        Args:
            items: (caption, references, aspect) of each.
            finished: called now and then with the number that are done.
            into: a list that grows as verdicts come, so that an interruption loses none.

        Returns:
            One verdict for each, in order.
        """
        found, silent = [] if into is None else into, 0
        asked = [self._asked(*item) for item in items]  # all are checked before any is sent
        gone = Judged(math.nan, "not asked", f"the server failed {GIVE_UP_AFTER} times in a row")
        with ThreadPoolExecutor(self.parallel) as pool:
            for start in range(0, len(items), self.parallel):
                part = asked[start : start + self.parallel]
                if silent >= GIVE_UP_AFTER:
                    found += [self._kept(one) or gone for one in part]
                else:
                    batch = list(pool.map(lambda one: self._kept(one) or self._ask(one), part))
                    for verdict in batch:
                        silent = silent + 1 if verdict.failed == "server" else 0
                    found += batch
                if finished is not None:
                    finished(len(found))
        return found

    def _asked(self, caption: str, references: Sequence[str], aspect: str) -> dict[str, Any]:
        require_choice("aspect", aspect, ASPECTS)
        listed = [references] if isinstance(references, str) else list(references)
        if not listed or not all(text.strip() for text in listed):
            raise InputError(f"a judge needs references of {ASPECTS[aspect]}; got {listed!r} for {caption!r}.")
        shown = "\n".join(f"Reference {number}: {text}" for number, text in enumerate(listed, start=1))
        return {
            "model": self.model,
            "messages": [
                {"role": "system", "content": INSTRUCTION.format(what=ASPECTS[aspect])},
                {"role": "user", "content": f"{shown}\nCaption: {caption}"},
            ],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }

    def _ask(self, asked: dict[str, Any]) -> Judged:
        why = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(float(self.wait_s) * 2 ** (attempt - 1))
            try:
                status, reply = self._send("chat/completions", asked)
            except (OSError, HTTPException, ValueError) as error:
                why = _why(error)
                continue
            if status == 200:
                text = str(_picked(reply, lambda said: said["choices"][0]["message"]["content"]) or "")
                if (score := parsed(text)) is None:
                    return Judged(math.nan, "unreadable", text)
                self._keep(asked, text)
                return Judged(score, "", text)
            why = f"{status}: {reply[:200]}"
            if status not in (408, 409, 425, 429) and status < 500:
                break
        return Judged(math.nan, "server", why)

    def _send(self, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key_env:
            if not (key := os.environ.get(self.key_env, "")):
                raise ModelError(
                    f"the judge's key should be in the environment variable {self.key_env}, which is empty."
                )
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.server.rstrip('/')}/{path}", data=data, headers=headers)
        try:
            with self._opener.open(request, timeout=float(self.timeout_s)) as reply:
                return int(reply.status), reply.read(MOST_BYTES).decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read(MOST_BYTES).decode("utf-8", "replace")

    def _place(self, asked: dict[str, Any]) -> Path:
        content = json.dumps([VERSION, asked], sort_keys=True, ensure_ascii=True).encode()
        return Path(self.cache or "") / f"{hashlib.sha256(content).hexdigest()}.json"

    def _kept(self, asked: dict[str, Any]) -> Judged | None:
        if self.cache is None:
            return None
        # A file that was cut short, or that answers another question, is asked again.
        kept = stored(self._place(asked), lambda found: str(found["reply"]) if found["asked"] == asked else None)
        score = parsed(kept or "")
        return None if kept is None or score is None else Judged(score, "", kept)

    def _keep(self, asked: dict[str, Any], reply: str) -> None:
        if self.cache is not None:
            make_folder(Path(self.cache))
            write_whole(self._place(asked), json.dumps({"asked": asked, "reply": reply}, indent=1))


def parsed(reply: str) -> float | None:
    """Read the score from a reply."""
    said = re.sub(r"(?s)<think>.*?(</think>|\Z)", "", reply).strip()
    fenced = re.fullmatch(r"(?s)```(?:json)?\n(.*)\n```", said)
    try:
        found: Any = parse_json(fenced[1] if fenced else said)
    except ValueError:
        return None
    score = cast(dict[str, Any], found).get("score") if isinstance(found, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float):
        return None
    return float(score) if 0 <= score <= 1 else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another address: it is refused as any other status."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        del args, options


def _picked(reply: str, pick: Callable[[Any], Any]) -> Any:
    """What a server's json holds at some place; None where it has none."""
    try:
        return pick(parse_json(reply, finite=False))
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def _why(error: BaseException) -> str:
    reason = getattr(error, "reason", None) or error
    return f"{type(error).__name__}: {reason}"
