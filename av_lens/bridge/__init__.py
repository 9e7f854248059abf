"""Weights become a TransformerBridge whose every hook is real: readable, writable and differentiable."""
