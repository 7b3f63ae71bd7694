"""The exceptions that end a run with one line, never with a traceback."""


class UserError(ValueError):
    """A mistake in a recipe, a file or a command line. The message says what is wrong, where, and what to do."""


class MistakeOfThisRank(UserError):
    """A mistake that the other ranks need not know, such as in this process's environment. Each rank says it for itself."""


class Interrupted(Exception):
    """The run was asked to end, has saved what it needs to go on, and ends. The message says how to go on."""


class LostRanks(RuntimeError):
    """Other ranks of the job do not answer. Each rank that notices says so for itself: there is no talking any more."""
