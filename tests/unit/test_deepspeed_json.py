"""Every mistake in a DeepSpeed JSON is one sentence that names the file and the key; what is right has one form."""

from __future__ import annotations

import json

import pytest
from helpers.processes import REPOSITORY

from ksl_ds.config.schema import Recipe
from ksl_ds.errors import UserError
from ksl_ds.estimate.memory import Zero
from ksl_ds.sharding import deepspeed_json
from ksl_ds.sharding.engine import check_precision, deepspeed_config, read_config

ZERO = "zero_optimization"


def zero(**section: object) -> dict[str, object]:
    return {ZERO: {"stage": 3, **section}}


def content_of(given: object) -> bytes:
    return given if isinstance(given, bytes) else json.dumps(given).encode()


# What is wrong: words of the sentence.
MISTAKES = {
    "empty file": (b"", ["not valid JSON"]),
    "no JSON": (b"{stage: 3}", ["not valid JSON"]),
    "a comment": (b'{"bf16": {} // half\n}', ["not valid JSON"]),
    "not UTF-8": (b'{"\xff": 1}', ["not valid JSON", "byte 2"]),
    "UTF-16": ('{"bf16": {}}'.encode("utf-16"), ["not valid JSON", "UTF-8"]),
    "too deep": (b"[" * 100_000, ["not valid JSON"]),
    "a number of many digits": (b'{"steps_per_print": ' + b"9" * 5000 + b"}", ["not valid JSON"]),
    "a key twice": (b'{"zero_optimization": {"stage": 2, "stage": 3}}', ["'stage'", "twice"]),
    "NaN": (b'{"gradient_clipping": NaN}', ["NaN", "finite"]),
    "infinity": (b'{"gradient_clipping": -Infinity}', ["-Infinity", "finite"]),
    "beyond a float": (b'{"zero_optimization": {"reduce_bucket_size": 1e999}}', ["1e999", "finite"]),
    "beyond 64 bits": (zero(sub_group_size=2**64), [f"{ZERO}.sub_group_size", "2^63"]),
    "a list at the top": ([], ["holds []", "object"]),
    "null at the top": (None, ["holds null", "object"]),
    "text at the top": ("zero3", ['holds "zero3"', "object"]),
    "a list for a section": ({ZERO: []}, [f"{ZERO} is []", "object"]),
    "null for a section": ({ZERO: None}, [f"{ZERO} is null", "object"]),
    "text for a section": ({ZERO: "3"}, [f'{ZERO} is "3"', "object"]),
    "true for a section": ({ZERO: True}, [f"{ZERO} is true", "object"]),
    "a number for bf16": ({"bf16": 1}, ["bf16 is 1", "object"]),
    "true for fp16": ({"fp16": True}, ["fp16 is true", "object"]),
    "a list for offload": (zero(offload_param=["cpu"]), [f'{ZERO}.offload_param is ["cpu"]', "object"]),
    "text for offload": (zero(offload_optimizer="cpu"), [f'{ZERO}.offload_optimizer is "cpu"', "object"]),
    "stage as text": ({ZERO: {"stage": "3"}}, [f'{ZERO}.stage is the text "3"', "write 3"]),
    "stage 5": ({ZERO: {"stage": 5}}, [f"{ZERO}.stage is 5; it must be one of 0, 1, 2, 3"]),
    "stage -1": ({ZERO: {"stage": -1}}, [f"{ZERO}.stage is -1; it must be one of 0, 1, 2, 3"]),
    "stage null": ({ZERO: {"stage": None}}, [f"{ZERO}.stage is null; it must be one of 0, 1, 2, 3"]),
    "stage true": ({ZERO: {"stage": True}}, [f"{ZERO}.stage is true; it must be a number"]),
    "stage 2.5": ({ZERO: {"stage": 2.5}}, [f"{ZERO}.stage is 2.5; it must be one of 0, 1, 2, 3"]),
    "a boolean as text": (zero(overlap_comm="false"), [f'{ZERO}.overlap_comm is the text "false"; write false']),
    "a size as a boolean": (zero(reduce_bucket_size=True), [f"{ZERO}.reduce_bucket_size is true"]),
    "a size as text": (zero(reduce_bucket_size="5e7"), [f"{ZERO}.reduce_bucket_size"]),
    "a size that is negative": (zero(reduce_bucket_size=-1), [f"{ZERO}.reduce_bucket_size is -1", "greater than 0"]),
    "a size with a fraction": (zero(reduce_bucket_size=1.5), [f"{ZERO}.reduce_bucket_size is 1.5"]),
    "a list for a size": (zero(stage3_prefetch_bucket_size=[1]), [f"{ZERO}.stage3_prefetch_bucket_size is [1]"]),
    "an unknown device": (zero(offload_param={"device": "gpu"}), [f'{ZERO}.offload_param.device is "gpu"', "'cpu'"]),
    "a mistyped section": ({"zero_optimisation": {}}, ["'zero_optimisation'", f"did you mean {ZERO}?"]),
    "a mistyped key": (zero(overlap_com=True), [f"'{ZERO}.overlap_com'", f"did you mean {ZERO}.overlap_comm?"]),
    "a key of a section at the top": ({"stage": 3}, ["'stage'", f"did you mean {ZERO}.stage?"]),
    "a key in the wrong section": ({"bf16": {"loss_scale": 1}}, ["'bf16.loss_scale'", "did you mean fp16.loss_scale?"]),
    "a key unlike any": ({"qqqq": 1}, ["unknown key 'qqqq'", "remove it"]),
    "a key that Python uses": (zero(self=1), [f"'{ZERO}.self'"]),
    "an old key beside the new": (zero(cpu_offload=True, offload_optimizer={"device": "cpu"}), ["cpu_offload"]),
    "loss scale": ({"fp16": {"loss_scale": -1}}, ["fp16", "loss_scale"]),
    "communication type": ({"communication_data_type": "int8"}, ['communication_data_type is "int8"', "'fp16'"]),
    "gradients' type": ({"data_types": {"grad_accum_dtype": "bf16"}}, ["'data_types'", "does not support"]),
    "modules fetched whole": (zero(stage3_module_granularity_threshold=9), ["granularity_threshold", "does not support"]),
    "divided gradients": ({"gradient_predivide_factor": 2}, ["'gradient_predivide_factor'", "does not support"]),
    "profiler": ({"flops_profiler": {"enabled": True, "profile_step": "x"}}, ['flops_profiler.profile_step is "x"']),
    "an unknown key left to nobody": (zero(stge="auto"), [f"'{ZERO}.stge'", f"did you mean {ZERO}.stage?"]),
    "a section that is none": (zero(leaf_module=[]), ["leaf_module", "mapping"]),
    "log level": ({"log_level": "loud"}, ['log_level is "loud"', "'debug'"]),
    "an odd bucket": ({ZERO: {"stage": 1, "allgather_bucket_size": 1}}, ["allgather_bucket_size = 1", "even"]),
    "steps of text": ({"steps_per_print": "many"}, ['steps_per_print is "many"']),
    "clipping of text": ({"gradient_clipping": "1.0"}, ["gradient_clipping"]),
    "amp": ({"amp": {"enabled": True}}, ["'amp'", "removed from DeepSpeed"]),
    "elasticity": ({"elasticity": {}}, ["'elasticity'", "removed from DeepSpeed"]),
    "curriculum": ({"curriculum_learning": {}}, ["'curriculum_learning'", "removed from DeepSpeed"]),
    "optimizer": ({"optimizer": {"type": "Adam"}}, ["'optimizer'", "embed_tuning"]),
    "scheduler": ({"scheduler": {}}, ["'scheduler'", "schedule"]),
    "batch size": ({"train_batch_size": 8}, ["'train_batch_size'", "training.batch_size"]),
    "checkpointing": ({"activation_checkpointing": {}}, ["'activation_checkpointing'", "gradient_checkpointing"]),
    "autocast": ({"torch_autocast": {"enabled": True}}, ["'torch_autocast'", "training.precision"]),
    "comet": ({"comet": {}}, ["'comet'", "tracking"]),
    "tensor parallelism": ({"tensor_parallel": {"autotp_size": 2}}, ["'tensor_parallel'", "does not support"]),
    "compilation": ({"compile": {"deepcompile": True}}, ["'compile'", "does not support"]),
    "summed gradients": ({"gradient_allreduce_op": "sum"}, ["'gradient_allreduce_op'", "does not support"]),
    "sequences": ({"sequence_parallel_size": 2}, ["'sequence_parallel_size'", "does not support"]),
    "hpZ": (zero(zero_hpz_partition_size=2), ["zero_hpz_partition_size = 2", "a host has 1 of the 1 ranks"]),
    "MiCS": (zero(mics_shard_size=2), ["mics_shard_size", "does not support"]),
    "ZenFlow": (zero(zenflow={"topk_ratio": 0.1}), ["zenflow", "does not support"]),
    "quantised weights": (zero(zero_quantized_weights=True), ["zero_quantized_weights", "does not support"]),
    "quantised frozen weights": (
        zero(zero_quantized_nontrainable_weights=True), ["zero_quantized_nontrainable_weights", "is for CUDA devices"],
    ),
    "quantised frozen weights, stage 2": (
        {ZERO: {"stage": 2, "zero_quantized_nontrainable_weights": True}}, ["below stage 3 weights are not partitioned"],
    ),
    "quantised frozen weights in host memory": (
        zero(zero_quantized_nontrainable_weights=True, offload_param={"device": "cpu"}), ["not tested with", "offload_param"],
    ),
    "quantised gradients": (zero(zero_quantized_gradients=True), ["zero_quantized_gradients", "does not support"]),
    "weights on NVMe": (
        zero(offload_param={"device": "nvme", "nvme_path": "/nvme"}), [f"{ZERO}.offload_param.device = nvme", "use cpu"],
    ),
    "optimizer on NVMe": (
        zero(offload_optimizer={"device": "nvme"}), [f"{ZERO}.offload_optimizer.device = nvme", "use cpu"],
    ),
    "part of the optimizer": (zero(offload_optimizer={"device": "cpu", "ratio": 0.5}), ["ratio", "does not support"]),
    "superchips": (zero(offload_optimizer={"device": "cpu", "super_offload": True}), ["super_offload"]),
    "no norm": ({ZERO: {"stage": 2, "compute_grad_norm": False}}, ["compute_grad_norm = false", "logged"]),
    "masters in bf16": ({"bf16": {"bf16_master_weights_and_grads": True}}, ["bf16_master_weights_and_grads"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_a_sentence_with_file_and_key(name, tmp_path, monkeypatch):
    given, words = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ds.json").write_bytes(content_of(given))
    recipe = Recipe(deepspeed="ds.json")
    recipe.training.batch_size = recipe.training.micro_batch_size
    with pytest.raises(UserError) as caught:
        deepspeed_config(recipe)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 250, sentence
    assert all(word in sentence for word in ["ds.json", *words]), sentence


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(UserError, match=r"deepspeed: .* cannot be read: Is a directory"):
        read_config(str(tmp_path))
    with pytest.raises(UserError, match=r"deepspeed: no file .*nowhere.json, here or in ds_configs/"):
        read_config(str(tmp_path / "nowhere.json"))


def test_what_deepspeeds_own_class_finds_is_a_sentence(tmp_path, monkeypatch):
    def refuse(self: object, config: dict) -> None:
        raise AssertionError("this and that\ndo not go together")

    monkeypatch.setattr(deepspeed_json.DeepSpeedConfig, "__init__", refuse)
    with pytest.raises(UserError, match=r"^DeepSpeed does not accept .*zero3.json: this and that do not go together$"):
        deepspeed_config(Recipe())


def test_two_ways_to_say_the_same_have_one_form(tmp_path):
    one = {
        ZERO: {"stage": 3, "reduce_bucket_size": 5e7, "offload_optimizer": {"device": "cpu"}, "sub_group_size": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "communication_data_type": None,
    }
    other = {
        ZERO: {"stage": 3.0, "reduce_bucket_size": 50_000_000, "cpu_offload": True, "offload_param": None},
        "bf16": {"enabled": "auto"},
    }
    (tmp_path / "one.json").write_bytes(content_of(one))
    (tmp_path / "other.json").write_bytes(b"\xef\xbb\xbf" + content_of(other))  # with a byte order mark
    found = [read_config(str(tmp_path / name)) for name in ("one.json", "other.json")]
    assert found[0][ZERO] == found[1][ZERO]
    assert found[0][ZERO]["reduce_bucket_size"] == 50_000_000 and type(found[0][ZERO]["stage"]) is int
    assert [Zero.of(config).offload_optimizer for config in found] == [True, True]
    recipe = Recipe(deepspeed=str(tmp_path / "other.json"))
    recipe.training.precision = "fp32"
    assert deepspeed_config(recipe)["bf16"] == {"enabled": False}


def test_aliases_are_what_the_estimate_reads(tmp_path):
    (tmp_path / "ds.json").write_bytes(content_of(zero(prefetch_bucket_size=7, max_live_parameters=8)))
    found = Zero.of(read_config(str(tmp_path / "ds.json")))
    assert (found.prefetch_bucket_size, found.max_live_parameters) == (7, 8)


@pytest.mark.parametrize("path", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_keep_what_they_say(path):
    given, found = json.loads(path.read_text()), read_config(path.name)
    for section, entries in given.items():
        assert {name: found[section][name] for name in entries} == entries


def test_settings_that_change_no_training_are_accepted(tmp_path):
    logged = {"steps_per_print": 10, "wall_clock_breakdown": True, "comms_logger": {"enabled": False}}
    off = {"zero_hpz_partition_size": 1, "zero_quantized_weights": False, "zenflow": None}
    (tmp_path / "ds.json").write_bytes(content_of({**logged, **zero(**off)}))
    found = deepspeed_config(Recipe(deepspeed=str(tmp_path / "ds.json")))
    assert {name: found[name] for name in logged} == logged


def test_fp16_on_a_processor_without_it(monkeypatch):
    from deepspeed.accelerator import get_accelerator

    check_precision("bf16")
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: None)  # as DeepSpeed answers for "no"
    with pytest.raises(UserError, match=r"this CPU does not support fp16; use training.precision=fp32 or bf16"):
        check_precision("fp16")
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    check_precision("fp16")
