"""Which α is worth publishing: candidates are tried on prompts, raced, and judged on others."""
