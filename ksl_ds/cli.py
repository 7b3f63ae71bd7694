"""The front door: `ksl-ds COMMAND [RECIPE.yaml] [key=value ...]`, in one process or under a launcher."""

from __future__ import annotations

import importlib
import io
import os
import re
import signal
import sys
import textwrap
import uuid
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from ksl_ds import __version__
from ksl_ds.errors import Interrupted, LostRanks, MistakeOfThisRank, UserError

# command: (what it does, how it is called)
COMMANDS = {
    "lottery": (
        "the whole method: embed tuning, draw, partial tuning, evaluation, report",
        "RECIPE.yaml [key=value ...]",
    ),
    "tune": ("one training run: method=embed, full, ticket, lora or prefix", "RECIPE.yaml [key=value ...]"),
    "draw": ("the KS test of two checkpoints of one model", "before=DIR after=DIR out=DIR [key=value ...]"),
    "transfer": ("write a model with a ticket's rows", "base=DIR ticket=DIR out=DIR"),
    "evaluate": ("translate held-out text and score it", "RECIPE.yaml [key=value ...]"),
    "compare": (
        "KS tickets beside their controls and other methods: table, tests, plots",
        "RECIPE.yaml [key=value ...] | --from RESULTS.json",
    ),
    "certify": (
        "how far a ticket's model agrees with the embed-tuned one: certificate and measurement",
        "RECIPE.yaml reference=DIR [ticket=DIR] [key=value ...]",
    ),
    "estimate": (
        "memory, traffic and time of a run before paying for it",
        "MODEL gpus=N gpu_memory=GIB [key=value ...]",
    ),
    "check": ("is everything that a run needs in place on every host", "RECIPE.yaml [key=value ...]"),
    "inspect": ("look at a ticket, or at what two tickets share", "TICKET [OTHER]"),
}
SCHEMA = {
    "lottery": "Recipe",
    "tune": "Recipe",
    "evaluate": "Recipe",
    "compare": "Recipe",
    "certify": "Recipe",
    "draw": "DrawCommand",
    "transfer": "TransferCommand",
    "estimate": "EstimateCommand",
    "check": "Recipe",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    0 when it worked, 2 after a user's mistake, 1 after an error that nobody foresaw, 130 after Ctrl-C, 143 when SIGTERM or
    SIGUSR1 ended it in order; a rank that has lost the others leaves with 3.
    """
    _protect_output()
    words = [word for word in (sys.argv[1:] if arguments is None else arguments) if not word.startswith("--local_rank")]
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"ksl_ds {__version__}")
        return 0
    command, *rest = words
    if command not in COMMANDS:
        return _fail(f"unknown command {command!r}; there are {', '.join(COMMANDS)}")
    if command != "inspect" and any(word in ("-h", "--help") for word in rest):
        print(_command_help(command))
        return 0
    recipe = None
    try:
        run, recipe = _command(command, rest)
        run()
    except MistakeOfThisRank as error:
        print(f"ksl-ds: {error}", file=sys.stderr, flush=True)
        return 2
    except UserError as error:
        return _fail(str(error))
    except Interrupted as error:
        _fail(str(error))
        return 128 + signal.SIGTERM
    except LostRanks as error:
        # Not by sys.exit: what is left of the collectives would keep the interpreter waiting for the lost ranks.
        print(f"ksl-ds: {error}", file=sys.stderr, flush=True)
        os._exit(3)
    except KeyboardInterrupt:
        _fail("interrupted")
        return _leave(128 + signal.SIGINT)
    except Exception as error:
        from ksl_ds import failure

        run_dir = getattr(recipe, "run_dir", None)
        verbose = recipe.verbose if recipe else "verbose=true" in rest
        failure.report(error, command, Path(run_dir) if run_dir else None, _JOB.get("id"), verbose)
        return _leave(1)
    return 0


_JOB: dict[str, str] = {}  # the id that all ranks of this job share, once they have met


def _leave(code: int) -> int:
    """The exit code, by itself on one rank. Among several the interpreter's end could wait for the others."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        sys.stdout.flush()
        os._exit(code)
    return code


def _command(command: str, words: list[str]) -> tuple[Callable[[], None], Any]:
    """What runs the command, and its recipe where it has one."""
    if command == "inspect":
        return lambda: importlib.import_module("ksl_ds.commands.inspect").run(words), None
    if command == "compare" and words and re.match(r"(--)?from(=|$)", words[0]):
        name, _, results_file = words[0].partition("=")
        files = [results_file] if results_file else words[1:]
        if len(files) != 1:
            raise UserError(f"compare {name} takes the results.json of one comparison")
        return lambda: importlib.import_module("ksl_ds.comparison.results").show_file(Path(files[0])), None
    from ksl_ds.config import load, schema

    if command == "estimate" and words and "=" not in words[0]:
        words = [f"model={words[0]}", *words[1:]]
    file = words[0] if words and "=" not in words[0] else None
    recipe = load.load_recipe(getattr(schema, SCHEMA[command]), file, words[1:] if file else words)
    return lambda: _on_ranks(command, recipe, file), recipe


def _on_ranks(command: str, recipe: Any, file: str | None) -> None:
    # Each rank is a process of its own: tokenizers' threads would only compete, and warn about forks.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from ksl_ds import distributed
    from ksl_ds.sharding.engine import set_library_verbosity

    timeout = timedelta(minutes=getattr(recipe, "timeout_minutes", 30.0))
    with distributed.name_lost_ranks(timeout):
        distributed.initialize(timeout)
        _JOB["id"] = distributed.broadcast_from_rank0(uuid.uuid4().hex)
        set_library_verbosity(recipe.verbose)
        _say_what_is_shipped(file or getattr(recipe, "model", None), "recipes")
        _say_what_is_shipped(getattr(recipe, "deepspeed", None), "ds_configs")
        importlib.import_module(f"ksl_ds.commands.{command}").run(recipe)
        distributed.shutdown()


def _say_what_is_shipped(name: object, folder: str) -> None:
    from ksl_ds import distributed
    from ksl_ds.config.load import shipped_file

    if isinstance(name, str) and (path := shipped_file(name, folder)) != Path(name):
        distributed.say(f"{name} is the file that comes with ksl_ds, {path}")


class _Lasting(io.FileIO):
    """A stream whose reader may leave or whose disk may be full: what is written after that goes nowhere, unsaid."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def _protect_output() -> None:
    """A training goes on without its terminal or its launcher's ssh connection; pdsh cuts that before the ranks have saved."""
    # A standard stream that is closed would be the number of the next file opened, and what libraries print would go there.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdout = _lasting(sys.stdout)
    sys.stderr = _lasting(sys.stderr)


def _lasting(stream: TextIO | None) -> TextIO:
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    try:
        raw = _Lasting(stream.fileno(), "w", closefd=False)
    except OSError:  # no file, as under a test
        return stream
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=stream.encoding, errors=stream.errors, line_buffering=True)


