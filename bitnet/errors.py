"""The one exception for input that cannot be used.

Everything a user can get wrong (a key, a path, a file, a shape, a combination) raises :class:`InputError` at the place
where the value is used. ``train.py`` prints it as one line, without a traceback, and exits with status 1; from
Python it is an ordinary ``ValueError``.
"""


class InputError(ValueError):
    """Input that cannot be used: the message says what was expected, what came, and what to do."""
