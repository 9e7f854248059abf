"""Every method on every planted model."""
