"""Conversation → token ids and loss weights, proved row by row against what inference will send."""
