"""The command line: one file a verb, no logic. Data to stdout, talk to stderr."""
