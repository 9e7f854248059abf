"""Above which share of G is an effect large? The threshold s where nobody gave one.

.10 for organisms; for other models .03, or, if larger, the 99th percentile over heads of the largest of the three
releases with base and donor cells asked `control` (the same answers, a question about neither), over G: what the same
edits do to a question that has nothing to do with hearing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from av_lens.isolation.measuring.bench import Chunk
from av_lens.isolation.measuring.donors import MEANS, PRIMARY_DONORS
from av_lens.isolation.measuring.effects import measure_requests
from av_lens.isolation.measuring.estimands import Request
from av_lens.isolation.naming.role_tests import head_means

PERCENTILE = 99


def null_share(
    chunks: Sequence[Chunk], examples: Int[np.ndarray, " example"], hearing: Float[np.ndarray, " example"]
) -> float:
    """Measure how much the releases of most heads reach under `control`, as a share of G."""
    donors = [donor for donor in PRIMARY_DONORS if donor not in MEANS or chunks[0].means is not None]
    wanted = [Request("va", donor, question="control") for donor in donors]
    stage = f"the same edits under the control question, {chunks[0].site}"
    heads = chunks[0].bench.engine.heads
    found = measure_requests(chunks, wanted, heads=heads, examples=examples, stage=stage)
    largest = np.fmax.reduce([head_means(found[request].margin) for request in wanted])
    return float(np.percentile(largest, PERCENTILE) / hearing.mean())
