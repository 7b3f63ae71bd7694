"""Starts Python programs without the seconds that importing torch, DeepSpeed and transformers takes each time.

One process a test session imports them once (`serve`). `Warm.command` turns a command into one whose program runs in a
fork of that process: the same code in a process of its own, with its own arguments, environment, working directory, output
and exit code. Python programs that it starts through `sys.executable`, as the deepspeed launcher starts its ranks, run the
same way. The process that was started stands for the fork: it passes signals on, ends with its exit code, and when it is
killed the fork is killed too.

Not for tests that are about processes themselves, imports or environment variables that libraries read when imported:
commands that `Warm.command` does not know start as ever.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

PRELOADED = (
    "torch", "deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "transformers", "peft", "scipy.stats",
    "sacrebleu", "wandb", "wandb.sdk.data_types._private", "matplotlib.figure", "pydantic", "rich.table", "yaml", "pandas",
    "datasets", "safetensors.torch",
    "psutil", "jinja2", "markupsafe", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
    "transformers.generation", "accelerate",
)  # fmt: skip
# Of the environment, what libraries read when they are imported: a program with other values starts cold.
READ_AT_IMPORT = ("DS_", "HF_", "TRANSFORMERS_", "TORCH", "CUDA", "OMP_", "MKL_", "PYTHON", "LD_", "XDG_")
# PYTHON is of launch/*.sh; CUDA_VISIBLE_DEVICES is set for ranks, and there is no GPU to see.
MAY_DIFFER = ("PYTHON", "PYTHONPATH", "CUDA_VISIBLE_DEVICES")
# argv of the client: the socket, then the arguments of python. Isolated and without site: it starts in 15 ms.
CLIENT = """#!{python} -SE
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = json.dumps({{"words": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}}).encode()
files = [0, 1, 2, *(os.open("/proc/self/ns/" + kind, os.O_RDONLY) for kind in ("net", "mnt"))]
server.sendmsg(
    [len(request).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files).tobytes())]
)
server.sendall(request)
pid = int.from_bytes(server.recv(8, socket.MSG_WAITALL), "big")
if pid == 0:
    os.execve({python!r}, [{python!r}, *sys.argv[1:]], os.environ)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
for number in (0, 1, 2):
    os.close(number)
status = server.recv(8, socket.MSG_WAITALL)
code = int.from_bytes(status, "big", signed=True) if status else 1
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class Warm:
    """The serving process of a test session, started when first needed."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def python(self, environment: dict[str, str]) -> str:
        """An executable that takes python's arguments."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="ksl-ds-warm-")
            address = f"{self._folder.name}/socket"
            client = Path(self._folder.name) / "python"
            client.write_text(CLIENT.format(python=sys.executable, address=address))
            client.chmod(0o755)
            ready, told = os.pipe()
            server = subprocess.Popen(
                [sys.executable, __file__, address, str(client), str(told)],
                env=environment,
                pass_fds=[told],
                stdin=subprocess.PIPE,  # it ends when this process does, however that ends
            )
            os.close(told)
            atexit.register(server.kill)
            with os.fdopen(ready) as pipe:
                if not pipe.read():
                    raise RuntimeError("the process that starts programs warm has died")
        return f"{self._folder.name}/python"

    def command(self, words: list[str], environment: dict[str, str]) -> list[str]:
        """The command as one that starts warm, where it is one of ours."""
        if words[0] == "deepspeed":
            return [self.python(environment), "-m", "deepspeed.launcher.runner", *words[1:]]
        if words[0] == "ksl-ds":
            return [self.python(environment), "-m", "ksl_ds", *words[1:]]
        return words


