"""Answers in the forms that the judges read, where they come from, and how two files of them compare."""
