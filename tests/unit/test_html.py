"""report.html as a document: complete in itself, whatever strings a user brings, and honest about scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.html_requests import Page
from helpers.synthetic_run import SAMPLES, STAGES, D, metrics, report_contents, scores
from matplotlib import rcParams

from ksl_ds.config.schema import Recipe
from ksl_ds.environment import hardware_and_versions
from ksl_ds.errors import UserError
from ksl_ds.report import html, plots
from ksl_ds.report.html import Section, reading, what_was_run, write_report
from ksl_ds.report.tables import ticket_rows

HOSTILE = (
    "</title></style></pre><script>x</script><img src=http://a.b/c onerror=d>\"'&{{ 7*7 }}{% raw %}\u202e\ud800]]>"
)
SHOWN = HOSTILE.replace("\ud800", "?")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, title="A run", summary="What was run.", **report_contents())
    return path.read_text(encoding="utf-8")


def test_nothing_leaves_the_file(report):
    page = Page(report)
    assert page.requests == []
    assert "default-src 'none'" in report
    assert "http://" not in report and "https://" not in report


def test_ids_are_unique_and_every_reference_finds_its_target(report):
    page = Page(report)
    assert len(page.ids) == len(set(page.ids))
    assert len(page.references) > 100 and set(page.references) <= set(page.ids)


def test_every_part_is_there_in_reading_order(report):
    headings = ["Scores", "How to read it", "In this run", "Ticket", "Figures", "Sample translations", "Recipe"]
    text = "\n".join(Page(report).text)
    places = [text.index(f"\n{heading}\n", text.index("Hardware and versions")) for heading in headings]
    assert places == sorted(places)
    assert Page(report).tags.count("figure") == 6 and Page(report).tags.count("table") == 3


def test_the_tables_hold_the_cells_of_the_printed_tables(report):
    text = " ".join(word for piece in Page(report).text for word in piece.split())
    assert "embed tuning 28,311,552 2.000 8.3 31.7 8.3 0.95 14.2 6 min 43 s 2.42 GiB" in text
    assert "copying the source 0 – 2.2 26.7 2.2 1.00 11.9 – –" in text


def test_the_ink_of_figures_is_the_pages_and_large_vocabularies_stay_light(tmp_path):
    contents = report_contents(vocab_size=128_256)
    write_report(tmp_path / "report.html", title="", **contents)
    text = (tmp_path / "report.html").read_text()
    assert plots.INK not in text and text.count("currentColor") > 50
    assert len(text) < 1.5e6


def test_hostile_strings_stay_text_wherever_they_come_from(tmp_path):
    rows = ticket_rows([1], [HOSTILE], [40], [40 / D], [1e-3], [0.5])
    before = np.random.default_rng(0).normal(size=(1, D))
    write_report(
        tmp_path / "report.html",
        title=HOSTILE,
        summary=HOSTILE,
        recipe_yaml=HOSTILE,
        stages={HOSTILE: scores(bleu=1.0)},
        ticket_rows=rows,
        figures={HOSTILE: plots.ecdf_rows(before, before + 1, [HOSTILE]), "bars": plots.stage_bars({SHOWN: scores()})},
        samples=[{"source": HOSTILE, "reference": HOSTILE, HOSTILE: HOSTILE, "empty": ""}],
        notes=[HOSTILE],
        sections=[Section(HOSTILE, html.paragraphs(HOSTILE))],
        environment=hardware_and_versions().model_copy(update={"cpu": HOSTILE, "versions": {HOSTILE: HOSTILE}}),
    )
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.requests == [] and not {"script", "img"} & set(page.tags)
    text = "".join(page.text)
    assert text.count(SHOWN) >= 14
    assert "49" not in text


def test_parts_without_content_are_left_out(tmp_path):
    empty = {"recipe_yaml": "", "stages": {}, "ticket_rows": [], "figures": {}, "samples": [], "notes": []}
    write_report(tmp_path / "report.html", title="Nothing yet", **empty)
    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("h2") == 1 and page.tags.count("table") == 1
    assert page.ids == ["hardware-and-versions"]


def test_further_sections_stand_between_figures_and_samples(tmp_path):
    contents = {**report_contents(), "figures": {}}
    more = [Section("Certificate (reconstructed)", html.paragraphs("Agreement was measured."))]
    write_report(tmp_path / "report.html", title="", sections=more, **contents)
    page = Page((tmp_path / "report.html").read_text())
    ids = page.ids
    assert ids[ids.index("certificate-reconstructed") + 1] == "sample-translations"
    assert "Agreement was measured." in page.text


def test_an_unwritable_place_is_one_clear_sentence_and_the_old_report_stays(tmp_path):
    (tmp_path / "report.html").mkdir()
    contents = {**report_contents(), "figures": {}}
    with pytest.raises(UserError, match=r"report\.html cannot be written: Is a directory"):
        write_report(tmp_path / "report.html", title="", **contents)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_what_follows_the_first_line_is_told_apart_in_samples():
    cards = html.samples_html([SAMPLES[0], {"source": "a", "reference": "b", "untuned": "\n\nfirst\nsecond"}])
    assert 'first<span class="rest">\nsecond</span>' in cards
    assert "(empty)" in cards and "set in italics" in cards
    assert "set in italics" not in html.samples_html([{"source": "a", "reference": "b", "untuned": "one line"}])


def test_reading_names_gains_that_are_only_stopping():
    sentences = {stage: [s for s in reading(STAGES) if s.startswith(stage)] for stage in ("embed", "partial tuning")}
    assert sentences["embed"] == [
        "embed tuning: BLEU rises by 7.9 over the untuned model, only by 1.4 on the first line: more than half of the gain "
        "is the model learning to stop."
    ]
    assert "falls by 3.0 on the first line: all of the gain" in sentences["partial tuning"][0]
    assert "not above that of copying the source (26.7)" in sentences["partial tuning"][1]


def test_reading_is_silent_about_a_gain_that_is_real_or_unknown():
    better = scores(bleu=20.0, first_line_bleu=20.0, chrf=50.0, test_loss=1.0)
    assert reading(STAGES | {"partial_tuning": better, "embed_tuning": better, "partial_transfer": better}) == []
    assert reading({"embed_tuning": better}) == []
    assert reading({"untuned": scores(test_loss=1.0), "lora": scores(test_loss=1.2)}) == [
        "lora: the test loss is not below the untuned model's."
    ]


def test_what_was_run_in_one_sentence():
    recipe = Recipe(run_dir="runs/x")
    recipe.model.path = "models/small"
    assert what_was_run(recipe, {"train": 10_000, "test": 64}, {"embed_tuning": 234, "partial_tuning": 1}, 1) == (
        "models/small, English to French, 10,000 train, 64 test pairs, 234 steps of embed tuning and 1 step of partial "
        "tuning with batches of 128 in bf16 on 1 rank."
    )


def test_histogram_counts_rows_at_or_above_each_threshold_also_where_float32_rounds_down():
    critical = next(k for k in range(47, D) if float(np.float32(k / D)) < k / D)
    count = torch.tensor([0, 0, critical - 1, critical, critical, critical + 9])
    figure = plots.d_histogram(count / D, {0.05: critical / D})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [f"α = 0.05: D ≥ {critical / D:.4f}, 3 rows"]
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == len(count)


def test_histogram_bins_hold_equally_many_possible_values():
    count = np.arange(500)
    edges = plots._lattice_bins(count / 4096)
    held = np.histogram(count, bins=edges * 4096)[0]
    assert set(held[:-1]) == {held[0]} and held.sum() == 500 and len(held) <= 91


def test_histogram_of_untouched_rows():
    figure = plots.d_histogram(np.zeros(10), {})
    assert sum(bar.get_height() for bar in figure.axes[0].patches) == 10


def test_curves_have_a_line_for_each_stage_and_the_ticket_panel_only_with_draws():
    figure = plots.training_curves(metrics())
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "embed tuning",
        "partial tuning",
        "validation",
    ]
    assert "ticket size, by draws on the way" in [axes.get_title("left") for axes in figure.axes]
    without = plots.training_curves([line for line in metrics() if "ticket_size" not in line])
    assert "ticket size, by draws on the way" not in [axes.get_title("left") for axes in without.axes]


def test_long_trainings_are_thinned_by_averaging():
    lines = [{"stage": "embed_tuning", "step": step, "loss": float(step % 2)} for step in range(1, 8001)]
    curve = plots.training_curves(lines).axes[0].lines[0]
    assert len(curve.get_xdata()) == plots.MAX_POINTS
    np.testing.assert_allclose(curve.get_ydata(), 0.5)


def test_a_resumed_step_counts_once():
    lines = [{"stage": "embed_tuning", "step": step, "loss": loss} for step, loss in ((1, 3.0), (2, 9.0), (2, 2.0))]
    curve = plots.training_curves(lines).axes[0].lines[0]
    assert list(curve.get_ydata()) == [3.0, 2.0]


def test_ecdf_marks_the_largest_distance():
    before = np.linspace(0, 1, 100)[None]
    figure = plots.ecdf_rows(before, before + 0.25, ["$x$"])
    assert figure.axes[0].get_title("left") == "$x$ · D = 0.250"
    low, high = sorted(figure.axes[0].lines[2].get_ydata())
    assert high - low == pytest.approx(0.25)


def test_figures_leave_matplotlibs_settings_alone():
    before = {name: value for name, value in rcParams.items() if name != "backend"}
    plots.svg(plots.stage_bars(STAGES), "f")
    assert {name: value for name, value in rcParams.items() if name != "backend"} == before
