"""Two hosts on one machine: network namespaces with addresses of their own, joined by a cable that can be cut.

Each runs DeepSpeed's launcher with the same hostfile, as `launch/multi_node.sh` does without ssh. Skipped where the system
does not permit namespaces.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from helpers.hosts import Hosts, said
from helpers.processes import HANG_SECONDS, launch, run, succeeds
from helpers.runs import losses
from helpers.tiny import make_model_folder, write_pairs

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


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hosts")
    make_model_folder(folder / "model")
    write_pairs(folder / "pairs.jsonl", repeat=20)
    (folder / "ds.json").write_text('{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}')
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "zero_hpz_partition_size": "auto"}
    (folder / "hpz.json").write_text(json.dumps({"zero_optimization": zero}))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def ticket_of_one_host(job) -> dict:
    succeeds(run("ksl-ds", "lottery", "recipe.yaml", "run_dir=one", cwd=job))
    return json.loads((job / "one/ticket/ticket.json").read_text())


@pytest.mark.parametrize("slots", [1, 2])
def test_two_hosts_draw_the_ticket_of_one(hosts, job, ticket_of_one_host, slots):
    launchers = hosts.start(job, slots, "lottery", "recipe.yaml", f"run_dir=two{slots}", f"num_ranks={2 * slots}")
    for launcher in launchers:
        assert launcher.wait(timeout=HANG_SECONDS) == 0, said(job)
    ticket = json.loads((job / f"two{slots}/ticket/ticket.json").read_text())
    assert len(ticket["token_ids"]) > 0
    for name in ("token_ids", "count"):
        assert ticket[name] == ticket_of_one_host[name]
    assert hosts.are_empty()


def test_check_measures_the_cable_and_finds_a_run_folder_that_is_not_shared(hosts, job):
    """What all ranks receive goes through a slow cable, what a host's ranks send each other does not."""
    megabits = 40
    hosts.limit(megabits)
    (job / "runs").mkdir()
    words = ("check", "recipe.yaml", "run_dir=runs/new")
    for own, slots, status in ((None, 2, "ok"), (job / "runs", 1, "failed")):
        launchers = hosts.start(job, slots, *words, f"num_ranks={2 * slots}", own=own)
        codes = [launcher.wait(timeout=HANG_SECONDS) for launcher in launchers]
        shown = (job / "out0").read_text().splitlines()
        (line,) = [line for line in shown if line[8:].startswith(" run_dir ")]
        assert line.startswith(status) and ("must be on a shared file system" in line) == (status == "failed")
        assert (codes[0] == 0) == (status == "ok"), said(job)
        assert list((job / "runs").iterdir()) == []
        network, *traffic = [line[20:] for line in shown if line[8:].startswith((" network", " traffic"))]
        among_all = re.match(r"between hosts (\S+) Gbit/s by all-gather, ", network)
        assert among_all and 0.5 * megabits < 1000 * float(among_all[1]) < 1.5 * megabits
        within = re.search(r"; within a host (\S+) Gbit/s by all-gather$", network)
        hpz = "; with hpZ "
        if slots == 1:  # a copy on each host would be the whole model for every rank
            assert within is None and not any(hpz in line for line in traffic)
            continue
        assert within and 1000 * float(within[1]) > 1.5 * megabits
        for name, line in zip(("embed", "ticket, rows"), traffic, strict=True):
            plain = rf"{name}: a step receives [\d.]+ KiB between hosts in [\d.]+ s \(this recipe\)"
            assert re.match(plain + hpz + r"[\d.]+ KiB between hosts and [\d.]+ KiB within in ", line)


LONGER = ("lottery", "recipe.yaml", "deepspeed=hpz.json", "embed_tuning.max_steps=40", "checkpoint.every=2")


def training_on_two_hosts(hosts: Hosts, job: Path, name: str, *words: str) -> list[subprocess.Popen]:
    """A longer lottery of two ranks on each host, which has its own copy of the weights (hpZ), after its third step."""
    launchers = hosts.start(job, 2, *LONGER, f"run_dir={name}", *words)
    metrics = job / name / "metrics.jsonl"
    deadline = time.monotonic() + HANG_SECONDS
    while not metrics.exists() or metrics.read_text().count("embed_tuning") < 3:
        assert time.monotonic() < deadline and launchers[0].poll() is None, said(job)
        time.sleep(0.2)
    return launchers


def assert_ended(hosts: Hosts, job: Path, name: str, launchers: list[subprocess.Popen], telling: list[int]) -> None:
    """No launcher succeeds, ranks of the hosts in `telling` say why in a line, no process stays, what was logged is whole.

    The first rank of a host that ends has the launcher end the others there.
    """
    for launcher in launchers:
        assert launcher.wait(timeout=HANG_SECONDS) != 0, said(job)
    for number in telling:
        text = (job / f"err{number}").read_text()
        messages = [line for line in text.splitlines() if "ksl-ds:" in line]
        assert messages and "Traceback" not in text, said(job)
        for message in messages:
            assert f"rank {2 * number} " in message or f"rank {2 * number + 1} " in message
            assert "lost the other ranks" in message and "timeout_minutes" in message
    assert hosts.are_empty()
    assert all("stage" in json.loads(line) for line in (job / name / "metrics.jsonl").read_text().splitlines())


def test_fault_a_host_is_cut_off_in_training(hosts, job):
    """Nobody is told, so both sides wait for the timeout; then they end by themselves."""
    launchers = training_on_two_hosts(hosts, job, "cut", "timeout_minutes=1")
    hosts.cut()
    assert_ended(hosts, job, "cut", launchers, telling=[0, 1])


def test_fault_a_rank_is_killed_in_training_and_one_host_continues(hosts, job):
    """The other host notices at once: the system closes the connections of the dead rank. Its two ranks go on alone."""
    launchers = training_on_two_hosts(hosts, job, "killed")
    ranks = [
        number
        for number in hosts.processes(hosts.names[1])
        if b"--local_rank" in Path(f"/proc/{number}/cmdline").read_bytes()
    ]
    os.kill(ranks[-1], signal.SIGKILL)
    assert_ended(hosts, job, "killed", launchers, telling=[0])
    succeeds(launch(2, "--module", "ksl_ds", *LONGER, "run_dir=killed", "resume=auto", cwd=job))
    results = json.loads((job / "killed/results.json").read_text())
    (resumed,) = results["resumed"]
    assert resumed["stage"] == "embed_tuning" and (resumed["ranks"], resumed["ranks_before"]) == (2, 4)
    assert resumed["step"] >= 2 and resumed["step"] % 2 == 0
    assert len(losses(job / "killed", "embed_tuning")) == 40
