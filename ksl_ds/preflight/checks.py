"""Is everything that a run needs in place on every host: a list to read before an expensive job.

Nothing is trained, no weight is loaded, and nothing is left behind. Every finding is gathered, so a line speaks for all ranks
and names the hosts where something is missing. What cannot be seen from here is whether the hosts stay up.
"""

from __future__ import annotations

import copy
import hashlib
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
from ksl_ds.errors import UserError
from ksl_ds.estimate.memory import min_ranks, rank_needs
from ksl_ds.estimate.plan import Estimated, Plan, plan_of
from ksl_ds.model.adapters import ALL_LINEAR
from ksl_ds.model.folder import ModelFolder, local_folder, open_model
from ksl_ds.model.methods import prepare_method
from ksl_ds.report.tables import print_text, size
from ksl_ds.report.tracking import tracking_mode, why_offline
from ksl_ds.sharding.checkpoint import Checkpoints
from ksl_ds.sharding.engine import check_precision, deepspeed_config
from ksl_ds.text.batches import check_positions, encode_corpus
from ksl_ds.text.corpus import load_corpus
from ksl_ds.text.prompt import Prompt
from ksl_ds.text.scores import check_tokenizer
from ksl_ds.training.inputs import check_inputs, inputs_of
from ksl_ds.training.run import corpus_sha256, previous_results, virtual_tokens

COMPARED = (".safetensors", ".json", ".model")  # files of a model folder, by their sizes
SECONDS_TO_SEE = 10  # for a new file to come through a network's file system
SPARE = 0.9  # of a device's memory; beyond it the allocator's fragments may decide


@dataclass
class Checklist:
    """Findings in order, the same on every rank, and what the checks pass on to later ones."""

    failed: int = 0
    hosts: list[str] = field(default_factory=list)  # by rank

    def add(self, status: str, what: str, detail: str) -> None:
        """Prints a line: status is ok, warning or failed."""
        self.failed += status == "failed"
        print_text(f"{status:8} {what:10} {detail}")

    def on_all(self, what: str, check: Callable[[], tuple[str, Any]]) -> list[Any] | None:
        """Runs a check that does not communicate on every rank; its detail, and what it found by rank.

        None, and a failed line that names the hosts, when it raises UserError anywhere.
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
        """A failed line when the hosts disagree; nothing after a check that failed already."""
        if values is None:
            return
        odd = dict.fromkeys(
            host for host, value in zip(self.hosts, values, strict=True) if value != values[0] and host != self.hosts[0]
        )
        if odd:
            self.add("failed", what, f"{', '.join(odd)}: {explain} than on {self.hosts[0]}")


def ranks_and_hosts(checks: Checklist, recipe: Recipe) -> None:
    """Every rank answers, there are as many as expected, and they lie on these hosts."""
    ranks = distributed.world_size()
    total = distributed.all_reduce(torch.tensor([distributed.rank() + 1.0], device=distributed.device()))
    told = distributed.gather_objects((socket.gethostname(), distributed.is_local_rank0()))
    number: dict[str, int] = {}
    for host, first in told:
        number[host] = number.get(host, 0) + first
        # Containers may share a host's name: a rank that is first on its host begins another one.
        checks.hosts.append(host if number[host] < 2 else f"{host} ({number[host]})")
    right = float(total) == ranks * (ranks + 1) / 2
    checks.add(
        "ok" if right else "failed", "ranks", f"{ranks} answer" + ("" if right else ", but an all-reduce is wrong")
    )
    if recipe.num_ranks is None:
        checks.add("warning", "ranks", "num_ranks is empty in the recipe: a missing hostfile would go unnoticed")
    elif recipe.num_ranks != ranks:
        checks.add("failed", "ranks", f"the recipe expects num_ranks={recipe.num_ranks}; check the hostfile")
    share = {host: checks.hosts.count(host) for host in dict.fromkeys(checks.hosts)}
    checks.add("ok", "hosts", f"{len(share)}: " + ", ".join(f"{host} ({count})" for host, count in share.items()))
    if len(set(share.values())) > 1:
        checks.add("warning", "hosts", "they have different numbers of ranks; is that meant?")


def versions_line(environment: dict[str, Any]) -> str:
    """The versions that must be the same on all hosts, for reading."""
    shown = ("ksl_ds", "python", "torch", "deepspeed", "transformers")
    return ", ".join(f"{name} {environment['versions'].get(name, 'missing')}" for name in shown)


def config_of_rank_0(recipe: Recipe) -> dict[str, Any] | None:
    """The DeepSpeed configuration, which rank 0 reads for all."""
    return deepspeed_config(recipe) if distributed.is_rank0() else None


def device_check(checks: Checklist, recipe: Recipe) -> None:
    """What a rank computes on can do the recipe's precision."""

    def check() -> tuple[str, Any]:
        precision = recipe.training.precision
        check_precision(precision)
        if distributed.device().type == "cpu":
            return f"no GPU is seen: ranks compute on the CPU in {precision}", None
        name = torch.cuda.get_device_name(distributed.device())
        return f"{name}, {size(_device_memory())}, {precision}", name

    checks.same("device", checks.on_all("device", check), "another device")


