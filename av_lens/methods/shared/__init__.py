"""What several methods and the isolation share: places and axes, examples, flows by role, matched cuts."""
