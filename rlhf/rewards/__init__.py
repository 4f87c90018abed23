"""Anything that scores an answer: rules, learned models, and how scores become per-token rewards."""
