"""Model folders: the embedding is found in any architecture, rows are read alone, copies differ where asked."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tickets import Malicious
from helpers.tiny import make_model_folder
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers import conversion_mapping as CONVERSIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ksl_ds.errors import UserError
from ksl_ds.model import write_folder
from ksl_ds.model.folder import ModelFolder, local_folder, open_model, token_strings
from ksl_ds.model.safetensors_io import ShardWriter
from ksl_ds.model.write_folder import Changes, folder_writer, write_model_with_rows
from ksl_ds.training.saving import save_model

IDS = [3, 17, 130]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by safetensors itself."""
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def loaded(path: Path) -> dict[str, torch.Tensor]:
    """The model's own state as transformers loads it; nothing may be missing or unexpected."""
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    return model.state_dict()


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.dtype == right.dtype and torch.equal(left, right)


@pytest.mark.parametrize(
    ("architecture", "embedding", "head", "module"),
    [
        ("llama", "model.embed_tokens.weight", "lm_head.weight", "model.embed_tokens"),
        ("mistral", "model.embed_tokens.weight", "lm_head.weight", "model.embed_tokens"),
        ("qwen2", "model.embed_tokens.weight", "lm_head.weight", "model.embed_tokens"),
        ("gemma", "model.embed_tokens.weight", "lm_head.weight", "model.embed_tokens"),
        ("opt", "model.decoder.embed_tokens.weight", "lm_head.weight", "model.decoder.embed_tokens"),
        ("gpt_neox", "gpt_neox.embed_in.weight", "embed_out.weight", "gpt_neox.embed_in"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_found(tmp_path, architecture, embedding, head, module, tied):
    base = ModelFolder(make_model_folder(tmp_path / "base", architecture, tied=tied))
    assert base.embedding_name == embedding and base.embedding_module == module and base.head_module == "lm_head"
    assert base.tied == tied
    assert base.new_name("lm_head.weight") == head
    model = AutoModelForCausalLM.from_pretrained(base.path)
    for name, parameter in model.named_parameters():
        stored = base.stored_name(name)
        assert stored is not None
        assert same(base.read_flat(stored, 0, parameter.numel()), parameter.detach().flatten())


def test_architecture_is_never_partitioned(tmp_path):
    """Also while a ZeRO-3 configuration is alive, which makes transformers partition every model it builds."""
    from transformers.integrations import HfDeepSpeedConfig

    path = make_model_folder(tmp_path / "base")
    alive = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    base = ModelFolder(path)
    assert alive.is_zero3() and base.meta_model.get_input_embeddings().weight.shape == (134, 32)
    assert not hasattr(base.meta_model.get_input_embeddings().weight, "ds_id") and not base.tied


def test_embedding_is_found_without_the_base_model_prefix(tmp_path):
    path = make_model_folder(tmp_path / "base", tied=True)
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors(path).items()}
    save_file(bare, path / "model.safetensors", metadata={"format": "pt"})
    base = ModelFolder(path)
    assert base.embedding_name == "embed_tokens.weight" and base.tied
    write_model_with_rows(base, tmp_path / "out", IDS, torch.ones(3, 32), "input")
    state = loaded(tmp_path / "out")
    assert same(state["lm_head.weight"], bare["embed_tokens.weight"])
    assert (state["model.embed_tokens.weight"] != bare["embed_tokens.weight"]).any(
        1
    ).nonzero().flatten().tolist() == IDS


@pytest.mark.parametrize("scope", ["input", "shared"])
@pytest.mark.parametrize("storage", ["head only", "both", "both, different"])
def test_tied_models_that_store_their_head(tmp_path, storage, scope):
    path = make_model_folder(tmp_path / "base", tied=True)
    stored = tensors(path)
    matrix = stored["model.embed_tokens.weight"]
    stored["lm_head.weight"] = matrix + 1 if storage == "both, different" else matrix.clone()
    if storage == "head only":
        del stored["model.embed_tokens.weight"]
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    base = ModelFolder(path)
    assert base.tied == (storage != "both, different")
    before = loaded(path)
    write_model_with_rows(base, tmp_path / "out", IDS, torch.ones(3, 32), scope)
    after = loaded(tmp_path / "out")
    changed = matrix.clone()
    changed[IDS] = 1
    assert same(after["model.embed_tokens.weight"], changed)
    head_moves = scope == "shared" and base.tied
    assert same(after["lm_head.weight"], changed if head_moves else before["lm_head.weight"])


def test_rows_and_flat_ranges_are_read(tmp_path):
    base = ModelFolder(make_model_folder(tmp_path / "base", dtype=torch.bfloat16, max_shard_size="20KB"))
    assert len(set(base.shard_of.values())) > 2
    reference = tensors(base.path)
    assert base.tensor_names == sorted(reference)
    for name, tensor in reference.items():
        assert base.shape(name) == tuple(tensor.shape) and base.dtype(name) == tensor.dtype == torch.bfloat16
        flat, size = tensor.flatten(), tensor.numel()
        for start, stop in [(0, size), (0, 1), (size - 1, size), (size // 3, size // 2 + 1), (5, 5), (size, size)]:
            assert same(base.read_flat(name, start, stop), flat[start:stop])
        assert same(base.read_rows(name, 2, 7), tensor[2:7])
    assert same(base.read_ids(base.embedding_name, IDS), reference[base.embedding_name][IDS])
    assert base.read_ids(base.embedding_name, []).shape == (0, 32)
    assert same(torch.cat(list(base.blocks(base.embedding_name))), reference[base.embedding_name])


def test_flat_offsets_exceed_32_bits(tmp_path):
    """A sparse file with one float16 matrix of 2^31 + 2^16 elements: only its last bytes are written and read."""
    path = make_model_folder(tmp_path / "base")
    rows, columns = 2**15 + 1, 2**16
    size = rows * columns * 2
    header = json.dumps({"big": {"dtype": "F16", "shape": [rows, columns], "data_offsets": [0, size]}}).encode()
    header += b" " * (-len(header) % 8)
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(8 + len(header) + size - 4)
        file.write(torch.tensor([1.5, 2.5], dtype=torch.float16).view(torch.uint8).numpy().tobytes())
    base = ModelFolder(path)
    assert base.read_flat("big", rows * columns - 3, rows * columns).tolist() == [0, 1.5, 2.5]
    with ShardWriter(path, base.shard_of) as writer:
        writer.write("big", rows * columns - 2, torch.tensor([7.0]))
    assert ModelFolder(path).read_flat("big", rows * columns - 3, rows * columns).tolist() == [0, 7, 2.5]


# Mistakes


def test_folders_that_are_no_models_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such model folder"):
        ModelFolder(tmp_path / "none")
    with pytest.raises(UserError, match=r"no config\.json"):
        ModelFolder(tmp_path)
    path = make_model_folder(tmp_path / "base")
    (path / "model.safetensors").rename(tmp_path / "aside")
    with pytest.raises(UserError, match="model folder without weights"):
        ModelFolder(path)
    (path / "config.json").write_text("{}")
    (tmp_path / "aside").rename(path / "model.safetensors")
    with pytest.raises(UserError, match=r"config\.json"):
        assert ModelFolder(path).embedding_name


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_are_refused_and_not_run(tmp_path, name):
    path, marker = make_model_folder(tmp_path / "base"), tmp_path / "executed"
    (path / "model.safetensors").unlink()
    (path / name).write_bytes(pickle.dumps(Malicious(marker)))
    with pytest.raises(UserError, match="convert them to safetensors" if name.endswith("bin") else "not a safetensors"):
        ModelFolder(path)
    assert not marker.exists()


def test_damaged_shards_are_refused(tmp_path):
    path = make_model_folder(tmp_path / "base", max_shard_size="20KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shard = path / index["weight_map"]["model.embed_tokens.weight"]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=f"{shard.name} is truncated"):
        ModelFolder(path).read_rows("model.embed_tokens.weight", 0, 1)
    shard.unlink()
    with pytest.raises(UserError, match=f"without weights: shard {shard.name} is missing"):
        ModelFolder(path)
    index["weight_map"]["model.embed_tokens.weight"] = "../elsewhere.safetensors"
    (tmp_path / "elsewhere.safetensors").write_bytes(content)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="elsewhere"):
        ModelFolder(path)
    (path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(UserError, match="not an index of shards"):
        ModelFolder(path)


def test_missing_tensors_are_named(tmp_path):
    path = make_model_folder(tmp_path / "base")
    stored = tensors(path)
    lacking = "model.embed_tokens.weight"
    save_file({name: tensor for name, tensor in stored.items() if name != lacking}, path / "model.safetensors")
    with pytest.raises(UserError, match=lacking):
        _ = ModelFolder(path).embedding_name
    with pytest.raises(UserError, match="has no tensor nothing"):
        ModelFolder(path).shape("nothing")


def test_tokenizer_must_fit_the_embedding(tmp_path):
    base = ModelFolder(make_model_folder(tmp_path / "small", vocab_size=100))
    with pytest.raises(UserError, match="134 tokens with ids up to 133, more than the embedding's 100 rows"):
        base.tokenizer()
    padded = ModelFolder(make_model_folder(tmp_path / "padded", vocab_size=192))
    assert token_strings(padded.tokenizer(), [0, 3, 133, 134, 191]) == ["<pad>", "a", "'", "", ""]
    (padded.path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is not valid JSON"):
        padded.tokenizer()


def test_local_folder_or_one_clear_sentence(tmp_path, monkeypatch):
    assert local_folder(tmp_path) == tmp_path
    assert local_folder("./none/of/these") == Path("none/of/these")  # no Hub id; ModelFolder refuses it
    import huggingface_hub

    asked = {}

    def download(name, **settings):
        asked.update(settings, name=name)
        if name == "org/model":
            return str(tmp_path)
        raise OSError("cannot reach the Hub\nlong details")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_folder("org/model", "v1") == tmp_path and asked["revision"] == "v1"
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in asked["allow_patterns"])
    with pytest.raises(
        UserError,
        match="org/none is not a folder, and cannot be downloaded from the Hub: cannot reach the Hub long details$",
    ):
        local_folder("org/none")


# Writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize(
    ("architecture", "tied", "scope"),
    [("llama", False, "input"), ("gemma", True, "shared"), ("gpt_neox", True, "input"), ("opt", True, "input")],
)
def test_written_model_differs_in_the_rows_only(tmp_path, architecture, tied, scope, max_shard_size, dtype):
    path = make_model_folder(tmp_path / "base", architecture, tied=tied, dtype=dtype, max_shard_size=max_shard_size)
    (path / "README.md").write_text("card")
    (path / "optimizer.pt").write_bytes(b"not to be copied")
    (path / "checkpoint-1").mkdir()
    base, out = ModelFolder(path), tmp_path / "out"
    rows_KD = torch.randn(3, 32)
    write_model_with_rows(base, out, IDS, rows_KD, scope)

    expected = tensors(path)
    if tied and scope == "input":
        expected[base.new_name("lm_head.weight")] = expected[base.embedding_name].clone()
    expected[base.embedding_name][IDS] = rows_KD.to(dtype)
    written = tensors(out)
    assert written.keys() == expected.keys()
    assert all(same(written[name], expected[name]) for name in expected)

    state, before = loaded(out), loaded(path)
    changed = {name for name in state if not same(state[name], before[name])}
    assert changed == {f"{base.embedding_module}.weight"} | ({"lm_head.weight"} if scope == "shared" else set())
    assert ModelFolder(out).tied == (scope == "shared") == AutoConfig.from_pretrained(out).tie_word_embeddings
    assert ModelFolder(out).tokenizer().get_vocab() == base.tokenizer().get_vocab()
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"):
        assert (out / name).read_bytes() == (path / name).read_bytes()
    assert not (out / "optimizer.pt").exists() and not (out / "checkpoint-1").exists()
    if tied and scope == "input":
        config, old = (json.loads((folder / "config.json").read_text()) for folder in (out, path))
        assert config == old | {"tie_word_embeddings": False}
    index = out / "model.safetensors.index.json"
    if index.exists():
        assert json.loads(index.read_text())["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())


@pytest.mark.parametrize("linkable", [True, False])
def test_untouched_shards_are_linked_or_copied(tmp_path, monkeypatch, linkable):
    path = make_model_folder(tmp_path / "base", tied=True, max_shard_size="20KB")
    # As in the Hub's cache: the snapshot holds symbolic links.
    shutil.move(path, tmp_path / "blobs")
    path.mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (path / file.name).symlink_to(file)
    if not linkable:

        def refuse(*_, **__):
            raise OSError(18, "Invalid cross-device link")

        monkeypatch.setattr(os, "link", refuse)
    base, out = ModelFolder(path), tmp_path / "out"
    write_model_with_rows(base, out, IDS, torch.ones(3, 32), "shared")
    changed = base.shard_of[base.embedding_name]
    for shard in set(base.shard_of.values()):
        assert (out / shard).samefile(path / shard) == (linkable and shard != changed)
        assert not (out / shard).is_symlink()
        assert ((out / shard).read_bytes() == (path / shard).read_bytes()) == (shard != changed)
    assert loaded(path)["model.embed_tokens.weight"].abs().max() < 1  # the base is what it was


def test_tensors_are_replaced_and_added(tmp_path):
    base = ModelFolder(make_model_folder(tmp_path / "base", tied=True, dtype=torch.bfloat16, max_shard_size="20KB"))
    norm = "model.norm.weight"
    head = torch.randn(134, 32).bfloat16()
    added = {"lm_head.weight": (torch.bfloat16, (134, 32))}
    changes = Changes(rewritten=[norm], added=added, config={"tie_word_embeddings": False})
    with folder_writer(base, tmp_path / "out", changes) as write:
        write("lm_head.weight", 32 * 70, head[70:])
        write(norm, 0, torch.full((32,), 0.3))
        write("lm_head.weight", 0, head[:70])
    state = loaded(tmp_path / "out")
    expected = loaded(base.path) | {norm: torch.full((32,), 0.3).bfloat16(), "lm_head.weight": head}
    assert all(same(state[name], expected[name]) for name in expected)
    with (
        pytest.raises(AssertionError, match="'model.norm.weight': 1"),
        folder_writer(base, tmp_path / "other", changes) as write,
    ):
        write("lm_head.weight", 0, head)
        write(norm, 0, torch.ones(31))
    assert not (tmp_path / "other").exists()


def test_single_shard_with_an_index_keeps_it(tmp_path):
    path = make_model_folder(tmp_path / "base")
    (path / "model.safetensors").rename(path / "model-00001-of-00001.safetensors")
    names = load_file(path / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_model_with_rows(ModelFolder(path), tmp_path / "out", IDS, torch.ones(3, 32), "input")
    assert torch.equal(loaded(tmp_path / "out")["model.embed_tokens.weight"][IDS], torch.ones(3, 32))


def test_existing_output_is_refused_and_kept(tmp_path):
    base = ModelFolder(make_model_folder(tmp_path / "base"))
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").touch()
    with pytest.raises(UserError, match="out already exists"):
        write_model_with_rows(base, out, IDS, torch.ones(3, 32), "input")
    assert [file.name for file in out.iterdir()] == ["precious"]


@pytest.mark.parametrize("step", ["link_or_copy", "new_shard", "ShardWriter.write", "_write_index", "_copy_side_files"])
def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch, step):
    base = ModelFolder(make_model_folder(tmp_path / "base", tied=True, max_shard_size="20KB"))
    before = {file.name: file.read_bytes() for file in base.path.iterdir()}

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"{write_folder.__name__}.{step}", no_space)
    with pytest.raises(UserError, match="out could not be written: No space left on device"):
        write_model_with_rows(base, tmp_path / "out", IDS, torch.ones(3, 32), "input")
    assert [file.name for file in tmp_path.iterdir()] == ["base"]
    assert {file.name: file.read_bytes() for file in base.path.iterdir()} == before


# Folders that are not what they seem


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantised folders are not supported; give the 16",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "quantised folders are not supported; give the 16-bit model",
        ),
        ({"is_encoder_decoder": True}, "encoder-decoders are not supported"),
        ({"model_type": "bert", "is_decoder": False}, "bert is a bidirectional encoder here"),
        ({"vocab_size": 200}, "vocab_size is 200, but model.embed_tokens.weight has 134 rows"),
        ({"hidden_size": 64, "head_dim": 8}, r"should have shape \(134, 64\), but has \(134, 32\)"),
        ({"hidden_size": -4}, r"config\.json"),
        (
            {"hidden_size": "32"},
            r"config\.json: Validation error for field 'hidden_size': Field 'hidden_size' expected int, got str",
        ),
        ({"hidden_act": "nothing"}, "unknown or missing key 'nothing'"),
        ({"num_key_value_heads": 0}, r"config\.json"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000, but the files hold \d+ tensors"),
        ({"num_hidden_layers": 1}, "9 tensors in the files do not belong to a llama, such as model.layers.1"),
        ({"pad_token_id": 500}, r"config\.json"),
        ({"attn_implementation": "flash_attention_2"}, r"config\.json: no causal language model can be built"),
        ({"model_type": ["llama"]}, r"config\.json"),
    ],
)
def test_configs_that_do_not_describe_the_files_are_refused(tmp_path, changes, sentence):
    path = make_model_folder(tmp_path / "base")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=sentence) as refused:
        open_model(path)
    assert "\n" not in str(refused.value)
    assert str(refused.value).count("config.json: ") <= 1


def test_return_dict_of_a_config_does_not_matter(tmp_path):
    path = make_model_folder(tmp_path / "base")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"return_dict": False}))
    assert open_model(path).config.return_dict