def _fail(message: str) -> int:
    """One line on stderr, from one rank: every rank knows the mistake, and all leave with the same code."""
    if os.environ.get("RANK", "0") == "0":
        print(f"ksl-ds: {message}", file=sys.stderr, flush=True)
    return 2


def _overview() -> str:
    lines = [
        "ksl-ds: find the few embedding rows that carry a fine-tuning (KS-Lottery), train only those.",
        "",
        "usage: ksl-ds COMMAND [RECIPE.yaml] [key=value ...]",
        "       deepspeed [launcher options] --module ksl_ds COMMAND [RECIPE.yaml] [key=value ...]",
        "",
        *(f"  {name:10} {what}" for name, (what, _) in COMMANDS.items()),
        "",
        "ksl-ds COMMAND --help lists every key with its default. ksl-ds --version prints the version.",
    ]
    return "\n".join(lines)


def _command_help(command: str) -> str:
    from ksl_ds.config import load, schema

    what, usage = COMMANDS[command]
    lines = [f"ksl-ds {command}: {what}", "", f"usage: ksl-ds {command} {usage}", "", "keys (default):"]
    for name, (default, text) in load.dotted_keys(getattr(schema, SCHEMA[command])).items():
        shown = "required" if default == "???" else "empty" if default in (None, []) else default
        lines += [f"  {name} ({shown})", *textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
