"""A scan's folder: results.json, scan.safetensors and report.html, written whole or not at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ksl_ds import distributed
from ksl_ds.environment import hardware_and_versions
from ksl_ds.errors import UserError
from ksl_ds.files import atomic_folder, reason, write_json
from ksl_ds.model.folder import ModelFolder, token_strings
from ksl_ds.report.html import Section, bullets, figure, table, write_report
from ksl_ds.report.tables import print_table, print_text
from ksl_ds.scan.checkpoints import open_checkpoints
from ksl_ds.scan.plots import heat_map, layer_profile
from ksl_ds.scan.results import COUNTS_FILE, results_of, save_counts
from ksl_ds.scan.runner import RowKind, make_plan, run_scan
from ksl_ds.scan.tables import (
    kind_table,
    left_out_sentence,
    left_out_table,
    percent,
    ratio,
    reading,
    row_table,
    token_table,
)

logger = logging.getLogger(__name__)


def scan_folders(before: ModelFolder, after: str | Path, out: Path, alpha: float, rows: RowKind) -> dict[str, Any]:
    """Scans two checkpoints, writes `out`, prints the table; collective. Returns the content of results.json on rank 0.

    Raises
    ------
    UserError
        On every rank, where they cannot be compared or `out` cannot be written. `out` is then not created.
    """
    with distributed.raise_on_all_ranks():
        if out.exists():
            raise UserError(f"{out} already exists; choose another folder for the scan")
        base, tuned = open_checkpoints(before, after)
        plan = make_plan(base, tuned, rows)
    found = run_scan(base, tuned, plan)
    results: dict[str, Any] = {}
    with distributed.raise_on_all_ranks():
        if distributed.is_rank0():
            results = {"before": str(before.path), "after": str(after), "rows_are": f"{rows}s"}
            results |= results_of(plan, found, alpha, [base.embedding, base.head or ""])
            results["environment"] = hardware_and_versions()
            _name_tokens(results, before)
            try:
                with atomic_folder(out) as draft:
                    write_json(draft / "results.json", results)
                    save_counts(plan, found, draft / COUNTS_FILE)
                    _write_report(results, draft / "report.html")
            except OSError as error:
                raise UserError(f"{out} could not be written: {reason(error)}") from None
            print_table(kind_table(results, str(out)))
            if sentence := left_out_sentence(results):
                print_text(sentence)
    return results


def _name_tokens(results: Mapping[str, Any], folder: ModelFolder) -> None:
    """Adds its token to every listed row of an embedding or head; "" where the folder has no tokenizer."""
    listed = [row for ticket in results["tickets"].values() for row in ticket["largest"]]
    try:
        tokens = token_strings(folder.tokenizer(), [row["row"] for row in listed])
    except UserError as error:
        logger.warning(f"{error}; rows are shown without their tokens")
        tokens = [""] * len(listed)
    for row, token in zip(listed, tokens, strict=True):
        row["token"] = token


def _write_report(results: Mapping[str, Any], path: Path) -> None:
    alpha = f"{results['alpha']:g}"
    maps = {
        f"Share of rows with p < {alpha}, in percent": heat_map(
            results, lambda cell: 100 * cell["share"]["nominal"], lambda value: f"{value:.3g}", "rows, %"
        ),
        "Largest D of the rows": heat_map(
            results, lambda cell: cell["largest_statistic"], lambda value: f"{value:.2g}", "largest D"
        ),
        "Median shift ratio of the rows that moved": heat_map(
            results, lambda cell: cell["median_shift_ratio"], lambda value: f"{value:.2g}", "median shift ratio"
        ),
    }
    drawn = [figure(caption, content, f"map{number}") for number, (caption, content) in enumerate(maps.items())]
    sections = [
        Section("Module kinds", table(kind_table(results)) + bullets(*reading(results))),
        Section("Layers and module kinds", "\n".join(drawn)),
    ]
    if any(entry["layer"] is not None for entry in results["layers"]):
        profile = figure("All rows of a layer together", layer_profile(results), "profile")
        sections.append(Section("Profile of the layers", profile))
    sections.append(Section("Rows of largest D", table(row_table(results), tall=True)))
    tokens = [table(token_table(ticket, results["alpha"]), tall=True) for ticket in results["tickets"].values()]
    if tokens:
        sections.append(Section("Embedding and head as tickets", "\n".join(tokens)))
    left_out = left_out_table(results)
    if left_out.rows:
        sections.append(Section("Not compared", table(left_out, tall=True)))
    everything = results["all"]
    write_report(
        path,
        title="Where fine-tuning moved the model",
        summary=(
            f"{results['after']} against {results['before']}: the two-sample KS test of {everything['rows']:,} rows "
            f"({results['rows_are']}) of {everything['tensors']:,} tensors. {percent(everything['share']['nominal'])} of them "
            f"have p < {alpha}, {percent(everything['moved'] / everything['rows'])} moved at all, with a median shift ratio "
            f"of {ratio(everything['median_shift_ratio'])}."
        ),
        sections=sections,
        environment=results["environment"],
    )
