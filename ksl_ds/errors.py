"""The exceptions that are shown as one line, never as a traceback."""


class UserError(ValueError):
    """A mistake in a recipe, a file or a command line. The message says what is wrong, where, and what to do."""


class LostRanks(RuntimeError):
    """Other ranks of the job do not answer. Each rank that notices says so for itself: there is no talking any more."""
