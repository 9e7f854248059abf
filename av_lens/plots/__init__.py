"""Results as figures: plotly, no model, no global template.

`heads`, `layers`, `spans`, `behaviour`, `release`, `confirmation`, `knowledge`, `attribution`, `circuit`, `changes` and
`conditions` return plotly figures that carry the numbers they draw; `attention_patterns` returns a circuitsvis view
that works offline. Not measured is hatched or left out, never zero.
"""

from av_lens.colours import THEMES as THEMES
from av_lens.plots.bars import attribution as attribution
from av_lens.plots.bars import behaviour as behaviour
from av_lens.plots.bars import conditions as conditions
from av_lens.plots.bars import release as release
from av_lens.plots.circuit_graph import circuit as circuit
from av_lens.plots.comparisons import changes as changes
from av_lens.plots.curves import confirmation as confirmation
from av_lens.plots.curves import knowledge as knowledge
from av_lens.plots.curves import layers as layers
from av_lens.plots.maps import attention_patterns as attention_patterns
from av_lens.plots.maps import heads as heads
from av_lens.plots.maps import spans as spans
