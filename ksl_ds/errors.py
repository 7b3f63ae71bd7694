"""The exceptions that end a run with one line, never with a traceback."""


class UserError(ValueError):
    """A mistake in a recipe, a file or a command line. The message says what is wrong, where, and what to do."""


class MistakeOfThisRank(UserError):
    """A mistake that concerns this rank only, such as one in its environment. Each rank prints its own."""


class Interrupted(Exception):
    """The run was stopped by a signal and has saved a checkpoint. The message says how to resume."""


class LostRanks(RuntimeError):
    """Peer ranks are unreachable; no further collectives are possible, so each rank prints its own message."""
