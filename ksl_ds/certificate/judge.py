"""How far the model of a ticket agrees with the embed-tuned one: the certificate, as reconstructed, and what is measured.

Reference: the embed-tuned model. Candidates, one forward pass over the held-out text each:
- partial transfer at every alpha of a grid: the base model with the reference's rows of T(alpha), drawn anew from the
  KS test of base and reference, in the precision in which they are compared;
- the ticket that was given, with its own rows, at its own alpha only: tuned rows exist for no other.
See criterion.py for the criterion and its gaps, candidates.py for how the models take turns.

Legend: V tokens, N predicted tokens, S sentences.
"""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from ksl_ds import distributed
from ksl_ds.certificate.candidates import Candidate
from ksl_ds.certificate.criterion import (
    Agreement,
    Predictions,
    agreement,
    certified,
    untuned_tokens,
)
from ksl_ds.certificate.report import (
    candidate_name,
    certificate_curves,
    certificate_reading,
    certificate_sections,
    certificate_table,
    show_risk,
)
from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.files import write_text
from ksl_ds.report.tables import print_table, print_text
from ksl_ds.text.corpus import Split
from ksl_ds.text.directions import load_split
from ksl_ds.training.run import RunContext
from ksl_ds.training.summary import write_run_report

logger = logging.getLogger(__name__)


def trained_sources(recipe: Recipe) -> set[str] | None:
    """The source sentences of the training text; None where the recipe names none, so that nobody can tell."""
    if not recipe.text.train:
        logger.warning("the recipe has no text.train, so whether test sentences were trained on is not checked")
        return None
    with distributed.raise_on_all_ranks():
        corpora = load_split(recipe.text, "train", recipe.text_seed)
        return {pair.source for corpus in corpora.values() for pair in corpus.pairs}


def leave_out(run: RunContext, split: Split, known: set[str], where: str = "text.train") -> int:
    """Takes sentences whose source is `known` out of a text of the run, and says how many they were.

    Parameters
    ----------
    run
        The open run.
    split
        Which text.
    known
        Sources to leave out.
    where
        Where they were seen, for the messages.

    Raises
    ------
    UserError
        If no sentence is left.
    """
    corpus = run.corpora[split]
    kept = [index for index, pair in enumerate(corpus.pairs) if pair.source not in known]
    if not kept:
        raise UserError(
            f"{corpus.name}: the source of every sentence is in {where} too; a certificate needs text that was not trained on"
        )
    overlap = len(corpus.pairs) - len(kept)
    if overlap:
        corpus.dropped[f"since their source is in {where}"] = overlap
        corpus.pairs = [corpus.pairs[index] for index in kept]
        run.examples[split] = [run.examples[split][index] for index in kept]
        if split == "test":
            run.prompts = [run.prompts[index] for index in kept]
        part = run.results.text[split]
        part.pairs = len(kept)
        part.dropped = corpus.dropped
        logger.info(f"{overlap:,} {split} sentences left out, since their source is in {where}; {len(kept):,} remain")
    return overlap


