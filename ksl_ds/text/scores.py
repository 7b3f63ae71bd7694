"""Scores of translations by sacrebleu, with what a single BLEU hides: scores of the first line, stop rate, length.

A hypothesis is one line: line breaks and tabs become spaces, in scores and files, so that `sacrebleu` on the files gives the
printed score.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ksl_ds.errors import UserError
from ksl_ds.files import read_text, write_text
from ksl_ds.text.corpus import one_line

DOWNLOAD_SECONDS = 30.0  # without an answer, for the model of a tokenizer: the other ranks wait


@dataclass
class Scores:
    """sacrebleu's BLEU and chrF++ in 0 .. 100, of whole answers and of their first lines; mean length in tokens."""

    bleu: float
    chrf: float
    first_line_bleu: float
    stop_rate: float  # share of answers that the model ended itself
    output_length: float  # tokens
    signatures: dict[str, str]


def check_tokenizer(tokenize: str) -> None:
    """Makes sure that sacrebleu's tokenizer works, before anything is translated.

    Call it on the one rank that scores, not on all: the first use of flores101 and flores200 fetches a model into a folder
    that ranks share.

    Raises
    ------
    UserError
        For an unknown tokenizer, or one whose model cannot be fetched or read: says which file belongs where.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.tokenizers import tokenizer_spm

    if tokenize not in BLEU.TOKENIZERS:
        raise UserError(f"evaluation.tokenize is {tokenize!r}; sacrebleu has {', '.join(sorted(BLEU.TOKENIZERS))}")
    try:
        with _patience(DOWNLOAD_SECONDS):
            BLEU(tokenize=tokenize).corpus_score(["a"], [["a"]])
    # The network's, sentencepiece's and MeCab's own kinds; sacrebleu exits after some failed downloads.
    except (Exception, SystemExit) as error:
        remedy = ""
        if tokenize in tokenizer_spm.SPM_MODELS:
            url = tokenizer_spm.SPM_MODELS[tokenize]["url"]
            file = Path(tokenizer_spm.SACREBLEU_DIR, "models", Path(url).name)
            remedy = f"replace {file} by {url}, or " if file.exists() else f"download {url} as {file}, or "
        raise UserError(
            f"sacrebleu cannot set up evaluation.tokenize={tokenize}: {one_line(str(error))[:200]}; {remedy}use "
            "evaluation.tokenize=13a"
        ) from None


@contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """Makes connections opened inside give up when nothing comes for so long."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def first_line(text: str) -> str:
    """Up to the first line break; leading ones do not count."""
    return one_line((text.strip().splitlines() or [""])[0])


def score(
    hypotheses: list[str], references: list[str], stopped: list[bool], lengths: list[int], tokenize: str
) -> Scores:
    """Corpus scores of translations; `lengths` in tokens without the end token."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    bleu = BLEU(tokenize=tokenize)
    chrf = CHRF(word_order=2)
    folded = [one_line(text) for text in hypotheses]
    cut = [first_line(text) for text in hypotheses]
    folded_references = [[one_line(text) for text in references]]
    return Scores(
        bleu=bleu.corpus_score(folded, folded_references).score,
        chrf=chrf.corpus_score(folded, folded_references).score,
        first_line_bleu=bleu.corpus_score(cut, folded_references).score,
        stop_rate=sum(stopped) / len(stopped),
        output_length=sum(lengths) / len(lengths),
        signatures={"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())},
    )


def sentence_chrf(hypotheses: list[str], references: list[str]) -> list[float]:
    """chrF++ of each sentence, 0 to 100."""
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF(word_order=2)
    return [
        chrf.sentence_score(one_line(hypothesis), [one_line(reference)]).score
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]


def read_translations(folder: Path, name: str) -> list[str]:
    """The lines of a file of `write_translations`, such as "hypotheses". Raises UserError if it cannot be read."""
    return read_text(folder / f"{name}.txt").split("\n")[:-1]


def write_translations(folder: Path, sources: list[str], references: list[str], hypotheses: list[str]) -> None:
    """sources.txt, references.txt, hypotheses.txt and hypotheses_first_line.txt in `folder`, a sentence a line."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = {
        "sources": [one_line(text) for text in sources],
        "references": [one_line(text) for text in references],
        "hypotheses": [one_line(text) for text in hypotheses],
        "hypotheses_first_line": [first_line(text) for text in hypotheses],
    }
    for name, lines in columns.items():
        write_text(folder / f"{name}.txt", "".join(f"{line}\n" for line in lines))
