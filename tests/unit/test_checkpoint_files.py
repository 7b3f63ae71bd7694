"""A checkpoint whose files were changed is passed over, also where the manifest was changed along."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.mutations import FILES_OF_OTHER_KINDS, REMOVED, changed

from ksl_ds.files import file_sha256
from ksl_ds.sharding.checkpoint import MANIFEST, STATE, Checkpoints


class NoTraining:
    def bytes_of_rank(self) -> int:
        return 0

    def save(self, folder: Path) -> list[Path]:
        return []

    def load(self, folder: Path) -> None:
        pass


@pytest.fixture
def checkpoints(tmp_path) -> Checkpoints:
    saved = Checkpoints(tmp_path / "steps", keep_last=2)
    for step in (2, 4):
        saved.save(step, NoTraining(), {"outcome": {"steps": step}, "monitor": {}})
    return saved


def write_state(folder: Path, content: bytes) -> None:
    """Replaces state.json, and its digest too."""
    (folder / STATE).write_bytes(content)
    digests = json.loads((folder / MANIFEST).read_text())
    digests[STATE] = [len(content), file_sha256(folder / STATE)]
    (folder / MANIFEST).write_text(json.dumps(digests))


def loads(checkpoints: Checkpoints) -> int:
    return checkpoints.load(NoTraining())["step"]


def test_a_changed_state_is_passed_over(checkpoints, capsys, messages):
    newest = checkpoints.folder / "step-00000004"
    assert loads(checkpoints) == 4
    whole = json.loads((newest / STATE).read_text())
    edited = [
        json.dumps(changed(whole, (name,), other)).encode()
        for name in ("step", "world_size", "outcome", "monitor")
        for other in (REMOVED, None, [], "x", -1, 10**30)
    ]
    for content in [*FILES_OF_OTHER_KINDS, *edited]:
        write_state(newest, content)
        assert loads(checkpoints) == 2, content
        assert f"warning: checkpoint {newest} is damaged ({STATE}" in capsys.readouterr().err.replace(f"{newest}/", "")
    write_state(newest, json.dumps(whole).encode())
    assert loads(checkpoints) == 4


def test_a_changed_manifest_is_passed_over(checkpoints):
    newest = checkpoints.folder / "step-00000004"
    whole = json.loads((newest / MANIFEST).read_text())
    assert set(whole) == {STATE, "rank-00000.safetensors"}
    edited = [
        json.dumps(changed(whole, (name,), other)).encode() for name in whole for other in (REMOVED, None, [], "x", 7)
    ]
    for content in [*FILES_OF_OTHER_KINDS, *edited]:
        (newest / MANIFEST).write_bytes(content)
        assert loads(checkpoints) == 2, content
