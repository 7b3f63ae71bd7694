"""What a finished run shows: the table of stages, the drawn tokens, the report, and where everything lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ksl_ds import distributed
from ksl_ds.config.methods import Stage, label_of
from ksl_ds.errors import UserError
from ksl_ds.files import read_text
from ksl_ds.lottery.ks import critical_count
from ksl_ds.lottery.ticket import Shift, Ticket
from ksl_ds.report import plots
from ksl_ds.report.html import NOTHING, Section, what_was_run, write_report
from ksl_ds.report.records import Scores, read_metrics
from ksl_ds.report.tables import direction_table, print_table, print_text, stage_table, ticket_rows, ticket_table
from ksl_ds.scan.report import scan_folders
from ksl_ds.text.scores import read_translations
from ksl_ds.training.run import RunContext

TOKENS_SHOWN = 40
ECDFS_SHOWN = 6
SAMPLES_SHOWN = 12
THRESHOLDS = (0.05, 0.5, 0.95)
SCANNED = (Stage.EMBED_TUNING, Stage.FULL_TUNING, Stage.LORA)  # stages that leave a whole model or LoRA's adapter


def show_stages(run: RunContext) -> None:
    """Writes results.json and prints the table of stages with the baselines beside it."""
    run.save_results()
    if distributed.is_rank0():
        stages = run.results.baselines | run.stages
        run.tracker.summary(stages)
        print_table(stage_table(stages))
        if run.recipe.text.directions:
            print_table(direction_table(stages))


def scan_result(run: RunContext) -> None:
    """Scans the model that a stage has left against the base model, into `scan/`, where the recipe asks for it. Collective."""
    out = run.dir / "scan"
    stage = next((name for name in SCANNED if name in run.stages), None)
    if not run.recipe.scan or stage is None or distributed.run_on_rank0(lambda: (out / "results.json").is_file()):
        return
    found = scan_folders(run.folder, run.dir / "checkpoints" / stage, out, run.recipe.draw.alpha, "output")
    if distributed.is_rank0():
        run.results.scan = {"stage": str(stage), **{key: found[key] for key in ("alpha", "all", "kinds")}}
    run.save_results()


def summarise(
    run: RunContext, shift: Shift, drawn: Ticket, frequency_V: Tensor, sections: Sequence[Section] = ()
) -> None:
    """Ends a lottery run: prints the tables, writes results.json and report.html.

    Parameters
    ----------
    run
        The open run, with all stages complete.
    shift
        The KS test of embed tuning.
    drawn
        The ticket drawn from it, with the rows of embed tuning.
    frequency_V
        int64 (V,): how often each token occurs in the training text.
    sections
        Further parts of the report.
    """
    rows = ticket_rows(
        drawn.token_ids,
        [run.tokenizer.decode([number]) or piece for number, piece in zip(drawn.token_ids, drawn.tokens, strict=True)],
        drawn.count,
        drawn.statistic,
        drawn.pvalue,
        drawn.shift_ratio,
        frequency_V[drawn.token_ids].tolist(),
    )
    run.results.draw = {
        "rows": len(drawn),
        "vocab_size": drawn.vocab_size,
        "num_samples": drawn.num_samples,
        "selection": drawn.selection,
        "alpha": drawn.alpha,
        "method": drawn.method,
        "tested_dtype": drawn.tested_dtype,
        "largest_statistic": int(drawn.count_V.max()) / drawn.num_samples,
        "tokens": rows,
    }
    show_stages(run)
    print_table(ticket_table(rows, limit=TOKENS_SHOWN))
    distributed.run_on_rank0(
        lambda: write_run_report(
            run,
            title=f"KS-Lottery: {run.dir.name}",
            stages=run.results.baselines | run.stages,
            ticket_rows=rows,
            figures=_figures(run, shift, drawn, frequency_V),
            samples=_samples(run),
            notes=_steps_saved(run),
            sections=sections,
        )
    )
    for name, what in {
        "ticket": "the ticket, tuned",
        "report.html": "the report",
        "checkpoints": "embed-tuned model, partial transfer",
        "translations": "all hypotheses",
    }.items():
        print_text(f"{what + ':':36} {run.dir / name}")


def write_run_report(
    run: RunContext,
    *,
    title: str,
    stages: Mapping[str, Scores] = NOTHING,
    ticket_rows: Sequence[Mapping[str, Any]] = (),
    figures: Mapping[str, Figure] = NOTHING,
    samples: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    sections: Sequence[Section] = (),
) -> None:
    """Writes the run's report.html, figures to wandb too; on rank 0. What every run has is added: recipe, text, hardware.

    Parameters are those of `write_report`; `notes` are those of the command, dropped pairs are noted here.
    """
    for caption, figure in figures.items():
        run.tracker.figure(caption, figure)
    write_report(
        run.dir / "report.html",
        title=title,
        recipe_yaml=read_text(run.dir / "recipe.yaml"),
        stages=stages,
        ticket_rows=ticket_rows,
        figures=figures,
        samples=samples,
        notes=[
            *notes,
            *(
                f"{name} text: {count:,} pairs left out, {reason}."
                for name, part in run.results.text.items()
                for reason, count in part.dropped.items()
            ),
        ],
        summary=what_was_run(
            run.recipe,
            {name: part.pairs for name, part in run.results.text.items()},
            {name: stage.steps for name, stage in run.stages.items()},
            distributed.world_size(),
        ),
        sections=sections,
        environment=run.results.environment,
    )


def _figures(run: RunContext, shift: Shift, drawn: Ticket, frequency_V: Any) -> dict[str, Any]:
    statistic_V: Any = shift.count_V / shift.num_samples  # numpy takes CPU tensors as they are
    shift_ratio_V: Any = shift.shift_ratio_V
    thresholds = {
        alpha: critical_count(drawn.num_samples, alpha, drawn.method) / drawn.num_samples for alpha in THRESHOLDS
    }
    top_K = torch.tensor(drawn.count).argsort(descending=True, stable=True)[:ECDFS_SHOWN]
    texts = [run.tokenizer.decode([drawn.token_ids[index]]) for index in top_K.tolist()]
    return {
        "Scores of the stages": plots.stage_bars(run.results.baselines | run.stages),
        "Training": plots.training_curves(read_metrics(run.dir)),
        "Distribution of D over the vocabulary": plots.d_histogram(statistic_V, thresholds),
        "Rows of largest D, before and after": plots.ecdf_rows(
            drawn.base_rows_KD[top_K].float().numpy(), drawn.rows_KD[top_K].numpy(), texts
        ),
        "D against how often a token occurs in the training text": plots.d_against(
            statistic_V, frequency_V, "occurrences in the training text", drawn_K=drawn.token_ids
        ),
        "D against how far a row moved for its length": plots.d_against(
            statistic_V, shift_ratio_V, "shift ratio", drawn_K=drawn.token_ids
        ),
    }


def _samples(run: RunContext) -> list[dict[str, str]]:
    """Sources, references and every stage's translation of the first test sentences."""
    test = run.corpora["test"]
    # In turns of the directions, where there are several.
    turns = chain.from_iterable(zip_longest(*test.by_direction().values()))
    places = [place for place in turns if place is not None][:SAMPLES_SHOWN]
    samples = [{"source": test.pairs[place].source, "reference": test.pairs[place].target} for place in places]
    for stage in run.stages:
        folder = run.dir / "translations" / stage
        lines = read_translations(folder, "hypotheses")
        if len(lines) != len(test.pairs):
            raise UserError(
                f"{folder / 'hypotheses.txt'} has {len(lines)} lines for {len(test.pairs)} sentences; choose another run_dir"
            )
        for sample, place in zip(samples, places, strict=True):
            sample[label_of(stage)] = lines[place]
    return samples


def _steps_saved(run: RunContext) -> list[str]:
    stage = run.stages[Stage.EMBED_TUNING]
    if stage.steps == stage.planned_steps:
        return []
    return [f"Embed tuning ended after {stage.steps} of {stage.planned_steps} steps: the ticket had settled."]
