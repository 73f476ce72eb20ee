"""Prepared examples on disk, memory-mapped."""
