"""Anything that makes a trajectory: batched sampling, the record of what was sampled, the cache of answers."""
