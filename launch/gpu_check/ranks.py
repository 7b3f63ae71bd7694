"""Parts under the deepspeed launcher, one rank a GPU with NCCL (gloo on CPUs): the restriction to a ticket's rows.

Legend: V tokens, D coordinates.
"""

from __future__ import annotations

import torch

from gpu_check.parts import Context, Figures, NotSupported, part

CHOSEN = [3, 5, 66]
VOCABULARY = 67
STEPS = 8
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def train(context: Context, mode: str, precision: str, *, tied: bool) -> tuple[torch.Tensor, ...]:
    """Trains the chosen rows under ZeRO-3 with decay, momentum and clipping.

    Returns the fp32 master rows before and after, the rows that compute before and after, and how many steps overflowed.
    """
    import deepspeed
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ksl_ds import distributed, train_only_rows
    from ksl_ds.errors import UserError
    from ksl_ds.model.row_parameter import TicketRows
    from ksl_ds.sharding.engine import check_precision, destroy_engine, set_library_verbosity
    from ksl_ds.sharding.rows import RowShard

    distributed.initialize()
    set_library_verbosity(False)
    if context.rehearse:  # DeepSpeed wants a CPU that is fast in fp16; a slow one computes it too
        deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True
    try:
        check_precision(precision)
    except UserError as error:
        raise NotSupported(str(error)) from None
    dtype = DTYPES[precision]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    zero = {"stage": 3}
    model = AutoModelForCausalLM.from_config(config).to(distributed.device(), dtype)
    deepspeed.zero.Init(
        module=model, config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}, dtype=dtype
    )
    model.requires_grad_(False)
    weight = model.get_input_embeddings().weight
    everything = torch.arange(VOCABULARY)
    ids_K = torch.tensor(CHOSEN)
    initial_VD = RowShard(weight).read_rows(everything)
    rows = None
    if mode == "rows":
        rows = TicketRows(model, ids_K, RowShard(weight).read_rows(ids_K))
        trained = rows.delta_KD
    else:
        trained = weight.requires_grad_(True)
        handle = train_only_rows(model, CHOSEN)
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.1,
        "bf16": {"enabled": precision == "bf16"},
        # So large a first scale that the first steps overflow and are skipped.
        "fp16": {"enabled": precision == "fp16", "initial_scale_power": 20, "loss_scale_window": 100, "hysteresis": 1},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    optimizer = torch.optim.AdamW([trained], lr=0.01, weight_decay=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    before_VD = RowShard(weight).read_rows(everything)
    generator = torch.Generator().manual_seed(distributed.rank())
    for _ in range(2 * STEPS):
        ids_BL = torch.randint(0, VOCABULARY, (2, 9), generator=generator).to(distributed.device())
        ids_BL[:, : len(CHOSEN)] = ids_K.to(ids_BL.device)  # a row without a gradient would not move
        engine.backward(engine(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss)
        engine.step()
    overflowed = int(getattr(engine.optimizer, "skipped_steps", 0) or engine.skipped_steps)
    if rows is not None:
        moved_KD = rows.moved(RowShard(trained).read_rows(torch.arange(len(CHOSEN))))
        after_VD = RowShard(weight).read_rows(everything)
        after_VD[ids_K] = moved_KD.to(after_VD)
    else:
        after_VD = RowShard(weight).read_rows(everything)
    destroy_engine(engine)
    if rows is not None:
        rows.remove()
    else:
        handle.remove()
    return initial_VD, before_VD, after_VD, RowShard(weight).read_rows(everything), torch.tensor(overflowed)


def check(context: Context, mode: str, precision: str, *, tied: bool = False) -> Figures:
    initial_VD, before_VD, after_VD, weights_VD, overflowed = train(context, mode, precision, tied=tied)
    chosen_V = torch.zeros(VOCABULARY, dtype=torch.bool)
    chosen_V[CHOSEN] = True
    moved_V = (before_VD != after_VD).any(dim=1)
    assert torch.equal(moved_V, chosen_V), f"rows of the masters that moved: {moved_V.nonzero().flatten().tolist()}"
    same = torch.equal(weights_VD[~chosen_V], initial_VD[~chosen_V])
    assert same, "rows outside the ticket changed in the weights that compute"
    if precision == "fp16":
        assert 0 < overflowed < STEPS, f"{overflowed} of {STEPS} steps overflowed; some were meant to, not all"
    return {"steps that overflowed": int(overflowed)} if precision == "fp16" else {}


@part("ranks", seconds=60)
def rows_bf16(context: Context) -> Figures:
    """Mode rows under ZeRO-3 in bf16: all other rows and master weights stay bit-identical."""
    return check(context, "rows", "bf16")


@part("ranks", seconds=30)
def rows_fp16(context: Context) -> Figures:
    """Mode rows under ZeRO-3 in fp16 with dynamic loss scaling and steps that overflow: the same."""
    return check(context, "rows", "fp16")


@part("ranks", seconds=30)
def hooks_bf16(context: Context) -> Figures:
    """Mode hooks under ZeRO-3 in bf16: all other rows and master weights stay bit-identical."""
    return check(context, "hooks", "bf16")


@part("ranks", seconds=30)
def hooks_fp16(context: Context) -> Figures:
    """Mode hooks under ZeRO-3 in fp16 with dynamic loss scaling and steps that overflow: the same."""
    return check(context, "hooks", "fp16")


@part("ranks", seconds=30)
def tied_head(context: Context) -> Figures:
    """Both modes with an output head that is the embedding itself."""
    check(context, "rows", "bf16", tied=True)
    return check(context, "hooks", "bf16", tied=True)
