"""The command line: `ksl-ds COMMAND [RECIPE.yaml] [key=value ...]`, in one process or under a launcher.

`COMMANDS` is the grammar. argparse makes usage, help and errors from it; the commands receive objects and parse nothing.
torch is imported when a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import signal
import sys
import textwrap
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TextIO

from ksl_ds import __version__
from ksl_ds.errors import Interrupted, LostRanks, MistakeOfThisRank, UserError, one_line

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Option:
    """An argument of a command that is not a recipe key; `name` and `settings` are argparse's."""

    name: str
    help: str
    metavar: str
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Command:
    """One command. `main` of ksl_ds/commands/`name`.py runs it with an object of the class `schema`.

    Attributes
    ----------
    name : str
        The word on the command line.
    help : str
        What the command does, in one line.
    usage : str
        What follows the command's name.
    schema : str or None
        The class of `ksl_ds.config.schema` whose keys the command takes; None where it takes options only, which `main`
        gets by name.
    first : str
        The key that a first word without `=` stands for; "" where that word is a recipe file.
    options : tuple of Option
        What the command takes besides keys.
    """

    name: str
    help: str
    usage: str
    schema: str | None
    first: str = ""
    options: tuple[Option, ...] = ()


RECIPE_USAGE = "RECIPE.yaml [key=value ...]"
COMMANDS = {
    command.name: command
    for command in (
        Command(
            "lottery",
            "the whole method: embed tuning, draw, partial tuning, evaluation, report",
            RECIPE_USAGE,
            "Recipe",
        ),
        Command("tune", "one training run: method=embed, full, ticket, lora or prefix", RECIPE_USAGE, "Recipe"),
        Command(
            "draw",
            "the KS test of two checkpoints of one model",
            "before=DIR after=DIR out=DIR [key=value ...]",
            "DrawCommand",
        ),
        Command(
            "scan",
            "where fine-tuning moved the model: the KS test of every matrix of two checkpoints",
            "before=DIR after=DIR out=DIR [alpha=.05] [rows=output|input]",
            "ScanCommand",
        ),
        Command("transfer", "write a model with a ticket's rows", "base=DIR ticket=DIR out=DIR", "TransferCommand"),
        Command("evaluate", "translate held-out text and score it", RECIPE_USAGE, "Recipe"),
        Command(
            "compare",
            "KS tickets beside their controls and other methods: table, tests, plots",
            f"{RECIPE_USAGE} | --from RESULTS.json",
            "Recipe",
            options=(
                Option(
                    "--from",
                    "only print the comparison that a results.json holds",
                    "RESULTS.json",
                    (("dest", "results"), ("type", Path)),
                ),
            ),
        ),
        Command(
            "multilingual",
            "tickets of several directions: overlaps, and transfer to each other",
            RECIPE_USAGE,
            "Recipe",
        ),
        Command(
            "certify",
            "how far a ticket's model agrees with the embed-tuned one: certificate and measurement",
            "RECIPE.yaml reference=DIR [ticket=DIR] [key=value ...]",
            "Recipe",
        ),
        Command(
            "estimate",
            "memory, traffic and time of a run before paying for it",
            "MODEL gpus=N gpu_memory=GIB [key=value ...]",
            "EstimateCommand",
            first="model",
        ),
        Command("check", "is everything that a run needs in place on every host", RECIPE_USAGE, "Recipe"),
        Command(
            "inspect",
            "look at tickets, and at what they share",
            "TICKET ... [--published DIRECTION] [--limit N] [--report FILE.html]",
            None,
            options=(
                Option("tickets", "ticket folders; of several, what they share", "TICKET", (("nargs", "+"),)),
                Option("--published", "compare with a published LLaMA ticket: en-ca, en-es, ..., or all", "DIRECTION"),
                Option("--limit", "show at most N tokens, those of largest D", "N", (("type", int),)),
                Option("--report", "write what the tickets share as a page", "FILE.html", (("type", Path),)),
            ),
        ),
    )
}


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are UserErrors and whose help lists the keys of a command's schema."""

    schema: str | None = None

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def format_help(self) -> str:
        return super().format_help() + (_keys_help(self.schema) if self.schema else "")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ksl-ds",
        usage="ksl-ds COMMAND [RECIPE.yaml] [key=value ...]\n"
        "       deepspeed [launcher options] --module ksl_ds COMMAND [RECIPE.yaml] [key=value ...]",
        description="Find the few embedding rows that carry a fine-tuning (KS-Lottery), train only those.",
        epilog="ksl-ds COMMAND --help lists every key with its default.",
        formatter_class=_wide,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ksl_ds {__version__}")
    shtab: Any = None
    with suppress(ImportError):  # the optional extra `completion`
        shtab = importlib.import_module("shtab")
        shtab.add_argument_to(parser)
    commands = parser.add_subparsers(prog="ksl-ds", dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS.values():
        of_command: _Parser = commands.add_parser(
            command.name,
            usage=f"ksl-ds {command.name} {command.usage}",
            help=command.help,
            description=f"ksl-ds {command.name}: {command.help}",
            formatter_class=_wide,
            allow_abbrev=False,
        )
        of_command.schema = command.schema
        if command.schema is not None:
            words = of_command.add_argument("words", nargs="*", metavar="key=value", help=argparse.SUPPRESS)
            if shtab:
                words.complete = shtab.FILE  # type: ignore[attr-defined]
        for option in command.options:
            of_command.add_argument(option.name, help=option.help, metavar=option.metavar, **dict(option.settings))
    return parser


def _wide(prog: str) -> argparse.HelpFormatter:
    return argparse.HelpFormatter(prog, max_help_position=18, width=110)


def _keys_help(schema: str) -> str:
    from ksl_ds.config import load
    from ksl_ds.config import schema as schemas

    lines = ["", "keys (default):"]
    for name, (default, text) in load.dotted_keys(getattr(schemas, schema)).items():
        shown = {"???": "required", "None": "empty", "[]": "empty"}.get(str(default), default)
        lines += [f"  {name} ({shown})", *textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Returns
    -------
    int
        The exit code: 0 for success, 2 for a user's mistake, 1 for an unexpected error, 130 after Ctrl-C, 143 after
        SIGTERM or SIGUSR1. A rank that has lost the others exits with 3.
    """
    _protect_output()
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if not word.startswith("--local_rank")]
    if words[:1] in ([], ["help"]):
        words = ["--help"]
    command = words[0]
    recipe = None
    try:
        try:
            options = vars(_parser().parse_args(words))
        except SystemExit:  # --help and the like; mistakes are UserErrors
            return 0
        command = options.pop("command")
        options.pop("print_completion", None)  # shtab
        from ksl_ds import log

        with log.messages_on_stderr():
            run_command, recipe = _prepare(COMMANDS[command], options)
            run_command()
    except MistakeOfThisRank as error:
        print(f"ksl-ds: {one_line(str(error))}", file=sys.stderr, flush=True)
        return 2
    except UserError as error:
        _print_error(str(error))
        return _exit_code(2)
    except Interrupted as error:
        _print_error(str(error))
        return _exit_code(128 + signal.SIGTERM)
    except LostRanks as error:
        # Not by sys.exit: pending collectives would keep the interpreter waiting for the lost ranks.
        print(f"ksl-ds: {error}", file=sys.stderr, flush=True)
        os._exit(3)
    except KeyboardInterrupt:
        _print_error("interrupted")
        return _exit_code(128 + signal.SIGINT)
    except Exception as error:
        from ksl_ds import failure

        run_dir = getattr(recipe, "run_dir", None)
        verbose = recipe.verbose if recipe else "verbose=true" in words
        failure.report(error, command, Path(run_dir) if run_dir else None, _JOB.get("id"), verbose)
        return _exit_code(1)
    return 0


_JOB: dict[str, str] = {}  # the id that all ranks of this job share, once they have met


def _exit_code(code: int) -> int:
    """Returns the code on a single rank; among several it exits at once.

    The end of Python could wait for the others, or abort in the threads of the process group, which only `shutdown` ends.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        os._exit(code)
    return code


def _prepare(command: Command, options: dict[str, Any]) -> tuple[Callable[[], None], Any]:
    """The function that runs the command, and its recipe where it has one."""
    module = f"ksl_ds.commands.{command.name}"
    if command.schema is None:
        return lambda: importlib.import_module(module).main(**options), None
    words = options["words"]
    results = options.get("results")
    if results is not None:
        if words:
            raise UserError("compare --from takes the results.json of one comparison and nothing else")
        return lambda: importlib.import_module(module).show(results), None
    from ksl_ds.config import load
    from ksl_ds.config import schema as schemas

    file = words.pop(0) if words and "=" not in words[0] else None
    if file is not None and command.first:
        words = [f"{command.first}={file}", *words]
        file = None
    recipe = load.load_recipe(getattr(schemas, command.schema), file, words)
    return lambda: _on_ranks(command.name, recipe, file), recipe


def _on_ranks(command: str, recipe: Any, file: str | None) -> None:
    # Each rank is a process: threads of tokenizers would only compete, and warn about forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from ksl_ds import distributed
    from ksl_ds.sharding.engine import set_library_verbosity

    timeout = timedelta(minutes=getattr(recipe, "timeout_minutes", 30.0))
    with distributed.name_lost_ranks(timeout):
        distributed.initialize(timeout)
        _JOB["id"] = distributed.broadcast_from_rank0(uuid.uuid4().hex)
        set_library_verbosity(recipe.verbose)
        if recipe.verbose:
            logging.getLogger("ksl_ds").setLevel(logging.DEBUG)
        _log_shipped_file(file or getattr(recipe, "model", None), "recipes")
        _log_shipped_file(getattr(recipe, "deepspeed", None), "ds_configs")
        importlib.import_module(f"ksl_ds.commands.{command}").main(recipe)
        distributed.shutdown()


def _log_shipped_file(name: object, folder: str) -> None:
    from ksl_ds.config.load import shipped_file

    if isinstance(name, str) and (path := shipped_file(name, folder)) != Path(name):
        logger.info(f"{name} is the file that comes with ksl_ds, {path}")


class _UnbreakableFile(io.FileIO):
    """Discards output after EPIPE or ENOSPC."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def _protect_output() -> None:
    """Keeps a run alive when its terminal or ssh connection closes; pdsh closes it before the ranks have saved."""
    # A closed standard stream would give its number to the next file opened, and libraries' output would go there.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = _ignore_broken_pipe(sys.stdout)
    sys.stderr = _ignore_broken_pipe(sys.stderr)


def _ignore_broken_pipe(stream: TextIO | None) -> TextIO:
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    try:
        raw = _UnbreakableFile(stream.fileno(), "w", closefd=False)
    except OSError:  # no file, as under a test
        return stream
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True)


def _print_error(message: str) -> None:
    """Prints one line on rank 0, as every rank has the same error."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ksl-ds: {one_line(message)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