def test_adapters_are_no_models(tmp_path):
    path = make_model_folder(tmp_path / "base")
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds adapter_config\.json beside a model"):
        open_model(path)
    (path / "config.json").unlink()
    with pytest.raises(UserError, match="is an adapter, not a model: give its base model"):
        open_model(path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"])
def test_git_lfs_pointers_are_named(tmp_path, name):
    path = make_model_folder(tmp_path / "base")
    (path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(UserError, match=f"{name} is a git-LFS pointer, not the file itself; run `git lfs pull`"):
        open_model(path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "said"), [("[1]", "belongs to a tokenizer and must hold an object"), ("", "is not valid JSON")]
)
def test_damaged_files_of_a_tokenizer_are_named(tmp_path, name, content, said):
    path = make_model_folder(tmp_path / "base")
    (path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} {said}"):
        open_model(path).tokenizer()


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (
            {"weight_map": {"a": "model.safetensors"}},
            "not an index of shards, an object with metadata and weight_map .unknown or missing key 'metadata'",
        ),
        ({"metadata": {}, "weight_map": {"a": 7}}, "weight_map: a: 7 is not a file's name"),
        ({"metadata": {}, "weight_map": {"a": ["b"]}}, r"weight_map: a: \['b'\] is not a file's name"),
        ({"metadata": {}, "weight_map": 3}, "not an index of shards"),
        ([], r"not an index of shards, an object with metadata and weight_map \(list indices must be integers"),
    ],
)
def test_indices_of_another_form_are_refused(tmp_path, index, sentence):
    path = make_model_folder(tmp_path / "base")
    (path / "model.safetensors").unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=sentence):
        open_model(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda matrix: matrix.flatten(), r"should have shape \(134, 32\), but has \(4288,\)"),
        (lambda matrix: matrix[None].clone(), r"should have shape \(134, 32\), but has \(1, 134, 32\)"),
        (lambda matrix: matrix.int(), "holds torch.int32, not floating-point weights"),
        (lambda matrix: matrix.to(torch.float8_e4m3fn), "is FP8: quantised folders are not supported"),
        (lambda matrix: matrix.to(torch.uint16), "holds torch.uint16, not floating-point weights"),
        (lambda matrix: matrix.to(torch.complex64), "is stored as C64, which is not supported"),
    ],
)
def test_embeddings_of_another_form_are_refused(tmp_path, change, sentence):
    path = make_model_folder(tmp_path / "base")
    stored = tensors(path)
    stored["model.embed_tokens.weight"] = change(stored["model.embed_tokens.weight"])
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=sentence):
        open_model(path)


