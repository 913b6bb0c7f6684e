"""A model in memory at any α, what it answers, and how good that is."""
