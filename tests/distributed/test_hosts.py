"""Two hosts on one machine: network namespaces with addresses of their own, joined by a cable that can be cut.

Each runs DeepSpeed's launcher with the same hostfile, as `launch/multi_node.sh` does without ssh. Skipped where the system
does not permit namespaces.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.processes import ENVIRONMENT, HANG_SECONDS, free_port, run, succeeds
from helpers.tiny import make_model_folder, write_pairs

from ksl_ds import draw_ticket
from ksl_ds.model.folder import ModelFolder

RECIPE = """
run_dir: run
deepspeed: ds.json
model: {path: model}
text: {train: pairs.jsonl, test: pairs.jsonl, max_test_pairs: 4}
training: {batch_size: 8, micro_batch_size: 2, precision: fp32, gradient_checkpointing: true}
embed_tuning: {learning_rate: 0.1, max_steps: 4}
draw: {alpha: 0.5}
partial_tuning: {learning_rate: 0.1, max_steps: 2}
evaluation: {batch_size: 4, max_new_tokens: 4}
tracking: {wandb: "off"}
"""
CONSTANT = 100_000  # bytes a step between hosts that no ticket causes: losses, norms, agreement of the ranks, headers
ADDRESSES = ("10.201.77.1", "10.201.77.2")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Hosts:
    """Two namespaces and the cable between them."""

    def __init__(self) -> None:
        self.names = [f"ksl{os.getpid()}{side}" for side in "ab"]

    def __enter__(self) -> Hosts:
        try:
            for name in self.names:
                ip("netns", "add", name)
            left, right = self.names
            ip("link", "add", left, "netns", left, "type", "veth", "peer", "name", right, "netns", right)
            for name, address in zip(self.names, ADDRESSES, strict=True):
                ip("-n", name, "address", "add", f"{address}/24", "dev", name)
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", name, "up")
        except (OSError, subprocess.CalledProcessError) as error:
            self.__exit__()
            pytest.skip(f"network namespaces are not permitted here: {getattr(error, 'stderr', '') or error}")
        return self

    def __exit__(self, *exception: object) -> None:
        for name in self.names:
            for number in self.processes(name):
                os.kill(number, 9)
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def processes(self, name: str) -> list[int]:
        found = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True)
        return [int(number) for number in found.stdout.split()]

    def cut(self) -> None:
        """Pulls the cable: packets are lost, nobody is told."""
        ip("-n", self.names[1], "link", "set", self.names[1], "down")

    def bytes_between(self) -> int:
        """What has gone through the cable so far, both ways."""
        name = self.names[0]
        shown = subprocess.run(
            ["ip", "-n", name, "-s", "-j", "link", "show", "dev", name], check=True, capture_output=True
        )
        statistics = json.loads(shown.stdout)[0]["stats64"]
        return statistics["rx"]["bytes"] + statistics["tx"]["bytes"]

    def start(self, job: Path, slots: int, *words: str, own: Path | None = None) -> list[subprocess.Popen]:
        """The launcher on both hosts, each with the same command; the folder `own` is another one on the second."""
        (job / "hosts").write_text("".join(f"{address} slots={slots}\n" for address in ADDRESSES))
        port = str(free_port())
        own_folder = ["sh", "-c", f'mount -t tmpfs tmpfs {own} && exec "$@"', "sh"] if own else []
        return [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *(own_folder if number else []),
                 "deepspeed", "--hostfile", "hosts", "--no_ssh", "--node_rank", str(number),
                 "--master_addr", ADDRESSES[0], "--master_port", port, "--module", "ksl_ds", *words],
                cwd=job, env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": name, "TP_SOCKET_IFNAME": name},
                stdin=subprocess.DEVNULL, stdout=(job / f"out{number}").open("w"),
                stderr=(job / f"err{number}").open("w"),
            )
            for number, name in enumerate(self.names)
        ]  # fmt: skip


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with Hosts() as pair:
        yield pair


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    make_model_folder(folder / "model")
    write_pairs(folder / "pairs.jsonl", repeat=20)
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def ticket_of_one_host(job) -> dict:
    succeeds(run("ksl-ds", "lottery", "recipe.yaml", "run_dir=one", cwd=job))
    return json.loads((job / "one/ticket/ticket.json").read_text())


def said(job: Path) -> str:
    return "\n".join((job / name).read_text()[-4000:] for name in ("out0", "err0", "out1", "err1"))


@pytest.mark.parametrize("slots", [1, 2])
def test_two_hosts_draw_the_ticket_of_one(hosts, job, ticket_of_one_host, slots):
    launchers = hosts.start(job, slots, "lottery", "recipe.yaml", f"run_dir=two{slots}", f"num_ranks={2 * slots}")
    for launcher in launchers:
        assert launcher.wait(timeout=HANG_SECONDS) == 0, said(job)
    ticket = json.loads((job / f"two{slots}/ticket/ticket.json").read_text())
    assert len(ticket["token_ids"]) > 0
    for name in ("token_ids", "count"):
        assert ticket[name] == ticket_of_one_host[name]
    assert [hosts.processes(name) for name in hosts.names] == [[], []]


def test_check_finds_a_run_folder_that_is_not_shared(hosts, job):
    (job / "runs").mkdir()
    words = ("check", "recipe.yaml", "run_dir=runs/new", "num_ranks=2")
    for own, status in ((None, "ok"), (job / "runs", "failed")):
        launchers = hosts.start(job, 1, *words, own=own)
        codes = [launcher.wait(timeout=HANG_SECONDS) for launcher in launchers]
        (line,) = [line for line in (job / "out0").read_text().splitlines() if line[8:].startswith(" run_dir ")]
        assert line.startswith(status) and ("must be on a shared file system" in line) == (status == "failed")
        assert (codes[0] == 0) == (status == "ok"), said(job)
        assert list((job / "runs").iterdir()) == []


def training_on_two_hosts(hosts: Hosts, job: Path, name: str, *words: str) -> list[subprocess.Popen]:
    """A lottery without end, after its first step."""
    words = ("lottery", "recipe.yaml", f"run_dir={name}", "embed_tuning.max_steps=1000000", *words)
    launchers = hosts.start(job, 1, *words)
    metrics = job / name / "metrics.jsonl"
    deadline = time.monotonic() + HANG_SECONDS
    while not (metrics.exists() and "embed_tuning" in metrics.read_text()):
        assert time.monotonic() < deadline and launchers[0].poll() is None, said(job)
        time.sleep(0.2)
    return launchers


def assert_ended(hosts: Hosts, job: Path, name: str, launchers: list[subprocess.Popen], telling: list[int]) -> None:
    """No launcher succeeds, the ranks in `telling` say why in one line, no process stays, what was logged is whole."""
    for launcher in launchers:
        assert launcher.wait(timeout=HANG_SECONDS) != 0, said(job)
    for number in telling:
        text = (job / f"err{number}").read_text()
        messages = [line for line in text.splitlines() if "ksl-ds:" in line]
        assert len(messages) == 1 and "Traceback" not in text, said(job)
        assert f"rank {number} " in messages[0] and "lost the other ranks" in messages[0]
        assert "timeout_minutes" in messages[0]
    assert [hosts.processes(name) for name in hosts.names] == [[], []]
    assert all("stage" in json.loads(line) for line in (job / name / "metrics.jsonl").read_text().splitlines())


def test_fault_a_host_is_cut_off_in_training(hosts, job):
    """Nobody is told, so both sides wait for the timeout; then they end by themselves."""
    launchers = training_on_two_hosts(hosts, job, "cut", "timeout_minutes=1")
    hosts.cut()
    assert_ended(hosts, job, "cut", launchers, telling=[0, 1])


def test_fault_a_rank_is_killed_in_training(hosts, job):
    """The other host notices at once: the system closes the connections of the dead rank."""
    launchers = training_on_two_hosts(hosts, job, "killed")
    for number in hosts.processes(hosts.names[1]):
        if b"--local_rank" in Path(f"/proc/{number}/cmdline").read_bytes():
            os.kill(number, signal.SIGKILL)
    assert_ended(hosts, job, "killed", launchers, telling=[0])


SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}


def test_between_hosts_only_the_ticket_travels(hosts, tmp_path):
    """Counters of the cable, steps of mode rows, two hosts of two ranks: hpZ sends at most 1 % of what plain ZeRO-3 sends."""
    make_model_folder(tmp_path / "model", **SIZES)
    write_pairs(tmp_path / "pairs.jsonl", repeat=4)
    folder = ModelFolder(tmp_path / "model")
    rows_VD = folder.read_rows(folder.embedding_name, 0, folder.shape(folder.embedding_name)[0])
    ticket = draw_ticket(rows_VD, rows_VD + torch.eye(*rows_VD.shape), selection="top_k", top_k=8)
    ticket.save(tmp_path / "ticket", folder.embedding_module)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    words = [
        "tune",
        "recipe.yaml",
        "method=ticket",
        "ticket=ticket",
        "partial_tuning.max_steps=24",
        "text.max_test_pairs=2",
    ]
    sent = {}
    losses = []
    for name, zero in {"plain": {}, "hpz": {"zero_hpz_partition_size": "auto"}}.items():
        settings = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero}}
        (tmp_path / "ds.json").write_text(json.dumps(settings))
        launchers = hosts.start(tmp_path, 2, *words, f"run_dir={name}")
        metrics = tmp_path / name / "metrics.jsonl"
        marks = []
        deadline = time.monotonic() + HANG_SECONDS
        for steps in (3, 23):
            while not metrics.exists() or len(metrics.read_text().splitlines()) < steps:
                assert time.monotonic() < deadline and launchers[0].poll() is None, said(tmp_path)
                time.sleep(0.002)
            marks.append((hosts.bytes_between(), len(metrics.read_text().splitlines())))
        for launcher in launchers:
            assert launcher.wait(timeout=HANG_SECONDS) == 0, said(tmp_path)
        losses.append([json.loads(line).get("loss") for line in metrics.read_text().splitlines()])
        sent[name] = (marks[1][0] - marks[0][0]) / (marks[1][1] - marks[0][1])
    assert losses[0] == losses[1]
    assert sent["hpz"] <= 0.01 * sent["plain"], sent
    assert sent["hpz"] <= 4 * ticket.rows_KD.nbytes + CONSTANT, sent
    print(f"bytes between hosts a step: {sent}")
