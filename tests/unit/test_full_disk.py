"""A disk that is full in the middle of writing: one sentence, and nothing half-written or lost.

Sizes are tried in pages of 4 KiB, so that each file of a folder is the first that finds no room.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.processes import small_disk
from helpers.tickets import IDS, random_matrix, same, shifted
from helpers.tiny import make_model_folder
from transformers import AutoModelForCausalLM

from ksl_ds.commands import draw, transfer
from ksl_ds.config.load import load_recipe
from ksl_ds.config.schema import DrawCommand, Recipe, TransferCommand
from ksl_ds.environment import hardware_and_versions
from ksl_ds.errors import UserError
from ksl_ds.lottery.ticket import Ticket, draw_ticket
from ksl_ds.model.adapters import save_adapter
from ksl_ds.model.folder import ModelFolder
from ksl_ds.model.write_folder import write_model_with_rows
from ksl_ds.training import stages


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A model, one with four rows moved, and a ticket of the two."""
    home = tmp_path_factory.mktemp("folders")
    base = ModelFolder(make_model_folder(home / "before"))
    weight_VD = next(base.blocks(base.embedding_name))
    write_model_with_rows(base, home / "after", IDS, shifted(weight_VD)[IDS], "input")
    draw.main(DrawCommand(before=str(home / "before"), after=str(home / "after"), out=str(home / "ticket")))
    return {name: str(home / name) for name in ("before", "after", "ticket")}


def runs_out(write, disk: Path) -> bool:
    """Whether there was no room; then nothing may be left, and the sentence names what was to be written."""
    try:
        write()
    except UserError as error:
        assert str(error).endswith("out could not be written: No space left on device"), error
        assert list(disk.iterdir()) == []
        return True
    return False


def fill_disks(tmp_path: Path, write, pages: list[int]) -> None:
    """Runs `write(out)` on disks of so many pages: there is room on the last only."""
    for number in pages:
        with small_disk(tmp_path / f"disk-{number}", f"{4 * number}k") as disk:
            assert runs_out(lambda disk=disk: write(disk / "out"), disk) == (number != pages[-1]), number


def test_draw(tmp_path, folders):
    command = {name: folders[name] for name in ("before", "after")}
    fill_disks(tmp_path, lambda out: draw.main(DrawCommand(**command, out=str(out))), [1, 2, 3, 4, 6])


def test_transfer(tmp_path, folders):
    words = {"base": folders["before"], "ticket": folders["ticket"]}
    fill_disks(tmp_path, lambda out: transfer.main(TransferCommand(**words, out=str(out))), [1, 8, 20, 24, 64])


def test_the_ticket_of_a_run(tmp_path, folders):
    ticket = Ticket.load(folders["ticket"])
    folder = SimpleNamespace(tied=False, embedding_module="model.embed_tokens", path=Path("m"))
    recipe = load_recipe(Recipe, None, ["run_dir=x", "model.path=m"])
    results = SimpleNamespace(baselines={}, environment=hardware_and_versions())
    run = SimpleNamespace(folder=folder, recipe=recipe, results=results, stages={})
    fill_disks(tmp_path, lambda out: stages.save_ticket(run, ticket, out), [1, 3, 8])


def test_an_adapter(tmp_path, folders):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folders["before"]), config)
    fill_disks(tmp_path, lambda out: save_adapter(model, out), [1, 2, 3, 16])


def test_an_older_ticket_stays(tmp_path):
    """With room for one and a half tickets, the older one stays as it is."""
    before_VD = random_matrix(1024)
    ticket = draw_ticket(before_VD, shifted(before_VD))
    with small_disk(tmp_path / "disk", "24k") as disk:
        ticket.save(disk / "out", "model.embed_tokens")
        with pytest.raises(OSError, match="No space left on device"):
            ticket.with_rows(ticket.rows_KD + 1).save(disk / "out", "model.embed_tokens")
        assert [path.name for path in disk.iterdir()] == ["out"] and same(Ticket.load(disk / "out"), ticket)
        assert torch.equal(Ticket.load(disk / "out").rows_KD, ticket.rows_KD)
