"""TransformerLens's `ActivationCache`, which says what to write where something is not in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities.components_utils import get_act_name

from av_lens.errors import InterventionError, NotKeptError, unknown
from av_lens.families.hook_names import gates_named


class Kept(ActivationCache):
    """An `ActivationCache` of a run; `cache["z", 5]` and `cache["blocks.5.attn.hook_z"]` are one tensor."""

    def __getitem__(self, key: Any) -> Tensor:
        try:
            return super().__getitem__(key)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise NotKeptError(self._missing(key)) from error

    def _missing(self, key: Any) -> str:
        """Why an activation is not there, and what would bring it."""
        model: Any = self.model
        known = tuple(model.hook_dict)
        parts = list(key) if isinstance(key, tuple) else [key]
        if len(parts) > 1 and isinstance(parts[1], int) and parts[1] < 0:
            parts[1] += int(model.cfg.n_layers)
        try:
            name = str(get_act_name(*parts))
        except (AssertionError, TypeError, AttributeError):
            name = str(key)
        if name not in known:
            return unknown("activation", name, self.cache_dict)
        gated = ": it fires only in a run that names it" if gates_named([name], known) else ""
        return f"{name} was not kept{gated}. Run again with model.run_with_cache(x, names_filter=[{name!r}, ...])."

    def __repr__(self) -> str:
        names = list(self.cache_dict)
        shown = ", ".join(names[:6]) + (f", ... ({len(names)} in all)" if len(names) > 6 else "")
        return f"ActivationCache with keys [{shown}]"


def kept_for(model: Any, cache: Any) -> Any:
    """Hand a bridge's cache to a model's user."""
    return Kept(cache.cache_dict, model, cache.has_batch_dim) if isinstance(cache, ActivationCache) else cache


def require_kept(names: Sequence[str], cache: Any, *, every: bool) -> None:
    """Refuse a cache in which something is missing that was asked for."""
    kept = set(cache.keys())
    missing = [name for name in names if name not in kept]
    if missing and (every or len(missing) == len(names)):
        raise InterventionError(
            f"the run never passed through {missing[0]}, so nothing was kept of it (a layer behind stop_at_layer=, or "
            "an encoder of media that the input does not have)."
        )
