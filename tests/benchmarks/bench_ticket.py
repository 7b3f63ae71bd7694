"""What a training step costs when only a ticket's rows train: ours beside PEFT's trainable tokens and embed tuning.

    python tests/benchmarks/bench_ticket.py                                                    # 128,256 x 2,048, CPU, float32
    python tests/benchmarks/bench_ticket.py --device cuda --dtype bfloat16 --width 8192        # a 70B model's embedding

One random Llama, one batch, AdamW. Time: all sides take turns on one model in one process; medians, and ratios of a round's
times. Memory: each side in a fresh process, the peak of two steps above the model's own. "frozen" trains nothing: the same
forward and backward pass with a gradient at the embedding's output only, the least that any of them can cost.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import TrainableTokensConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from ksl_ds import distributed
from ksl_ds.model.row_hooks import train_only_rows
from ksl_ds.model.row_parameter import TicketRows

SIDES = ("frozen", "rows", "hooks", "PEFT", "embed tuning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=18)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    print(
        f"{options.vocab:,} x {options.width:,}, {options.layers} layers, {options.rows} rows, {options.tokens} tokens a "
        f"step, {options.dtype}, {where}\n"
    )
    print("| head | side | step | of PEFT's | of frozen | memory above the model | of PEFT's | loss |")
    print("|---|---|---|---|---|---|---|---|")
    for tied in (False, True):
        times, losses = take_turns(options, tied)
        memory = {side: in_fresh_process(peak_memory, options, tied, side) for side in SIDES}
        for side in SIDES:
            print(
                f"| {'tied' if tied else 'untied'} | {side} | {statistics.median(times[side]):.2f} s "
                f"| {ratio(times, side, 'PEFT'):.2f} | {ratio(times, side, 'frozen'):.2f} "
                f"| {memory[side] / 2**30:.2f} GiB | {memory[side] / memory['PEFT']:.2f} | {losses[side]:.6f} |",
                flush=True,
            )


def ratio(times: dict[str, list[float]], side: str, other: str) -> float:
    return statistics.median(ours / theirs for ours, theirs in zip(times[side], times[other], strict=True))


def build(options: Any, tied: bool) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab,
        hidden_size=options.width,
        intermediate_size=4 * options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=options.width // 256,
        tie_word_embeddings=tied,
    )
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
    return model.requires_grad_(False).train()


@contextmanager
def training(side: str, model: Any, ids: torch.Tensor) -> Iterator[Callable[[], float]]:
    """A step of this side, which returns its loss; the model is as before afterwards."""
    embedding = model.get_input_embeddings()
    stepped, undo = model, lambda: None
    before_KD = embedding.weight.detach()[ids].clone()
    if side == "frozen":
        undo = embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_()).remove
    elif side == "rows":
        undo = TicketRows(model, ids, before_KD).remove
    elif side == "hooks":
        undo = train_only_rows(model, ids).remove
    elif side == "PEFT":
        stepped = get_peft_model(
            model, TrainableTokensConfig(token_indices=ids.tolist(), target_modules=["embed_tokens"])
        )
        undo = stepped.unload
    else:
        embedding.weight.requires_grad_(True)
    trained = [parameter for parameter in stepped.parameters() if parameter.requires_grad]
    # So small a step that the loss, and with it every side's work, stays that of the base model.
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True) if trained else None

    def step() -> float:
        batch = model.batch
        loss = stepped(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    try:
        yield step
    finally:
        undo()
        model.requires_grad_(False)
        with torch.no_grad():
            embedding.weight[ids] = before_KD
        gc.collect()


def prepare(options: Any, tied: bool) -> tuple[Any, torch.Tensor]:
    model = build(options, tied)
    # Ticket rows are what occurs often, so a part of the batch is theirs.
    ids = torch.arange(100, 100 + options.rows, device=options.device)
    batch = torch.randint(0, options.vocab, (2, options.tokens // 2), device=options.device)
    batch[:, ::4] = ids[torch.randint(0, len(ids), batch[:, ::4].shape, device=options.device)]
    model.batch = batch
    return model, ids


def take_turns(options: Any, tied: bool) -> tuple[dict[str, list[float]], dict[str, float]]:
    model, ids = prepare(options, tied)
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    losses = {}
    for _ in range(options.rounds):
        for side in SIDES:
            with training(side, model, ids) as step:
                losses[side] = step()  # allocates the optimizer's states
                synchronize(options)
                started = time.perf_counter()
                step()
                synchronize(options)
                times[side].append(time.perf_counter() - started)
    return times, losses


def synchronize(options: Any) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def peak_memory(options: Any, tied: bool, side: str) -> int:
    """Most bytes held above the model's own in two steps."""
    torch.set_num_threads(options.threads)
    model, ids = prepare(options, tied)
    gc.collect()
    distributed.reset_peak_memory()
    before = distributed.peak_memory()
    with training(side, model, ids) as step:
        step()
        step()
    return distributed.peak_memory() - before


def in_fresh_process(function: Callable[..., int], *arguments: Any) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


if __name__ == "__main__":
    main()
