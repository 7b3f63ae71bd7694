"""A run's numbers, made up but of realistic size and shape, for tests of the report."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats

from ksl_ds.report import plots
from ksl_ds.report.records import Scores
from ksl_ds.report.tables import ticket_rows

D = 576
TOKENS = ["Ċ", "Ġthe", "Ġto", ".", "Ġof", ",", "Ġ<script>", "[/INST]", "é", "▁mañana", "语", "\u200f$x_1$"]

NUMBERS = {
    "copying_source": {"trained_parameters": 0, "test_loss": None, "bleu": 2.2, "chrf": 26.7, "first_line_bleu": 2.2}
    | {"stop_rate": 1.0, "output_length": 11.9},
    "untuned": {"trained_parameters": 0, "test_loss": 3.17, "bleu": 0.4, "chrf": 19.4, "first_line_bleu": 6.9}
    | {"stop_rate": 0.13, "output_length": 59.4, "seconds": 0.0, "peak_memory_bytes": 0},
    "embed_tuning": {"trained_parameters": 28_311_552, "test_loss": 2.0, "bleu": 8.3, "chrf": 31.7}
    | {"first_line_bleu": 8.3, "stop_rate": 0.95, "output_length": 14.2, "seconds": 402.7, "peak_memory_bytes": 2.6e9},
    "partial_transfer": {"trained_parameters": 0, "test_loss": 2.99, "bleu": 1.3, "chrf": 21.4, "first_line_bleu": 5.1}
    | {"stop_rate": 0.52, "output_length": 38.0, "seconds": 0.0, "peak_memory_bytes": 0},
    "partial_tuning": {"trained_parameters": 10_368, "test_loss": 2.57, "bleu": 3.9, "chrf": 25.2}
    | {"first_line_bleu": 3.9, "stop_rate": 0.95, "output_length": 15.0, "seconds": 391.2, "peak_memory_bytes": 2.2e9},
}
NEEDED = ("trained_parameters", "test_loss", "bleu", "chrf", "first_line_bleu")


def scores(**numbers: Any) -> Scores:
    """Scores of which only some are known; whatever is not given is None."""
    return Scores.model_construct(**(dict.fromkeys(NEEDED) | numbers))


STAGES = {name: scores(**numbers) for name, numbers in NUMBERS.items()}

SAMPLES = [
    {
        "source": "You can customize the menu by adding <b>new</b> entries.",
        "reference": "Vous pouvez personnaliser le menu en ajoutant de nouvelles entrées.",
        "untuned": "Vous pouvez changer le menu.\n\nEnglish: The\nFrench: Le\n" + "English: The menu. " * 40,
        "embed_tuning": "Vous pouvez personnaliser le menu en ajoutant des entrées nouvelles.",
        "partial_transfer": "",
        "partial_tuning": "Vous pouvez customiser le menu en ajoutant nouveaux entrées.",
    },
    {
        "source": "The file was saved.",
        "reference": "תיקייה נשמרה & <script>alert('x')</script>",
        "untuned": "\nThe file",
        "embed_tuning": "Le fichier a été enregistré.",
        "partial_transfer": "Le fichier fut sauvé.\n",
        "partial_tuning": "Le fichier était enregistré. " + "x" * 300,
    },
]


def metrics(steps: int = 98) -> list[dict]:
    """Lines of metrics.jsonl of two trainings, draws during the first, and an evaluation."""
    noise = np.random.default_rng(0)
    lines = []
    for stage, start, end, peak in (("embed_tuning", 3.2, 2.0, 5e-3), ("partial_tuning", 3.2, 2.6, 1e-2)):
        for step in range(1, steps + 1):
            share = step / steps
            line = {"stage": stage, "step": step, "time": 0.0, "loss": end + (start - end) * math.exp(-4 * share)}
            line["loss"] += noise.normal(0, 0.08)
            line["learning_rate"] = peak * min(share / 0.03, (1 + math.cos(math.pi * share)) / 2)
            line["gradient_norm"] = None if step == 1 else noise.lognormal(0, 0.3)
            if step % max(1, steps // 8) == 0:
                line["valid_loss"] = end + 0.1 + (start - end) * math.exp(-4 * share)
                if stage == "embed_tuning":
                    line |= {"ticket_size": int(30 * share**2), "ticket_overlap": min(1.0, 0.4 + 0.6 * share)}
            lines.append(line)
        lines.append({"stage": stage, "step": 0, "time": 0.0, "bleu": 3.0, "test_loss": 2.0})
    return lines


def shifts(vocab_size: int = 49152) -> dict[str, np.ndarray]:
    """Statistics of all rows, most of them untouched, and a few rows before and after."""
    noise = np.random.default_rng(1)
    touched = noise.random(vocab_size) < 0.2
    ratio = np.where(touched, noise.lognormal(-2.4, 0.6, vocab_size), 0.0)
    count = np.where(touched, np.rint(D * 0.09 * ratio**0.8 * noise.lognormal(0, 0.15, vocab_size)), 0).astype(np.int64)
    frequency = np.where(touched, noise.zipf(1.6, vocab_size).clip(max=40_000), 0)
    before = noise.normal(0, 0.1, (len(TOKENS), D)).astype(np.float32)
    after = before * 1.3 + noise.normal(0.03, 0.05, before.shape).astype(np.float32)
    return {"count": count, "ratio": ratio, "frequency": frequency, "before": before, "after": after}


def report_contents(vocab_size: int = 49152) -> dict:
    """What `write_report` takes, except its path and title."""
    shift = shifts(vocab_size)
    ids = np.argsort(-shift["count"], kind="stable")[: len(TOKENS)]
    pvalues = [float(stats.kstwo.sf(k / D, D / 2)) for k in shift["count"][ids]]
    columns = [shift["count"][ids] / D, pvalues, shift["ratio"][ids], shift["frequency"][ids]]
    rows = ticket_rows(ids.tolist(), TOKENS, shift["count"][ids].tolist(), *(np.asarray(c).tolist() for c in columns))
    statistic = shift["count"] / D
    figures = {
        "Scores of every stage: BLEU of the whole output and of its first line, chrF++, stop rate": plots.stage_bars(
            STAGES
        ),
        "Training": plots.training_curves(metrics()),
        "D over the vocabulary": plots.d_histogram(statistic, {0.05: 47 / D, 0.5: 29 / D, 0.95: 18 / D}),
        "The rows of largest D": plots.ecdf_rows(shift["before"], shift["after"], TOKENS),
        "D against frequency": plots.d_against(statistic, shift["frequency"], "occurrences in the training text", ids),
        "D against shift ratio": plots.d_against(statistic, shift["ratio"], "|after - before| / |before|", ids),
    }
    recipe = "run_dir: runs/quickstart\nmodel:\n  path: models/SmolLM2-135M-Instruct # <&>\n" + "text: {}\n" * 60
    return {
        "recipe_yaml": recipe,
        "stages": STAGES,
        "ticket_rows": rows,
        "figures": figures,
        "samples": SAMPLES,
        "notes": ["text.train: 12 of 805 pairs were dropped, 12 longer than text.max_words=10."],
    }
