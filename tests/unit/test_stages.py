"""What a stage takes from the one before it when a run is resumed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.training import stages


@pytest.mark.parametrize(("ticket_ids", "fits"), [([3, 5], True), ([3, 6], False), ([3], False)])
def test_a_ticket_must_be_the_one_that_the_draw_selects(monkeypatch, tmp_path, ticket_ids, fits):
    run = SimpleNamespace(recipe=Recipe(), dir=tmp_path)
    ticket = SimpleNamespace(token_ids=ticket_ids)
    shift = SimpleNamespace(count_V=torch.zeros(7), num_samples=4)
    shard = SimpleNamespace(num_rows=7, row_length=4)
    for name, answer in {"load_shift": shift, "token_frequency": None, "load_ticket": ticket}.items():
        monkeypatch.setattr(stages, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(stages, "ids_of_draw", lambda *_, **__: torch.tensor([3, 5]))
    if fits:
        assert stages.load_draw(run, shard) == (shift, ticket)
    else:
        with pytest.raises(UserError, match=r"partial_transfer is not the ticket that .*draw.safetensors selects"):
            stages.load_draw(run, shard)
