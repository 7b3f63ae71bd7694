"""`ksl-ds draw` and `ksl-ds inspect` as a user types them, and what they say when two folders do not belong together."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.tiny import make_model_folder
from safetensors.torch import load_file, save_file

from ksl_ds.cli import main
from ksl_ds.lottery.ticket import Ticket, draw_ticket
from ksl_ds.model.folder import ModelFolder

EMBEDDING = "model.embed_tokens.weight"


def change_embedding(folder, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[EMBEDDING] = change(tensors[EMBEDDING])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """before, and after with rows 3, 40 and 77 moved."""
    home = tmp_path_factory.mktemp("draw")
    make_model_folder(home / "before")
    shutil.copytree(home / "before", home / "after")

    def move(weight_VD):
        weight_VD[[3, 40, 77]] += torch.tensor([[0.5], [0.05], [-0.5]])
        return weight_VD

    change_embedding(home / "after", move)
    return home


def draw(home, *words, before="before", after="after"):
    return main(["draw", f"before={home / before}", f"after={home / after}", *map(str, words)])


def test_draws_what_draw_ticket_draws(folders, tmp_path, capsys):
    assert draw(folders, f"out={tmp_path / 'ticket'}") == 0
    assert "3 of 134 rows" not in capsys.readouterr().err
    ticket = Ticket.load(tmp_path / "ticket")
    weights = [ModelFolder(folders / name).read_rows(EMBEDDING, 0, 134) for name in ("before", "after")]
    expected = draw_ticket(*weights)
    assert ticket.token_ids == expected.token_ids == [3, 40, 77]
    assert torch.equal(ticket.count_V, expected.count_V) and torch.equal(ticket.rows_KD, expected.rows_KD)
    peft_config = json.loads((tmp_path / "ticket" / "adapter_config.json").read_text())
    assert peft_config["base_model_name_or_path"] == str(folders / "before")
    tokenizer = ModelFolder(folders / "before").tokenizer()
    assert ticket.tokens == tokenizer.convert_ids_to_tokens([3, 40, 77])

    assert "# 3 embedding rows of" in (tmp_path / "ticket/README.md").read_text()

    for rule, rows in {"top_k": 2, "shift_ratio": 2, "shift_norm": 2, "random": 2, "bonferroni": 3}.items():
        out = tmp_path / rule
        assert draw(folders, f"out={out}", f"selection={rule}", "top_k=2") == 0
        assert len(Ticket.load(out)) == rows
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "ticket"), str(tmp_path / "top_k")]) == 0
    shown = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "ticket 3 0.667" in lines and "top_k 2 (0.0) 2" in lines
    assert "k differs for 0 of 134 tokens." in lines and "Mean Jaccard overlap of all pairs: 0.667." in lines
    (only,) = set(Ticket.load(tmp_path / "ticket").token_ids) - set(Ticket.load(tmp_path / "top_k").token_ids)
    assert f"ticket only 1 {ModelFolder(folders / 'before').tokenizer().convert_ids_to_tokens(only)}" in lines
    page = tmp_path / "overlaps.html"
    assert (
        main(["inspect", *(str(tmp_path / rule) for rule in ("ticket", "top_k", "random")), "--report", str(page)]) == 0
    )
    assert "random only" in capsys.readouterr().out
    assert "Jaccard overlap of all pairs" in page.read_text() and page.read_text().count("<svg") == 1
    for words, said in {
        ("ticket", "ticket"): "a ticket is given twice",
        ("ticket", "--report", str(page)): "--report shows what tickets share",
    }.items():
        assert (
            main(["inspect", *(word if word.startswith(("-", "/")) else str(tmp_path / word) for word in words)]) == 2
        )
        assert said in capsys.readouterr().err


def test_another_dtype_and_more_files(folders, tmp_path):
    """A sharded bf16 checkpoint against itself in float32 draws nothing; its rows are read where they lie."""
    make_model_folder(tmp_path / "sharded", dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    shutil.copytree(tmp_path / "sharded", tmp_path / "moved")
    index = json.loads((tmp_path / "moved/model.safetensors.index.json").read_text())
    shard = tmp_path / "moved" / index["weight_map"][EMBEDDING]
    tensors = load_file(shard)
    tensors[EMBEDDING][[5]] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    assert draw(tmp_path, f"out={tmp_path / 'ticket'}", before="sharded", after="moved") == 0
    ticket = Ticket.load(tmp_path / "ticket")
    assert ticket.token_ids == [5] and ticket.tested_dtype == "bfloat16"


def mistake(capsys, *words, home, **names) -> str:
    assert draw(home, *words, **names) == 2
    message = capsys.readouterr().err
    (line,) = [line for line in message.splitlines() if line.startswith("ksl-ds: ")]
    return line


def test_folders_that_do_not_belong_together(folders, tmp_path, capsys):
    out = f"out={tmp_path / 'ticket'}"
    make_model_folder(tmp_path / "wider", vocab_size=140)
    shutil.copytree(folders / "before", tmp_path / "before")
    line = mistake(capsys, out, home=tmp_path, after="wider")
    assert "(134, 32)" in line and "(140, 32)" in line

    shutil.copytree(folders / "before", tmp_path / "retokenized")
    tokenizer = json.loads((tmp_path / "retokenized/tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["chien"], vocabulary["chat"] = vocabulary["chat"], vocabulary["chien"]
    (tmp_path / "retokenized/tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizers" in mistake(capsys, out, home=tmp_path, after="retokenized")

    shutil.copytree(folders / "before", tmp_path / "headless")
    tensors = load_file(tmp_path / "headless/model.safetensors")
    del tensors[EMBEDDING]
    save_file(tensors, tmp_path / "headless/model.safetensors", metadata={"format": "pt"})
    assert "embed_tokens" in mistake(capsys, out, home=tmp_path, after="headless")

    shutil.copytree(folders / "before", tmp_path / "broken")

    def spoil(weight_VD):
        weight_VD[9, 1] = torch.nan
        return weight_VD

    change_embedding(tmp_path / "broken", spoil)
    assert "row 9 of after" in mistake(capsys, out, home=tmp_path, after="broken")

    line = mistake(capsys, out, home=tmp_path, after="before")
    assert "the ticket is empty" in line and "selection=top_k" in line
    assert "alpha is 2" in mistake(capsys, out, "alpha=2", home=folders)
    assert "frequency" in mistake(capsys, out, "selection=frequency", home=folders)
    assert "must be one of" in mistake(capsys, out, "selection=best", home=folders)
    assert "already exists" in mistake(capsys, f"out={tmp_path}", home=folders)
    assert not (tmp_path / "ticket").exists()


def test_inspect_says_what_it_cannot_read(tmp_path, capsys, folders):
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err
    assert draw(folders, f"out={tmp_path / 'ticket'}") == 0
    assert main(["inspect", str(tmp_path / "ticket"), "--published", "en-xx"]) == 2
    assert "en-ca" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "ticket"), "--published", "en-ca"]) == 2
    assert "LLaMA-1" in capsys.readouterr().err


def test_published_tickets_compare_with_llama_tickets(tmp_path, capsys):
    """A ticket over LLaMA's vocabulary that holds four of the published rows for Danish."""
    before_VD = torch.randn(32000, 16, generator=torch.Generator().manual_seed(0))
    after_VD = before_VD.clone()
    after_VD[[13, 278, 297, 29871, 500]] += 3
    pieces = [""] * 32000
    draw_ticket(before_VD, after_VD, tokens=pieces).save(tmp_path / "ticket", "model.embed_tokens")
    assert main(["inspect", str(tmp_path / "ticket"), "--published", "en-da"]) == 0
    assert "12 rows, 4 of them in this ticket of 5" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "ticket"), "--published", "all"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    # Ten rows are common to all six published tickets; this one has four of them.
    assert any(line.startswith("all 4 ") for line in lines)
    assert sum("published en-" in line for line in lines) >= 6
