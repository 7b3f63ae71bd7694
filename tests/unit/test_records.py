"""Our own files, damaged, edited or of another kind: accepted if nothing is lost, else one sentence that names the file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.mutations import FILES_OF_OTHER_KINDS, REMOVED, REPLACEMENTS, changed, paths
from helpers.processes import REPOSITORY
from helpers.synthetic_comparison import perfect, write_comparison, write_run
from helpers.synthetic_run import metrics

from ksl_ds.cli import main
from ksl_ds.comparison import tables as report
from ksl_ds.comparison.entries import Entry, finished, scored_by_lottery
from ksl_ds.comparison.results import finish, show_file
from ksl_ds.config.load import load_recipe, save_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.lottery.shift import Shift, load_shift, save_shift
from ksl_ds.report import plots
from ksl_ds.report.html import environment_table, reading, what_was_run
from ksl_ds.report.records import (
    ComparisonResults,
    ComparisonSection,
    EntryRun,
    RunResults,
    read_comparison,
    read_metrics,
    read_results,
)
from ksl_ds.report.tables import stage_table
from ksl_ds.report.tracking import Tracker
from ksl_ds.training.run import previous_results

LOOKED_AT = [(), ("seed",), ("text",), ("draw",), ("text", "seed"), ("draw", "alpha"), ("draw", "every")]


def value_at(content: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        content = content[key]
    return content


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_files(path: Path, use: Callable[[], Any], *, accepted: tuple[bytes, ...] = ()) -> None:
    """Every other kind of file in the place of `path`, and `path` cut off anywhere, is refused with its name."""
    content = path.read_bytes()
    cut = [content[:length] for length in {1, 2, 20, len(content) // 3, len(content) // 2, len(content) - 4}]
    for other in [*FILES_OF_OTHER_KINDS, *cut]:
        path.write_bytes(other)
        if other in accepted:
            use()
            continue
        with pytest.raises(UserError, match=path.name) as error:
            use()
        assert "\n" not in str(error.value), other
    path.write_bytes(content)


def check_values(path: Path, use: Callable[[], Any], chosen: Callable[[tuple[Any, ...]], bool]) -> tuple[int, int]:
    """Changes every chosen value of a JSON file in many ways. Returns how many were accepted and how many refused.

    Whatever is accepted must be used without an error; a number that is no number any more must be refused.
    """
    content = json.loads(path.read_text())
    accepted = refused = 0
    for place in filter(chosen, paths(content)):
        for replacement in REPLACEMENTS:
            path.write_text(json.dumps(changed(content, place, replacement)))
            try:
                use()
                accepted += 1
            except UserError as error:
                message = str(error)
                assert str(path.parent) in message and "\n" not in message, (place, replacement, message)
                refused += 1
                continue
            of_other_kind = replacement is not REMOVED and not is_number(replacement) and replacement is not None
            number = place[0] != "recipe" and is_number(value_at(content, place))
            assert not (number and of_other_kind), (place, replacement)
    path.write_text(json.dumps(content))
    use()
    return accepted, refused


@pytest.fixture
def run_dir(tmp_path: Path) -> tuple[Path, Recipe, Entry]:
    """A run folder that holds all that resume and compare look at, with its recipe and its entry in a comparison."""
    home = tmp_path / "home"
    words = [f"run_dir={home}", "model.path=m", "text.test=t.jsonl", "text.train=t.jsonl", "tracking.wandb=off"]
    recipe, entry = load_recipe(Recipe, None, words), Entry("lora")
    write_run(recipe, entry, 0, home, perfect, trained_parameters=4)
    wanted = entry.recipe(recipe, home, 0, 3)
    folder = Path(wanted.run_dir)
    save_recipe(wanted, folder / "recipe.yaml")
    return folder, wanted, entry


def test_results_of_a_run(run_dir, monkeypatch):
    folder, wanted, entry = run_dir
    monkeypatch.setattr("ksl_ds.training.run.load_recipe", lambda *_: wanted)  # which takes its time

    def use() -> None:
        """What resume, compare, certify and the report do with it."""
        scored_by_lottery(Entry("untuned"), folder, wanted)
        finished(entry, folder, wanted)
        results = previous_results(folder, wanted)
        content = json.loads((folder / "results.json").read_text())
        assert json.loads(results.to_json()) == content | {"format_version": 2}
        stages = results.baselines | results.stages
        stage_table(stages)
        reading(stages)
        pairs = {name: part.pairs for name, part in results.text.items()}
        what_was_run(wanted, pairs, {name: stage.steps for name, stage in results.stages.items()}, 1)
        assert all(part.sha256 and set(part.dropped) is not None for part in results.text.values())
        environment_table(results.environment)
        runs = {str(seed): EntryRun(scores=scores) for seed, scores in enumerate(results.stages.values())}
        report.mean_stages(ComparisonSection(order=["a"], seeds=[0], runs={"a": runs}, tests={}))

    path = folder / "results.json"
    use()
    check_files(path, use)
    # Recorded recipes are compared as a whole: there, sections stand for their keys.
    accepted, refused = check_values(path, use, lambda place: place[0] != "recipe" or place[1:] in LOOKED_AT)
    assert refused > 400 and accepted > 50


def test_the_sentence_names_file_and_key(run_dir):
    folder, wanted, _ = run_dir
    content = json.loads((folder / "results.json").read_text())
    for place, replacement, said in (
        (("stages", "lora", "bleu"), "x", "stages.lora.bleu: input should be a valid number"),
        (("stages", "lora", "steps"), REMOVED, "stages.lora.steps: is missing"),
        (("text", "test"), [], "text.test: should be an object, {...}"),
        (("baselines",), None, "baselines: input should be a valid object, {...}"),
    ):
        (folder / "results.json").write_text(json.dumps(changed(content, place, replacement)))
        with pytest.raises(UserError) as error:
            previous_results(folder, wanted)
        message = str(error.value)
        assert message.startswith(f"{folder / 'results.json'}: {said}"), message
        assert message.endswith("; the file was changed or is another kind of file")


def test_results_of_a_comparison_are_no_run_to_resume(run_dir):
    folder, wanted, _ = run_dir
    content = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(content | {"comparison": {}}))
    with pytest.raises(UserError, match=r"results\.json is of a comparison, not of a run"):
        previous_results(folder, wanted)


@pytest.fixture
def small_comparison(tmp_path: Path) -> Path:
    recipe, home, outcomes = write_comparison(tmp_path / "x")
    kept = ("untuned", "embed_tuning", "partial_tuning_alpha_0.05", "partial_tuning_alpha_0.52", "lora")
    outcomes = {key: outcomes[key] for key in kept}
    finish(recipe, home, outcomes)
    return home / "results.json"


@pytest.mark.slow
def test_results_of_a_comparison(small_comparison, monkeypatch):
    monkeypatch.setattr("ksl_ds.comparison.results.print_table", lambda table: None)
    monkeypatch.setattr("ksl_ds.comparison.results.print_text", lambda text: None)

    def use() -> None:
        show_file(small_comparison)

    check_files(small_comparison, use)
    read = ("comparison", "stages", "baselines")
    accepted, refused = check_values(small_comparison, use, lambda place: place[0] in read)
    assert refused > 2000 and accepted > 100


def test_a_score_that_is_null_is_no_error(small_comparison):
    """NaN is written as null: a model whose loss or score is none is compared all the same."""
    content = json.loads(small_comparison.read_text())
    for part in (content["stages"], content["baselines"]):
        for scores in part.values():
            scores |= dict.fromkeys(("test_loss", "chrf", "bleu", "first_line_bleu"))
    small_comparison.write_text(json.dumps(content))
    assert main(["compare", "--from", str(small_comparison)]) == 0
    read_comparison(small_comparison)


def test_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = metrics(16)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def use() -> list[dict[str, Any]]:
        found = read_metrics(tmp_path)
        plots.training_curves(found)
        report.curves({"a": found})
        return found

    assert use() == lines
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # cut off by a kill, and gone on with
    assert use() == lines[:-1]
    path.write_bytes(whole[:-9] + whole)
    assert use() == lines[:-1] + lines[1:]
    for other in FILES_OF_OTHER_KINDS:
        # Alone or in the midst; what a cut-off line leaves begins as a line does.
        path.write_bytes(other)
        if other.startswith(b"{") and other != b"{}" and b"\xe9" not in other or other == b"":
            assert use() == []
            continue
        with pytest.raises(UserError, match=r"metrics\.jsonl"):
            use()
    accepted = 0
    for place in paths(lines[7]):
        for replacement in REPLACEMENTS:
            path.write_text(json.dumps(changed(lines[7], place, replacement)))
            try:
                use()
                accepted += 1
            except UserError as error:
                assert str(error).startswith(f"{path}, line 1, {place[0]}: ".replace("1, ", "1,: ")) or place[0] in str(
                    error
                )
            else:
                of_other_kind = replacement is not REMOVED and not is_number(replacement) and replacement is not None
                known = place[0] != "time" and (place[0], replacement) != ("stage", "x")
                assert not (of_other_kind and known), (place, replacement)
    assert accepted > 10
    path.unlink()
    assert read_metrics(tmp_path) == []


def test_rewinding_keeps_every_other_line_to_the_byte(tmp_path):
    lines = [json.dumps(line) + "\n" for line in metrics(4)] + [
        '{"stage": "x", "step": 1, "é": 1e-05}\n'.replace("é", "e")
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(lines) + '{"stage": "embed_tun')
    recipe = Recipe(run_dir=str(tmp_path))
    recipe.model.path, recipe.tracking.wandb = "m", "off"
    with Tracker(tmp_path, recipe) as tracker:
        tracker.rewind("embed_tuning", 2)
    kept = [text for text in lines if '"embed_tuning"' not in text or json.loads(text)["step"] <= 2]
    assert path.read_text() == "".join(kept) and len(kept) == len(lines) - 2


def test_a_recorded_recipe(run_dir):
    folder, wanted, _ = run_dir
    path = folder / "recipe.yaml"

    def use() -> None:
        previous_results(folder, wanted)

    use()
    content = yaml.safe_load(path.read_text())
    accepted = refused = 0
    for other in [None, [], 7, "x", True, [1], {"x": 1}]:
        path.write_text(yaml.safe_dump(other))
        with pytest.raises(UserError, match=r"recipe\.yaml"):
            use()
    for binary in (b"\xff\xfe\x00", b"\x00", b"\x89PNG", b"a: [", b"a: \xe9", b"run_dir: &a [*a]"):
        path.write_bytes(binary)
        with pytest.raises(UserError, match=r"recipe\.yaml"):
            use()
    kinds = (REMOVED, None, [], {}, 7, "x", True)  # one for each key: reading a recipe takes its time
    for number, place in enumerate(paths(content)):
        path.write_text(yaml.safe_dump(changed(content, place, kinds[number % len(kinds)])))
        try:
            use()
            accepted += 1
        except UserError as error:
            assert "recipe.yaml" in str(error) and "\n" not in str(error), (place, str(error))
            refused += 1
    assert refused > 60 and accepted > 5


def test_the_ks_test_of_all_tokens(tmp_path):
    """draw.safetensors, which resume and compare read."""
    path = tmp_path / "draw.safetensors"
    count_V, length_V = torch.tensor([0, 3, 8], dtype=torch.int32), torch.tensor([0.0, 1.0, 2.0])
    whole = Shift(count_V, length_V, length_V.clone(), num_samples=8, tested_dtype="float32")
    others = {
        "count is above": dataclasses.replace(whole, num_samples=7),
        "num_samples": dataclasses.replace(whole, num_samples="x"),
        r"count is \(3,\) int64": dataclasses.replace(whole, count_V=count_V.long()),
        r"shift_norm is \(2,\)": dataclasses.replace(whole, shift_norm_V=length_V[1:]),
        "shift_ratio holds NaN": dataclasses.replace(whole, shift_ratio_V=length_V / 0),
        "count holds": dataclasses.replace(whole, count_V=-count_V),
    }
    for said, other in others.items():
        save_shift(other, path)
        with pytest.raises(UserError, match=r"draw\.safetensors is not a valid KS test of all tokens"):
            load_shift(path)
        if said not in ("count is above", "num_samples"):
            with pytest.raises(UserError, match=said):
                load_shift(path)
    for content in FILES_OF_OTHER_KINDS:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"draw\.safetensors"):
            load_shift(path)
    save_shift(whole, path)
    assert torch.equal(load_shift(path).count_V, count_V)


def test_a_run_folder_that_is_only_begun_is_resumed(run_dir):
    folder, wanted, _ = run_dir
    (folder / "results.json").unlink()
    (folder / "metrics.jsonl").unlink()
    assert previous_results(folder, wanted) is None and read_results(folder) is None


VERSION_1 = Path(__file__).parent / "results_version_1.json"


@pytest.mark.parametrize(
    ("path", "schema"),
    [(VERSION_1, RunResults), (REPOSITORY / "tests/benchmarks/compare_smollm2_fr.json", ComparisonResults)],
)
def test_files_of_the_first_format_are_read_without_a_loss(path, schema):
    """Of a quickstart and of a comparison, as version 0.1 wrote them."""
    text = path.read_text()
    assert "format_version" not in text
    written = schema.from_json(text, str(path)).to_json()
    assert json.loads(written)["format_version"] == 2
    assert written.replace('  "format_version": 2,\n', "") == text
    assert schema.from_json(written, "written").to_json() == written


def test_a_newer_format_is_refused_in_a_sentence(run_dir):
    folder, wanted, _ = run_dir
    content = json.loads((folder / "results.json").read_text()) | {"format_version": 3}
    (folder / "results.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"results\.json has format_version 3, .* reads up to 2; update ksl_ds"):
        previous_results(folder, wanted)
