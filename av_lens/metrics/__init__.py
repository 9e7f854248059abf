"""What a run says, as one number for each example: answers, the forms they are said in, and their scores."""

from av_lens.metrics.forms import each
from av_lens.metrics.metric import (
    Metric,
    as_metric,
    kl,
    log_prob,
    logit,
    logit_diff,
    measure,
    prob,
    rank,
    require_numbers,
)

__all__ = [
    "Metric",
    "as_metric",
    "each",
    "kl",
    "log_prob",
    "logit",
    "logit_diff",
    "measure",
    "prob",
    "rank",
    "require_numbers",
]
