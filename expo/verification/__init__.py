"""Checks of a model directory: structure, tensors, configuration, tokenizer, template, generation."""