def model_check(checks: Checklist, recipe: Recipe) -> ModelFolder | None:
    """The model's files are readable, and the same, on every host. The folder on this one; None when they are not."""
    model = recipe.model

    def fetch() -> tuple[str, Any]:
        return "", local_folder(model.path, model.revision) if distributed.is_local_rank0() else None

    def check() -> tuple[str, Any]:
        folder = open_model(model.path, model.revision, trust_remote_code=model.trust_remote_code)
        rows, width = folder.shape(folder.embedding_name)
        folder.tokenizer()
        files = sorted((path.name, path.stat().st_size) for path in folder.path.glob("*") if path.suffix in COMPARED)
        digest = hashlib.sha256((folder.path / "config.json").read_bytes() + repr(files).encode()).hexdigest()
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
    """The architecture can be trained by the recipe's method, as the run itself finds out before it loads weights."""

    def check() -> tuple[str, Any]:
        if not distributed.is_rank0():
            return "", None
        adapter = prepare_method(recipe, folder.config, config, recipe.method)
        detail = f"{recipe.method} is possible for the architecture {folder.config.model_type}"
        if getattr(adapter, "target_modules", None) == ALL_LINEAR:
            detail += f"; PEFT has no default modules for it: lora.target_modules is {ALL_LINEAR}"
        return detail, None

    checks.on_all("method", check)


def text_check(checks: Checklist, recipe: Recipe, folder: ModelFolder) -> tuple[int, int] | None:
    """The text is readable, and the same, on every host. Tokens of the longest pair and response; None when it is not."""
    text = recipe.text

    def check() -> tuple[str, Any]:
        tokenizer = folder.tokenizer()
        prompt = Prompt(text.prompt, text.source_language, text.target_language, tokenizer)
        _ = folder.end_ids
        every = {}
        digests = []
        counts = []
        longest = 0
        response = 0
        for name in ("train", "valid", "test"):
            if name == "valid" and not text.valid:
                continue
            corpus = load_corpus(text, name, recipe.text_seed)
            examples, _ = encode_corpus(corpus, prompt, text.max_length)
            every[name] = examples
            digests.append(corpus_sha256(corpus))
            counts.append(f"{len(examples):,} {name}")
            longest = max(longest, *map(len, examples))
            response = max(response, *(len(example.response_ids) for example in examples))
        check_positions(every, folder.positions, recipe.evaluation.max_new_tokens, virtual_tokens(recipe))
        return f"{', '.join(counts)} pairs; the longest has {longest} tokens", (digests, longest, response)

    found = checks.on_all("text", check)
    if found is None:
        return None
    checks.same("text", [digests for digests, _, _ in found], "other text")
    _, longest, response = found[0]
    return longest, response


def scores_and_wandb(checks: Checklist, recipe: Recipe) -> None:
    """What only rank 0 does: scores and tracking."""
    try:
        check_tokenizer(recipe.evaluation.tokenize)
        checks.add("ok", "scores", f"sacrebleu's tokenizer {recipe.evaluation.tokenize} works on rank 0, which scores")
    except UserError as error:
        checks.add("failed", "scores", str(error))
    mode = tracking_mode(recipe)
    reason = why_offline() if mode in ("auto", "online") else ""
    if reason:
        checks.add("warning" if mode == "online" else "ok", "wandb", f"offline: {reason}")
    else:
        checks.add("ok", "wandb", mode if mode in ("off", "offline") else "online")


