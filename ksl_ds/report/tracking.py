"""What a run leaves behind as numbers: metrics.jsonl, wandb, results.json, and on which software and hardware.

Choices and what they cost:
- Only rank 0 writes, and nothing here is a collective: whatever wandb or the disk does, no rank waits for another.
- wandb never stops or delays a run. Its calls that may wait for a server run in threads with a timeout, and after the first
  failure it is switched off with one line; metrics.jsonl has all numbers in any case. `auto` goes online only if an API key
  is configured and the server responds, so a machine without network starts at once.
- A run folder is one run of wandb, whose id it keeps in `wandb/run_id`: a resumed run continues it.
- wandb captures neither the console nor the repository (a remote's address can carry a token); the price is that its
  pages show neither. Its scratch folders lie in the run folder, so deleting that folder leaves nothing behind.
- NaN and infinities become null, since JSON has no word for them.
"""

from __future__ import annotations

import io
import json
import logging
import netrc
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from ksl_ds import distributed
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.files import clean, write_text
from ksl_ds.report.records import Scores, read_metrics

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")
TOKEN_COLUMNS = {
    "id": "token_id",
    "token": "token",
    "k": "count",
    "D": "statistic",
    "p": "pvalue",
}  # keys of a ticket's rows
PROBE_SECONDS = 5.0  # for the server to answer at all
START_SECONDS = 60.0  # for wandb to begin a run
FINISH_SECONDS = 120.0  # for the last uploads; what is missing stays on disk, `wandb sync` sends it
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # never printed, not even inside an error message


