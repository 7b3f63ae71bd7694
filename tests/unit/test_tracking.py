"""What a run writes down, and that no fault of wandb stops it."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from helpers.processes import ENVIRONMENT
from helpers.tickets import random_matrix, shifted
from helpers.wandb_records import records, summary_of
from matplotlib.figure import Figure

from ksl_ds import distributed
from ksl_ds.config.schema import Recipe
from ksl_ds.environment import hardware_and_versions
from ksl_ds.errors import UserError
from ksl_ds.files import write_json
from ksl_ds.lottery.ticket import draw_ticket
from ksl_ds.report import tracking
from ksl_ds.report.records import Scores
from ksl_ds.report.tables import rows_of_ticket
from ksl_ds.report.tracking import Tracker, write_text

pytestmark = pytest.mark.usefixtures("messages")

KEY = "5ecret" + "0123456789" * 4


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run folder, and a process that knows of no wandb account."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        del os.environ[name]
    os.environ["NETRC"] = str(tmp_path / "no netrc")
    os.environ["WANDB_CONFIG_DIR"] = str(tmp_path / "config")
    (tmp_path / "run").mkdir()
    yield tmp_path / "run"
    wandb.teardown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def server():
    """A server in place of wandb's, which refuses everything."""

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(401)
            self.end_headers()

        do_HEAD = do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refuses) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def recipe(run_dir: Path, mode: str) -> Recipe:
    made = Recipe(run_dir=str(run_dir))
    made.model.path = "a/model"
    made.tracking.wandb = mode
    return made


def lines(run_dir: Path) -> list[dict]:
    def no_constants(word: str):
        raise AssertionError(f"{word} is not JSON")

    text = (run_dir / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=no_constants) for line in text.splitlines()]


def test_metrics_are_json_lines_that_can_be_read_while_the_run_goes_on(run_dir):
    with Tracker(run_dir, recipe(run_dir, "off")) as tracker:
        tracker.log("embed_tuning", 1, loss=2.5, gradient_norm=None)
        tracker.log("embed_tuning", 2, loss=math.nan, learning_rate=math.inf)
        tracker.log("partial_tuning", 1, loss=torch.tensor(1.5), count=np.int64(7), ids=np.arange(3))
        written = lines(run_dir)
    assert [line.pop("time") > 1.7e9 for line in written] == [True] * 3
    assert written == [
        {"stage": "embed_tuning", "step": 1, "loss": 2.5, "gradient_norm": None},
        {"stage": "embed_tuning", "step": 2, "loss": None, "learning_rate": None},
        {"stage": "partial_tuning", "step": 1, "loss": 1.5, "count": 7, "ids": [0, 1, 2]},
    ]
    assert not (run_dir / "wandb").exists()


def test_a_resumed_run_appends(run_dir):
    for step in (1, 2):
        with Tracker(run_dir, recipe(run_dir, "off")) as tracker:
            tracker.log("embed_tuning", step, loss=1.0)
    assert [line["step"] for line in lines(run_dir)] == [1, 2]


def test_other_ranks_do_nothing(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "is_rank0", lambda: False)
    with Tracker(run_dir, recipe(run_dir, "offline")) as tracker:
        tracker.log("embed_tuning", 1, loss=1.0)
        tracker.figure("curve", Figure())
        tracker.ticket(run_dir / "ticket", [], {})
        tracker.summary({})
    assert list(run_dir.iterdir()) == []
    assert capsys.readouterr() == ("", "")


OFFLINE_RUN = """
from pathlib import Path
from matplotlib.figure import Figure
from ksl_ds.config.schema import Recipe
from ksl_ds.log import messages_on_stderr
from ksl_ds.report.tracking import Tracker

recipe = Recipe(run_dir="run")
recipe.model.path = "a/model"
with messages_on_stderr(), Tracker(Path("run"), recipe) as tracker:
    tracker.log("embed_tuning", 1, loss=2.5, learning_rate=None)
    tracker.log("partial_tuning", 1, loss=1.5)
    figure = Figure()
    figure.subplots().plot([1, 2])
    tracker.figure("curves", figure)
"""


