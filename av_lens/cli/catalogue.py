"""What can be loaded: the organisms of the package and the checkpoint families with an adapter, read without torch."""

from __future__ import annotations

from importlib.metadata import entry_points

from av_lens.checkpoints import index

_HUB_NAMES = {"Qwen2_5OmniThinkerForConditionalGeneration": "Qwen/Qwen2.5-Omni-3B, Qwen/Qwen2.5-Omni-7B (thinker only)"}


def short_names() -> list[tuple[str, str]]:
    """List the organisms that ship with the package."""
    return [(name, str(entry.get("summary", ""))) for name, entry in index().items()]


def families() -> list[tuple[str, str]]:
    """List the architectures that can be opened: those with an adapter of ours, and other packages' families."""
    ours = [
        point for point in entry_points(group="transformer_lens.architectures") if point.value.startswith("av_lens.")
    ]
    ours += entry_points(group="av_lens.families")
    return [(point.name, _HUB_NAMES.get(point.name, "any checkpoint of this class")) for point in sorted(ours)]
