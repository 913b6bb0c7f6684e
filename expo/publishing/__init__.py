"""What a model looks like on the Hub: its licence, its card, its signature."""
