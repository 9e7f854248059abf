"""One file per model family, each saying only what that family does differently."""
