"""Every error that av_lens raises on purpose: one small tree, each message saying what was asked, found and to do."""

import difflib
from collections.abc import Iterable


class AvLensError(Exception):
    """The root: `except AvLensError` catches everything that av_lens refuses."""


class MediaError(AvLensError):
    """A file or clip that cannot be read, cut, joined or written."""


class InputError(AvLensError, ValueError):
    """A question, option, answer or span that does not fit the model or the clip."""


class AlignmentError(InputError):
    """Two inputs that should match position by position and do not."""


class ManifestError(InputError):
    """A manifest with faults; the message lists all of them with their line numbers."""


class ModelError(AvLensError):
    """A model that cannot be loaded, adapted or trusted (a failed self-check)."""


class InterventionError(AvLensError):
    """A site, edit or plan that cannot be applied, or that did not fire as it should have."""


class NotKeptError(InterventionError, KeyError):
    """An activation that a run did not keep."""

    __str__ = Exception.__str__  # a KeyError would show its message in quotes


class BudgetError(AvLensError):
    """A request that would need more memory or time than its budget."""


class FileError(AvLensError):
    """A file or folder that cannot be written, or read back as what was written there."""


class ProtocolError(AvLensError):
    """An isolation that must not go on: no gap to explain, too few conflicts, an undefined donor."""


class UnfinishedError(Exception):
    """Long work that stopped before its end; what was finished is kept, and the same call goes on from there.

    No refusal, and so no `AvLensError`: whoever notes a refusal as the reason why something was not measured must not
    take a run that was stopped for one.
    """


def unknown(kind: str, name: object, known: Iterable[object]) -> str:
    """Say that `name` is not a known `kind`, with the nearest match and all that is known."""
    options = [str(option) for option in known]
    near = difflib.get_close_matches(str(name), options, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    shown = ", ".join(options[:40]) + (", ..." if len(options) > 40 else "")
    return f"unknown {kind} {str(name)!r}.{hint} Known: {shown}."
