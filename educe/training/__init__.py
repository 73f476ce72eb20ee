"""The loop and its state. Never sees text, templates or data files: it is given batches, a loss and hooks."""