def smallest_device(checks: Checklist) -> int:
    """Bytes that every rank has: of its GPU, or of its host's memory shared out to the host's ranks."""
    neighbours = checks.hosts.count(checks.hosts[distributed.rank()]) if distributed.device().type == "cpu" else 1
    return min(distributed.gather_objects(_device_memory() // neighbours))


def memory_check(checks: Checklist, recipe: Recipe, longest: tuple[int, int] | None, memory: int) -> None:
    """The estimate for the recipe's method, at the longest pair of the text, against `memory` bytes a rank."""
    recipe = copy.deepcopy(recipe)
    try:
        plan: Plan = plan_of(recipe)
        if longest is not None:
            recipe.text.max_length, plan.response_length = longest
        training = plan.training()
        method = plan.method(Estimated.of(recipe), checkpointing=recipe.training.gradient_checkpointing)
    except UserError as error:
        checks.add("failed", "memory", str(error))
        return
    needs = rank_needs(method, training, plan.zero, distributed.world_size())
    taken = needs.device + (training.reserved if distributed.device().type == "cuda" else needs.host)
    status = "failed"
    if taken <= SPARE * memory:
        status = "ok"
    elif taken <= memory:
        status = "warning"
    at_least = "" if method.working is not None else "more than "
    line = (
        f"{recipe.method} needs {at_least}{size(taken)} of {size(memory)} a rank, as estimated (ksl-ds estimate shows the "
        "parts)"
    )
    if method.working is None:
        status = "failed" if status == "failed" else "warning"
        line += f"; activations: unknown for this architecture: {method.unknown}"
    if status != "ok":
        fewest = min_ranks(method, training, plan.zero, round(SPARE * memory))
        line += "; lower training.micro_batch_size, or training.gradient_checkpointing=true"
        line += f", or {fewest} ranks" if fewest and fewest > distributed.world_size() else ""
    checks.add(status, "memory", line)
    whole = training.weight_bytes * (sum(method.trained) + sum(method.frozen))
    if plan.zero.stage == 3 and recipe.evaluation.gather_weights and whole > SPARE * memory:
        line = f"translating holds the whole model, {size(whole)}, on every rank; use evaluation.gather_weights=false"
        checks.add("failed", "memory", line)


def _device_memory() -> int:
    """Bytes of this rank's device, all of them."""
    if distributed.device().type == "cuda":
        return torch.cuda.get_device_properties(distributed.device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def shared_check(checks: Checklist, recipe: Recipe) -> None:
    """What rank 0 writes where the run folder will be, every other host sees: all ranks write checkpoints there."""
    there: Path = distributed.broadcast_from_rank0(_nearest(recipe))
    name = distributed.run_on_rank0(lambda: _probe_file(there))
    if name is None:
        return  # not writable, which `disk_check` says

    def seen() -> tuple[str, Any]:
        for _ in range(SECONDS_TO_SEE):
            # A listing asks the server anew, where a single name's absence may be cached.
            if there.is_dir() and name in os.listdir(there):
                return f"{there} is the same on all hosts", None
            time.sleep(1)
        raise UserError(
            f"what rank 0 writes to {there} is not to be seen; run_dir must be on a file system that all share"
        )

    checks.on_all("run_dir", seen)
    distributed.run_on_rank0(lambda: (there / name).unlink())


def _nearest(recipe: Recipe) -> Path:
    """The run folder, or what there is of the way to it."""
    run_dir = Path(recipe.run_dir).absolute()
    return next(parent for parent in (run_dir, *run_dir.parents) if parent.exists())


def _probe_file(folder: Path) -> str | None:
    try:
        with tempfile.NamedTemporaryFile(prefix=".ksl_ds-check-", dir=folder, delete=False) as file:
            return Path(file.name).name
    except OSError:
        return None


def disk_check(checks: Checklist, recipe: Recipe, folder: ModelFolder) -> None:
    """Rank 0 can write what the run leaves: a model, of which unchanged files are linked where the disk allows."""
    there = _nearest(recipe)
    free = shutil.disk_usage(there).free
    needed = sum(path.stat().st_size for path in folder.path.glob("*.safetensors"))
    if not os.access(there, os.W_OK):
        checks.add("failed", "disk", f"{there} cannot be written")
        return
    line = f"{size(free)} free at {there}; the run writes a model of up to {size(needed)}"
    checks.add("failed" if free < needed else "ok", "disk", line)


def resume_check(checks: Checklist, recipe: Recipe, folder: ModelFolder, config: dict[str, Any]) -> None:
    """What the run folder holds can be resumed, as far as is known before the weights are loaded."""
    run_dir = Path(recipe.run_dir)
    try:
        before = previous_results(run_dir, recipe)
        check_inputs(run_dir, recipe, inputs_of(recipe, folder, config))
        for steps in sorted((run_dir / "checkpoints").glob("*_steps")):
            by_rows = steps.name == "partial_tuning_steps" and recipe.partial_tuning.mode == "rows"
            Checkpoints(steps, recipe.checkpoint.keep_last).check_newest(any_world_size=by_rows)
    except UserError as error:
        checks.add("failed", "resume", str(error))
    else:
        if before is not None:
            done = ", ".join(before["stages"]) or "no stage"
            checks.add("ok", "resume", f"{run_dir} goes on, {done} done; weights are compared when they are loaded")
