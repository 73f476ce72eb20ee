"""Bytes → conversations: sources, formats, held-out splits."""
