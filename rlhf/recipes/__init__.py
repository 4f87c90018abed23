"""The order of events: one file per method, read from top to bottom."""
