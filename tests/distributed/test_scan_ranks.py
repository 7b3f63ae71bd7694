"""`scan` under the launcher: any number of ranks finds the same bits, and a mistake ends all of them with one sentence."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.processes import launch, succeeds
from helpers.tiny import make_model_folder
from safetensors.torch import load_file, save_file

WORDS = ("--module", "ksl_ds", "scan", "before=before", "after=after")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two random models of uneven tensors, in bf16 and several shards."""
    home = tmp_path_factory.mktemp("scan")
    sizes = {"vocab_size": 1501, "hidden_size": 32, "num_hidden_layers": 3}
    make_model_folder(home / "before", dtype=torch.bfloat16, max_shard_size="40KB", **sizes)
    make_model_folder(home / "after", dtype=torch.bfloat16, seed=1, **sizes)
    return home


@pytest.mark.parametrize("rows", ["output", "input"])
def test_one_two_and_three_ranks_find_the_same_bits(folders, rows):
    found, numbers = [], []
    for ranks in (1, 2, 3):
        out = folders / f"{rows}-{ranks}"
        done = succeeds(launch(ranks, *WORDS, f"out={out}", f"rows={rows}", cwd=folders))
        assert done.stdout.count("embed_tokens") == 1  # the table, from rank 0
        found.append(((out / "scan.safetensors").read_bytes(), (out / "report.html").is_file()))
        results = json.loads((out / "results.json").read_text())
        assert results.pop("environment")["ranks"] == ranks
        numbers.append(results)
    assert found[0] == found[1] == found[2] and numbers[0] == numbers[1] == numbers[2]
    assert any(count_T.any() for count_T in load_file(out / "scan.safetensors").values())


def test_every_rank_ends_where_one_finds_nan(folders):
    tensors = load_file(folders / "after" / "model.safetensors")
    tensors["lm_head.weight"][1500, 3] = torch.nan  # in the last rank's rows
    (folders / "spoilt").mkdir()
    for path in (folders / "after").iterdir():
        if path.suffix != ".safetensors":
            (folders / "spoilt" / path.name).write_bytes(path.read_bytes())
    save_file(tensors, folders / "spoilt" / "model.safetensors", metadata={"format": "pt"})
    done = launch(3, *WORDS[:-1], "after=spoilt", "out=none", cwd=folders)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.count("ksl-ds: lm_head.weight: row 1500 of after holds NaN or infinity") == 1
    assert not (folders / "none").exists()
