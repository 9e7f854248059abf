"""Where a checkpoint's files lie: a folder, the hub, the base of a difference or an adapter; and how reading fails."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from av_lens.checkpoints import index, known_names, located, shipped
from av_lens.checks import foreign_file, parse_json
from av_lens.errors import AvLensError, ModelError
from av_lens.model.adapters import Adapter, read_adapter
from av_lens.model.differences import Difference, read_difference

GRAMMAR_FILE = "grammar.json"


class Source:
    """Where a checkpoint lies: a folder, or a name on the hub. Of a difference it is the base's, which is checked."""

    def __init__(self, asked: str, revision: str | None) -> None:
        self.asked, self.folder = asked, located(asked)
        self.revision = revision if self.folder is None else None
        self.adapter = None if self.folder is None else read_adapter(self.folder)
        if self.adapter is not None:
            self._on_base_of(self.adapter)
        self.difference = None if self.folder is None else read_difference(self.folder)
        if self.difference is not None:
            self.folder = base_of(self.difference)
            self.difference.check_base(self.folder)
        self.place = self.asked if self.folder is None else str(self.folder)
        self.grammar: dict[str, Any] | None = None
        if self.folder is not None and (found := self.folder / GRAMMAR_FILE).is_file():
            with foreign_file(found, "an organism's grammar", error=ModelError):
                self.grammar = dict(parse_json(found.read_bytes()))

    def _on_base_of(self, adapter: Adapter) -> None:
        """Read everything but the adapter's weights from its base."""
        beside = adapter.folder / Path(adapter.base).expanduser()
        try:
            self.folder = beside if beside.is_dir() else located(adapter.base)
        except ModelError as error:
            raise ModelError(
                f"{self.asked!r} is an adapter over {adapter.base!r}, which is not there: {error} Bring that folder "
                "back, or write its new place into adapter_config.json (base_model_name_or_path)."
            ) from error
        self.asked = adapter.base
        self.revision = adapter.revision if self.folder is None else None

    def config(self) -> dict[str, Any]:
        """Read the configuration as it was written."""
        from transformers import PreTrainedConfig

        with self.translated("config.json"):
            found, _ = PreTrainedConfig.get_config_dict(self.place, revision=self.revision, trust_remote_code=False)
        if not found:
            raise ModelError(f"{self.asked!r} has no config.json, so it is no checkpoint. {known_names()}")
        return found

    @contextmanager
    def translated(self, what: str) -> Generator[None, None, None]:
        """Say in our words what HuggingFace could not find or read: its readers raise anything on foreign files."""
        try:
            yield
        except (AvLensError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
            if "custom code" in str(error):
                raise ModelError(self._own_code(what)) from error
            if self.folder is not None:
                raise ModelError(f"cannot read {what} in {self.asked!r}: {first}") from error
            raise ModelError(
                f"cannot get {what} of {self.asked!r} from the HuggingFace hub: {first} Check the name and the "
                f"network, or download the folder elsewhere and pass its path. {known_names()}"
            ) from error

    def _own_code(self, what: str) -> str:
        listed = [] if self.folder is None else sorted(self.folder.glob("*.json"))
        named = [path.name for path in listed if b'"auto_map"' in path.read_bytes()]
        return (
            f"{self.asked!r} wants code of its own to be run for {what} ({', '.join(named) or 'its json files'}: "
            "auto_map), and av_lens runs no code from a checkpoint. Take auto_map out and name the classes of "
            "transformers there (processor_class, tokenizer_class), or pass processor= made by code that you trust."
        )


def base_of(difference: Difference) -> Path:
    """Find the folder of a difference's base: a short name's, or one named from the root or the difference's folder."""
    shown, known = repr(str(difference.folder)), index().get(difference.base)
    found = difference.folder / Path(difference.base).expanduser()
    found = found if known is None else Path(str(shipped() / str(known["folder"])))
    if not found.is_dir():
        raise ModelError(
            f"{shown} is a difference over {difference.base!r}, which is neither a short name nor a folder. Bring that "
            f"folder back, or write its new place into difference.json. {known_names()}"
        )
    if read_difference(found) is not None:
        raise ModelError(f"the base of {shown} is a difference itself; only one may stand on another.")
    return found
