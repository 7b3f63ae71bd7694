"""Checks on every host that everything that a run needs is in place; see preflight/checks.py."""

from __future__ import annotations

from ksl_ds import distributed
from ksl_ds.config.schema import Recipe
from ksl_ds.environment import hardware_and_versions
from ksl_ds.errors import UserError
from ksl_ds.estimate.memory import Zero
from ksl_ds.preflight.checks import (
    Checklist,
    config_of_rank_0,
    device_check,
    disk_check,
    memory_check,
    method_check,
    model_check,
    ranks_and_hosts,
    resume_check,
    scores_and_wandb,
    shared_check,
    smallest_device,
    text_check,
    versions_line,
)
from ksl_ds.preflight.traffic import bandwidth_check, ranks_of_copy, traffic_check
from ksl_ds.report.tables import print_text


def main(recipe: Recipe) -> None:
    """Prints the list. Raises UserError when a check failed."""
    checks = Checklist()
    ranks_and_hosts(checks, recipe)
    environment = hardware_and_versions()
    versions = checks.on_all("versions", lambda: (versions_line(environment), environment.versions))
    checks.same("versions", versions, "other versions")
    configs = checks.on_all("deepspeed", lambda: (f"{recipe.deepspeed} fits the recipe", config_of_rank_0(recipe)))
    device_check(checks, recipe)
    folder = model_check(checks, recipe)
    longest = None
    if folder is not None:
        method_check(checks, recipe, folder, configs[0] or {} if configs else {})
        longest = text_check(checks, recipe, folder)
    memory = smallest_device(checks)
    shared_check(checks, recipe)
    zero = Zero.of(distributed.broadcast_from_rank0(configs[0] if configs else None) or {})
    copies = ranks_of_copy(checks, zero)
    bandwidth = bandwidth_check(checks, recipe, copies)
    if distributed.is_rank0():
        scores_and_wandb(checks, recipe)
        if folder is not None:
            memory_check(checks, recipe, longest, memory)
            disk_check(checks, recipe, folder)
            if configs is not None:
                if bandwidth is not None:
                    traffic_check(checks, recipe, bandwidth, zero, copies)
                resume_check(checks, recipe, folder, configs[0])
    checks.failed = distributed.broadcast_from_rank0(checks.failed)
    if checks.failed:
        raise UserError(f"{checks.failed} check{'s' if checks.failed > 1 else ''} failed; see the list")
    print_text("all checks passed")
