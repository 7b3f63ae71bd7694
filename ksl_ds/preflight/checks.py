"""Checks of hosts and inputs before an expensive job.

Nothing is trained, no weights are loaded, no files are left. Results are gathered from all ranks, so a line is about all of
them and names the hosts with a problem.
"""

from __future__ import annotations

import copy
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ksl_ds import distributed
from ksl_ds.config.schema import Recipe
from ksl_ds.environment import Environment
from ksl_ds.errors import UserError
from ksl_ds.estimate.memory import min_ranks, rank_needs
from ksl_ds.estimate.plan import Estimated, Plan, plan_of
from ksl_ds.files import bytes_sha256
from ksl_ds.model.adapters import ALL_LINEAR
from ksl_ds.model.folder import ModelFolder, local_folder, open_model
from ksl_ds.model.methods import prepare_method
from ksl_ds.report.tables import print_text, size
from ksl_ds.report.tracking import tracking_mode, why_offline
from ksl_ds.sharding.engine import check_precision, deepspeed_config
from ksl_ds.text.batches import check_positions
from ksl_ds.text.corpus import Split
from ksl_ds.text.directions import load_texts
from ksl_ds.text.packing import shared_beginning
from ksl_ds.training.inputs import check_inputs, inputs_of
from ksl_ds.training.run import check_scores, corpus_sha256, previous_results, virtual_tokens

COMPARED = (".safetensors", ".json", ".model")  # files of a model folder, by their sizes
SECONDS_TO_SEE = 10  # for a new file to appear on a network file system
SPARE = 0.9  # share of a device's memory; above it fragmentation may exceed the rest


@dataclass
class Checklist:
    """Prints and counts findings, the same on every rank."""

    failed: int = 0
    hosts: list[str] = field(default_factory=list)  # by rank

    def add(self, status: str, what: str, detail: str) -> None:
        """Prints a line: status is ok, warning or failed."""
        self.failed += status == "failed"
        print_text(f"{status:8} {what:10} {detail}")

    def on_all(self, what: str, check: Callable[[], tuple[str, Any]]) -> list[Any] | None:
        """Runs a check on every rank and prints its line. The check returns (detail, finding) and must not communicate.

        Returns the findings by rank, or None after a failed line if the check raised UserError on any rank.
        """
        detail = ""
        found = None
        problem = None
        try:
            detail, found = check()
        except UserError as error:
            problem = str(error)
        everywhere = distributed.gather_objects((detail, found, problem))
        problems = dict.fromkeys(
            f"on {host}: {problem}"
            for host, (_, _, problem) in zip(self.hosts, everywhere, strict=True)
            if problem is not None
        )
        if problems:
            self.add("failed", what, "; ".join(problems))
            return None
        if detail:
            self.add("ok", what, everywhere[0][0])
        return [found for _, found, _ in everywhere]

    def same(self, what: str, values: list[Any] | None, explain: str) -> None:
        """Prints a failed line if the hosts' values differ; nothing if the check has already failed."""
        if values is None:
            return
        odd = dict.fromkeys(
            host for host, value in zip(self.hosts, values, strict=True) if value != values[0] and host != self.hosts[0]
        )
        if odd:
            self.add("failed", what, f"{', '.join(odd)}: {explain} than on {self.hosts[0]}")


def ranks_and_hosts(checks: Checklist, recipe: Recipe) -> None:
    """Checks that all ranks respond, and lists the hosts."""
    ranks = distributed.world_size()
    total = distributed.all_reduce(torch.tensor([distributed.rank() + 1.0], device=distributed.device()))
    told = distributed.gather_objects((socket.gethostname(), distributed.is_local_rank0()))
    number: dict[str, int] = {}
    for host, first in told:
        number[host] = number.get(host, 0) + first
        # Containers may share a host name: each local rank 0 starts another host.
        checks.hosts.append(host if number[host] < 2 else f"{host} ({number[host]})")
    right = float(total) == ranks * (ranks + 1) / 2
    checks.add(
        "ok" if right else "failed", "ranks", f"{ranks} respond" + ("" if right else ", but an all-reduce is wrong")
    )
    if recipe.num_ranks is None:
        checks.add("warning", "ranks", "num_ranks is empty in the recipe: a missing hostfile would not be detected")
    elif recipe.num_ranks != ranks:
        checks.add("failed", "ranks", f"the recipe expects num_ranks={recipe.num_ranks}; check the hostfile")
    share = {host: checks.hosts.count(host) for host in dict.fromkeys(checks.hosts)}
    checks.add("ok", "hosts", f"{len(share)}: " + ", ".join(f"{host} ({count})" for host, count in share.items()))
    if len(set(share.values())) > 1:
        checks.add("warning", "hosts", "the numbers of ranks differ; is that intended?")


def versions_line(environment: Environment) -> str:
    """The versions that must agree on all hosts, as text."""
    shown = ("ksl_ds", "python", "torch", "deepspeed", "transformers")
    return ", ".join(f"{name} {environment.versions.get(name, 'missing')}" for name in shown)


