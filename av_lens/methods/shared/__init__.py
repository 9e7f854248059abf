"""What several methods and the isolation share: the frame, places and axes, examples, flows by role, matched cuts."""
