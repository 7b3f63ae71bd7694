"""The scan of two checkpoints against scipy row by row: rows, counts, corrections, and words for bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.tiny import make_model_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import stats

from ksl_ds.cli import main
from ksl_ds.model.folder import ModelFolder
from ksl_ds.scan.blocks import BLOCK_ELEMENTS, as_rows, blocks_of, row_shape
from ksl_ds.scan.checkpoints import open_checkpoints
from ksl_ds.scan.names import Place, places
from ksl_ds.scan.results import results_of, thresholds
from ksl_ds.scan.runner import Found, Plan, ScannedTensor, compare_parts, make_plan, run_scan

EMBEDDING = "model.embed_tokens.weight"


def change(folder, **changes):
    """Rewrites tensors of a one-file checkpoint: a function of the old one (None where there is none) by name."""
    tensors = load_file(folder / "model.safetensors")
    for name, function in changes.items():
        made = function(tensors.pop(name, None))
        if made is not None:
            tensors[name] = made.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def noisy(tensor, seed=0):
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
    return (tensor.float() + 0.02 * noise).to(tensor.dtype)


def tune(before, after, *untouched):
    """A copy of a checkpoint in which all floating tensors but some have moved."""
    shutil.copytree(before, after)
    names = load_file(after / "model.safetensors")
    change(after, **{name: noisy for name in names if name not in untouched and names[name].is_floating_point()})
    return after


def scan(before, after, rows="output", alpha=0.05):
    sides = open_checkpoints(ModelFolder(before), after)
    plan = make_plan(*sides, rows)
    found = run_scan(*sides, plan)
    return plan, dict(zip([tensor.name for tensor in plan.tested], found.count_T, strict=True)), found


def scipy_counts(before, after):
    """k of each row of two matrices, by scipy."""
    pairs = zip(before.float().numpy(), after.float().numpy(), strict=True)
    return [round(stats.ks_2samp(one, other).statistic * len(one)) for one, other in pairs]


# --- names and blocks ---


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["model.layers.11.self_attn.q_proj.weight", "model.embed_tokens.weight", "lm_head.weight"],
            [(11, "self_attn.q_proj"), (None, "embed_tokens"), (None, "lm_head")],
        ),
        (
            ["transformer.h.0.attn.c_attn.bias", "transformer.wte.weight", "transformer.ln_f.bias"],
            [(0, "attn.c_attn.bias"), (None, "wte"), (None, "ln_f.bias")],
        ),
        (["h.3.mlp.c_fc.weight", "wte.weight"], [(3, "mlp.c_fc"), (None, "wte")]),
        (
            ["gpt_neox.layers.5.attention.query_key_value.weight", "gpt_neox.embed_in.weight", "embed_out.weight"],
            [(5, "attention.query_key_value"), (None, "embed_in"), (None, "embed_out")],
        ),
        (
            ["model.decoder.layers.2.fc1.weight", "model.decoder.embed_positions.weight"],
            [(2, "fc1"), (None, "embed_positions")],
        ),
        (
            ["transformer.h.1.self_attention.dense.weight", "transformer.word_embeddings_layernorm.bias"],
            [(1, "self_attention.dense"), (None, "word_embeddings_layernorm.bias")],
        ),
        (
            ["model.layers.0.block_sparse_moe.experts.7.w1.weight", "model.layers.0.block_sparse_moe.gate.weight"],
            [(0, "block_sparse_moe.experts.w1"), (0, "block_sparse_moe.gate")],
        ),
        (
            ["language_model.layers.0.fc", "language_model.layers.1.fc", "vision.layers.4.fc"],
            [(0, "fc"), (1, "fc"), (4, "vision.layers.fc")],
        ),
        (["prompt.3"], [(3, "prompt")]),
    ],
)
def test_a_name_says_layer_and_kind(names, expected):
    assert list(places(names).values()) == [Place(*place) for place in expected]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 7), max_size=4).map(tuple), st.booleans(), st.integers(1, 60))
def test_blocks_cover_every_row_once_and_in_order(shape, by_columns, size):
    values = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    rows, width = row_shape(shape, by_columns)
    whole = values.reshape(1, -1) if len(shape) < 2 else (values.mT if by_columns else values).reshape(-1, width)
    assert torch.Size(rows).numel() == len(whole)
    parts, expected_start = [], 0
    for block in blocks_of(shape, by_columns, size):
        part = as_rows(values[block.slices] if shape else values, by_columns)
        assert block.start == expected_start and len(part) == block.stop - block.start
        expected_start = block.stop
        parts.append(part)
        assert part.numel() <= max(size, width) or len(shape) > 3
    assert torch.equal(torch.cat(parts), whole)


def test_a_large_heads_columns_are_read_in_bounded_blocks():
    blocks = list(blocks_of((128_256, 8_192), by_columns=True))
    assert blocks[-1].stop == 8_192 and len(blocks) > 30
    assert max((block.stop - block.start) * 128_256 for block in blocks) <= BLOCK_ELEMENTS


# --- counts ---


@pytest.mark.parametrize("rows", ["output", "input"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_has_scipys_statistic(tmp_path, rows, dtype):
    before = make_model_folder(tmp_path / "before", dtype=dtype)
    untouched = "model.layers.1.mlp.up_proj.weight"
    after = tune(before, tmp_path / "after", untouched)
    plan, counts, _ = scan(before, after, rows)
    left, right = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert counts.keys() == left.keys() and not (plan.not_tested or plan.only_before or plan.only_after)
    for name in left:
        one, other = (values if values.ndim == 2 else values[None] for values in (left[name], right[name]))
        if rows == "input" and left[name].ndim == 2 and name != EMBEDDING:
            one, other = one.T, other.T
        assert counts[name].tolist() == scipy_counts(one, other), name
    assert not counts[untouched].any() and counts[EMBEDDING].any()
    # In the order of the model, not of the alphabet.
    kinds = [tensor.place.kind for tensor in plan.tested]
    assert kinds[0] == "embed_tokens" and kinds[-1] == "lm_head" and kinds[1].startswith("self_attn.q_proj")


def test_dtypes_may_differ_and_values_are_compared(tmp_path):
    before = make_model_folder(tmp_path / "before", dtype=torch.bfloat16)
    after = tmp_path / "after"
    shutil.copytree(before, after)
    wide = {name: lambda values: values.double() for name in load_file(after / "model.safetensors")}
    change(after, **wide)
    _, counts, found = scan(before, after)
    assert not any(count_T.any() for count_T in counts.values()) and not any(map(torch.any, found.ratio_T))
    change(after, **{"model.norm.weight": lambda values: values + torch.arange(len(values)) / 10})
    _, counts, _ = scan(before, after)
    ones, moved = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert counts["model.norm.weight"].tolist() == scipy_counts(
        ones["model.norm.weight"][None], moved["model.norm.weight"][None]
    )
    plan, *_ = scan(before, after)
    assert plan.tested[0].dtypes == (torch.bfloat16, torch.float64)


def test_float16_and_a_shard_each(tmp_path):
    before = make_model_folder(tmp_path / "before", dtype=torch.float16, max_shard_size="20KB")
    after = make_model_folder(tmp_path / "after", dtype=torch.float16, max_shard_size="30KB", seed=1)
    _, counts, _ = scan(before, after)
    left, right = (ModelFolder(folder) for folder in (before, after))
    assert len(set(left.shard_of.values())) > 1
    for name in left.tensor_names:
        one, other = (folder.read_rows(name, 0, folder.shape(name)[0]) for folder in (left, right))
        one, other = (values if values.ndim == 2 else values[None] for values in (one, other))
        assert counts[name].tolist() == scipy_counts(one, other)


def test_bit_identical_parts_are_only_compared(monkeypatch):
    import ksl_ds.scan.runner as runner

    monkeypatch.setattr(runner, "row_counts", lambda *_, **__: pytest.fail("identical rows were tested"))
    same = torch.full((3, 4), torch.inf)
    assert compare_parts(same, same.clone(), False, 0) is None


def test_gpt2_stores_inputs_first_and_its_files_may_lack_the_prefix(tmp_path):
    before = make_model_folder(tmp_path / "before", "gpt2", n_embd=32, n_layer=2, n_head=4, tied=True)
    after = tune(before, tmp_path / "after")
    name = "transformer.h.0.mlp.c_fc.weight"
    left, right = (load_file(folder / "model.safetensors")[name] for folder in (before, after))
    assert left.shape == (32, 128)
    for rows, (one, other) in {"output": (left.T, right.T), "input": (left, right)}.items():
        _, counts, _ = scan(before, after, rows)
        assert counts[name].tolist() == scipy_counts(one, other)
    bare = {key.removeprefix("transformer."): values for key, values in load_file(before / "model.safetensors").items()}
    # As in the first checkpoints of GPT-2: a mask as a float buffer, names without the prefix.
    bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(bare, before / "model.safetensors", metadata={"format": "pt"})
    change(after, **{"transformer.h.0.attn.bias": lambda _: torch.zeros(1, 1, 8, 8)})
    plan, again, _ = scan(before, after, "input")
    assert again.keys() == counts.keys() and all(torch.equal(again[key], counts[key]) for key in counts)
    assert not plan.only_before + plan.only_after or "attn.bias" in str(plan)
    assert "transformer.h.0.attn.bias" not in again and "h.0.attn.bias" not in again


def test_stacked_experts_are_their_matrices(tmp_path):
    before = make_model_folder(tmp_path / "before", "gpt_oss", num_local_experts=3, num_experts_per_tok=2, head_dim=8)
    after = tune(before, tmp_path / "after")
    left, right = (load_file(folder / "model.safetensors") for folder in (before, after))
    name = next(key for key in left if key.endswith("layers.0.mlp.experts.gate_up_proj"))
    assert left[name].shape == (3, 32, 96)  # (experts, inputs, outputs)
    for rows, transposed in {"output": True, "input": False}.items():
        plan, counts, _ = scan(before, after, rows)
        pair = [(values.mT if transposed else values).flatten(0, 1) for values in (left[name], right[name])]
        assert counts[name].tolist() == scipy_counts(*pair)
        tensor = next(tensor for tensor in plan.tested if tensor.name == name)
        assert tensor.row_shape == ((3, 96) if transposed else (3, 32))
        bias = name + "_bias"  # a row an expert
        assert counts[bias].tolist() == scipy_counts(left[bias], right[bias])
    mixtral = make_model_folder(tmp_path / "mixtral", "mixtral", num_local_experts=2, num_experts_per_tok=1)
    plan, *_ = scan(mixtral, tune(mixtral, tmp_path / "mixtral-after"))
    kinds = {tensor.place.kind for tensor in plan.tested if "experts" in tensor.name}
    assert len(kinds) == 3 and all(kind.startswith("block_sparse_moe.experts.w") for kind in kinds)


def test_a_tied_head_is_tested_once_and_an_untied_one_against_what_it_was(tmp_path):
    before = make_model_folder(tmp_path / "before", tied=True)
    plan, counts, _ = scan(before, tune(before, tmp_path / "after"))
    assert EMBEDDING in counts and "lm_head.weight" not in counts
    # Both names in the files: still one matrix.
    twice = tmp_path / "twice"
    shutil.copytree(tmp_path / "after", twice)
    matrix = load_file(twice / "model.safetensors")[EMBEDDING]
    change(twice, **{"lm_head.weight": lambda _: matrix.clone()})
    plan, again, _ = scan(before, twice)
    assert again.keys() == counts.keys() and plan.only_after == []
    # Untied by tuning: the head that moved is compared with the embedding that it was.
    change(twice, **{"lm_head.weight": lambda _: noisy(matrix, seed=3)})
    base = load_file(before / "model.safetensors")[EMBEDDING]
    for left, right, order in ((before, twice, 1), (twice, before, -1)):
        plan, untied, _ = scan(left, right)
        pair = (base, load_file(twice / "model.safetensors")["lm_head.weight"])[::order]
        assert untied["lm_head.weight"].tolist() == scipy_counts(*pair)
        assert plan.only_before == plan.only_after == []


def test_what_is_not_tested_is_listed(tmp_path):
    before = make_model_folder(tmp_path / "before", tied=True)
    after = tune(before, tmp_path / "after")
    extra = {
        "steps": lambda _: torch.tensor([3]),
        "mask": lambda _: torch.tensor([True]),
        "value_head.weight": lambda _: torch.ones(1, 32),
        "scalar": lambda _: torch.tensor(0.5),
        "one": lambda _: torch.ones(1),
        "none": lambda _: torch.ones(0, 4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": lambda _: torch.ones(4),
    }
    for folder in (before, after):
        change(folder, **extra)
    change(before, **{"only.here": lambda _: torch.ones(2)})
    change(after, **{"only.there": lambda _: torch.ones(2), "scalar": lambda _: torch.tensor(0.7)})
    plan, counts, found = scan(before, after)
    assert plan.not_tested == {
        "steps": "holds int64",
        "mask": "holds bool",
        "none": "empty",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "a buffer, which no training changes",
    }
    assert (plan.only_before, plan.only_after) == (["only.here"], ["only.there"])
    assert counts["scalar"].tolist() == [1] and counts["one"].tolist() == counts["value_head.weight"].tolist() == [0]
    results = results_of(plan, found, 0.05, [EMBEDDING])
    scalar = results["tensors"]["scalar"]
    assert scalar["largest_statistic"] == 1 and scalar["share"]["nominal"] == 0
    assert all(row["tensor"] != "scalar" for row in results["largest_rows"])  # no D of one value means anything


@pytest.mark.parametrize("architecture", ["gpt_neox", "opt", "bloom", "gptj", "falcon", "mamba", "qwen3_moe"])
def test_every_tensor_of_an_architecture_has_its_place(tmp_path, architecture):
    sizes = {
        "bloom": {"n_layer": 2, "n_head": 4, "hidden_size": 32},
        "gptj": {"n_layer": 2, "n_head": 4, "n_embd": 32, "rotary_dim": 4},
        "mamba": {"state_size": 4},
        "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8},
    }
    before = make_model_folder(tmp_path / "before", architecture, **sizes.get(architecture, {}))
    after = tune(before, tmp_path / "after")
    for rows in ("output", "input"):
        plan, counts, _ = scan(before, after, rows)
        assert len(counts) == len(load_file(before / "model.safetensors"))  # the model calls some by another name
        assert not (plan.not_tested or plan.only_before or plan.only_after)
        assert {tensor.place.layer for tensor in plan.tested} == {None, 0, 1}
    kinds = {tensor.place.kind for tensor in plan.tested}
    assert "lm_head" in kinds and not any(part.isdecimal() for kind in kinds for part in kind.split("."))


# --- corrections ---


@pytest.mark.parametrize("seed", range(4))
def test_shares_agree_with_every_p_value_by_itself(seed):
    generator = torch.Generator().manual_seed(seed)
    tested, counts, every = [], [], []
    for number, width in enumerate((1, 3, 16, 40, 40, 576)):
        rows = int(torch.randint(1, 60, (1,), generator=generator))
        scale = float(torch.rand(1, generator=generator)) * 1.5
        samples = torch.randn(2, rows, width, generator=generator)
        samples[1] += scale * (torch.rand(rows, 1, generator=generator) < 0.5)
        k = [round(stats.ks_2samp(*pair).statistic * width) for pair in samples.numpy().swapaxes(0, 1)]
        pvalue = [stats.ks_2samp(*pair, method="exact").pvalue for pair in samples.numpy().swapaxes(0, 1)]
        place = Place(None, f"kind{number}")
        dtypes = (torch.float32,) * 2
        tested.append(ScannedTensor(str(number), "", "", (rows, width), dtypes, place, False, (rows,), width))
        counts.append(torch.tensor(k, dtype=torch.int32))
        every.append(pvalue)
    plan, found = Plan(tested), Found(counts, [count_T.float() for count_T in counts])
    levels = thresholds(plan, found, 0.05)
    flat = np.concatenate(every)
    adjusted = stats.false_discovery_control(flat)
    bounds = np.cumsum([0, *map(len, counts)])
    for number, (tensor, count_T) in enumerate(zip(tested, counts, strict=True)):
        own = slice(*bounds[number : number + 2])
        assert levels.rejected("nominal", tensor, count_T).tolist() == (flat[own] < 0.05).tolist()
        assert levels.rejected("bonferroni", tensor, count_T).tolist() == (flat[own] < 0.05 / len(flat)).tolist()
        assert levels.rejected("benjamini_hochberg", tensor, count_T).tolist() == (adjusted[own] <= 0.05).tolist()
    found.ratio_T[4][:] = 0.0  # rows that did not move are left out of the median
    results = results_of(plan, found, 0.05, [])
    moved = torch.cat([count_T for number, count_T in enumerate(counts) if number != 4])
    assert results["all"]["moved"] == (moved > 0).sum()
    assert results["all"]["median_shift_ratio"] == moved[moved > 0].float().median()
    assert results["all"]["rows"] == len(flat) and results["all"]["share"]["nominal"] == np.mean(flat < 0.05)
    assert results["kinds"]["kind3"]["largest_statistic"] == int(counts[3].max()) / 40


# --- mistakes ---


def mistake(capsys, before, after, out, *words) -> str:
    assert main(["scan", f"before={before}", f"after={after}", f"out={out}", *words]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ksl-ds: ")]
    assert not out.exists() or (out / "kept").exists()
    return line


def test_every_mistake_is_one_sentence(tmp_path, capsys):
    out, before = tmp_path / "out", make_model_folder(tmp_path / "before")
    after = tune(before, tmp_path / "after")
    name = "model.layers.1.mlp.down_proj.weight"

    def copy(of, to):
        shutil.copytree(of, tmp_path / to)
        return tmp_path / to

    wider = copy(after, "wider")
    change(wider, **{name: lambda values: values[:, :-1]})
    line = mistake(capsys, before, wider, out)
    assert name in line and "(32, 48)" in line and "(32, 47)" in line

    spoilt = copy(after, "spoilt")
    for value in (torch.nan, torch.inf):
        change(spoilt, **{name: lambda values, value=value: values.index_put((torch.tensor(9),), torch.tensor(value))})
        line = mistake(capsys, before, spoilt, out)
        assert f"{name}: row 9 of after holds NaN or infinity" in line and "spoilt" in line
    line = mistake(capsys, spoilt, before, out, "rows=input")
    assert f"{name}: row 0 of before holds NaN or infinity" in line

    other = make_model_folder(tmp_path / "other", "qwen2")
    assert "is a llama and" in (line := mistake(capsys, before, other, out)) and "a qwen2" in line

    lacking = copy(after, "lacking")
    change(lacking, **{EMBEDDING: lambda _: None})
    assert f"lacks the input embedding {EMBEDDING}" in mistake(capsys, lacking, after, out)
    sharded = make_model_folder(tmp_path / "sharded", max_shard_size="20KB")
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][name] = content["weight_map"][EMBEDDING]
    index.write_text(json.dumps(content))
    assert name in mistake(capsys, before, sharded, out)
    cut = copy(after, "cut")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    assert "truncated" in mistake(capsys, before, cut, out)

    nothing = copy(after, "nothing")
    change(nothing, **dict.fromkeys(load_file(nothing / "model.safetensors"), torch.Tensor.int))
    assert "no floating-point tensor in common" in mistake(capsys, before, nothing, out)
    assert "no such model folder" in mistake(capsys, before, tmp_path / "none", out)
    assert "alpha is 2" in mistake(capsys, before, after, out, "alpha=2")
    assert "rows is both" in mistake(capsys, before, after, out, "rows=both")
    out.mkdir()
    (out / "kept").touch()
    assert "already exists" in mistake(capsys, before, after, out)
