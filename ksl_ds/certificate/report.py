"""A certificate as people read it: the table, its curves, the counterexamples, and whose claim is whose.

Every row is a dict of results.json's `certificate.candidates`, which commands/certify.py makes. The words follow one rule:
what is the paper's is called reported, what is ours `reconstructed`, and what counts is measured.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from ksl_ds.certificate.criterion import CONFIDENCE, MIN_SENTENCES
from ksl_ds.config.methods import Stage, label_of
from ksl_ds.report.html import Section, bullets, figure, table
from ksl_ds.report.plots import INK, PALETTE, style
from ksl_ds.report.tables import (
    DASH,
    Column,
    Table,
    count,
    decimals,
    print_table,
    print_text,
    probability,
    visible,
)
from ksl_ds.report.tracking import Tracker

PERCENT = f"{CONFIDENCE:.0%}"
CLAIMS = {
    "reported": "The paper's Theorem 2, as a replication reports it (its exact wording is not known here): the predictions of "
    "the model whose ticket rows alone were tuned agree with the embed-tuned model's at confidence 1 - alpha.",
    "reconstructed": "Our reconstruction of the criterion, named reconstructed wherever it is printed: a token is certified "
    "where (p_A - p_B)/2 > tau(alpha). p_A and p_B are the embed-tuned model's two largest next-token probabilities, "
    "tau(alpha) is the critical D, which no row outside the ticket reaches. The union bound asks for "
    "(p_A - p_B)/2 > u tau(alpha), u counting the tokens of the input whose rows are outside the ticket (none: any margin "
    "will do). Both suppose that a "
    "row of distance D changes no probability by more than D. That is not proved: D compares distribution functions, a model "
    "reads coordinates in their order. And 1 - alpha is the nominal level of one row's test, no probability of agreement.",
    "measured": "How often the top tokens of both models agree on held-out text, with the reference translation as prefix. "
    f"Intervals are exact (Clopper-Pearson, {PERCENT}) and over whole sentences, since the tokens of one sentence are not "
    "independent.",
    "candidates": "Partial transfer: the base model with the reference's rows of T(alpha), drawn anew at every alpha by the "
    "KS test of base and reference. The ticket that was given is compared with its own rows at its own alpha only: "
    "tuned rows exist for no other alpha.",
}
CRITERIA = {"reconstructed": "by_reconstructed", "union bound": "by_union_bound"}  # keys of a counterexample
SHOWN = 10  # counterexamples of a candidate in the report; counterexamples.jsonl has all


def candidate_name(row: Mapping[str, Any]) -> str:
    """Such as "partial tuning, alpha 0.5"; for the ticket that was given, "ticket (partial tuning), alpha 0.5"."""
    name = label_of(row["candidate"])
    drawn = f"alpha {row['alpha']:g}" if row["selection"] == "alpha" else row["selection"]
    return f"ticket ({name}), {drawn}" if row["given"] else f"{name}, {drawn}"


def certificate_table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One row a candidate: what is certified, and how far it agrees."""
    columns = [
        Column("", numeric=False),
        Column("ticket rows"),
        Column("all tokens agree"),
        Column(f"whole sentences agree [{PERCENT}]"),
        Column("tau"),
        Column("certified (reconstructed)"),
        Column("of them agree"),
        Column(f"sentences without counterexample [{PERCENT}]", optional=True),
        Column("certified (union bound)"),
        Column("of them agree", optional=True),
    ]
    share = decimals(3)
    cells = []
    for row in rows:
        criterion, union, everything = (row[name] for name in ("reconstructed", "reconstructed_union_bound", "overall"))
        cells.append(
            [
                candidate_name(row),
                count(row["ticket_rows"]),
                share(everything["agreement"]),
                of_sentences(everything),
                decimals(4)(row["tau"]),
                share(criterion["share"]),
                share(criterion["agreement"]),
                of_sentences(criterion),
                share(union["share"]),
                share(union["agreement"]),
            ]
        )
    notes = [f"{name}: {text}" for name, text in CLAIMS.items()]
    return Table(title, columns, cells, notes)


