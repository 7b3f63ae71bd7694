"""Two hosts on one machine: network namespaces with addresses of their own, joined by a cable that can be cut.

Each runs DeepSpeed's launcher with the same hostfile, as `launch/multi_node.sh` does without ssh. Tests are skipped where the
system does not permit namespaces.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from helpers.processes import ENVIRONMENT, WARM, free_port

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

    def are_empty(self) -> bool:
        """Whether all processes of both hosts have ended, or do so within seconds."""
        deadline = time.monotonic() + 10
        while any(map(self.processes, self.names)):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def cut(self) -> None:
        """Pulls the cable: packets are lost, nobody is told."""
        ip("-n", self.names[1], "link", "set", self.names[1], "down")

    def limit(self, megabits: int) -> None:
        """Makes the cable slow, each way; skips the test where the system cannot."""
        try:
            for name in self.names:
                bucket = ("rate", f"{megabits}mbit", "burst", "64kb", "latency", "100ms")
                command = ["tc", "-n", name, "qdisc", "add", "dev", name, "root", "tbf", *bucket]
                subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"links cannot be limited here: {getattr(error, 'stderr', '') or error}")

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
                 *WARM.command(
                     ["deepspeed", "--hostfile", "hosts", "--no_ssh", "--node_rank", str(number),
                      "--master_addr", ADDRESSES[0], "--master_port", port, "--module", "ksl_ds", *words],
                     ENVIRONMENT,
                 )],
                cwd=job, env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": name, "TP_SOCKET_IFNAME": name},
                stdin=subprocess.DEVNULL, stdout=(job / f"out{number}").open("w"),
                stderr=(job / f"err{number}").open("w"),
            )
            for number, name in enumerate(self.names)
        ]  # fmt: skip


def said(job: Path) -> str:
    return "\n".join((job / name).read_text()[-4000:] for name in ("out0", "err0", "out1", "err1"))
