"""Judged by a model: prompts out, verdicts in, scores from verdicts. Pure functions, and one that asks a `Sampler`."""