def config_of_rank_0(recipe: Recipe) -> dict[str, Any] | None:
    """The DeepSpeed configuration on rank 0, None on other ranks."""
    return deepspeed_config(recipe) if distributed.is_rank0() else None


def device_check(checks: Checklist, recipe: Recipe) -> None:
    """Checks that all devices support the recipe's precision."""

    def check() -> tuple[str, Any]:
        precision = recipe.training.precision
        check_precision(precision)
        if distributed.device().type == "cpu":
            return f"no GPU found: ranks run on the CPU in {precision}", None
        name = torch.cuda.get_device_name(distributed.device())
        return f"{name}, {size(_device_memory())}, {precision}", name

    checks.same("device", checks.on_all("device", check), "another device")


def model_check(checks: Checklist, recipe: Recipe) -> ModelFolder | None:
    """Checks that the model's files are readable and equal on all hosts. Returns the folder, or None."""
    model = recipe.model

    def fetch() -> tuple[str, Any]:
        return "", local_folder(model.path, model.revision) if distributed.is_local_rank0() else None

    def check() -> tuple[str, Any]:
        folder = open_model(model.path, model.revision, trust_remote_code=model.trust_remote_code)
        rows, width = folder.shape(folder.embedding_name)
        folder.tokenizer()
        files = sorted((path.name, path.stat().st_size) for path in folder.path.glob("*") if path.suffix in COMPARED)
        digest = bytes_sha256((folder.path / "config.json").read_bytes() + repr(files).encode())
        code = ", runs code of its repository (model.trust_remote_code)" if model.trust_remote_code else ""
        return f"{folder.path}: embedding {rows:,} x {width:,}{code}", digest

    if checks.on_all("model", fetch) is None:
        return None
    digests = checks.on_all("model", check)
    if digests is None:
        return None
    checks.same("model", digests, "other files")
    return ModelFolder(local_folder(model.path, model.revision), trust_remote_code=model.trust_remote_code)


def method_check(checks: Checklist, recipe: Recipe, folder: ModelFolder, config: dict[str, Any]) -> None:
    """Checks that the recipe's method can train the architecture, as the run does before it loads weights."""

    def check() -> tuple[str, Any]:
        if not distributed.is_rank0():
            return "", None
        adapter = prepare_method(recipe, folder.config, config, recipe.method)
        detail = f"{recipe.method} supports the architecture {folder.config.model_type}"
        if getattr(adapter, "target_modules", None) == ALL_LINEAR:
            detail += f"; PEFT has no default modules for it: lora.target_modules is {ALL_LINEAR}"
        return detail, None

    checks.on_all("method", check)


def text_check(checks: Checklist, recipe: Recipe, folder: ModelFolder) -> tuple[int, int, int] | None:
    """Checks that the text is readable and equal on all hosts.

    Returns tokens of the longest pair, of the longest response, and of the beginning that all training prompts share; None
    where the text cannot be read.
    """
    text = recipe.text

    def check() -> tuple[str, Any]:
        tokenizer = folder.tokenizer()
        _ = folder.end_ids
        splits: list[Split] = ["train", "valid", "test"] if text.valid else ["train", "test"]
        corpora, every = load_texts(text, splits, recipe.text_seed, tokenizer)
        digests = [corpus_sha256(corpus) for corpus in corpora.values()]
        counts = [f"{len(examples):,} {name}" for name, examples in every.items()]
        longest = max(len(example) for examples in every.values() for example in examples)
        response = max(len(example.response_ids) for examples in every.values() for example in examples)
        shared = shared_beginning(every["train"])
        check_positions(every, folder.positions, recipe.evaluation.max_new_tokens, virtual_tokens(recipe))
        return f"{', '.join(counts)} pairs; the longest has {longest} tokens", (digests, longest, response, shared)

    found = checks.on_all("text", check)
    if found is None:
        return None
    checks.same("text", [digests for digests, *_ in found], "other text")
    _, longest, response, shared = found[0]
    return longest, response, shared


def scores_and_wandb(checks: Checklist, recipe: Recipe) -> None:
    """Checks sacrebleu's tokenizer, COMET and wandb on rank 0."""
    evaluation = recipe.evaluation
    try:
        check_scores(evaluation)
        comet = f" and COMET's {evaluation.comet}" if evaluation.comet else ""
        works = "work" if comet else "works"
        checks.add(
            "ok", "scores", f"sacrebleu's tokenizer {evaluation.tokenize}{comet} {works} on rank 0, which scores"
        )
    except UserError as error:
        checks.add("failed", "scores", str(error))
    mode = tracking_mode(recipe)
    reason = why_offline() if mode in ("auto", "online") else ""
    if reason:
        checks.add("warning" if mode == "online" else "ok", "wandb", f"offline: {reason}")
    else:
        checks.add("ok", "wandb", mode if mode in ("off", "offline") else "online")


