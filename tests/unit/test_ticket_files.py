"""A ticket's folder gives back what went in; damage of any byte and half-written folders are refused."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.mutations import FILES_OF_OTHER_KINDS, REPLACEMENTS, changed, paths
from helpers.tickets import IDS, Malicious, random_matrix, same, shifted

from ksl_ds import files
from ksl_ds.commands import inspect
from ksl_ds.errors import UserError
from ksl_ds.lottery import ticket_files
from ksl_ds.lottery.ticket import Ticket, draw_ticket

FILES = ["adapter_config.json", "adapter_model.safetensors", "ks.safetensors", "ticket.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    before_VD = random_matrix(dtype=torch.bfloat16)
    tokens = [f"Ġtoken{number}" for number in range(len(before_VD))]
    ticket = draw_ticket(before_VD, shifted(before_VD), tokens=tokens)
    ticket.with_rows(ticket.rows_KD, before="base", stage="embed_tuning").save(
        tmp_path / "ticket", "model.embed_tokens"
    )
    return tmp_path / "ticket"


def test_ticket_survives_its_folder(folder):
    ticket = Ticket.load(folder)
    assert sorted(path.name for path in folder.iterdir()) == FILES
    assert ticket.token_ids == IDS and ticket.tokens[0] == "Ġtoken3" and ticket.source["stage"] == "embed_tuning"
    ticket.save(folder.parent / "again", "model.embed_tokens")
    assert same(Ticket.load(folder.parent / "again"), ticket)
    record = json.loads((folder / "ticket.json").read_text(encoding="utf-8"))
    lists = ("token_ids", "tokens", "count", "statistic", "pvalue", "shift_ratio")
    assert {len(record[name]) for name in lists} == {len(IDS)}
    assert (record["alpha"], record["selection"], record["method"]) == (0.05, "alpha", "exact")
    assert (record["num_samples"], record["vocab_size"], record["embedding_scope"]) == (32, 134, "input")


@pytest.mark.parametrize("name", FILES)
def test_ticket_with_a_flipped_bit_is_refused(folder, name):
    """Every byte of the JSON files, every 7th of the others. The base model's name in PEFT's config is free text."""
    whole, content = Ticket.load(folder), (folder / name).read_bytes()
    refused = 0
    for place in range(0, len(content), 1 if name.endswith("json") else 7):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place % 8)
        (folder / name).write_bytes(damaged)
        try:
            ticket = Ticket.load(folder)
        except ValueError as error:
            assert str(folder) in str(error)
            refused += 1
        else:
            # JSON white space, or free text of PEFT's config: nothing that a ticket consists of may have changed.
            assert name.endswith("json") and same(ticket, whole), place
    assert refused > 0.5 * len(content) / (1 if name.endswith("json") else 7)


@pytest.mark.parametrize("name", FILES)
def test_truncated_ticket_is_refused(folder, name):
    content = (folder / name).read_bytes()
    for length in (0, 1, 7, 8, 9, len(content) // 2, len(content) - 2):
        (folder / name).write_bytes(content[:length])
        with pytest.raises(ValueError, match=name):
            Ticket.load(folder)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        Ticket.load(folder)


@pytest.mark.parametrize("name", [*FILES, "adapter_model.bin", "ks.pt"])
def test_pickled_ticket_is_refused_and_not_run(folder, tmp_path, name):
    marker = tmp_path / "executed"
    (folder / name).write_bytes(pickle.dumps(Malicious(marker)))
    if name not in FILES:
        (folder / f"{Path(name).stem}.safetensors").unlink()
    with pytest.raises(ValueError, match="is a pickle, which ksl_ds never loads" if name not in FILES else name):
        Ticket.load(folder)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists()  # the trap works


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"token_ids": [3, 64, 17, 130]}, "ascending"),
        ({"token_ids": [3, 17, 17, 130]}, "ascending"),
        ({"token_ids": [3, 17, 64, 134]}, "exceed the vocabulary"),
        ({"token_ids": [-1, 17, 64, 130]}, "token_ids.0: input should be greater than or equal to 0"),
        ({"token_ids": [3, 17, 64]}, "4 entries for 3"),
        ({"token_ids": [3, 17, 64, 131]}, "count differs"),
        ({"tokens": ["a"]}, "tokens has 1 entries"),
        ({"pvalue": ["0", "0", "0", "0"]}, "pvalue"),
        ({"alpha": None}, "alpha: input should be a valid number"),
        ({"alpha": 1.5}, "alpha: input should be less than 1"),
        ({"embedding_scope": "output"}, "embedding_scope: input should be 'input' or 'shared'"),
        ({"method": "auto"}, "method: input should be 'exact' or 'asymp'"),
        ({"source": {"train_frequency": [1, 2]}}, "source.train_frequency has 2 entries for 4"),
        ({"source": {"before": ["base"]}}, "source.before: input should be a valid string"),
        ({"count": [33, 33, 33, 33]}, "count is above num_samples"),
        ({"num_samples": 31}, "requires"),
        ({"vocab_size": 135}, "requires"),
        ({"base": {"dtype": "float16", "sha256": ""}}, "requires"),
        ({"base": {"dtype": "bfloat16", "sha256": ""}}, "do not match the fingerprint"),
        ({"modules": ["lm_head"]}, "adapter_model.safetensors holds"),
        ({"format_version": 2}, "ticket format"),
    ],
)
def test_ticket_at_odds_with_itself_is_refused(folder, changes, reason):
    """Also where all checksums are right: a folder put together by hand must not reach a model."""
    record = json.loads((folder / "ticket.json").read_text()) | changes
    del record["sha256"]
    record["sha256"] = ticket_files._record_sha256(record)
    (folder / "ticket.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=reason):
        Ticket.load(folder)


def test_ticket_with_peft_config_of_other_rows_is_refused(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/model"}))
    Ticket.load(folder)  # that name may be edited
    (folder / "adapter_config.json").write_text(json.dumps(config | {"token_indices": [3, 17, 64, 131]}))
    with pytest.raises(ValueError, match=r"adapter_config.json: token_indices does not match ticket.json"):
        Ticket.load(folder)


@pytest.mark.parametrize(("module", "failing"), [(ticket_files, "_write_json"), (files, "sync")])
@pytest.mark.parametrize("existing", [False, True])
def test_interrupted_ticket_write_leaves_the_old_or_nothing(folder, tmp_path, monkeypatch, module, failing, existing):
    old = Ticket.load(folder)
    target = folder if existing else tmp_path / "new"

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, failing, no_space)
    with pytest.raises(OSError, match="No space"):
        old.with_rows(old.rows_KD + 1).save(target, "model.embed_tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["ticket"]
    assert same(Ticket.load(folder), old)


def test_killed_ticket_write_leaves_the_old_one(folder, tmp_path):
    script = (
        "import os, sys; from ksl_ds.lottery import ticket_files; from ksl_ds.lottery.ticket import Ticket\n"
        "ticket = Ticket.load(sys.argv[1]); ticket_files._write_json = lambda *_: os.kill(os.getpid(), 9)\n"
        "ticket.with_rows(ticket.rows_KD + 1).save(sys.argv[1], 'model.embed_tokens')"
    )
    old = Ticket.load(folder)
    assert subprocess.run([sys.executable, "-c", script, str(folder)], check=False).returncode == -9
    assert same(Ticket.load(folder), old)
    for draft in set(tmp_path.iterdir()) - {folder}:
        with pytest.raises(ValueError, match="missing"):
            Ticket.load(draft)
    old.with_rows(old.rows_KD + 2).save(folder, "model.embed_tokens")
    assert torch.equal(Ticket.load(folder).rows_KD, old.rows_KD + 2)


def test_ticket_does_not_replace_a_foreign_folder(folder):
    (folder / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(ValueError, match=r"is not a ticket \(it holds model.safetensors\)"):
        draw_ticket(random_matrix(), shifted(random_matrix())).save(folder, "embed")
    assert (folder / "model.safetensors").read_bytes() == b"precious"


def test_a_ticket_edited_in_any_way_is_refused_or_usable(folder, capsys):
    """With checksums made right: whatever `inspect` and `apply` would stumble over is found when reading."""
    content = json.loads((folder / "ticket.json").read_text())
    content["source"] |= {"train_frequency": [5, 6, 7, 8], "base": "base"}
    del content["sha256"]
    whole, accepted, refused = Ticket.load(folder), 0, 0
    for place in paths(content):
        for replacement in REPLACEMENTS:
            record = changed(content, place, replacement)
            record["sha256"] = ticket_files._record_sha256(record)
            (folder / "ticket.json").write_text(json.dumps(record))
            try:
                ticket = inspect.load(str(folder))
            except UserError as error:
                assert str(folder) in str(error) and "\n" not in str(error), (place, replacement, error)
                refused += 1
                continue
            accepted += 1
            inspect.show(ticket, "ticket", None)
            assert ticket.token_ids == whole.token_ids and torch.equal(ticket.rows_KD, whole.rows_KD)
            assert len(ticket.tokens) == len(ticket.pvalue) == len(ticket.statistic) == len(ticket.shift_ratio) == 4
            assert all(isinstance(token, str) for token in ticket.tokens)
            assert all(0 <= value <= 1 for value in (*ticket.pvalue, *ticket.statistic, ticket.alpha))
            assert (ticket.embedding_scope, ticket.method) in {("input", "exact"), ("input", "asymp")}
    assert refused > 400 and accepted > 20


@pytest.mark.parametrize("limit", [0, -3])
def test_a_table_of_no_tokens_is_refused(folder, limit):
    with pytest.raises(UserError, match=f"--limit is {limit}; it must be at least 1"):
        inspect.show(Ticket.load(folder), str(folder), limit)


@pytest.mark.parametrize("name", ["ticket.json", "adapter_config.json", "ks.safetensors"])
def test_a_file_of_another_kind_in_a_ticket_is_refused(folder, name):
    for content in FILES_OF_OTHER_KINDS:
        (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            Ticket.load(folder)
        assert "\n" not in str(error.value)
