"""A clip in a notebook or a report: an HTML5 player with the medium inside, and a line of facts."""

from __future__ import annotations

import base64
import html
from typing import Any

from av_lens.media import encoding

_PREVIEW_SECONDS = 60.0
_PREVIEW_SIDE = 480


def player(clip: Any) -> str:
    """Draw a clip as HTML that needs no network."""
    shown = clip if clip.duration <= _PREVIEW_SECONDS else clip.trimmed(0.0, _PREVIEW_SECONDS)
    if not clip.has_picture:
        element = f'<audio controls src="{data_uri("audio/mp4", shown.to_mp4_bytes())}"></audio>'
    elif clip.is_image and not clip.has_sound:
        uri = data_uri("image/png", encoding.png_bytes(clip.frames[0]))
        element = f'<img alt="one frame" style="max-width:480px" src="{uri}">'
    else:
        data = shown.to_mp4_bytes(crf=20.0, max_side=_PREVIEW_SIDE)
        width = max(240, min(_PREVIEW_SIDE, clip.frames.shape[2]))
        element = f'<video controls loop playsinline width="{width}" src="{data_uri("video/mp4", data)}"></video>'
    preview = f" (the first {_PREVIEW_SECONDS:g} s are shown)" if shown is not clip else ""
    notes = "".join(f"<br>{html.escape(note)}" for note in clip.notes)
    caption = f"<figcaption><small>{html.escape(repr(clip))}{preview}{notes}</small></figcaption>"
    return f'<figure class="av-lens-clip" style="margin:0">{element}{caption}</figure>'


def data_uri(kind: str, data: bytes) -> str:
    """Write a medium of this kind, such as "video/mp4", into an address."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
