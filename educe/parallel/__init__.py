"""Ranks: who computes what, and what they add up."""
