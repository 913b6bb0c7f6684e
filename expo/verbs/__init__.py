"""What a user can ask for: one file a verb, called by the Python door and by the command line."""