def judge(
    run: RunContext, candidate: Candidate, reference: Predictions, num_samples: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A candidate's line of results.json, and its counterexamples: certified tokens on which the models differ."""
    untuned_N = torch.cat(
        [
            untuned_tokens(
                torch.tensor(example.prompt_ids + example.response_ids), len(example.prompt_ids), candidate.in_ticket_V
            )
            for example in run.examples["test"]
        ]
    )
    first_N = reference.first_N
    second_N = reference.second_N
    count = candidate.tau_count
    by_criterion_N = certified(first_N, second_N, count, num_samples)
    by_union_N = certified(first_N, second_N, count, num_samples, untuned_N)
    predictions = candidate.predictions["test"]
    agrees_N = reference.top_N == predictions.top_N
    row = {
        **candidate.record,
        "ticket_rows": int(candidate.in_ticket_V.sum()),
        "tau_count": count,
        "tau": count / num_samples,
        "reconstructed": _shares(agreement(agrees_N, reference.length_S, by_criterion_N), len(agrees_N)),
        "reconstructed_union_bound": _shares(agreement(agrees_N, reference.length_S, by_union_N), len(agrees_N)),
        "overall": _shares(agreement(agrees_N, reference.length_S), len(agrees_N)),
    }
    differing = ((by_criterion_N | by_union_N) & ~agrees_N).nonzero().flatten()
    widest_first = (first_N - second_N)[differing].argsort(descending=True, stable=True)
    examples = _counterexamples(run, predictions, reference, differing[widest_first].tolist())
    for example in examples:
        token = example["token"]
        example |= {"candidate": candidate_name(row), "by_reconstructed": bool(by_criterion_N[token])}
        example["by_union_bound"] = bool(by_union_N[token])
    return row, examples


def _shares(found: Agreement, num_tokens: int) -> dict[str, Any]:
    return {
        **asdict(found),
        "share": found.tokens / num_tokens,
        "agreement": found.agreeing / found.tokens if found.tokens else None,
        "sentence_agreement": found.agreeing_sentences / found.sentences if found.sentences else None,
    }


def _counterexamples(
    run: RunContext, found: Predictions, reference: Predictions, positions: list[int]
) -> list[dict[str, Any]]:
    """The tokens at `positions` of all predicted tokens, with their text."""
    sentence_N = torch.repeat_interleave(torch.arange(len(reference.length_S)), reference.length_S)
    start_S = reference.length_S.cumsum(0) - reference.length_S
    examples = []
    for token in positions:
        sentence = int(sentence_N[token])
        response_ids = run.examples["test"][sentence].response_ids
        tops = {"reference": int(reference.top_N[token]), "candidate": int(found.top_N[token])}
        examples.append(
            {
                "token": token,
                "sentence": sentence,
                "source": run.corpora["test"].pairs[sentence].source,
                "prefix": run.tokenizer.decode(response_ids[: token - int(start_S[sentence])]).strip(),
                **{f"{name}_token_id": number for name, number in tops.items()},
                **{f"{name}_token": run.tokenizer.decode([number]) for name, number in tops.items()},
                "p_A": float(reference.first_N[token]),
                "p_B": float(reference.second_N[token]),
                "candidate_p_A": float(found.first_N[token]),
            }
        )
    return examples


def show(
    run: RunContext, rows: list[dict[str, Any]], examples: list[dict[str, Any]], risk: Mapping[str, Any] | None
) -> None:
    """Prints the tables and what they say, writes counterexamples.jsonl and report.html; `risk` as certify_texts gave it."""
    for step, row in enumerate(rows):
        numbers = {
            f"{name}_{key}": row[name][key]
            for name in ("reconstructed", "reconstructed_union_bound", "overall")
            for key in ("share", "agreement", "sentence_agreement")
        }
        run.tracker.log(
            "certificate", step, candidate=candidate_name(row), alpha=row["alpha"], tau=row["tau"], **numbers
        )
    tokens = rows[0]["overall"]["tokens"]
    sentences = rows[0]["overall"]["sentences"]
    content = certificate_table(
        rows, f"Agreement with {run.recipe.reference} on {tokens:,} tokens of {sentences:,} held-out sentences"
    )
    reading = certificate_reading(rows)
    print_table(content)
    print_text("\n" + "\n".join(textwrap.fill(sentence, 100, subsequent_indent="  ") for sentence in reading))

    def write() -> None:
        risk_sections = [show_risk(risk, run.tracker)] if risk is not None else []
        lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in examples]
        write_text(run.dir / "counterexamples.jsonl", "".join(lines))
        curves = certificate_curves(rows)
        run.tracker.figure("Certificate", curves)
        sections = [*risk_sections, *certificate_sections(content, reading, curves, examples)]
        write_run_report(run, title=f"Certificate: {run.dir.name}", sections=sections)

    distributed.run_on_rank0(write)
    print_text(f"\ncounterexamples ({len(examples):,}): {run.dir / 'counterexamples.jsonl'}")
    print_text(f"the report: {run.dir / 'report.html'}")
