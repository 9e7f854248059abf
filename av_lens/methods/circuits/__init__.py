"""From scores to a circuit: scores, rankings, runs of circuits, and their checks."""
