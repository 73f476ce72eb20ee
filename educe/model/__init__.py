"""Models: find, describe, load, adapt, prove, export."""
