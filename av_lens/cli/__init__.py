"""The command line, `av-lens`: nothing heavy is imported before a command needs it."""
