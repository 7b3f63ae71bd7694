"""Comparisons without a model: what is planned, what is found again, which differences are called significant, in words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.processes import run, succeeds
from helpers.synthetic_comparison import REFERENCES, good, perfect, poor, rambling, write_comparison, write_run
from helpers.synthetic_run import NUMBERS

from ksl_ds.cli import main
from ksl_ds.commands.compare import main as run_compare
from ksl_ds.comparison import runner
from ksl_ds.comparison import tables as report
from ksl_ds.comparison.entries import Entry, comparison_dir, differs, entries_of, finished, scored_by_lottery, seeds_of
from ksl_ds.comparison.results import Outcome, finish
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import Recipe
from ksl_ds.environment import hardware_and_versions
from ksl_ds.errors import UserError
from ksl_ds.files import write_json
from ksl_ds.lottery.shift import Shift
from ksl_ds.report.records import BootstrapScore, EntryRun, Metrics, SeedTest, read_comparison
from ksl_ds.report.tables import size
from ksl_ds.text.significance import paired_bootstrap

BASE = ["run_dir=runs/x", "model.path=m", "text.train=t.jsonl", "text.test=t.jsonl"]


def recipe(*words: str) -> Recipe:
    return load_recipe(Recipe, None, [*BASE, *words])


# --- the plan ---


def test_entries_run_in_an_order_in_which_rows_are_known():
    entries = entries_of(
        recipe("compare.alphas=[.05,.5]", "compare.methods=[lora,ticket,embed,random,untuned]").compare
    )
    assert [entry.key for entry in entries] == [
        "untuned",
        "embed_tuning",
        "partial_tuning_alpha_0.05",
        "partial_tuning_alpha_0.5",
        "rows_at_random",
        "lora",
    ]
    compare_section = recipe("compare.seeds=[3,4]").compare
    assert seeds_of(Entry("untuned"), compare_section) == [3]
    assert seeds_of(Entry("lora"), compare_section) == [3, 4]


def test_an_entrys_recipe_is_one_that_tune_takes_on_the_same_text_for_every_seed():
    home = Path("runs/x")
    whole = recipe("seed=7", "draw.every=3", "draw.alpha=.5", "compare.rows=9")
    for seed in (0, 1):
        own = Entry("frequency").recipe(whole, home, seed, 9)
        assert (own.seed, own.text.seed, own.method) == (seed, 7, "ticket")
        assert (own.draw.selection, own.draw.top_k, own.draw.every) == ("frequency", 9, None)
        assert own.run_dir == f"runs/x/runs/rows_by_frequency-seed{seed}"
    ticket = Entry("ticket", 0.25).recipe(whole, home, 1, None)
    assert (ticket.draw.selection, ticket.draw.alpha) == ("alpha", 0.25)
    assert Entry("embed").recipe(whole, home, 1, None).draw.every == 3
    assert Entry("lora").recipe(recipe("text.seed=5"), home, 1, None).text.seed == 5
    assert whole == recipe("seed=7", "draw.every=3", "draw.alpha=.5", "compare.rows=9"), "the original is left alone"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["compare.methods=[embed,tiket]"], r"compare.methods is tiket; did you mean ticket\?"),
        (["compare.methods=[untuned,random]"], "compare.methods has random, .* add embed"),
        (["compare.seeds=[1,1]"], "compare.seeds is .*none twice"),
        (["compare.seeds=[-1]"], "compare.seeds is -1; it should be greater than or equal to 0"),
        (["compare.alphas=[.05,2]"], "compare.alphas is 2"),
        (["compare.rows=0"], "compare.rows is 0"),
        (["text.seed=-1"], "text.seed is -1"),
    ],
)
def test_mistakes_in_the_section_are_one_sentence(words, sentence):
    with pytest.raises(UserError, match=sentence):
        recipe(*words)


def test_recipes_differ_only_where_a_method_reads_them():
    wanted = recipe()
    theirs = json.loads(json.dumps(vars(recipe("lora.r=4", "verbose=true", "run_dir=y")), default=vars))
    assert differs(theirs, wanted, "ticket") == "" == differs(theirs, wanted, "untuned")
    assert differs(theirs, wanted, "lora") == "lora.r is 4 there and 8 here"
    theirs = json.loads(json.dumps(vars(recipe("embed_tuning.max_steps=5")), default=vars))
    assert differs(theirs, wanted, "newline") == ""
    assert differs(theirs, wanted, "random") == "embed_tuning.max_steps is 5 there and None here"


# --- what is there already ---


def test_a_run_is_found_again_unless_its_recipe_changed(tmp_path):
    home = tmp_path / "x"
    whole = recipe(f"run_dir={home}")
    entry = Entry("lora")
    assert finished(entry, entry.folder(home, 0), entry.recipe(whole, home, 0, None)) is None
    write_run(whole, entry, 0, home, good)
    found = finished(entry, entry.folder(home, 0), entry.recipe(whole, home, 0, None))
    assert found.stages["lora"].test_loss == 2.0
    changed = entry.recipe(recipe(f"run_dir={home}", "lora.r=4"), home, 0, None)
    with pytest.raises(
        UserError, match=r"lora-seed0 holds a run of another recipe: lora.r is 8 there and 4 here; move"
    ):
        finished(entry, entry.folder(home, 0), changed)
    # A run that was stopped before its scores is none; where the recipe is the same it can be resumed.
    found.stages = {}
    (entry.folder(home, 0) / "results.json").write_text(found.to_json())
    assert finished(entry, entry.folder(home, 0), changed) is None


def test_a_lotterys_stages_serve_for_its_seed_and_its_alpha(tmp_path):
    run_dir = tmp_path / "lottery"
    whole = recipe(f"run_dir={run_dir}", "draw.alpha=.5", "draw.every=8")
    run_dir.mkdir()
    names = ("untuned", "embed_tuning", "partial_transfer", "partial_tuning")
    results = {
        "stages": {name: NUMBERS[name] | {"steps": 1, "planned_steps": 1} for name in names},
        "baselines": {},
        "text": {},
        "environment": hardware_and_versions(),
        "recipe": whole,
    }
    write_json(run_dir / "results.json", results)
    (run_dir / "recipe.yaml").write_text("")
    home = comparison_dir(whole)
    assert home == run_dir / "compare"

    def serves(entry: Entry, seed: int = 0, asked: Recipe = whole) -> bool:
        return scored_by_lottery(entry, run_dir, entry.recipe(asked, home, seed, 3)) is not None

    assert serves(Entry("untuned")) and serves(Entry("embed")) and serves(Entry("ticket", 0.5))
    assert serves(Entry("transfer", 0.5))
    assert not serves(Entry("ticket", 0.25)) and not serves(Entry("embed"), seed=1)
    assert not serves(Entry("lora")) and not serves(Entry("frequency"))
    other = recipe(f"run_dir={run_dir}", "draw.alpha=.5", "draw.every=8", "embed_tuning.max_steps=2")
    assert not serves(Entry("embed"), asked=other) and serves(Entry("untuned"), asked=other)
    elsewhere = recipe(f"run_dir={run_dir}", "draw.alpha=.5", "draw.every=8", "text.seed=4")
    assert not serves(Entry("embed"), asked=elsewhere)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="neither a comparison nor a finished run"):
        comparison_dir(recipe(f"run_dir={tmp_path}"))
    assert comparison_dir(recipe(f"run_dir={tmp_path / 'new'}")) == tmp_path / "new"


# --- rows ---


def shift_of(counts: list[int], num_samples: int = 576) -> Shift:
    count_V = torch.tensor(counts, dtype=torch.int32)
    return Shift(count_V, count_V.float(), count_V.float(), num_samples, "float32")


def test_controls_take_as_many_rows_as_the_ticket_or_as_they_are_told():
    shift = shift_of([50, 48, 47, 40, 29, 0])  # alpha .05 needs k >= 47, .5 needs 29
    assert runner.rows_of_controls(recipe(), shift) == 3
    assert runner.rows_of_controls(recipe("draw.alpha=.5"), shift) == 5
    assert runner.rows_of_controls(recipe("compare.rows=2"), shift) == 2
    assert runner.rows_of_controls(recipe("draw.top_k=4"), shift_of([3, 2, 1, 0])) == 4


def planned(monkeypatch, shift: Shift, whole: Recipe) -> tuple[runner.Comparison, list[str]]:
    """A comparison after embed tuning with seed 0; the keys that were really run are listed."""
    ran: list[str] = []
    monkeypatch.setattr(
        runner, "_found", lambda entry, *more: Outcome(EntryRun(folder=entry.key)) if entry.key in ran else None
    )
    monkeypatch.setattr(runner, "_run_entry", lambda comparison, entry, seed, wanted: ran.append(entry.key))
    comparison = runner.Comparison(whole, Path("runs/x"))
    comparison.outcomes["embed_tuning"] = {0: Outcome(EntryRun(folder="runs/embed_tuning-seed0"))}
    comparison.shifts[0] = shift
    for entry in entries_of(whole.compare):
        if entry.method != "embed":
            outcome = runner._outcome(comparison, entry, 0)
            comparison.outcomes.setdefault(entry.key, {})[0] = outcome
    return comparison, ran


def test_levels_that_draw_alike_share_a_run_and_empty_ones_say_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    whole = recipe(
        "compare.alphas=[1e-9,.05,.06,.5]", "compare.methods=[embed,transfer,ticket,top_k]", "draw.alpha=.05"
    )
    comparison, ran = planned(monkeypatch, shift_of([60, 48, 30, 0]), whole)
    assert ran == [
        "partial_transfer_alpha_0.05",
        "partial_transfer_alpha_0.5",
        "partial_tuning_alpha_0.05",
        "partial_tuning_alpha_0.5",
    ]
    outcomes = {key: by_seed[0].entry for key, by_seed in comparison.outcomes.items()}
    assert outcomes["partial_tuning_alpha_0.06"].same_as == "partial_tuning_alpha_0.05"
    assert outcomes["partial_transfer_alpha_0.06"].same_as == "partial_transfer_alpha_0.05"
    assert outcomes["rows_of_largest_D"].same_as == "partial_tuning_alpha_0.05"  # as many, hence the same
    empty = outcomes["partial_tuning_alpha_1e-09"]
    assert empty.empty and not empty.failed and "the ticket is empty" in empty.missing


def test_without_embed_tuning_what_needs_it_fails_and_the_rest_goes_on(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    ran: list[str] = []

    def run_entry(comparison, entry, seed, wanted):
        if entry.method == "embed":
            raise UserError("the loss of step 1 is nan")
        ran.append(entry.key)

    monkeypatch.setattr(runner, "_run_entry", run_entry)
    monkeypatch.setattr(
        runner, "_found", lambda entry, *more: Outcome(EntryRun(folder=entry.key)) if entry.key in ran else None
    )
    monkeypatch.setattr(runner, "finish", lambda *arguments: None)
    with pytest.raises(
        UserError, match=r"2 of 4 entries failed: embed tuning \(seed 0\), partial tuning alpha 0.5 \(s"
    ):
        run_compare(recipe("compare.methods=[embed,ticket,newline,lora]", "compare.alphas=[.5]", "compare.seeds=0"))
    assert ran == ["one_row_newline", "lora"]


class Tokenizer:
    """Like SentencePiece, which puts a piece of its own before a newline."""

    bos_token_id = 1

    def __call__(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=[29871, 13])

    def decode(self, ids):
        return {13: "\n"}[ids[0]]


def test_one_row_is_the_token_that_the_text_really_has():
    opened = SimpleNamespace(tokenizer=Tokenizer(), prompts=[[7, 8], [7, 9]])
    frequency_V = torch.zeros(30000, dtype=torch.int64)
    frequency_V[[13, 7]] = 5
    assert runner.single_row("newline", opened, frequency_V) == 13
    assert runner.single_row("first_prompt_token", opened, frequency_V) == 7
    with pytest.raises(runner.UnavailableRow, match=r"bos \(1\) does not occur"):
        runner.single_row("bos", opened, frequency_V)
    opened.tokenizer.bos_token_id = None
    with pytest.raises(runner.UnavailableRow, match="no token for bos"):
        runner.single_row("bos", opened, frequency_V)


# --- significance ---


def hypotheses(translate) -> list[str]:
    return [translate(number) for number in range(len(REFERENCES))]


def test_the_bootstrap_is_sacrebleus_own(tmp_path):
    """The same p, mean and interval as sacrebleu's command line prints for the same files."""
    systems = {"embed": hypotheses(good), "ticket": hypotheses(poor)}
    found, signatures = paired_bootstrap(systems, REFERENCES, "embed", "13a")
    for name, lines in {"refs": REFERENCES, **systems}.items():
        (tmp_path / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    words = ["refs", "-i", "embed", "ticket", "-m", "bleu", "chrf", "--chrf-word-order", 2, "--paired-bs", "-f", "text"]
    printed = succeeds(run("sacrebleu", *words, "-w", 4, cwd=tmp_path)).stdout
    scores = re.findall(r"([\d.]+) \(([\d.]+) ± ([\d.]+)\)", printed)
    ours = [found[name][metric] for name in systems for metric in ("bleu", "chrf")]
    for tested, numbers in zip(ours, scores, strict=True):
        assert (tested.score, tested.mean, tested.half_width) == pytest.approx(tuple(map(float, numbers)), abs=1e-4)
    p_values = [float(number) for number in re.findall(r"\(p = ([\d.]+)\)", printed)]
    assert [found["ticket"][metric].p for metric in ("bleu", "chrf")] == pytest.approx(p_values, abs=1e-4)
    assert found["ticket"]["bleu"].p < 0.05 and found["embed"]["bleu"].p is None
    assert found["ticket"]["bleu"].difference == pytest.approx(
        found["ticket"]["bleu"].score - found["embed"]["bleu"].score
    )
    assert "bs:1000" in signatures["bleu"] and "nw:2" in signatures["chrf"]


def test_no_difference_is_never_significant():
    """sacrebleu alone gives p = 1/1001 to two systems that say the same, or that both score nothing."""
    systems = {"a": hypotheses(good), "same": hypotheses(good)}
    found, _ = paired_bootstrap(systems, REFERENCES, "a", "13a", ["bleu"])
    assert found["same"]["bleu"].p == 1.0 and found["same"]["bleu"].difference == 0
    nothing = {"a": ["x"] * len(REFERENCES), "b": ["y"] * len(REFERENCES)}
    assert paired_bootstrap(nothing, REFERENCES, "a", "13a", ["bleu"])[0]["b"]["bleu"].p == 1.0


def of_seed(difference: float, p: float) -> SeedTest:
    bleu = Metrics(bleu=BootstrapScore(score=5.0, mean=5.0, half_width=1.0, difference=difference, p=p))
    return SeedTest(whole=bleu, first_line=bleu)


@pytest.mark.parametrize(
    ("of_seeds", "significant"),
    [
        ([(1.0, 0.01), (2.0, 0.04)], True),
        ([(-1.0, 0.01), (-2.0, 0.04)], True),
        ([(1.0, 0.01), (2.0, 0.06)], False),
        ([(1.0, 0.01), (-2.0, 0.01)], False),
        ([(0.5, 0.001)], True),
    ],
)
def test_a_difference_is_significant_with_every_seed_and_in_one_direction(of_seeds, significant):
    tests = {str(seed): of_seed(*numbers) for seed, numbers in enumerate(of_seeds)}
    mean, largest, found = report.difference(tests)
    assert found is significant
    assert largest == max(p for _, p in of_seeds)
    assert mean == pytest.approx(sum(d for d, _ in of_seeds) / len(of_seeds))


# --- tables, words, files ---


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A finished comparison of made-up runs: its folder and its results.json."""
    home = tmp_path_factory.mktemp("runs") / "made-up"
    finish(*write_comparison(home))
    return home, read_comparison(home / "results.json")


def test_stages_are_means_and_spreads_over_seeds(compared):
    _, results = compared
    ticket = results.stages["partial_tuning_alpha_0.5"]
    assert ticket.test_loss == pytest.approx(2.6) and ticket.seeds == 2
    assert ticket.spread["test_loss"] == pytest.approx(0.2 / 2**0.5)
    assert results.stages["lora"].seeds == 1 and results.stages["lora"].spread["bleu"] is None
    assert "partial_tuning_alpha_0.05" not in results.stages
    for name in ("trained_parameters", "test_loss", "bleu", "chrf", "first_line_bleu", "stop_rate", "output_length"):
        assert name in ticket.content()
    assert results.environment.versions["sacrebleu"] and results.recipe["compare"]["seeds"] == [0, 1]


def test_the_score_table(compared):
    table = report.score_table(compared[1])
    rows = {row[0]: dict(zip([column.name for column in table.columns], row, strict=True)) for row in table.rows}
    assert list(rows) == [
        "copying the source", "untuned", "full tuning", "embed tuning", "partial tuning alpha 0.05",
        "partial tuning alpha 0.5", "partial tuning alpha 0.52", "lora",
    ]  # fmt: skip
    assert rows["partial tuning alpha 0.5"]["test loss"] == "2.600 ±0.141"
    assert rows["lora"]["test loss"] == "3.200"
    assert rows["full tuning"]["tuned file"] == "513 MiB" and rows["full tuning"]["BLEU"] == "100.0 ±0.0"
    assert set(list(rows["partial tuning alpha 0.05"].values())[1:]) == {"–"}
    notes = " ".join(table.notes)
    assert "± is the standard deviation over 2 seeds." in notes
    assert "partial tuning alpha 0.05 (seeds 0, 1): the ticket is empty: the largest D is 0.01." in notes
    assert "lora (seed 1): the loss of step 2 is nan." in notes
    assert (
        "partial tuning alpha 0.52 (seeds 0, 1): the same rows as partial tuning alpha 0.5, hence the same run."
        in notes
    )


def test_the_table_of_differences(compared):
    table = report.difference_table(compared[1])
    names = [column.name for column in table.columns]
    assert names[2] == "against embed tuning" and "against full tuning" in names and "against untuned" in names
    rows = {row[0]: row for row in table.rows}
    assert "partial tuning alpha 0.05" not in rows
    ticket = rows["partial tuning alpha 0.5"]
    assert ticket[2].startswith("-") and ticket[2].endswith("*") and ticket[3] == "0.001"
    assert rows["embed tuning"][2:6] == ["–"] * 4
    assert rows["full tuning"][2].startswith("+")
    low, _, high = ticket[1].partition(" to ")
    assert float(low) < compared[1].stages["partial_tuning_alpha_0.5"].bleu < float(high)
    # On first lines the ticket says what the untuned model says, in whole answers it does not.
    at = names.index("against untuned")
    assert ticket[at].endswith("*") and ticket[at + 2] == "+0.0" and ticket[at + 3] == "1.000"


def test_the_words_name_what_is_significant_and_what_only_stops(compared):
    sentences = report.readings(compared[1])
    assert (
        "BLEU against embed tuning: significantly above it: full tuning; significantly below it: partial tuning alpha 0.5, "
        "partial tuning alpha 0.52, lora." in sentences
    )
    assert any(
        text.startswith("first-line BLEU against untuned: ")
        and "no significant difference: partial tuning alpha 0.5, partial tuning alpha 0.52, lora" in text
        for text in sentences
    )
    stopping = [text for text in sentences if "learned to stop" in text]
    assert all(
        text.endswith("but not on the first line: all of the gain is the model learning to stop.") for text in stopping
    )
    assert [text.partition(":")[0] for text in stopping] == [
        "partial tuning alpha 0.5",
        "partial tuning alpha 0.52",
        "lora",
    ]
    assert "test loss not below the untuned model's (3.000): lora." in sentences
    assert not any("not above that of copying" in text for text in sentences)


def test_from_prints_what_the_run_printed(compared, capsys, tmp_path):
    home, results = compared
    assert main(["compare", "--from", str(home / "results.json")]) == 0
    first = capsys.readouterr().out
    assert main(["compare", f"--from={home / 'results.json'}"]) == 0
    assert capsys.readouterr().out == first
    assert "significantly below it" in first and "2.600 ±0.141" in first
    (tmp_path / "results.json").write_text("{}")
    assert main(["compare", "--from", str(tmp_path / "results.json")]) == 2
    assert "holds no comparison" in capsys.readouterr().err
    assert main(["compare", "--from"]) == 2
    assert capsys.readouterr().err == ("ksl-ds: argument --from: expected one argument; see ksl-ds compare --help\n")
    assert main(["compare", "recipe.yaml", "--from", "results.json"]) == 2
    assert "takes the results.json of one comparison" in capsys.readouterr().err


def test_the_report_holds_tables_words_figures_and_samples(compared):
    page = (compared[0] / "report.html").read_text()
    for text in ("2.600 ±0.141", "significantly below it", "learned to stop", "Training loss", "Sample translations"):
        assert text in page
    assert page.count("<svg") == 3
    assert "&lt;b&gt;menu&lt;/b&gt;" in page and "<b>menu</b>" not in page
    assert "one run with one seed" not in page


def test_a_test_text_of_few_sentences_gets_no_bootstrap(tmp_path, monkeypatch):
    written = write_comparison(tmp_path / "x")
    monkeypatch.setattr(report, "MIN_SENTENCES", 41)
    finish(*written)
    results = read_comparison(tmp_path / "x" / "results.json")
    assert results.comparison.tests == {}
    assert any("Fewer than 41 test sentences" in text for text in report.readings(results))
    assert [column.name for column in report.difference_table(results).columns][2:] == []


def test_sizes_of_files():
    sizes = {None: "–", 0: "–", 288: "288 B", 168_400: "164 KiB", 538_060_032: "513 MiB", 27e9: "25.1 GiB"}
    assert {number: size(number) for number in sizes} == sizes


def test_made_up_translations_are_what_the_tests_take_them_for():
    assert rambling(3).startswith(poor(3)) and perfect(3) == REFERENCES[3]


def test_an_entry_with_another_base_model_is_refused(tmp_path):
    """Entries that were found keep their model; one that starts with another is no comparison."""
    parts = {"deepspeed": {}, "model_files": {"config.json": "a"}, "ticket": None}
    weights = {"old": "4 01", "same": "4 01", "changed": "4 02"}
    for name, digest in weights.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "inputs.json").write_text(json.dumps({**parts, "weights": {"embed.weight": digest}}))
    (tmp_path / "before").mkdir()  # by a version that recorded nothing
    missing, before, old = (
        Outcome(EntryRun(**words)) for words in ({"missing": "it"}, {"folder": "before"}, {"folder": "old"})
    )
    outcomes = {"untuned": {0: before}, "lora": {0: missing, 1: old}}
    comparison = runner.Comparison(recipe(), tmp_path, outcomes)
    runner._check_same_model(comparison, tmp_path / "same")
    with pytest.raises(UserError, match=r"the model m has changed since .*old was run \(embed.weight differs\)"):
        runner._check_same_model(comparison, tmp_path / "changed")
    assert not (tmp_path / "changed" / "inputs.json").exists() and (tmp_path / "old" / "inputs.json").exists()
