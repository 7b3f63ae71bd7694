"""`ksl-ds transfer` as users run it: base and ticket in, a model folder out that transformers and PEFT agree with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers.processes import launch, run, succeeds
from helpers.tiny import make_model_folder, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ksl_ds.commands import transfer
from ksl_ds.config.schema import TransferCommand
from ksl_ds.errors import UserError
from ksl_ds.lottery.ticket import Ticket, draw_ticket
from ksl_ds.model.folder import ModelFolder, token_strings

IDS = [3, 17, 64, 130]


def tuned_copy(base: ModelFolder, out: Path) -> ModelFolder:
    """What embed tuning leaves: some rows far from where they were, all others a little off."""
    matrix_VD = next(base.blocks(base.embedding_name)).clone()
    generator = torch.Generator().manual_seed(1)
    noise_VD = 1e-2 * matrix_VD.float() * torch.randn(matrix_VD.shape, generator=generator)
    noise_VD[IDS] = 1 + torch.rand(len(IDS), matrix_VD.shape[1], generator=generator)
    write_model(base, out, {base.embedding_name: matrix_VD + noise_VD})
    return ModelFolder(out)


def drawn(base: ModelFolder, tuned: ModelFolder, folder: Path, scope: str = "input") -> Ticket:
    before_VD, after_VD = (next(model.blocks(model.embedding_name)) for model in (base, tuned))
    tokens = token_strings(base.tokenizer(), range(len(before_VD)))
    ticket = draw_ticket(before_VD, after_VD, tokens=tokens, embedding_scope=scope)
    assert ticket.token_ids == IDS
    ticket.save(folder, base.embedding_module, base.head_module if base.tied else None)
    return ticket


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([[3, 17, 9, 64, 130, 2, 20, 21]])).logits


@pytest.mark.parametrize(
    ("architecture", "tied", "scope", "dtype"),
    [
        ("llama", False, "input", torch.bfloat16),
        ("llama", True, "input", torch.float32),
        ("gemma", True, "shared", torch.bfloat16),
        ("gemma", True, "input", torch.bfloat16),
        ("opt", False, "input", torch.float32),
        ("opt", True, "shared", torch.float32),
        ("gpt_neox", False, "input", torch.float32),
        ("gpt_neox", True, "input", torch.bfloat16),
    ],
)
def test_transferred_model_equals_ticket_and_peft(tmp_path, capsys, architecture, tied, scope, dtype):
    from peft import PeftModel

    path = make_model_folder(tmp_path / "base", architecture, tied=tied, dtype=dtype, max_shard_size="20KB")
    base = ModelFolder(path)
    tuned = tuned_copy(base, tmp_path / "tuned")
    ticket = drawn(base, tuned, tmp_path / "ticket", scope)
    transfer.main(TransferCommand(base=str(path), ticket=str(tmp_path / "ticket"), out=str(tmp_path / "out")))
    (said,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(str(tmp_path))]
    assert f"4 of 134 embedding rows differ from {path}" in said
    assert ("a matrix of its own" in said, "moved along" in said) == (tied and scope == "input", scope == "shared")

    written, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    # Partial transfer: the ticket's rows are the tuned checkpoint's, to the bit, and nothing else has moved.
    expected_VD = next(base.blocks(base.embedding_name)).clone()
    expected_VD[IDS] = next(tuned.blocks(tuned.embedding_name))[IDS]
    assert torch.equal(written.get_input_embeddings().weight, expected_VD)
    model = AutoModelForCausalLM.from_pretrained(path)
    before, embedding = dict(model.named_parameters()), f"{base.embedding_module}.weight"
    for name, parameter in written.named_parameters():
        if name != embedding:
            assert torch.equal(parameter, before[embedding if name == "lm_head.weight" and tied else name]), name

    ticket.apply(model)
    assert torch.equal(logits(written), logits(model))
    if not tied or scope == "shared":
        with_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path), tmp_path / "ticket")
        assert torch.equal(logits(with_peft), logits(written))


@pytest.fixture
def ready(tmp_path: Path) -> dict[str, str]:
    base = ModelFolder(make_model_folder(tmp_path / "base", tied=True))
    drawn(base, tuned_copy(base, tmp_path / "tuned"), tmp_path / "ticket")
    return {name: str(tmp_path / name) for name in ("base", "ticket", "out")}


def test_transfer_mistakes_are_one_sentence_and_write_nothing(ready, tmp_path):
    make_model_folder(tmp_path / "other", tied=True, seed=1)
    make_model_folder(tmp_path / "wide", tied=True, hidden_size=64)
    (tmp_path / "exists").mkdir()
    mistakes = {
        "another base model": {"base": str(tmp_path / "other")},
        r"shape \(134, 32\), not \(134, 64\)": {"base": str(tmp_path / "wide"), "force": True},
        "no such model folder": {"base": str(tmp_path / "none" / "at" / "all")},
        "no such ticket folder": {"ticket": str(tmp_path / "none")},
        "already exists": {"out": str(tmp_path / "exists")},
        r"base/adapter_config\.json is missing; a ticket is the four files": {"ticket": ready["base"]},
    }
    for reason, change in mistakes.items():
        with pytest.raises(UserError, match=reason) as error:
            transfer.main(TransferCommand(**(ready | change)))
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "exists", "other", "ticket", "tuned", "wide"]
    transfer.main(TransferCommand(**(ready | {"base": str(tmp_path / "other"), "force": True})))
    rows_KD = ModelFolder(ready["out"]).read_ids("model.embed_tokens.weight", IDS)
    assert torch.equal(rows_KD, Ticket.load(ready["ticket"]).rows_KD)


def test_transfer_to_a_vocabulary_that_was_resized_later_is_forced(ready, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(ready["base"])
    model.resize_token_embeddings(140)
    model.save_pretrained(tmp_path / "resized")
    words = ready | {"base": str(tmp_path / "resized")}
    with pytest.raises(UserError, match=r"not \(140, 32\) \(force accepts a vocabulary that was resized later\)"):
        transfer.main(TransferCommand(**words))
    transfer.main(TransferCommand(**words, force=True))
    ticket = Ticket.load(ready["ticket"])
    ticket.apply(model, force=True)
    written = AutoModelForCausalLM.from_pretrained(ready["out"]).state_dict()
    assert all(torch.equal(value, written[name]) for name, value in model.state_dict().items())


def test_transfer_in_one_process_and_on_two_ranks(ready, tmp_path):
    words = ["transfer", *(f"{name}={path}" for name, path in ready.items())]
    one = succeeds(run(sys.executable, "-m", "ksl_ds", *words, cwd=tmp_path))
    assert "4 of 134 embedding rows differ" in one.stdout
    words[-1] += "2"
    two = succeeds(launch(2, "--module", "ksl_ds", *words, cwd=tmp_path))
    assert two.stdout.count("embedding rows differ") == 1
    for file in Path(ready["out"]).glob("*.safetensors"):
        left, right = load_file(file), load_file(tmp_path / "out2" / file.name)
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    again = launch(2, "--module", "ksl_ds", *words, cwd=tmp_path)
    assert again.returncode != 0 and again.stderr.count("out2 already exists") == 1