def of_sentences(found: Mapping[str, Any]) -> str:
    """Such as "60 of 64 [0.848, 0.983]"; without an interval if there are too few sentences."""
    if not found["sentences"]:
        return DASH
    interval = found["interval"]
    ends = f"[{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "[too few]"
    return f"{found['agreeing_sentences']:,} of {found['sentences']:,} {ends}"


def certificate_reading(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers say, one sentence for each thing that a reader could miss."""
    sentences = []
    few = rows[0]["overall"]["sentences"]
    if few < MIN_SENTENCES:
        sentences.append(
            f"No intervals: {few} sentence{' is' if few == 1 else 's are'} too few. Below {MIN_SENTENCES} an exact interval "
            "is up to .37 wide and more, and says nothing; give more text.test."
        )
    for part, criterion in (("reconstructed", "reconstructed criterion"), ("reconstructed_union_bound", "union bound")):
        found = {candidate_name(row): (row[part]["tokens"], row[part]["agreeing"]) for row in rows}
        none = [name for name, (tokens, _) in found.items() if not tokens]
        broken = [f"{name} ({n - same:,} of {n:,})" for name, (n, same) in found.items() if same < n]
        kept = [name for name, (tokens, agreeing) in found.items() if tokens and tokens == agreeing]
        if none:
            sentences.append(f"The {criterion} certifies no token, so it says nothing, for {'; '.join(none)}.")
        if broken:
            sentences.append(
                f"The {criterion} does not hold on this model: tokens that it certifies differ for {'; '.join(broken)}."
            )
        if kept:
            sentences.append(
                f"No token that the {criterion} certifies differs for {'; '.join(kept)}; how sure that is for other "
                "sentences, an interval says and not the criterion."
            )
    for row in rows:
        if row["selection"] != "alpha":
            sentences.append(
                f"{candidate_name(row)}: no alpha drew it; tau is the smallest D that no row outside it reaches."
            )
        elif row["tau_count"] > row["critical_count"]:
            sentences.append(
                f"{candidate_name(row)}: rows outside it reach the critical D of its alpha in the reference, so it was drawn "
                "from other weights or in another precision; tau is the smallest D that no such row reaches."
            )
    return sentences


def certificate_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Share certified and agreement against alpha; tickets with rows of their own (drawn by alpha) as diamonds."""
    grid = [row for row in rows if row["candidate"] == Stage.PARTIAL_TRANSFER and not row["given"]]
    given = [row for row in rows if row not in grid and row["selection"] == "alpha"]
    panels = [
        (
            "share of tokens certified",
            [("reconstructed", "share", "reconstructed"), ("reconstructed_union_bound", "share", "union bound")],
        ),
        (
            "measured agreement",
            [
                ("overall", "agreement", "all tokens"),
                ("reconstructed", "agreement", "certified tokens"),
                ("overall", "sentence_agreement", f"whole sentences, {PERCENT} interval"),
            ],
        ),
    ]
    colors = iter(PALETTE)
    with style():
        curves = Figure(figsize=(7.2, 3.6), layout="constrained")
        for axes, (title, lines) in zip(curves.subplots(1, 2, sharey=True), panels, strict=True):
            for part, key, label in lines:
                color = next(colors)
                for points, mark in ((grid, "o-"), (given, "D")):
                    known = [(row["alpha"], row[part]) for row in points if row[part][key] is not None]
                    alphas = [alpha for alpha, _ in known]
                    shares = [found[key] for _, found in known]
                    axes.plot(alphas, shares, mark, color=color, markersize=4, label=label if mark == "o-" else None)
                    spans = [(alpha, *found["interval"]) for alpha, found in known if found["interval"]]
                    if key == "sentence_agreement" and spans:
                        at, low, high = zip(*spans, strict=True)
                        axes.vlines(at, low, high, color=color, linewidth=1)
            axes.set(title=title, xlabel="alpha", xlim=(0, 1), ylim=(-0.03, 1.03))
        if given:
            axes.plot([], [], "D", color=INK, markersize=4, label="tickets with rows of their own")
        curves.legend(loc="outside upper left", ncols=3)
    return curves


def certificate_sections(
    content: Table, reading: Sequence[str], curves: Figure, examples: Sequence[Mapping[str, Any]]
) -> list[Section]:
    """The parts of report.html: the certificate and, where there are some, its counterexamples."""
    body = table(content) + bullets(*reading) + figure("Certificate and agreement", curves, "curves")
    sections = [Section("Certificate", body)]
    if examples:
        sections.append(Section("Counterexamples", counterexamples_html(examples)))
    return sections


def counterexamples_html(found: Sequence[Mapping[str, Any]]) -> Markup:
    """Tables of certified tokens that differ, a table a candidate, the widest margin first."""
    columns = [
        Column("translation so far", numeric=False),
        Column("reference says", numeric=False),
        Column("candidate says", numeric=False),
        Column("p_A"),
        Column("p_B"),
        Column("candidate's p_A"),
        Column("certified by", numeric=False),
        Column("source", numeric=False),
    ]
    parts = []
    by_candidate: dict[str, list[Mapping[str, Any]]] = {}
    for example in found:
        by_candidate.setdefault(example["candidate"], []).append(example)
    for name, examples in by_candidate.items():
        cells = [
            [
                f"…{text[-40:]}" if len(text := example["prefix"]) > 40 else text or DASH,
                visible(example["reference_token"]),
                visible(example["candidate_token"]),
                *(decimals(3)(example[key]) for key in ("p_A", "p_B", "candidate_p_A")),
                " and ".join(word for word, key in CRITERIA.items() if example[key]),
                example["source"],
            ]
            for example in examples[:SHOWN]
        ]
        shown = f"the {SHOWN} of widest margin of " if len(examples) > SHOWN else ""
        parts.append(table(Table(f"{name}: {shown}{len(examples):,} certified tokens that differ", columns, cells)))
    return Markup("\n").join(parts)


RISKS = {
    "tokens": "the share of a sentence's tokens on which its top token differs from the embed-tuned model's",
    "sentence": "the share of sentences with a token on which its top token differs from the embed-tuned model's",
    "lost_tokens": "the share of a sentence's tokens that the embed-tuned model predicts as the reference translation has "
    "them, and whose top token differs in this model",
    "chrf": "how far the chrF++ of a sentence's translation falls below that of the embed-tuned model's, over 100,",
}
ASSUMED = (
    "Valid for any model and any number of tickets (Learn then Test), if the sentences of text.valid are independent draws "
    "from the text that is to come, and neither the embed-tuned model nor certify.alphas was chosen by them: text that "
    "trained the model or chose its learning rate is no calibration text. Tickets are tested from the largest to the smallest "
    "until one fails. The upper bound is of one ticket looked at alone. The held-out risk, on text.test, decides nothing."
)


def risk_table(risk: Mapping[str, Any]) -> Table:
    """One row a ticket, in the order tested: `risk` is results.json's `certificate.risk`."""
    columns = [Column("", numeric=False), Column("rows"), Column("measured risk")]
    columns += [
        Column(f"upper bound, {risk['confidence']:.0%}"),
        Column("p"),
        Column("bound", numeric=False, optional=True),
    ]
    columns += [Column("certified", numeric=False), Column("held-out risk")]
    number = decimals(4)
    cells = [
        [
            ticket["name"],
            count(ticket["rows"]),
            number(ticket["risk"]),
            number(ticket["upper_bound"]),
            probability(ticket["p"]),
            ticket["bound"],
            "yes" if ticket["certified"] else "no",
            number(ticket["held_out_risk"]),
        ]
        for sequence in risk["sequences"]
        for ticket in sequence["tickets"]
    ]
    sentences = f"{risk['sentences']:,} calibration, {risk['held_out_sentences']:,} held-out sentences"
    title = f"Risk at most {risk['epsilon']:g}? {sentences}"
    return Table(title, columns, cells, [f"risk: {RISKS[risk['risk']]}.", ASSUMED])


def show_risk(risk: Mapping[str, Any], tracker: Tracker) -> Section:
    """Prints the table of the certified risk and what it says, sends its figure to wandb; returns the part of report.html."""
    print_table(risk_table(risk))
    print_text("\n" + textwrap.fill(risk["sentence"], 100, subsequent_indent="  "))
    curves = risk_curves(risk)
    tracker.figure("Certified risk", curves)
    return risk_section(risk, curves)


def risk_sentence(risk: Mapping[str, Any]) -> str:
    """The smallest certified ticket, or what none needs, in one sentence."""
    found = risk["smallest"]
    if found is not None:
        what = RISKS[risk["risk"]].replace("its top token", "the top token").replace(" in this model", "")
        return (
            f"With {risk['confidence']:.0%} confidence, for the model with the ticket of {found['rows']:,} rows "
            f"({found['name']}), {what} is at most {risk['epsilon']:g} in the mean: it is {found['risk']:.4f} on "
            f"{risk['sentences']:,} calibration sentences, and {found['held_out_risk']:.4f} on "
            f"{risk['held_out_sentences']:,} held-out ones."
        )
    parts = []
    for sequence in risk["sequences"]:
        first = sequence["tickets"][0]
        part = (
            f"{first['name']} ({first['rows']:,} rows) has a measured risk of {first['risk']:.4f}, and an epsilon of "
            f"{first['upper_bound']:.4f} would do"
        )
        more = "" if sequence["needed"] is None else f", or about {sequence['needed']:,} sentences with that risk"
        parts.append(part + more)
    return (
        f"No ticket is certified at epsilon {risk['epsilon']:g} with {risk['confidence']:.0%} confidence from "
        f"{risk['sentences']:,} calibration sentences: {'; '.join(parts)}."
    )


def risk_curves(risk: Mapping[str, Any]) -> Figure:
    """Risk against ticket size with upper confidence bounds, epsilon, and the smallest certified ticket."""
    with style():
        curves = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = curves.subplots()
        for color, sequence in zip(PALETTE, risk["sequences"], strict=False):
            tickets = sequence["tickets"]
            rows = [ticket["rows"] for ticket in tickets]
            found = [ticket["risk"] for ticket in tickets]
            axes.plot(rows, found, "o-", color=color, markersize=4, label=f"{sequence['name']}, calibration")
            axes.vlines(rows, found, [ticket["upper_bound"] for ticket in tickets], color=color, linewidth=1)
            axes.plot(
                rows, [ticket["held_out_risk"] for ticket in tickets], "x", color=color, markersize=5, label="held-out"
            )
        axes.axhline(risk["epsilon"], color=INK, linewidth=0.8, linestyle="--", label=f"epsilon {risk['epsilon']:g}")
        if (smallest := risk["smallest"]) is not None:
            axes.plot(
                [smallest["rows"]],
                [smallest["risk"]],
                "o",
                color=INK,
                markersize=11,
                fillstyle="none",
                label="smallest certified",
            )
        axes.set_xscale("symlog")
        axes.set(xlabel="ticket rows", ylabel=f"risk, with its {risk['confidence']:.0%} upper bound", ylim=(0, None))
        curves.legend(loc="outside upper left", ncols=3)
    return curves


def risk_section(risk: Mapping[str, Any], curves: Figure) -> Section:
    """The part of report.html about the certified risk."""
    body = table(risk_table(risk)) + bullets(risk["sentence"]) + figure("Risk against ticket size", curves, "risk")
    return Section("Certified risk", body)
