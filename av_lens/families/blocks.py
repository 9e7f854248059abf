"""A decoder layer, its attention, its norms and the towers, each stage a real hook, equal to HuggingFace's eager.

In TransformerLens's own block a write at `hook_resid_mid` reaches the MLP but not the stream, because the wrapped layer
keeps the stream in a local variable. Here the layer's arithmetic is written out, in HuggingFace's order. `hook_embed`
is the stream after the media are scattered in; else decompositions would miss them.

Outputs that TransformerLens recomputes as sums over heads (`hook_result`, input forks) are *differences* here: the
exact output, plus what an edit changed. Nothing edited means nothing moved, in any precision. What happens where a
layer's scores would pass the budget: `docs/hooks.md`.
"""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import (
    BlockBridge,
    PositionEmbeddingsAttentionBridge,
    RMSNormalizationBridge,
)

from av_lens.errors import BudgetError, ModelError
from av_lens.families.decoder import Read, attended, rotated, weight_of
from av_lens.families.weights import brought


def device_of(module: Any) -> torch.device:
    """Where a module computes: where accelerate takes it, else where its first weight lies."""
    for part in module.modules():
        hook = part.__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            place = getattr(one, "execution_device", None)
            if place is not None:
                return torch.device(place)
        for weight in part._parameters.values():
            if weight is not None:
                return weight.device
    return torch.device("cpu")


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


