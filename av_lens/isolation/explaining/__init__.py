"""Fourth floor: by what mechanism and road, for larger units, under other choices, and as a repair."""