def serve(address: str, client: str, told: int) -> list[str]:
    """Forks a process for every request until the test session ends. Returns in the forks, with their arguments."""
    imported_with = dict(os.environ)
    for name in PRELOADED:
        importlib.import_module(name)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast  # noqa: F401  (lazy until named)

    gc.collect()
    gc.freeze()  # what is imported is not searched in each of the forks' collections: half of a tiny run's time
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    os.write(told, b"ready")
    os.close(told)
    children: dict[int, socket.socket] = {}
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    while True:
        readable, _, _ = select.select([0, wake, listener, *children.values()], [], [])
        if 0 in readable:
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            os._exit(0)
        if wake in readable:
            os.read(wake, 4096)
            for pid in list(children):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    waiting = children.pop(pid)
                    with contextlib.suppress(OSError):
                        waiting.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "big", signed=True))
                    waiting.close()
        for pid, waiting in children.items():
            if waiting in readable:  # the client is gone
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if listener in readable:
            waiting, _ = listener.accept()
            request, streams = receive(waiting)
            if request is None:
                waiting.close()
                continue
            words = request["words"]
            if program_of(words) is None or read_at_import(request["env"]) != read_at_import(imported_with):
                waiting.sendall((0).to_bytes(8, "big"))
                waiting.close()
                for stream in streams:
                    os.close(stream)
                continue
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (listener, waiting, *children.values()):
                    other.close()
                os.close(wake)
                os.close(woken)
                become(request, streams, client)
                return words
            for stream in streams:
                os.close(stream)
            children[pid] = waiting
            with contextlib.suppress(OSError):
                waiting.sendall(pid.to_bytes(8, "big"))


def receive(waiting: socket.socket) -> tuple[dict | None, list[int]]:
    streams = array.array("i")
    head, ancillary, *_ = waiting.recvmsg(8, socket.CMSG_SPACE(5 * streams.itemsize))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            streams.frombytes(data)
    if len(head) < 8:
        return None, list(streams)
    content = waiting.recv(int.from_bytes(head, "big"), socket.MSG_WAITALL)
    return json.loads(content), list(streams)


def read_at_import(environment: dict[str, str]) -> dict[str, str]:
    """The variables that libraries have read already when a program starts."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_AT_IMPORT) and name not in MAY_DIFFER and not name.startswith("TORCHELASTIC")
    }


def program_of(words: list[str]) -> list[str] | None:
    """The words from `-m` or the script on; None where python gets other options."""
    rest = words[1:] if words[:1] == ["-u"] else words
    return rest if rest and (rest[0] == "-m" or not rest[0].startswith("-")) else None


def become(request: dict, streams: list[int], client: str) -> None:
    """Makes a fork the program that was asked for, but for running it."""
    enter_namespaces(streams[3:])
    for number, stream in enumerate(streams[:3]):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    # wandb makes a folder for pictures when it is imported, which the first fork to end would remove for all.
    pictures = sys.modules["wandb.sdk.data_types._private"].MEDIA_TMP
    pictures._finalizer.detach()
    pictures.__init__("wandb-media")
    sys.executable = client
    first = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [*first, *(path for path in sys.path[1:] if path not in first)]
    for name in ("stdin", "stdout", "stderr"):
        stream = open(("stdin", "stdout", "stderr").index(name), "r" if name == "stdin" else "w", closefd=False)  # noqa: SIM115
        if name != "stdin":
            stream.reconfigure(line_buffering=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def enter_namespaces(files: list[int]) -> None:
    """Enters the network and mount namespaces of a client that is in others: a host of helpers/hosts.py."""
    for file, kind in zip(files, ("net", "mnt"), strict=True):
        if os.fstat(file).st_ino != os.stat(f"/proc/self/ns/{kind}").st_ino and ctypes.CDLL(None).setns(file, 0) != 0:
            raise RuntimeError(f"a fork could not enter a {kind} namespace")
        os.close(file)


def run_program(program: list[str]) -> int:
    """Runs it as python would; returns the exit code."""
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            sys.path.insert(0, os.getcwd())
            sys.modules.pop(program[1], None)  # imported already, and run a second time as __main__
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            sys.path.insert(0, os.path.dirname(os.path.abspath(program[0])))
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


def main() -> None:
    address, client, told = sys.argv[1:]
    words = serve(address, client, int(told))
    code = run_program(program_of(words) or [])
    # What python does at its end, without freeing a large heap object by object.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
