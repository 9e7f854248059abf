"""bridge/adapters."""
