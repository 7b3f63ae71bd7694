"""The one exception that means "the user must change something": shown as one line, never as a traceback."""


class UserError(ValueError):
    """A mistake in a recipe, a file or a command line. The message says what is wrong, where, and what to do."""
