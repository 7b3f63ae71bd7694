"""Runs parts of one group, one after the other, and appends a line of JSON for each: when it starts and what came of it.

    python -m gpu_check.worker RESULTS SCRATCH gpu|rehearse PART ...

Under the deepspeed launcher every rank runs the parts; rank 0 writes. A part that fails ends the process, since what it
leaves behind could disturb the next one; `__main__.py` starts the rest anew.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from gpu_check.parts import PARTS, Context, NotSupported, load_parts


def main() -> None:
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    results, scratch, kind, *names = words
    load_parts()
    context = Context(kind == "rehearse", Path(scratch))

    def tell(**line: object) -> None:
        if os.environ.get("RANK", "0") == "0":
            with Path(results).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    for name in names:
        tell(part=name, started=True)
        started = time.perf_counter()
        try:
            figures = PARTS[name].run(context)
        except NotSupported as error:
            tell(part=name, status="not supported", message=str(error), seconds=time.perf_counter() - started)
        except Exception as error:  # any fault of a part is a result
            message = f"{type(error).__name__}: {error}".strip()
            tell(part=name, status="failed", message=message, seconds=time.perf_counter() - started)
            raise
        else:
            tell(part=name, status="passed", figures=figures, seconds=time.perf_counter() - started)


if __name__ == "__main__":
    main()
