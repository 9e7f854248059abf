"""Fifth floor: a whole run, its protocol, stages, cost, folder and record."""
