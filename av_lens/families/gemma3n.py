"""Gemma 3n has no one residual stream, so that no hook here could say what it stands for: it is refused.

Its decoder carries four streams (AltUp; Baykal et al., 2023). Before a layer, each is mixed anew with the others, by
weights that depend on the token; the layer's attention and MLP read the first of the four alone; what they made of it
is then added to all four, each scaled by its own token-dependent weight, and the layer's own embedding to the last
three. So nothing that is called a write here (a head's, an MLP's) is added to a stream that stays: `resid_post` of a
layer is not `resid_pre` of the next, and no decomposition, path or direct share is defined.
"""

CANNOT_OPEN = dict.fromkeys(
    ("Gemma3nForConditionalGeneration", "gemma3n"),
    "Gemma 3n cannot be opened: its layers carry four streams that are mixed anew before each (AltUp), so that there "
    "is no residual stream to hook, patch or decompose (docs/families.md). Gemma 4 has one, and opens.",
)
"""Why what is known by these names is no family."""
