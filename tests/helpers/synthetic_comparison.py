"""The runs of a comparison, made up: folders with scores, translations and losses as `compare` would find them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from helpers.synthetic_run import NUMBERS
from ksl_ds.comparison.entries import Entry
from ksl_ds.comparison.results import Outcome
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.environment import hardware_and_versions
from ksl_ds.files import write_text
from ksl_ds.report.records import EntryRun, RunResults
from ksl_ds.text.scores import score, write_translations

SOURCES = [f"You can open document {number} in the <b>menu</b> of window {number * 7}." for number in range(40)]
REFERENCES = [f"Vous pouvez ouvrir le document {n} dans le menu de la fenêtre {n * 7}." for n in range(40)]


def perfect(number: int) -> str:
    return REFERENCES[number]


def good(number: int) -> str:
    return REFERENCES[number] if number % 4 else "Vous ouvrez le document dans un menu."


def poor(number: int) -> str:
    return f"Vous pouvez ouvrir {number} dans la rivière." if number % 5 else REFERENCES[number]


def rambling(number: int) -> str:
    """The same first line as `poor`, then much else."""
    return poor(number) + "\nEnglish: And so on.\nFrench: Et ainsi de suite, et cetera.\n" * 3


def write_run(recipe: Recipe, entry: Entry, seed: int, home: Path, translate, **scores: Any) -> Outcome:
    """Writes the folder of a run; its entry in `outcomes`."""
    wanted = entry.recipe(recipe, home, seed, 3)
    folder = Path(wanted.run_dir)
    hypotheses = [translate(number) for number in range(len(SOURCES))]
    write_translations(folder / "translations" / entry.stage, SOURCES, REFERENCES, hypotheses)
    stopped = ["\n" not in text for text in hypotheses]
    found = score(hypotheses, REFERENCES, stopped, [len(text.split()) for text in hypotheses], "13a")
    stage = {
        "trained_parameters": 0,
        "test_loss": 2.0,
        "steps": 3,
        "planned_steps": 3,
        "seconds": 61.0,
        "peak_memory_bytes": 2**31,
        **vars(found),
        **scores,
    }
    results = RunResults.from_content(
        {
            "stages": {str(entry.stage): stage},
            "baselines": {"copying_source": NUMBERS["copying_source"]},
            "text": {
                "train": {"pairs": 200, "dropped": {}, "sha256": "0"},
                "test": {"pairs": len(SOURCES), "dropped": {}, "sha256": "1"},
            },
            "environment": hardware_and_versions().content(),
            "recipe": json.loads(json.dumps(vars(wanted), default=vars)),
        },
        "made up",
    )
    write_text(folder / "results.json", results.to_json())
    losses = [3.0, 2.5 + seed / 10, 2.2] if stage["trained_parameters"] else []
    lines = [{"stage": entry.stage, "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    place = str(folder.relative_to(home))
    return Outcome(EntryRun(folder=place, stage=str(entry.stage), scores=results.stages[str(entry.stage)]), results)


def write_comparison(home: Path, *words: str) -> tuple[Recipe, Path, dict[str, dict[int, Outcome]]]:
    """What `finish` takes: a recipe, the new folder `home` with runs in it, and their outcomes by key and seed."""
    home.mkdir(parents=True)
    words = (f"run_dir={home}", "model.path=m", "text.test=t.jsonl", "tracking.wandb=off", *words)
    recipe = load_recipe(Recipe, None, list(words))
    write_text(home / "recipe.yaml", "run_dir: <made up> & so on\n")

    def both(entry: Entry, translate, **scores: Any) -> dict[int, Outcome]:
        return {seed: write_run(recipe, entry, seed, home, translate, **scores) for seed in (0, 1)}

    empty = Outcome(EntryRun(missing="the ticket is empty: the largest D is 0.01", empty=True))
    ticket = both(Entry("ticket", 0.5), poor, trained_parameters=1728, test_loss=2.5)
    ticket[1].entry.scores.test_loss = 2.7
    outcomes = {
        "untuned": {0: write_run(recipe, Entry("untuned"), 0, home, rambling, test_loss=3.0)},
        "embed_tuning": both(Entry("embed"), good, trained_parameters=28_311_552),
        "partial_tuning_alpha_0.05": {0: empty, 1: empty},
        "partial_tuning_alpha_0.5": ticket,
        "partial_tuning_alpha_0.52": {
            seed: Outcome(run.entry.model_copy(update={"same_as": "partial_tuning_alpha_0.5"}), run.results)
            for seed, run in ticket.items()
        },
        "full_tuning": both(Entry("full"), perfect, trained_parameters=134_515_008, tuned_file_bytes=538_060_032),
        "lora": {
            0: write_run(recipe, Entry("lora"), 0, home, poor, trained_parameters=460_800, test_loss=3.2),
            1: Outcome(EntryRun(missing="the loss of step 2 is nan", failed=True)),
        },
    }
    return recipe, home, outcomes