def test_two_matrices_under_a_config_that_says_tied_are_written_untied(tmp_path):
    path = make_model_folder(tmp_path / "base", tied=True)
    stored = tensors(path)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    base = open_model(path)
    assert base.config_ties and not base.tied
    write_model_with_rows(base, tmp_path / "out", IDS, torch.ones(3, 32), "input")
    assert not open_model(tmp_path / "out").config_ties
    assert same(loaded(tmp_path / "out")["lm_head.weight"], stored["lm_head.weight"])


@pytest.mark.parametrize("storage", ["embedding only", "head only", "both"])
def test_a_whole_tied_model_is_written_under_every_name(tmp_path, storage):
    path = make_model_folder(tmp_path / "base", tied=True)
    stored = tensors(path)
    if storage != "embedding only":
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    if storage == "head only":
        del stored["model.embed_tokens.weight"]
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    assert_whole_model_is_written(open_model(path), tmp_path / "out")


# Every architecture that transformers converts on loading


CONVERSIONS.get_checkpoint_conversion_mapping("llama")  # fills the table
CONVERTED = {
    name for name in CONVERSIONS._checkpoint_conversion_mapping_cache if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
}
NOT_TINY = {
    "deepseek_v4": "transformers does not read back the final norm that it writes itself",
    "emu3": "a multimodal wrapper, whose image part has no tiny size here",
    "gemma3": "a multimodal wrapper, whose image part has no tiny size here",
    "gemma3n_text": "its kinds of layers demand more layers than a tiny model has",
    "gemma4_unified": "its sizes differ by layer",
    "got_ocr2": "a multimodal wrapper, whose image part has no tiny size here",
    "granitemoehybrid": "its recurrent layers demand matching sizes",
    "lfm2_moe": "it has no default kinds of layers",
    "mllama": "a multimodal wrapper, whose image part has no tiny size here",
}
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_topk": 2,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1, "pad_token_id": 0,
}  # fmt: skip


