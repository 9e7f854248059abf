"""Captions under a plan, and who judges them."""