def smallest_device(checks: Checklist) -> int:
    """The smallest rank's memory in bytes: of its GPU, or its share of the host's memory."""
    neighbours = checks.hosts.count(checks.hosts[distributed.rank()]) if distributed.device().type == "cpu" else 1
    return min(distributed.gather_objects(_device_memory() // neighbours))


def memory_check(checks: Checklist, recipe: Recipe, longest: tuple[int, int, int] | None, memory: int) -> None:
    """Compares the estimate for the recipe's method at the longest pair of the text with `memory` bytes per rank."""
    recipe = copy.deepcopy(recipe)
    try:
        plan: Plan = plan_of(recipe)
        if longest is not None:
            recipe.text.max_length, plan.response_length, plan.shared_length = longest
        training = plan.training()
        method = plan.method(Estimated.of(recipe), checkpointing=recipe.training.gradient_checkpointing)
    except UserError as error:
        checks.add("failed", "memory", str(error))
        return
    zero = plan.zero.on_hosts(distributed.ranks_of_host())
    needs = rank_needs(method, training, zero, distributed.world_size())
    taken = needs.device + (training.reserved if distributed.device().type == "cuda" else needs.host)
    status = "failed"
    if taken <= SPARE * memory:
        status = "ok"
    elif taken <= memory:
        status = "warning"
    at_least = "" if method.working is not None else "more than "
    line = f"{recipe.method} needs about {at_least}{size(taken)} of {size(memory)} per rank (see ksl-ds estimate)"
    if method.working is None:
        status = "failed" if status == "failed" else "warning"
        line += f"; activations: unknown for this architecture: {method.unknown}"
    if status != "ok":
        fewest = min_ranks(method, training, plan.zero, round(SPARE * memory))
        line += "; lower training.micro_batch_size, or use training.gradient_checkpointing=true"
        line += f", or {fewest} ranks" if fewest and fewest > distributed.world_size() else ""
    checks.add(status, "memory", line)
    whole = training.weight_bytes * (sum(method.trained) + sum(method.frozen))
    if plan.zero.stage == 3 and recipe.evaluation.gather_weights and whole > SPARE * memory:
        line = f"translation gathers the whole model, {size(whole)}, on every rank; use evaluation.gather_weights=false"
        checks.add("failed", "memory", line)


def _device_memory() -> int:
    """Total memory of this rank's device in bytes."""
    if distributed.device().type == "cuda":
        return torch.cuda.get_device_properties(distributed.device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def shared_check(checks: Checklist, recipe: Recipe) -> None:
    """Checks that run_dir will be on a shared file system, since all ranks write checkpoints there."""
    there: Path = distributed.broadcast_from_rank0(_nearest(recipe))
    name = distributed.run_on_rank0(lambda: _probe_file(there))
    if name is None:
        return  # not writable: reported by `disk_check`

    def seen() -> tuple[str, Any]:
        for _ in range(SECONDS_TO_SEE):
            # A listing asks the server; the absence of a single name may be cached.
            if there.is_dir() and name in os.listdir(there):
                return f"{there} is the same on all hosts", None
            time.sleep(1)
        raise UserError(f"a file that rank 0 wrote to {there} is not visible; run_dir must be on a shared file system")

    checks.on_all("run_dir", seen)
    distributed.run_on_rank0(lambda: (there / name).unlink())


def _nearest(recipe: Recipe) -> Path:
    """The run folder, or its nearest existing parent."""
    run_dir = Path(recipe.run_dir).absolute()
    return next(parent for parent in (run_dir, *run_dir.parents) if parent.exists())


def _probe_file(folder: Path) -> str | None:
    try:
        with tempfile.NamedTemporaryFile(prefix=".ksl_ds-check-", dir=folder, delete=False) as file:
            return Path(file.name).name
    except OSError:
        return None


def disk_check(checks: Checklist, recipe: Recipe, folder: ModelFolder) -> None:
    """Checks that rank 0 can write the run's largest output, a model."""
    there = _nearest(recipe)
    free = shutil.disk_usage(there).free
    needed = sum(path.stat().st_size for path in folder.path.glob("*.safetensors"))
    if not os.access(there, os.W_OK):
        checks.add("failed", "disk", f"{there} cannot be written")
        return
    line = f"{size(free)} free at {there}; the run writes a model of up to {size(needed)}"
    checks.add("failed" if free < needed else "ok", "disk", line)


def resume_check(checks: Checklist, recipe: Recipe, folder: ModelFolder, config: dict[str, Any]) -> None:
    """Checks that the run in run_dir can be resumed, as far as known without the weights."""
    run_dir = Path(recipe.run_dir)
    try:
        before = previous_results(run_dir, recipe)
        check_inputs(run_dir, recipe, inputs_of(recipe, folder, config))
    except UserError as error:
        checks.add("failed", "resume", str(error))
    else:
        if before is not None:
            done = ", ".join(before.stages) or "no stage"
            checks.add("ok", "resume", f"{run_dir} can be resumed, {done} complete; weights are compared on loading")
