"""What did the user type? Arguments, verbs, exit codes."""
