"""Checks that everything a run needs is in place on every host."""
