"""Checks of a set-up before compute is spent: each takes the parts it looks at and returns one `Finding`."""
