"""First floor: conflicts, cells and donors, and what edits of heads do to hearing."""
