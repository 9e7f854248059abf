"""How much arithmetic must an exact sweep of heads do, and how long does the bare arithmetic take here?

A patch of one head's z at layer l on rows E (the positions patched), the first of which is p, on a prompt of n
positions, asked at its last. What any exact method that restarts from the recorded run must compute for each plan, as
multiply-adds times 2:

    layer l             o of the one head        |E| d_head d_model
                        MLP                      |E| 3 d_model d_mlp
    layers between      q, o                     (n - p) 2 d_model (heads d_head)
                        k, v                     (n - p) 2 d_model (kv_heads d_head)
                        attention                sum over rows r >= p of (r + 1), times 2 heads d_head
                        MLP                      (n - p) 3 d_model d_mlp
    last layer          k, v of n - p rows; q, o, MLP and attention of the asked row alone
    unembedding         d_model for each of the two answers

An edit at the last layer counts where the asked row is patched, and is nothing elsewhere. The recorded run is work that
all plans share and is counted once, apart: all layers, all rows, of the last layer keys and values and the asked row.
Norms, rotations, softmax and the towers are left out.

`bare_seconds` runs these products and nothing else, all plans of a layer stacked as one product (beyond 4,096 rows, one
such piece is timed and multiplied), attention by the faster of PyTorch's fused kernel and plain products with softmax,
without masks. The share of the bound that a sweep reaches is bare seconds over the sweep's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from av_lens.lab.replay_benchmark.timing import Stopwatch

PIECE = 4096  # rows of a product that is timed; larger ones are made of such pieces


@dataclass(frozen=True)
class Block:
    """What one layer computes for all plans of a sweep together.

    Attributes:
        keyed: rows whose keys and values are projected, over all plans.
        asked: rows whose queries, attention and write are computed, over all plans.
        fed: rows that pass the MLP.
        edited: rows of one head's write, in the layer that is edited.
        plans: plans that run this layer whole.
        own: new rows of each of these plans.
        queries: rows of each of these plans that attend.
        prefix: recorded rows before them.
    """

    keyed: int
    asked: int
    fed: int
    edited: int
    plans: int
    own: int
    queries: int
    prefix: int

    @property
    def attended(self) -> int:
        """Pairs of query and key for each plan: the last `queries` rows, each seeing the rows up to itself."""
        last = self.prefix + self.own
        return sum(range(last - self.queries + 1, last + 1))


def sweep_blocks(heads: Sequence[tuple[int, int]], rows: Sequence[int], *, n_layers: int, n: int) -> list[Block]:
    """Count what each layer computes for a sweep of single heads, a plan each, at one set of rows of `n`."""
    first, last = rows[0], n_layers - 1
    made: list[Block] = []
    for layer in range(n_layers):
        before, here = sum(at < layer for at, _ in heads), sum(at == layer for at, _ in heads)
        new = n - first
        queries = 1 if layer == last else new
        touched = here * (len(rows) if layer < last else int(rows[-1] == n - 1))
        asked = before * queries
        made.append(Block(before * new, asked, asked + touched, touched, before, new, queries, first))
    return made


def run_blocks(*, n_layers: int, n: int) -> list[Block]:
    """Count what each layer computes for the recorded run; of the last one only keys, values and the asked row."""
    whole = Block(n, n, n, 0, 1, n, n, 0)
    return [whole] * (n_layers - 1) + [Block(n, 1, 1, 0, 1, n, 1, 0)]


def flops(blocks: Sequence[Block], spec: Any) -> int:
    """Count floating-point operations, a multiply-add being two."""
    queries, keys = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
    total = 0
    for block in blocks:
        total += block.asked * 2 * spec.d_model * queries + block.keyed * 2 * spec.d_model * keys
        total += block.fed * 3 * spec.d_model * spec.d_mlp + block.edited * spec.d_head * spec.d_model
        total += block.plans * block.attended * 2 * queries
    return 2 * total


def unembedding_flops(plans: int, spec: Any, *, answers: int = 2) -> int:
    """Count the operations of reading the logits of a few answers at one position, for each plan."""
    return 2 * plans * answers * spec.d_model


def bare_seconds(blocks: Sequence[Block], spec: Any, dtype: torch.dtype, watch: Stopwatch) -> dict[str, float]:
    """Time the bare products of these row counts, one after another, on this machine: of "products" and "attention".

    Sizes that the watch knows are not timed again.
    """
    timer = _Timer(dtype, watch)
    queries, keys = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
    products = attention = 0.0
    for block in blocks:
        sizes = [(block.asked, spec.d_model, queries), (block.asked, queries, spec.d_model)]
        sizes += 2 * [(block.keyed, spec.d_model, keys)] + 2 * [(block.fed, spec.d_model, spec.d_mlp)]
        sizes += [(block.fed, spec.d_mlp, spec.d_model), (block.edited, spec.d_head, spec.d_model)]
        products += sum(timer.product(*size) for size in sizes)
        attention += timer.attention(block, spec)
    return {"products": products, "attention": attention}


class _Timer:
    """Times bare operations."""

    def __init__(self, dtype: torch.dtype, watch: Stopwatch) -> None:
        self.dtype, self.watch = dtype, watch

    def product(self, rows: int, inner: int, outer: int) -> float:
        """Seconds of `[rows, inner] @ [inner, outer]`, the weight stored as a layer stores it."""
        if not rows:
            return 0.0
        timed, factor = min(rows, PIECE), max(1.0, rows / PIECE)

        def make() -> Callable[[], Any]:
            left, weight = self._made(timed, inner), self._made(outer, inner)
            return lambda: functional.linear(left, weight)

        return factor * self.watch.known(("product", timed, inner, outer), make)

    def attention(self, block: Block, spec: Any) -> float:
        """Seconds of the attention of a block's plans: on the recorded rows, shared, and on each plan's own."""
        if not block.plans:
            return 0.0
        plans = min(block.plans, max(1, PIECE // block.queries))
        group, width = spec.n_heads // spec.n_kv_heads, spec.d_head
        best = 0.0
        if block.prefix:
            shape = (1, spec.n_kv_heads, group * plans * block.queries, width, block.prefix)
            best += min(self.watch.known((way, *shape), self._maker(way, shape)) for way in ("fused", "plain"))
        shape = (plans, spec.n_kv_heads, group * block.queries, width, block.own)
        ways = ("fused", "plain") if block.queries == 1 else ("fused", "plain", "causal")
        best += min(self.watch.known((way, *shape), self._maker(way, shape, group)) for way in ways)
        return best * block.plans / plans

    def _maker(self, way: str, shape: tuple[int, ...], group: int = 1) -> Callable[[], Callable[[], Any]]:
        plans, heads, rows, width, n_keys = shape

        def make() -> Callable[[], Any]:
            if way == "causal":
                q, k, v = (
                    self._made(plans, h, rows // group, width) for h in (heads * group, heads, heads)
                )  # every query head with its key-value head
                return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            q, k, v = (self._made(plans, heads, n, width) for n in (rows, n_keys, n_keys))
            if way == "fused":
                return lambda: functional.scaled_dot_product_attention(q, k, v)
            return lambda: torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v

        return make

    def _made(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(shape, generator=generator).to(self.dtype)
