"""The GPU check: runs every part with a time limit, prints a line for each, leaves gpu_check.json and gpu_check.md.

    python -m gpu_check [OUT] [--rehearse] [--minutes 9] [--only PART ...]

Started by `launch/gpu_check.sh`, which sets the paths.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu_check.parts import REPOSITORY, Context, Part

NEEDED = ("torch", "deepspeed", "transformers", "peft", "datasets", "scipy", "sacrebleu", "pydantic", "yaml", "rich")
START_SECONDS = 90  # of a group's process: imports, and a GPU's first context
REHEARSAL_SLOWNESS = 10  # CPUs may be busy with other work; time limits there only end what hangs
Line = dict[str, Any]  # a part's result


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("gpu_check"), help="folder for the results")
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU; figures mean nothing")
    parser.add_argument(
        "--minutes", type=float, help="parts that do not fit in are left out; default 9, in a rehearsal 60"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="run these parts only")
    options = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return refuse(
            f"these packages are missing: {', '.join(missing)}; install ksl_ds (pip install -e .), or give WHEELS"
        )
    if options.rehearse:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from gpu_check.parts import PARTS, load_parts

    load_parts()
    import torch

    if not options.rehearse and not torch.cuda.is_available():
        return refuse("torch sees no CUDA GPU here; --rehearse runs the same code on the CPU")
    unknown = [name for name in options.only if name not in PARTS]
    if unknown:
        return refuse(f"--only: there is no part {unknown[0]}; there are {', '.join(PARTS)}")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["WANDB_MODE"] = "offline"
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * (options.minutes or (60 if options.rehearse else 9))
    parts = [part for part in PARTS.values() if not options.only or part.name in options.only]
    lines: list[Line] = []
    with tempfile.TemporaryDirectory() as folder:
        context = Context(options.rehearse, Path(folder))
        for group in dict.fromkeys(part.group for part in parts):
            lines += run_group([part for part in parts if part.group == group], context, deadline)
    write(options.out, lines, parts, rehearsed=options.rehearse)
    failed = [line["part"] for line in lines if line["status"] in ("failed", "over time")]
    print(f"{len(lines) - len(failed)} of {len(lines)} parts without a failure; see {options.out / 'gpu_check.md'}")
    return 1 if failed else 0


def refuse(message: str) -> int:
    print(f"gpu_check: {message}", file=sys.stderr)
    return 2


def run_group(parts: list[Part], context: Context, deadline: float) -> list[Line]:
    """Runs the parts of a group in one process; where one fails or hangs, the rest in another."""
    lines: list[Line] = []
    rest = list(parts)
    while rest:
        if time.monotonic() + rest[0].seconds > deadline:
            lines.append(result(rest.pop(0), status="not run", message="no time left"))
            continue
        found = watch(rest, context, deadline)
        lines += found
        rest = rest[len(found) :]
    return lines


def watch(parts: list[Part], context: Context, deadline: float) -> list[Line]:
    """Starts a process for the parts and follows it; returns the lines of those that came to an end, at least one."""
    results = Path(tempfile.mkdtemp(dir=context.scratch)) / "results.jsonl"
    results.touch()
    log = results.with_name("log.txt")
    words = [
        str(results),
        str(context.scratch),
        "rehearse" if context.rehearse else "gpu",
        *(part.name for part in parts),
    ]
    command = [sys.executable, "-m", "gpu_check.worker", *words]
    if parts[0].group == "ranks":
        from gpu_check.commands import launcher

        command = [*launcher(context), "--module", "gpu_check.worker", *words]
    lines: list[Line] = []
    with (
        log.open("w") as output,
        subprocess.Popen(
            command, cwd=REPOSITORY, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        slowness = REHEARSAL_SLOWNESS if context.rehearse else 1
        limit = time.monotonic() + slowness * (START_SECONDS + parts[0].seconds)
        told = 0
        while True:
            ended = process.poll() is not None
            text = results.read_text().splitlines()
            for line in map(json.loads, text[told:]):
                part = parts[len(lines)]
                line.pop("part")
                if "started" in line:
                    limit = min(time.monotonic() + slowness * part.seconds, max(deadline, time.monotonic() + 1))
                else:
                    lines.append(result(part, **line))
            told = len(text)
            if len(lines) == len(parts) or (lines and lines[-1]["status"] == "failed") or ended:
                break
            if time.monotonic() > limit:
                lines.append(result(parts[len(lines)], status="over time", message=tail(log)))
                break
            time.sleep(0.05)
        end(process, patient=len(lines) == len(parts))
    if not lines:
        lines.append(result(parts[0], status="failed", message=tail(log)))
    elif ended and len(lines) < len(parts) and lines[-1]["status"] != "failed":
        lines.append(result(parts[len(lines)], status="failed", message=tail(log)))
    return lines


def end(process: subprocess.Popen[bytes], *, patient: bool) -> None:
    """Ends a process with all that it started; one that has finished its parts gets the time to leave by itself."""
    if patient:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path) -> str:
    return " / ".join(line for line in log.read_text(errors="replace").splitlines()[-12:] if line.strip())[-1500:]


def result(part: Part, **line: Any) -> Line:
    """A part's line, printed."""
    line = {"group": part.group, "speed": part.speed, "what": part.what, "figures": {}, "seconds": None} | line
    line["part"] = part.name
    took = "" if line["seconds"] is None else f" ({line['seconds']:.1f} s)"
    why = f": {line['message']}" if line.get("message") else ""
    print(f"{line['status']:13} {part.name}{took}{why}", flush=True)
    return line


def write(out: Path, lines: list[Line], parts: list[Part], *, rehearsed: bool) -> None:
    """Leaves gpu_check.json and gpu_check.md."""
    from ksl_ds.files import write_json, write_text

    where = machine(rehearsed)
    write_json(out / "gpu_check.json", {"rehearsed": rehearsed, **where, "parts": lines})
    head = ["# GPU check", ""]
    if rehearsed:
        head += ["**A rehearsal on the CPU at small sizes: the figures mean nothing.**", ""]
    head += [f"- {name}: {value}" for name, value in where.items()]
    correct = [
        "",
        "## Results",
        "",
        "| part | result | seconds | what |",
        "|---|---|---|---|",
        *(
            f"| {line['part']} | {line['status']} | {shown(line['seconds'])} "
            f"| {line['what']}{': ' + cell(line['message']) if line.get('message') else ''} |"
            for line in lines
        ),
    ]
    figures = ["", "## Figures", "", "| part | figure | value |", "|---|---|---|"]
    figures += [
        f"| {line['part']} | {name} | {shown(value)} |" for line in lines for name, value in line["figures"].items()
    ]
    write_text(out / "gpu_check.md", "\n".join([*head, *correct, *figures]) + "\n")


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:300]


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def machine(rehearsed: bool) -> dict[str, str]:
    """The card, the driver, versions, the commit and the date."""
    import torch

    from ksl_ds.environment import hardware_and_versions

    found = hardware_and_versions()
    cards = [] if rehearsed else found.gpus_of_a_host
    driver = run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return {
        "cards": ", ".join(f"{cards.count(name)} x {name}" for name in dict.fromkeys(cards)) or "none",
        "driver": driver or "none",
        "CUDA of torch": str(torch.version.cuda or "none"),
        "processor": f"{found.cpu}, {found.cpu_cores} cores",
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        "commit": found.git_commit or "unknown",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def run(*command: str) -> str:
    """The output of a command; empty where it does not work."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


if __name__ == "__main__":
    sys.exit(main())