@pytest.mark.slow
def test_offline_tracking_lies_in_the_run_folder_alone_and_holds_no_secret(tmp_path):
    for name in ("home", "tmp", "work", "work/run", "fonts"):
        (tmp_path / name).mkdir()
    environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(("WANDB", "XDG"))}
    environment |= {
        "HOME": str(tmp_path / "home"),
        "TMPDIR": str(tmp_path / "tmp"),
        "MPLCONFIGDIR": str(tmp_path / "fonts"),
    }
    subprocess.run(["git", "init", "-q"], cwd=tmp_path / "work", check=True)
    remote = ["git", "remote", "add", "origin", f"https://me:{KEY}@git.example/repository"]
    subprocess.run(remote, cwd=tmp_path / "work", check=True)
    # With a key, but a server that cannot be reached: the default `auto` must end offline.
    environment |= {"WANDB_API_KEY": KEY, "HF_TOKEN": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    process = subprocess.run(
        [sys.executable, "-c", OFFLINE_RUN], cwd=tmp_path / "work", env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr.startswith(
        "wandb: offline (127.0.0.1 does not answer); upload with `wandb sync run/wandb/offline-run-*`"
    )
    assert process.stderr.count("\n") == 1 and process.stdout == ""

    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == [".git", "run"]
    assert sorted(path.name for path in (tmp_path / "work/run").iterdir()) == ["metrics.jsonl", "wandb"]
    elsewhere = [path for name in ("home", "tmp") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert elsewhere == []

    (folder,) = (tmp_path / "work/run/wandb").glob("offline-run-*")
    (record,) = folder.glob("*.wandb")
    for word in (b"embed_tuning/loss", b"partial_tuning/step", b"embedding_scope", b"a/model"):
        assert word in record.read_bytes()
    assert len(list(folder.glob("files/media/images/curves*.png"))) == 1
    written = [path.read_bytes() for path in (tmp_path / "work/run").rglob("*") if path.is_file()]
    assert not any(KEY.encode() in content or b"git.example" in content for content in written)


@pytest.mark.parametrize("kept", [None, "no/id", "\udcff"])
def test_a_resumed_run_continues_the_same_wandb_run(run_dir, kept):
    for step in (1, 2):
        with Tracker(run_dir, recipe(run_dir, "offline")) as tracker:
            tracker.log("embed_tuning", step, loss=float(step))
        time.sleep(1.1)  # wandb names a folder by the second
    if kept is not None:  # a damaged record of the id: a run of its own
        (run_dir / "wandb" / "run_id").write_bytes(kept.encode("utf-8", "surrogateescape"))
        with Tracker(run_dir, recipe(run_dir, "offline")) as tracker:
            tracker.log("embed_tuning", 3, loss=3.0)
    wandb.teardown()  # its service writes the last lines
    starts, losses = [], []
    for path in sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for record in records(path):
            if record.HasField("run"):
                starts.append((record.run.run_id, record.run.resume))
            for item in record.history.item:
                if (item.key or "/".join(item.nested_key)) == "embed_tuning/loss":
                    losses.append(float(item.value_json))
    assert losses == [1.0, 2.0] + ([3.0] if kept is not None else [])
    assert starts[0] == starts[1] and starts[0][1] is True  # `wandb sync` appends to the run of that id
    assert len({number for number, _ in starts}) == (1 if kept is None else 2)
    assert (run_dir / "wandb" / "run_id").read_text() == starts[-1][0] + "\n"


def test_wandb_gets_the_ticket_its_tokens_the_final_scores_and_tags(run_dir):
    before_VD = random_matrix()
    ticket = draw_ticket(before_VD, shifted(before_VD), tokens=[f"t{number}" for number in range(len(before_VD))])
    ticket.save(run_dir / "ticket", "model.embed_tokens", base_model="a/model", card="# A card")
    stages = {
        "copying_source": Scores(trained_parameters=0, test_loss=None, bleu=2.5, chrf=18.0, first_line_bleu=2.5),
        "partial_tuning": Scores(trained_parameters=128, test_loss=1.5, bleu=9.5, chrf=30.0, first_line_bleu=9.5),
    }
    tagged = recipe(run_dir, "offline")
    tagged.tracking.tags = ["first", "en-fr"]
    with Tracker(run_dir, tagged) as tracker:
        tracker.ticket(run_dir / "ticket", rows_of_ticket(ticket), {"base": "a/model", "rows": len(ticket)})
        tracker.summary(stages)
    wandb.teardown()  # its service writes the last lines
    (path,) = (run_dir / "wandb").glob("offline-run-*/*.wandb")
    found = list(records(path))
    (started,) = [record.run for record in found if record.HasField("run")]
    assert list(started.tags) == ["first", "en-fr"]
    (sent,) = [record.artifact for record in found if record.artifact.type == "ticket"]
    assert sent.name == f"ticket-{started.run_id}"
    files = sorted(path.name for path in (run_dir / "ticket").iterdir())
    assert json.loads(sent.metadata) == {"base": "a/model", "rows": 4, "files": files}
    assert sorted(entry.path for entry in sent.manifest.contents) == files and len(files) == 5
    (table,) = path.parent.glob("files/media/table/ticket_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["id", "token", "k", "D", "p"]
    columns = (ticket.token_ids, ticket.tokens, ticket.count, ticket.statistic, ticket.pvalue)
    assert content["data"] == [list(row) for row in zip(*columns, strict=True)]
    summary = summary_of(found)
    assert (summary["copying_source/bleu"], summary["partial_tuning/test_loss"]) == (2.5, 1.5)
    assert "copying_source/test_loss" not in summary


@pytest.mark.parametrize(("mode", "variable"), [("off", "online"), ("auto", "disabled")])
def test_no_wandb_when_asked_for_none(run_dir, monkeypatch, capsys, mode, variable):
    monkeypatch.setenv("WANDB_MODE", variable)
    with Tracker(run_dir, recipe(run_dir, mode)) as tracker:
        tracker.log("embed_tuning", 1, loss=1.0)
    assert not (run_dir / "wandb").exists()
    assert capsys.readouterr() == ("", "")


def test_wandb_mode_offline_asks_nobody(run_dir, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(tracking, "_why_offline", lambda probe: pytest.fail("offline was asked for"))
    Tracker(run_dir, recipe(run_dir, "online")).finish()
    assert capsys.readouterr().err.startswith("wandb: offline; upload with")


def test_auto_without_a_key_is_offline(run_dir, capsys):
    Tracker(run_dir, recipe(run_dir, "auto")).finish()
    assert capsys.readouterr().err.startswith("wandb: offline (no API key;")


def test_auto_gives_up_on_a_server_that_accepts_and_then_says_nothing(run_dir, monkeypatch, capsys):
    monkeypatch.setattr(tracking, "PROBE_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        os.environ.update(WANDB_API_KEY=KEY, WANDB_BASE_URL=f"http://127.0.0.1:{silent.getsockname()[1]}")
        Tracker(run_dir, recipe(run_dir, "auto")).finish()
    assert capsys.readouterr().err.startswith("wandb: offline (127.0.0.1 does not answer)")


def test_a_rejected_key_goes_offline_and_is_not_repeated(run_dir, server, capsys):
    os.environ.update(WANDB_API_KEY=KEY, WANDB_BASE_URL=server)
    with Tracker(run_dir, recipe(run_dir, "online")) as tracker:
        tracker.log("embed_tuning", 1, loss=1.0)
    captured = capsys.readouterr()
    assert captured.err.startswith("wandb: offline (") and "does not answer" not in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""  # wandb itself says nothing
    assert KEY not in captured.err
    assert len(lines(run_dir)) == 1
    assert list((run_dir / "wandb").glob("offline-run-*"))


def test_a_key_is_found_where_wandb_login_puts_it(run_dir, tmp_path, monkeypatch):
    os.environ.update(WANDB_BASE_URL="http://127.0.0.1:9", NETRC=str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1 login user password {KEY}\n")
    assert tracking._why_offline(probe=False) == ""
    (tmp_path / "netrc").write_text(f"machine elsewhere.example login user password {KEY}\n")
    assert tracking._why_offline(probe=False).startswith("no API key")


def survives(run_dir: Path, capsys, mode: str = "offline") -> str:
    """Runs on with a broken wandb; every number is in metrics.jsonl. Returns what was printed."""
    with Tracker(run_dir, recipe(run_dir, mode)) as tracker:
        for step in range(3):
            tracker.log("embed_tuning", step, loss=1.0)
        tracker.figure("curve", Figure())
    assert [line["step"] for line in lines(run_dir)] == [0, 1, 2]
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert len(warnings) == 1
    return warnings[0]


def test_a_run_goes_on_when_wandb_cannot_write(run_dir, capsys):
    (run_dir / "wandb").write_text("a file where wandb wants a folder")
    assert "no wandb" in survives(run_dir, capsys)


def test_a_run_goes_on_when_wandb_cannot_start(run_dir, capsys, monkeypatch):
    def fail(**_: object):
        raise RuntimeError(f"broken\nby {KEY}")

    os.environ["WANDB_API_KEY"] = KEY
    monkeypatch.setattr(wandb, "init", fail)
    assert survives(run_dir, capsys) == (
        "warning: no wandb (broken by ***); the run continues, metrics.jsonl has all numbers"
    )


def test_a_run_goes_on_when_wandb_never_starts(run_dir, capsys, monkeypatch):
    monkeypatch.setattr(tracking, "START_SECONDS", 0.2)
    monkeypatch.setattr(tracking, "_init_wandb", lambda *_: threading.Event().wait())
    assert "no answer in 0 s" in survives(run_dir, capsys)


class BreaksLater:
    """A run of wandb that fails while logging, or never finishes."""

    offline, dir = True, "nowhere/files"

    def __init__(self, hangs: bool) -> None:
        self.hangs = hangs

    def define_metric(self, *_: object, **__: object) -> None:
        pass

    def log(self, _: dict) -> None:
        if not self.hangs:
            raise OSError(28, "No space left on device")

    def finish(self) -> None:
        threading.Event().wait()


@pytest.mark.parametrize(("hangs", "reason"), [(False, "No space left on device"), (True, "no answer in")])
def test_a_run_goes_on_when_wandb_breaks_later(run_dir, capsys, monkeypatch, hangs, reason):
    monkeypatch.setattr(tracking, "_init_wandb", lambda *_: BreaksLater(hangs))
    monkeypatch.setattr(tracking, "FINISH_SECONDS", -9.8)
    warning = survives(run_dir, capsys)
    assert "wandb stopped" in warning and reason in warning


def test_a_run_goes_on_when_the_disk_is_full(run_dir, capsys):
    (run_dir / "metrics.jsonl").symlink_to("/dev/full")
    with Tracker(run_dir, recipe(run_dir, "off")) as tracker:
        tracker.log("embed_tuning", 1, loss=1.0)
        tracker.log("embed_tuning", 2, loss=1.0)
    err = capsys.readouterr().err
    assert err.count("warning:") == 1 and "No space left on device" in err


def test_json_files_are_sorted_readable_and_free_of_nan(tmp_path):
    write_json(tmp_path / "a.json", {"b": math.nan, "a": [Path("x"), np.float32(0.5), (1, True)], "é": {2: None}})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"a": ["x", 0.5, [1, True]], "b": None, "é": {"2": None}}
    assert text.index('"a"') < text.index('"b"') < text.index('"é"')
    assert text.count("\n") > 5


def test_a_failed_write_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    write_text(tmp_path / "a.json", "old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=r"a\.json cannot be written: No space left on device"):
        write_json(tmp_path / "a.json", {"new": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_a_missing_folder_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        write_json(tmp_path / "missing" / "a.json", {})


def test_hardware_and_versions_name_software_and_commit_but_not_the_host(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hardware_and_versions().git_commit is None
    git = ["git", "-c", "user.name=A", "-c", "user.email=a@b.c"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    found = hardware_and_versions()
    assert found.git_commit == commit
    (tmp_path / "file").write_text("2")
    assert hardware_and_versions().git_commit == f"{commit}-dirty"

    assert found.versions["torch"] == torch.__version__
    assert {"python", "ksl_ds", "deepspeed", "transformers", "peft", "scipy", "sacrebleu"} <= set(found.versions)
    assert found.ranks == 1 and found.memory_bytes > 2**28 and found.cpu
    assert socket.gethostname() not in found.model_dump_json()
