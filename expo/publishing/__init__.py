"""What a model looks like on the Hub, and how it gets there: licence, card, signature, upload, receipt."""
