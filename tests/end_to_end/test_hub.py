"""Hub ids instead of folders, against a Hub of the test's own: download, cache, revisions, refusals in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.hub import Hub, hub
from helpers.processes import run, succeeds
from helpers.runs import RECIPE, ZERO3
from helpers.tiny import make_model_folder, write_pairs
from helpers.warm_start import Warm

TEXT = ("text.train=org/text", "text.valid=org/text", "text.test=org/text")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A working folder, and the Hub that `ksl-ds` asks there, with a cache of its own."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "ds.json").write_text(json.dumps(ZERO3))
    (folder / "recipe.yaml").write_text(RECIPE)
    for name in ("text", "text_without_test"):
        (folder / name).mkdir()
        for split in ("train", "validation", "test"):
            write_pairs(folder / name / f"{split}.jsonl")
    (folder / "text_without_test" / "test.jsonl").unlink()
    shutil.copytree(folder / "text", folder / "doubled")
    write_pairs(folder / "doubled" / "train.jsonl", repeat=2)
    first = make_model_folder(folder / "first", tied=True)
    other = make_model_folder(folder / "other", tied=True, seed=1)
    (folder / "half").mkdir()
    (folder / "half" / "config.json").write_text((first / "config.json").read_text())
    with hub() as served:
        served.add("models", "org/tiny", main=first, v1=other)
        served.add("models", "org/cut", main=first)
        served.add("models", "org/half", main=folder / "half")
        served.add("models", "org/gated", gated=True, main=first)
        served.add("datasets", "org/text", main=folder / "text", v1=folder / "doubled")
        served.add("datasets", "org/gated-text", gated=True, main=folder / "text")
        served.add("datasets", "org/two-splits", main=folder / "text_without_test")
        yield folder, served, Warm()


def ksl_ds(job: tuple[Path, Hub, Warm], *words: object, offline: bool = False):
    folder, served, warm = job
    served.asked.clear()
    environment = {"HF_ENDPOINT": served.endpoint, "HF_HOME": str(folder / "home")}
    return run("ksl-ds", *words, cwd=folder, warm=warm, HF_HUB_OFFLINE=str(int(offline)), **environment)


def results(job: tuple[Path, Hub, Warm], run_dir: str) -> dict:
    return json.loads((job[0] / run_dir / "results.json").read_text())


def test_a_lottery_by_ids_then_from_the_cache_then_of_another_revision(job):
    folder, served, _ = job
    served.cuts["model.safetensors"] = 1  # the connection breaks once, and the download goes on where it was
    succeeds(ksl_ds(job, "lottery", "recipe.yaml", "model.path=org/tiny", *TEXT))
    assert served.cuts == {"model.safetensors": 0}
    found = results(job, "run")
    assert found["draw"]["rows"] > 0 and {part["pairs"] for part in found["text"].values()} == {12, 6}
    card = (folder / "run" / "ticket" / "README.md").read_text()
    assert "base_model: org/tiny\n" in card
    adapter = json.loads((folder / "run" / "ticket" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "org/tiny"

    same = ("evaluate", "recipe.yaml", "model.path=org/tiny", *TEXT)
    succeeds(ksl_ds(job, *same, "run_dir=offline", offline=True))
    assert served.asked == []
    untuned = found["stages"]["untuned"]
    assert results(job, "offline")["stages"]["untuned"]["test_loss"] == untuned["test_loss"]

    succeeds(ksl_ds(job, *same, "run_dir=v1", "model.revision=v1"))
    assert any("/revision/v1" in line for line in served.asked)
    assert results(job, "v1")["stages"]["untuned"]["test_loss"] != untuned["test_loss"]

    checked = succeeds(
        ksl_ds(job, "check", "recipe.yaml", "model.path=org/tiny", *TEXT, "run_dir=new", "text.revision=v1")
    )
    assert "24 train, 12 valid, 6 test pairs" in checked.stdout


LOG_IN = "log in with `hf auth login`"


@pytest.mark.parametrize(
    "words, parts",
    {
        "no such model": (["model.path=org/none"], ["org/none is not a folder", "no such repository", LOG_IN]),
        "no such revision": (["model.revision=v2"], ["org/tiny", "at revision v2", "no such revision"]),
        "gated model": (["model.path=org/gated"], ["it is gated; ask for access at http://", "/org/gated, ", LOG_IN]),
        "no weights": (["model.path=org/half"], ["org--half", "without weights"]),
        "cut model": (["model.path=org/cut"], ["org/cut", "no connection to http://", "check the network"]),
        "no such dataset": (["text.train=org/none"], ["text.train: org/none", "no such repository", LOG_IN]),
        "no such revision of a dataset": (["text.revision=v2"], ["text.train: org/text", "no such revision"]),
        "gated dataset": (
            ["text.test=org/gated-text"],
            ["text.test", "it is gated", "/datasets/org/gated-text, ", LOG_IN],
        ),
        "no such split": (["text.test=org/two-splits"], ["text.test: org/two-splits", 'Unknown split "test"']),
    }.values(),
)
def test_a_refusal_is_one_sentence(job, words, parts):
    folder, served, _ = job
    served.cuts["model.safetensors"] = 99 if "model.path=org/cut" in words else 0
    refused(ksl_ds(job, "lottery", "recipe.yaml", "run_dir=refused", "model.path=org/tiny", *TEXT, *words), parts)
    assert not (folder / "refused").exists()


def test_a_token_without_access_a_server_out_of_order_and_an_empty_cache(job):
    folder, served, _ = job
    words = ("lottery", "recipe.yaml", "run_dir=refused", *TEXT)
    (folder / "home" / "token").write_text("hf_OfAnotherUser")
    refused(ksl_ds(job, *words, "model.path=org/gated"), ["org/gated", "it is gated"])
    refused(ksl_ds(job, "estimate", "org/gated"), ["model org/gated: it is gated"])
    (folder / "home" / "token").unlink()
    served.status = 503
    refused(ksl_ds(job, *words, "model.path=org/new"), ["org/new", "answers 503", "try again later"])
    served.status = 0
    refused(ksl_ds(job, *words, "model.path=org/new", offline=True), ["org/new", "not complete in the cache"])


def refused(process, parts: list[str]) -> None:
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("ksl-ds: ")]
    assert [part for part in parts if part not in line] == []
