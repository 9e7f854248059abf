"""Results as figures: plotly, no model, no global template.

`heads`, `layers`, `spans`, `behaviour`, `release`, `confirmation`, `knowledge`, `attribution`, `circuit` and
`conditions` return plotly figures that carry the numbers they draw; `attention_patterns` returns a circuitsvis view
that works offline. Not measured is hatched or left out, never zero.
"""

from av_lens.colours import THEMES as THEMES
from av_lens.plots.attribution_bars import attribution as attribution
from av_lens.plots.behaviour_bars import behaviour as behaviour
from av_lens.plots.circuit_graph import circuit as circuit
from av_lens.plots.condition_dots import conditions as conditions
from av_lens.plots.confirmation_curves import confirmation as confirmation
from av_lens.plots.head_maps import heads as heads
from av_lens.plots.knowledge_curves import knowledge as knowledge
from av_lens.plots.layer_curves import layers as layers
from av_lens.plots.patterns import attention_patterns as attention_patterns
from av_lens.plots.release_dots import release as release
from av_lens.plots.span_strips import spans as spans
