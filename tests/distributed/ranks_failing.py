"""Run by test_failing.py: a command, in which the ranks of FAILING meet an error in training that nobody foresaw."""

import os
import sys

from ksl_ds import cli
from ksl_ds.training import loop


def fail(*_):
    raise ZeroDivisionError("nobody foresaw this")


if os.environ["RANK"] in os.environ["FAILING"].split():
    loop.train_step = fail
sys.exit(cli.main())