class Tracker:
    """The numbers of a run, into `run_dir/metrics.jsonl` and to wandb.

    Construct it on every rank; it acts on rank 0 and does nothing on the others. `run_dir` must exist.
    """

    def __init__(self, run_dir: Path, recipe: Recipe) -> None:
        self._path = Path(run_dir) / "metrics.jsonl"
        self._file: Any = None
        self._wandb: Any = None
        self._stages: set[str] = set()
        if distributed.is_rank0():
            with self._file_may_fail():
                self._file = self._path.open("a", encoding="utf-8")
            self._wandb = start_wandb(Path(run_dir), recipe)

    def log(self, stage: str, step: int, **numbers: Any) -> None:
        """One line of metrics.jsonl: stage, step, time (seconds since 1970) and `numbers`; to wandb as `stage/name`."""
        if not distributed.is_rank0():
            return
        numbers = clean(numbers)
        if self._file is not None:
            with self._file_may_fail():
                line = {"stage": stage, "step": step, "time": round(time.time(), 3), **numbers}
                self._file.write(json.dumps(line, allow_nan=False) + "\n")
                self._file.flush()
        if self._wandb is None:
            return
        with self._wandb_may_fail():
            if stage not in self._stages:  # each stage counts its own steps
                self._wandb.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
                self._stages.add(stage)
            values = {f"{stage}/{name}": value for name, value in numbers.items() if isinstance(value, (int, float))}
            self._wandb.log({f"{stage}/step": step, **values})

    def rewind(self, stage: str, step: int) -> None:
        """Drops the lines of `stage` after `step`, and a torn last line: the run resumes from a checkpoint."""
        if self._file is None:
            return
        with self._file_may_fail():
            lines = read_metrics(self._path.parent)
            kept = [json.dumps(line) + "\n" for line in lines if line["stage"] != stage or line["step"] <= step]
            self._file.close()
            write_text(self._path, "".join(kept))
            self._file = self._path.open("a", encoding="utf-8")

    def figure(self, name: str, figure: Any) -> None:
        """A matplotlib figure, to wandb as an image (metrics.jsonl holds numbers only)."""
        if self._wandb is None:
            return
        with self._wandb_may_fail():
            import wandb
            from PIL import Image

            from ksl_ds.report.plots import png

            self._wandb.log({name: wandb.Image(Image.open(io.BytesIO(png(figure))))})

    def ticket(self, folder: Path, rows: Sequence[Mapping[str, Any]], metadata: Mapping[str, Any]) -> None:
        """A ticket, to wandb: its folder as an artifact, its tokens as a table.

        Parameters
        ----------
        folder
            The ticket's folder.
        rows
            Its tokens, as `report.tables.rows_of_ticket` returns them.
        metadata
            Of the artifact; the names of the folder's files are added.
        """
        if self._wandb is None:
            return
        run = self._wandb

        def send() -> None:
            import wandb

            files = sorted(path.name for path in folder.iterdir())
            artifact = wandb.Artifact(f"ticket-{run.id}", "ticket", metadata={**metadata, "files": files})
            artifact.add_dir(str(folder))
            run.log_artifact(artifact)
            cells = [[row[key] for key in TOKEN_COLUMNS.values()] for row in rows]
            run.log({"ticket": wandb.Table(list(TOKEN_COLUMNS), cells)})

        with self._wandb_may_fail():
            within(START_SECONDS, send)  # online, wandb asks its server whether the artifact's name is free

    def summary(self, stages: Mapping[str, Scores]) -> None:
        """The scores of every stage, to the summary of the wandb run, as `stage/score`."""
        if self._wandb is None:
            return
        with self._wandb_may_fail():
            self._wandb.summary.update(
                {f"{stage}/{name}": value for stage, of in stages.items() for name, value in of.numbers().items()}
            )

    def finish(self) -> None:
        """Ends tracking; waits a limited time for wandb. Calling it twice does no harm."""
        if self._file is not None:
            with self._file_may_fail():
                self._file.close()
            self._file = None
        if self._wandb is not None:
            with self._wandb_may_fail():
                within(FINISH_SECONDS + 10, self._wandb.finish)
            self._wandb = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.finish()

    @contextmanager
    def _file_may_fail(self) -> Iterator[None]:
        try:
            yield
        except (OSError, UserError) as error:
            self._file = None
            reason = getattr(error, "strerror", None) or error
            logger.warning(f"{self._path} cannot be written ({reason}); the run continues without it")

    @contextmanager
    def _wandb_may_fail(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever wandb raises, the training is worth more than its tracking
            self._wandb = None
            logger.warning(f"wandb stopped ({brief(error)}); the run continues, metrics.jsonl has all numbers")


def start_wandb(run_dir: Path, recipe: Recipe) -> Any:
    """A wandb run, or None where tracking is off or wandb fails; says in one line which it is. Rank 0 only."""
    asked = tracking_mode(recipe)
    if asked == "off":
        return None
    for variable, folder in {"WANDB_CACHE_DIR": "cache", "WANDB_DATA_DIR": "data"}.items():
        os.environ.setdefault(variable, str((run_dir / "wandb" / folder).absolute()))
    if not recipe.verbose:
        os.environ.setdefault("WANDB_SILENT", "true")
    run = None
    reason = ""
    try:
        (run_dir / "wandb").mkdir(exist_ok=True)  # wandb would fall back to the system's temporary folder
        run_id = wandb_run_id(run_dir)
        if asked != "offline":
            reason = within(START_SECONDS, lambda: _why_offline(probe=asked == "auto"))
            try:
                run = None if reason else within(START_SECONDS, lambda: _init_wandb(run_dir, recipe, "online", run_id))
            except Exception as error:  # a rejected key, a server that stops answering
                reason = brief(error)
        run = run or within(START_SECONDS, lambda: _start_offline(run_dir, recipe, run_id, tried_online=bool(reason)))
    except Exception as error:  # no disk, a broken installation: the run is worth more than its tracking
        logger.warning(f"no wandb ({brief(error)}); the run continues, metrics.jsonl has all numbers")
        return None
    if run.offline:
        logger.info(
            f"wandb: offline{reason and f' ({reason})'}; upload with `wandb sync {run_dir / 'wandb' / 'offline-run-*'}`"
        )
    else:
        logger.info(f"wandb: {run.url}")
    return run


def tracking_mode(recipe: Recipe) -> str:
    """auto, online, offline or off: the recipe's, unless WANDB_MODE says otherwise."""
    asked: str = recipe.tracking.wandb
    if asked != "off":
        asked = {"dryrun": "offline", "disabled": "off"}.get(mode := os.environ.get("WANDB_MODE", ""), mode) or asked
    return asked


def why_offline() -> str:
    """Why wandb would not go online; empty when it would. Asks its server, for a limited time."""
    try:
        return within(START_SECONDS, lambda: _why_offline(probe=True))
    except Exception as error:  # no disk, a broken installation
        return brief(error)


def _start_offline(run_dir: Path, recipe: Recipe, run_id: str, *, tried_online: bool) -> Any:
    if tried_online:
        import wandb

        wandb.teardown()  # a run that could not start online keeps its id in use
    return _init_wandb(run_dir, recipe, "offline", run_id)


def wandb_run_id(run_dir: Path) -> str:
    """The id of the run folder's wandb run: the one that it keeps, or a new one, which it then keeps."""
    path = run_dir / "wandb" / "run_id"
    with suppress(OSError, UnicodeDecodeError):
        if re.fullmatch(r"\w{1,64}", kept := path.read_text(encoding="utf-8").strip(), re.ASCII):
            return kept
    made = secrets.token_hex(4)
    write_text(path, made + "\n")
    return made


def _init_wandb(run_dir: Path, recipe: Recipe, mode: Literal["online", "offline"], run_id: str) -> Any:
    import wandb

    settings: dict[str, Any] = {
        "silent": not recipe.verbose,
        "console": "off",
        "disable_git": True,
        "save_code": False,
        "init_timeout": START_SECONDS / 2,
        "login_timeout": START_SECONDS / 2,
    }
    if "finish_timeout" in wandb.Settings.model_fields:
        settings["finish_timeout"] = FINISH_SECONDS
    return wandb.init(
        dir=run_dir,
        mode=mode,
        project=recipe.tracking.project,
        entity=recipe.tracking.entity,
        name=recipe.tracking.name or run_dir.name,
        tags=recipe.tracking.tags or None,  # on resume, wandb keeps the tags it has unless it gets others
        id=run_id,
        resume="allow",
        config=clean(recipe),
        settings=wandb.Settings(**settings),
    )


def _why_offline(probe: bool) -> str:
    """Why there is no use in trying to go online; empty when there is."""
    import wandb

    settings = wandb.setup().settings  # of the environment and of wandb's own files
    host = settings.base_url
    hosts = {urlsplit(host).hostname} | ({"api.wandb.ai"} if host == wandb.Settings().base_url else set())
    if not (settings.api_key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or _netrc_hosts() & hosts):
        return "no API key; `wandb login` stores one"
    if probe and not _answers(host):
        return f"{urlsplit(host).hostname} does not answer"
    return ""


def _netrc_hosts() -> set[str]:
    """The machines in ~/.netrc, where `wandb login` puts keys."""
    with suppress(OSError, netrc.NetrcParseError):
        return set(netrc.netrc(os.environ.get("NETRC") or Path("~/.netrc").expanduser()).hosts)
    return set()


def _answers(host: str) -> bool:
    """Whether the server says anything at all. Through the proxies that the environment names, as wandb does."""
    import requests

    try:
        return within(PROBE_SECONDS, lambda: requests.head(host, timeout=PROBE_SECONDS).status_code < 500)
    except Exception:  # no route, no name, no certificate, no answer in time
        return False


def within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """What `call` returns or raises. TimeoutError when it takes longer; its thread is then left to itself."""
    box: list[Answer] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            box.append(call())
        except BaseException as error:  # handed to the caller's thread below
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True, name="ksl_ds-wandb")
    thread.start()
    thread.join(seconds)
    if failure:
        raise RuntimeError(brief(failure[0])) from failure[0]
    if not box:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return box[0]


def brief(error: BaseException) -> str:
    """An error as part of one line, without secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "***")
    return text if len(text) <= 200 else text[:199] + "…"
