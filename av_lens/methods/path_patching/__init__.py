"""Path patching: the method, and the runs under it."""
