"""Workers of this machine that share a run: each a process that joins the run in its folder.

`main` is one: it reads from its standard input what to isolate.
"""

import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from av_lens.errors import AvLensError, ProtocolError
from av_lens.isolation.measuring.crew import WORKERS
from av_lens.isolation.running.preparing import Options
from av_lens.whole_files import make_folder

LEAVING = 30.0
"""Seconds that the others are given to see that the record is there."""


@contextmanager
def sharing(
    workers: int,
    model: Any,
    conflicts: Sequence[Any],
    options: Options,
    *,
    out: str | Path | None,
    told: Callable[[str], None] | None,
    engine: Any = None,
) -> Generator[Path | None]:
    """Start the other workers, and give the run's folder (one that goes afterwards, if none was named)."""
    if workers < 2:
        raise ProtocolError(f"workers={workers!r}: give how many processes share the work, 1 or more.")
    if engine is not None:
        raise ProtocolError("workers load the model anew, and an engine was given: leave workers out.")
    said = {"model": reloaded(model), "conflicts": list(conflicts), "options": asdict(options)}
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        made = tempfile.TemporaryDirectory(prefix="av-lens-") if out is None else None
        folder = Path(stack.enter_context(made)) if made is not None else Path(str(out))
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(max(1, threads // workers))
        held = pickle.dumps(said | {"out": str(folder.resolve()), "threads": torch.get_num_threads()})
        others = [stack.enter_context(_worker(number, folder, held, told)) for number in range(2, workers + 1)]
        yield folder
        for other in others:  # they see the record and leave
            with suppress(subprocess.TimeoutExpired):
                other.wait(LEAVING)


def reloaded(model: Any) -> dict[str, Any]:
    """Say how a model is loaded again: the arguments of `load`."""
    known = dict(getattr(model, "provenance", {}))
    if known.get("source") in (None, "hf_model"):
        raise ProtocolError(
            "workers load the model anew by its name, and this one was given as an object. Leave workers out, or start "
            "others yourself with join=True on the same folder."
        )
    dtype = str(model.dtype).removeprefix("torch.")
    options = {"name_or_path": str(known["source"]), "revision": known.get("revision"), "dtype": dtype}
    return options | {"device": str(model.device)}


@contextmanager
def _worker(
    number: int, folder: Path, held: bytes, told: Callable[[str], None] | None
) -> Generator[subprocess.Popen[bytes]]:
    """Run another worker; what it says last is told if it fails, and the others do its work."""
    make_folder(folder / WORKERS)
    log = folder / WORKERS / f".worker-{number}.log"
    with log.open("wb") as said:
        command = [sys.executable, "-c", f"import sys; from {__name__} import main; sys.exit(main())"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said)
    try:
        assert process.stdin is not None
        with suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(held)
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        if process.wait() > 0 and told is not None:
            last = (log.read_text("utf-8", errors="replace").strip().splitlines() or ["it said nothing"])[-1]
            told(f"worker {number} stopped, and the others did its work: {last}")


def main() -> int:
    """Be a worker: join the run that standard input tells of."""
    from av_lens.isolation import isolate
    from av_lens.model import load

    said = pickle.load(sys.stdin.buffer)  # written by the process that started this one
    torch.set_num_threads(said["threads"])
    name = said["model"].pop("name_or_path")
    try:
        isolate(load(name, **said["model"]), said["conflicts"], out=said["out"], join=True, **said["options"])
    except AvLensError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0
