"""Messages and warnings: where they go, on which rank, and that a library prints nothing."""

from __future__ import annotations

import logging
import subprocess
import sys

from tqdm import tqdm

from ksl_ds import cli
from ksl_ds.log import LOGGER, messages_on_stderr

logger = logging.getLogger("ksl_ds.test")


def test_warnings_can_be_told_from_messages(capsys):
    with messages_on_stderr():
        logger.info("loading")
        logger.warning("no wandb")
        logger.debug("not shown")
        LOGGER.setLevel(logging.DEBUG)
        logger.debug("shown")
    assert capsys.readouterr() == ("", "loading\nwarning: no wandb\ndebug: shown\n")


def test_other_ranks_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with messages_on_stderr():
        logger.warning("no wandb")
    assert capsys.readouterr() == ("", "")


def test_the_command_line_leaves_the_logger_as_it_was():
    before = (list(LOGGER.handlers), LOGGER.level, LOGGER.propagate)
    assert cli.main(["inspect", "nowhere"]) == 2
    assert (LOGGER.handlers, LOGGER.level, LOGGER.propagate) == before


def test_a_message_leaves_a_progress_bar_whole(capsys):
    with messages_on_stderr(), tqdm(total=2, file=sys.stderr, desc="steps", mininterval=0) as bar:
        bar.update()
        logger.info("loading")
        bar.update()
    written = capsys.readouterr().err
    assert "\rloading\n" in written and written.rstrip().split("\r")[-1].startswith("steps: 100%")


def test_a_library_prints_nothing():
    code = "import logging, ksl_ds; logging.getLogger('ksl_ds.training').warning('no wandb')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""
