"""COMET beside BLEU, by a command that takes the options of comet-score 2.2.7 and writes the same file."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from statistics import fmean

import pytest
from helpers.processes import ENVIRONMENT, run, succeeds
from helpers.runs import RECIPE, prepare_inputs
from helpers.tiny import SENTENCES

from ksl_ds.errors import UserError
from ksl_ds.text.comet import check_comet, comet_scores

# The real one is not installed beside the package: its versions of numpy and transformers exclude the package's.
STAND_IN = """#!{python}
import argparse, json, os, sys

parser = argparse.ArgumentParser()
for name in ("-s --sources", "-t --translations", "-r --references", "--model", "--to_json"):
    parser.add_argument(*name.split(), required=True)
parser.add_argument("--gpus", type=int, required=True)
parser.add_argument("--quiet", action="store_true", required=True)
parser.add_argument("--only_system", action="store_true", required=True)
words = parser.parse_args()
if words.model == "no/model":
    print("Traceback (most recent call last):", file=sys.stderr)
    sys.exit("KeyError: \\"Model 'no/model' not supported by COMET.\\"")
of_ranks = [name for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_NTASKS") if name in os.environ]
assert not of_ranks, of_ranks
texts = [[line.strip() for line in open(name)] for name in (words.sources, words.translations, words.references)]
rows = [
    {{"src": source, "mt": text, "ref": reference, "COMET": len(source) / 1e3 + len(text) / 1e2 + len(reference)}}
    for source, text, reference in zip(*texts, strict=True)
]
assert words.model in ("org/metric", os.environ.get("EXPECTED")), words.model
print(words.translations + "\\tscore: 0.0000")
json.dump({{words.translations: rows}}, open(words.to_json, "w"))
"""


@pytest.fixture
def path(tmp_path, monkeypatch) -> str:
    """A PATH with the command, which is also this process' PATH."""
    command = tmp_path / "bin" / "comet-score"
    command.parent.mkdir()
    command.write_text(STAND_IN.format(python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{ENVIRONMENT['PATH']}")
    check_comet.cache_clear()
    return os.environ["PATH"]


def expected(source: str, text: str, reference: str) -> float:
    return len(source) / 1e3 + len(text) / 1e2 + len(reference)


def test_scores_of_sentences(path, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_NTASKS"):
        monkeypatch.setenv(name, "2")
    found = comet_scores("org/metric", ["a b", "c"], ["x\ny\u2028z ", ""], ["é", "fg"])
    assert found == [expected("a b", "x y z", "é"), expected("c", "", "fg")]
    (tmp_path / "metric" / "checkpoints").mkdir(parents=True)
    (tmp_path / "metric" / "checkpoints" / "model.ckpt").write_text("")
    monkeypatch.setenv("EXPECTED", str(tmp_path / "metric" / "checkpoints" / "model.ckpt"))
    monkeypatch.chdir(tmp_path)
    assert comet_scores("metric", ["a"], ["b"], ["c"]) == [expected("a", "b", "c")]
    with pytest.raises(UserError, match="^evaluation.comet=no/model: comet-score failed: KeyError: .*not supported"):
        check_comet("no/model")


def test_without_the_command_nothing_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    check_comet.cache_clear()
    with pytest.raises(UserError, match="needs the command comet-score, which is not installed; `pipx install"):
        check_comet("org/metric")
    if shutil.which("comet-score", path=ENVIRONMENT["PATH"]):
        pytest.skip("comet-score is installed here")
    prepare_inputs(tmp_path, RECIPE)
    (tmp_path / "ds.json").write_text("{}")
    for command in ("lottery", "check"):
        done = run("ksl-ds", command, "recipe.yaml", "evaluation.comet=org/metric", cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "needs the command comet-score" in done.stdout + done.stderr
        assert not (tmp_path / "run").exists()


def test_scores_stand_in_results_table_and_report(path, tmp_path):
    """With two directions: the score of each is the mean of its sentences, and the stage's is the mean of both."""
    prepare_inputs(tmp_path, RECIPE)
    (tmp_path / "ds.json").write_text("{}")
    for direction, some in {"en-fr": SENTENCES[:4], "en-es": SENTENCES[4:]}.items():
        lines = [json.dumps({"source": source, "target": target}) for source, target in some]
        (tmp_path / f"{direction}.jsonl").write_text("\n".join(lines))
    words = ["text.directions=[en-fr,en-es]", "text.train=[]", "text.valid=[]", "text.test={direction}.jsonl"]
    words += ["evaluation.comet=org/metric", "text.max_test_pairs=null"]
    done = succeeds(run("ksl-ds", "evaluate", "recipe.yaml", *words, cwd=tmp_path, PATH=path))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    untuned = results["stages"]["untuned"]
    texts = [
        Path(tmp_path, "run", "translations", "untuned", f"{name}.txt").read_text().split("\n")[:-1]
        for name in ("sources", "hypotheses", "references")
    ]
    scores = [expected(*sentence) for sentence in zip(*texts, strict=True)]
    by_direction = {"en-fr": fmean(scores[:4]), "en-es": fmean(scores[4:])}
    assert {name: of["comet"] for name, of in untuned["directions"].items()} == pytest.approx(by_direction)
    assert untuned["comet"] == pytest.approx(fmean(by_direction.values()))
    assert untuned["signatures"]["comet"] == "org/metric"
    copying = [expected(source, source, reference) for source, _, reference in zip(*texts, strict=True)]
    copied = results["baselines"]["copying_source"]["comet"]
    assert copied == pytest.approx(fmean((fmean(copying[:4]), fmean(copying[4:]))))
    assert "COMET" in done.stdout and f"{untuned['comet']:.4f}" in done.stdout and f"{copied:.4f}" in done.stdout
