"""The one exception that is meant to be read by the person who typed the command."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what was asked for, told in one sentence: what was got, what was expected, how to mend it.

    The command line prints the sentence without a traceback and exits with code 2.
    """
