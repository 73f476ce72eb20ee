"""Lengths → plan → batches: which examples make a step, and how they share rows. Pure numpy."""
