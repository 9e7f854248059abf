"""Replay beside its peers: speed, memory and arithmetic."""