class FullBlockBridge(BlockBridge):
    """A pre-norm layer with a writable `hook_resid_mid`; `own_layout`: what `families.decoder.Layer` does not know."""

    own_layout: str = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hook_aliases = {key: path for key, path in self.hook_aliases.items() if key != "hook_resid_mid"}
        self.hook_resid_mid = HookPoint()
        self._hook_embed: HookPoint | None = None

    def set_embed_hook(self, hook: HookPoint) -> None:
        """Let this block, the first, fire the hook of the stream that enters the fusion stack."""
        object.__setattr__(self, "_hook_embed", hook)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the layer."""
        if "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"), *args)
        if args[0].device != (place := device_of(self.ln1)):  # as accelerate does for the forward that this replaces
            args, kwargs = brought(args, place), brought(kwargs, place)
        if self._hook_embed is not None:
            args = (self._hook_embed(args[0]), *args[1:])
        args, kwargs = self._maybe_inject_start_residual(args, kwargs)
        self._check_stop_at_layer(*args, **kwargs)
        stream = self.hook_in(args[0])
        stream = self.hook_resid_mid(stream + self._attended(stream, kwargs))
        entering = self.hook_mlp_in(stream.clone()) if self._read_use_hook_mlp_in() else stream
        return self.hook_out(self._leaving(stream + self._fed(entering), args[1:]))

    def _attended(self, stream: torch.Tensor, told: dict[str, Any]) -> torch.Tensor:
        """What attention writes to the stream."""
        attention: Any = self.attn
        attention.set_stream(stream, self.ln1.original_component)
        try:
            return attention(hidden_states=self.ln1(stream), **told)[0]
        finally:
            attention.set_stream(None, None)

    def _fed(self, entering: torch.Tensor) -> torch.Tensor:
        """What the MLP writes to it."""
        return self.mlp(self.ln2(entering))

    def _leaving(self, stream: torch.Tensor, told: tuple[Any, ...]) -> torch.Tensor:
        """What a layer does after its MLP."""
        del told
        return stream


class RealRMSNormBridge(RMSNormalizationBridge):
    """RMSNorm in HuggingFace's order, its hooks on the road; `hook_scale` enters as a ratio, unedited 1."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Norm the stream."""
        norm: Any = self.original_component
        weight = weight_of(norm)
        stream = self.hook_in(hidden_states.to(weight.device))
        wide = stream.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon
        normalized = self.hook_normalized(self.scaled(wide, variance, torch.rsqrt))
        return self.hook_out(weight * normalized.to(stream.dtype))

    def scaled(
        self, wide: torch.Tensor, variance: torch.Tensor, inverse: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """Divide by the variance's root, the scale that the hook shows; `inverse` is how the family computes 1 / it."""
        if not self.hook_scale.has_hooks():
            return wide * inverse(variance)
        scale = variance.sqrt()
        fixed = scale.detach().clone()
        # The inverse enters as a constant: the gradient of the scale flows through the hook alone.
        return wide * inverse(variance.detach()) * (fixed / self.hook_scale(scale))


BUDGET_GB = 8.0
"""GB (1e9 bytes) that a run may take for scores, logits or kept activations where the caller names no other budget."""

_WORKING = 8  # bytes of a score at the dearest moment: two copies in float32; in half precision one, and softmax's
_BLOCK = 1 << 29  # bytes of scores computed together
_ROWS = 16  # the fewest queries of a block: fewer go through slower kernels, which sum in another order
_budget_gb: ContextVar[float] = ContextVar("budget_gb", default=BUDGET_GB)


@contextmanager
def score_budget(budget_gb: float | int) -> Generator[None, None, None]:
    """Bound what attention scores may take, for runs inside the block."""
    token = _budget_gb.set(float(budget_gb))
    try:
        yield
    finally:
        _budget_gb.reset(token)


def score_gigabytes(scores: int, *, itemsize: int, kept_layers: int = 0) -> float:
    """Estimate what whole attention scores take."""
    return scores * (_WORKING + kept_layers * (4 if itemsize == 4 else 4 + itemsize)) / 1e9


def refuse_scores(names: list[str], gigabytes: float, *, shape: tuple[int, int, int], graph: bool) -> None:
    """Refuse hooks on scores or pattern whose whole scores pass the budget."""
    budget = _budget_gb.get()
    if not names or gigabytes <= budget:
        return
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    fits = int(shape[2] * (budget / gigabytes) ** 0.5)
    without = "run under torch.no_grad(), " if graph else ""
    raise BudgetError(
        f"whole attention scores of {shape[0]} x {shape[1]} positions would take about {gigabytes:.3g} GB, beyond "
        f"budget_gb={budget:g}, and {shown} ask{'s' if len(names) == 1 else ''} for them; without such hooks they are "
        f"computed in blocks. Hook z, q, k or v instead, {without}hook fewer layers, give at most {fits} positions, or "
        f"raise budget_gb."
    )


_HOOK_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooked_change(hook: HookPoint, value: torch.Tensor, again: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Fire a hook, and say what it changed."""
    version = None if value.is_inference() else value._version
    wanted = torch.is_grad_enabled() and value.requires_grad
    # Where gradients are wanted the hook sees a node of its own, or the difference would cancel its gradient.
    shown = value.view_as(value) if wanted else value
    hooked = hook(shown)
    in_place = version is None or value._version != version
    if hooked is shown and not in_place and not wanted:
        return None
    return hooked, again() if in_place else value


class RealAttentionBridge(PositionEmbeddingsAttentionBridge):
    """Grouped-query rotary attention, stage by stage; the layer's own projections and cache are used."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stream: torch.Tensor | None = None
        self._norm: Any = None
        # The base class keeps one hook for layers that are left to HuggingFace; here it would never fire.
        del self._modules["hook_hidden_states"]
        self._hook_registry.pop("hook_hidden_states", None)

    def set_stream(self, stream: torch.Tensor | None, norm: Any) -> None:
        """Remember the residual stream before its norm, for the input forks."""
        object.__setattr__(self, "_stream", stream)
        object.__setattr__(self, "_norm", norm)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend."""
        attention: Any = self.original_component
        hidden = kwargs.pop("hidden_states") if "hidden_states" in kwargs else args[0]
        tables = kwargs.pop("position_embeddings", None)
        if tables is None:
            raise ModelError(f"{self.name}: the layer passed no position_embeddings; rotary attention needs them.")
        mask = kwargs.pop("attention_mask", None)
        query, *own = self._projected(self.hook_in(hidden))
        cos, sin = (table.unsqueeze(1) for table in self._apply_position_embedding_hooks(tables))
        query = self.hook_rot_q(rotated(query, cos, sin))
        key, value = self._read(own, (cos, sin), kwargs)
        key, value = (_repeated(part, attention.num_key_value_groups) for part in (key, value))
        rows = self._block_rows(query, key)
        if rows is None:
            z, pattern = self._attended(query, key, value, mask)
        else:
            z, pattern = self._attended_in_blocks(query, key, value, mask, rows), None
        return self.hook_out(self._written(z.transpose(1, 2).contiguous().flatten(-2))), pattern

    def _read(self, own: list[torch.Tensor], tables: tuple[torch.Tensor, ...], told: dict[str, Any]) -> Any:
        """Keys and values that queries read: these and those of the cache."""
        key, value = own
        return self._update_kv_cache(self.hook_rot_k(rotated(key, *tables)), value, **told)

    def score_hooks(self) -> list[str]:
        """Name the hooks that look at whole scores or the whole pattern."""
        points = [self.hook_attn_scores, self.hook_pattern]
        return [str(p.name) for p in points if any(getattr(p, kind) for kind in _HOOK_KINDS)]

    def _block_rows(self, query: torch.Tensor, key: torch.Tensor) -> int | None:
        """How many queries to take together; None for all, where they fit the budget or are a single one."""
        config: Any = self.config
        batch, n_heads, n, _ = query.shape
        row, budget = batch * n_heads * key.shape[2], _budget_gb.get()
        graph, itemsize = torch.is_grad_enabled() and query.requires_grad, query.element_size()
        whole = score_gigabytes(n * row, itemsize=itemsize, kept_layers=config.n_layers if graph else 0)
        if whole <= budget or n == 1:
            return None
        names = self.score_hooks()
        if names:
            alone = score_gigabytes(n * row, itemsize=itemsize, kept_layers=1 if graph else 0)
            refuse_scores(names, alone, shape=(batch, n, key.shape[2]), graph=graph)
            return None
        return max(_ROWS, int(min(_BLOCK, budget * 1e9)) // (row * _WORKING))

    def _attended(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        hooked: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries read `[batch, head, pos, d_head]`, and their pattern; hooks fire unless it is a block."""
        attention: Any = self.original_component
        dropout = attention.attention_dropout if self.training else 0.0
        sizes = {"attention_mask": mask, "seq_len": key.shape[2], "q_seq_len": query.shape[2]}
        return attended(
            query,
            [Read(key, value)],
            attention.scaling,
            scores=partial(self._masked, sizes, hooked),
            softmax=lambda scores: self._masked_softmax(scores, dtype=torch.float32),
            pattern=partial(self._dropped, dropout, hooked),
        )

    def _masked(self, sizes: dict[str, Any], hooked: bool, scores: torch.Tensor) -> torch.Tensor:
        scores = self._apply_reconstruct_attention_mask(attn_scores=scores, **sizes)
        return self.hook_attn_scores(scores) if hooked else scores

    def _dropped(self, dropout: float, hooked: bool, pattern: torch.Tensor) -> torch.Tensor:
        pattern = self._scrub_compatibility_pattern_nans(pattern)
        pattern = torch.nn.functional.dropout(pattern, p=dropout, training=self.training)
        return self.hook_pattern(pattern) if hooked else pattern

    def _attended_in_blocks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, rows: int
    ) -> torch.Tensor:
        """The same without hooks, some queries at a time; for gradients each block is computed again."""
        n, n_keys = query.shape[2], key.shape[2]
        square = mask is not None and mask.ndim >= 3  # a mask with rows of its own
        if mask is not None and square:
            mask = mask[..., -n:, :].expand(*mask.shape[:-2], n, -1)
        # Without a whole mask the queries are the last positions, and a block must end with its own last key.
        cut_keys = mask is None or mask.ndim < 4

        def block(start: int, end: int) -> torch.Tensor:
            shown = mask[..., start:end, :] if mask is not None and square else mask
            seen = n_keys - n + end if cut_keys else n_keys
            return self._attended(query[:, :, start:end], key[:, :, :seen], value[:, :, :seen], shown, hooked=False)[0]

        count = -(-n // rows)
        edges = [n * i // count for i in range(count + 1)]  # even blocks: a short last one would take another kernel
        if torch.is_grad_enabled():
            parts = [checkpoint(block, *ends, use_reentrant=False) for ends in pairwise(edges)]
        else:
            parts = [block(*ends) for ends in pairwise(edges)]
        return torch.cat(parts, dim=2)

    def _projected(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values `[batch, head, pos, d_head]`, each with what its input fork changed."""
        changes = self._fork_changes()
        kinds = [kind for kind in "qkv" if kind in self.submodules]
        return self._normed({kind: self._heads(kind, hidden, changes) for kind in kinds})

    def _heads(self, kind: str, hidden: torch.Tensor, changes: dict[str, torch.Tensor | None] | None) -> torch.Tensor:
        linear: Any = getattr(self, kind)
        if changes is None:
            flat = linear(hidden)
        else:
            flat = linear.original_component(linear.hook_in(hidden))
            change = changes[kind]
            if change is not None:
                flat = flat + self._per_head(linear, change).to(flat.dtype)
            flat = linear.hook_out(flat)
        heads = flat.view(*flat.shape[:2], -1, self.original_component.head_dim)  # pyright: ignore[reportOptionalMemberAccess]
        return heads.transpose(1, 2)

    def _normed(self, heads: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """On each head, after its hook and before rotary position, where the layer has norms."""
        made = dict(heads)
        for kind in heads:
            if f"{kind}_norm" in self.submodules:
                made[kind] = getattr(self, f"hook_{kind}_normed")(getattr(self, f"{kind}_norm")(heads[kind]))
        return tuple(made.values())

    def _fork_changes(self) -> dict[str, torch.Tensor | None] | None:
        """What the hooks on the forked inputs changed, after the norm `[batch, pos, head, d_model]`; None: no forks."""
        config: Any = self.config
        if not (config.use_split_qkv_input or config.use_attn_in):
            return None
        group: int = self.original_component.num_key_value_groups  # pyright: ignore
        if config.use_split_qkv_input:
            sizes = {"q": config.n_heads, "k": config.n_heads // group, "v": config.n_heads // group}
            return {
                kind: self._fork_change(getattr(self, f"hook_{kind}_input"), n)
                for kind, n in sizes.items()
                if kind in self.submodules
            }
        change = self._fork_change(self.hook_attn_in, config.n_heads)
        # One copy per query head: a key-value head reads the copy of the first query head that it serves.
        shared = None if change is None else change[:, :, ::group]
        return {"q": change, "k": shared, "v": shared}

    def _fork_change(self, hook: HookPoint, n_heads: int) -> torch.Tensor | None:
        stream, norm = self._stream, self._norm
        if stream is None:
            raise ModelError(f"{self.name}: its block must call set_stream before input forks can fire.")
        forked = partial(_copies, stream, n_heads)
        change = hooked_change(hook, forked(), forked)
        return None if change is None else norm(change[0]) - norm(change[1])

    def _per_head(self, linear: Any, change: torch.Tensor) -> torch.Tensor:
        """Each head's own rows of the projection on that head's change; flat `[batch, pos, head * d_head]`."""
        weight = weight_of(linear.original_component)
        rows = weight.view(change.shape[2], -1, weight.shape[-1])
        return torch.einsum("bphm,hdm->bphd", change, rows).flatten(-2)

    def _written(self, z: torch.Tensor) -> torch.Tensor:
        """The output projection of `z` `[batch, pos, head * d_head]`, with what `hook_result` changed."""
        config: Any = self.config
        if not config.use_attn_result:
            return self.o(z)
        output: Any = self.o.original_component
        z = self.o.hook_in(z)
        heads = z.view(*z.shape[:2], config.n_heads, -1)
        columns = weight_of(output).unflatten(1, (config.n_heads, -1))
        per_head = partial(torch.einsum, "bphd,mhd->bphm", heads, columns)
        written = output(z)
        change = hooked_change(self.hook_result, per_head(), per_head)
        if change is not None:
            written = written + (change[0] - change[1]).sum(2, dtype=torch.float32).to(written.dtype)
        return self.o.hook_out(written)


def _copies(stream: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The stream once for each head, `[batch, pos, head, d_model]`."""
    return stream.unsqueeze(2).repeat(1, 1, n_heads, 1)


def _repeated(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """Key-value heads repeated for the query heads that share them."""
    return heads if groups == 1 else heads.repeat_interleave(groups, dim=1)
