"""`hook_embed` where it belongs: on the stream that enters the fusion layers, media included.

TransformerLens's `hook_embed` is the text embedding; a model that scatters media features into the stream does so
afterwards, so every decomposition that starts at `hook_embed` would miss the media. The raw text embedding stays
readable at `embed.hook_out`.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.hook_points import HookPoint


def install_embed_hook(bridge: Any) -> None:
    """Put a real `hook_embed` at the entry of the first block, in place of the alias; again changes nothing."""
    bridge.hook_aliases = {name: path for name, path in bridge.hook_aliases.items() if name != "hook_embed"}
    bridge._hook_alias_registry.pop("hook_embed", None)
    if "hook_embed" not in bridge._modules:
        bridge.__dict__.pop("hook_embed", None)
        bridge.hook_embed = HookPoint()
    hook = bridge._modules["hook_embed"]
    hook.name = "hook_embed"
    bridge._hook_registry["hook_embed"] = hook
    bridge.blocks[0].set_embed_hook(hook)