def assert_whole_model_is_written(base: ModelFolder, out: Path) -> None:
    """Other values for every parameter are what plain transformers loads from the written folder."""
    model = AutoModelForCausalLM.from_pretrained(base.path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    save_model(SimpleNamespace(folder=base, model=model), out)
    again, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    expected, written = (dict(each.named_parameters()) for each in (model, again))
    assert written.keys() == expected.keys()
    assert [name for name in expected if not same(written[name], expected[name])] == []


@pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=[pytest.mark.skip(reason=NOT_TINY[name])] if name in NOT_TINY else [])
        for name in sorted(CONVERTED)
    ],
)
def test_a_whole_model_is_written_as_transformers_reads_it(tmp_path, architecture):
    text = AutoConfig.for_model(architecture).get_text_config()
    torch.manual_seed(0)
    sizes = {name: value for name, value in TINY.items() if hasattr(text, name)}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes)).save_pretrained(tmp_path / "base")
    assert_whole_model_is_written(open_model(tmp_path / "base"), tmp_path / "out")


def test_ids_with_gaps_are_compared_by_the_largest_one(tmp_path):
    path = make_model_folder(tmp_path / "gaps", vocab_size=140)
    record = json.loads((path / "tokenizer.json").read_text())
    record["model"]["vocab"]["far"] = 139
    (path / "tokenizer.json").write_text(json.dumps(record))
    tokenizer = ModelFolder(path).tokenizer()
    assert len(tokenizer) == 135 and token_strings(tokenizer, [134, 139]) == ["", "far"]
    record["model"]["vocab"]["far"] = 140
    (path / "tokenizer.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="135 tokens with ids up to 140, more than the embedding's 140 rows"):
        ModelFolder(path).tokenizer()


@pytest.mark.parametrize(
    ("value", "ids"), [(2, [2]), ([2, 5], [2, 5]), (None, []), ([2, 134, -1, 10**30], [2]), ([], [])]
)
def test_end_ids_of_a_checkpoint(tmp_path, value, ids):
    path = make_model_folder(tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": value, "do_sample": True}))
    assert ModelFolder(path).end_ids == ids
    (path / "generation_config.json").unlink()
    assert ModelFolder(path).end_ids == [2]  # config.json's


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"eos_token_id": "</s>"}', 'eos_token_id is "</s>"; it must be a token id or a list of token ids'),
        ('{"eos_token_id": [2, null]}', "eos_token_id is \\[2, null\\]; it must be"),
        ('{"eos_token_id": true}', "eos_token_id is true; it must be"),
        ('{"eos_token_id": 2.0}', "eos_token_id is 2.0; it must be"),
        ('{"eos_token_id": {"a": 1}}', "it must be"),
        ("[1]", "must hold a JSON object, not"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_generation_config_that_says_no_end_ids(tmp_path, text, problem):
    path = make_model_folder(tmp_path / "model")
    (path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=f"generation_config.json.*{problem}"):
        _ = ModelFolder(path).end_ids


@pytest.mark.parametrize(
    ("architecture", "sizes", "positions"),
    [
        ("gpt2", {"n_positions": 40, "n_embd": 32, "n_layer": 1, "n_head": 4}, 40),
        ("opt", {"max_position_embeddings": 40}, 40),
        ("gptj", {"n_positions": 40, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 8}, 40),
        ("llama", {"max_position_embeddings": 40}, None),
        ("bloom", {"n_layer": 1}, None),
    ],
)
def test_positions_that_a_model_has_a_table_for(tmp_path, architecture, sizes, positions):
    assert ModelFolder(make_model_folder(tmp_path / "model", architecture, **sizes)).positions == positions
