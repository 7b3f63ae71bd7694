"""The scan of a whole model against a loop over scipy: 1.1 billion bf16 weights of TinyLlama's shapes, all changed.

    python tests/benchmarks/bench_scan.py [--rounds 3] [--threads 1] [--layers 22] [--folder DIR]

Both sides in turns in one process, process time (all threads). scipy takes a sample of the rows of each width, already in
memory as float32, and is scaled up to all rows; the scan reads its files. Memory is what no file backs (RssAnon), sampled
while the scan runs.
A second part scans the columns of a head of 128,256 x 8,192, whose rows cannot be read one after the other.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import save_file

VOCAB, WIDTH, INNER, KV = 32_000, 2_048, 5_632, 256
HEAD = (128_256, 8_192)
BILLIONS_7B = 6.74
SCIPY_ROWS = 60  # of a width and round


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in range(layers):
        for name, shape in {
            "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KV, WIDTH), "self_attn.v_proj": (KV, WIDTH),
            "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER), "input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,),
        }.items():  # fmt: skip
            found[f"model.layers.{layer}.{name}.weight"] = shape
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}


def make_model(folder: Path, layers: int) -> None:
    """Both checkpoints, a shard for about 100 million weights: N(0, .02^2), the later ones with noise of a tenth of that."""
    generator = torch.Generator().manual_seed(0)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": WIDTH,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 32, "num_key_value_heads": 4,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    sides = {side: folder / side for side in ("before", "after")}
    where: dict[str, str] = {}
    held: dict[str, dict[str, torch.Tensor]] = {side: {} for side in sides}

    def write() -> None:
        shard = f"model-{len(set(where.values())):05d}.safetensors"
        where.update(dict.fromkeys(held["before"], shard))
        for side, tensors in held.items():
            save_file(tensors, sides[side] / shard, metadata={"format": "pt"})
            tensors.clear()

    for path in sides.values():
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
    for name, shape in shapes(layers).items():
        base = 0.02 * torch.randn(shape, generator=generator)
        held["before"][name] = base.bfloat16()
        held["after"][name] = (base + 0.002 * torch.randn(shape, generator=generator)).bfloat16()
        if sum(tensor.numel() for tensor in held["before"].values()) > 1e8:
            write()
    write()
    for path in sides.values():
        index = {"metadata": {}, "weight_map": where}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))


def make_head(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for side in ("before", "after"):
        head = torch.empty(HEAD, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        (folder / side).mkdir(parents=True)
        save_file({"lm_head.weight": head}, folder / side / "model.safetensors")


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class PeakMemory:
    """The largest RssAnon within the block, above that at its start."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self.held = self.peak = anonymous_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def __str__(self) -> str:
        return f"{self.peak / 2**20:,.0f} MiB, {(self.peak - self.held) / 2**20:,.0f} of them while it ran"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument(
        "--folder", type=Path, help="for 4.4 and 4.2 GB of checkpoints, one after the other; default: a temporary one"
    )
    parser.add_argument("--make", choices=["model", "head"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        (make_head if arguments.make == "head" else lambda folder: make_model(folder, arguments.layers))(
            arguments.folder
        )
        return
    torch.set_num_threads(arguments.threads)
    for part in ("model", "head"):
        with tempfile.TemporaryDirectory(dir=arguments.folder) as home:
            words = ["--make", part, "--folder", home, "--layers", str(arguments.layers)]
            subprocess.run([sys.executable, __file__, *words], check=True)
            (measure_model if part == "model" else measure_head)(Path(home), arguments.rounds)


def measure_model(home: Path, rounds: int) -> None:
    from scipy.stats import ks_2samp

    from ksl_ds.model.folder import ModelFolder
    from ksl_ds.scan.checkpoints import open_checkpoints
    from ksl_ds.scan.runner import make_plan, run_scan

    sides = open_checkpoints(ModelFolder(home / "before"), home / "after")
    plan = make_plan(*sides, "output")
    rows_of: dict[int, int] = {}
    for tensor in plan.tested:
        rows_of[tensor.num_samples] = rows_of.get(tensor.num_samples, 0) + tensor.num_rows
    parameters = sum(math.prod(tensor.shape) for tensor in plan.tested)
    device = "GPU" if torch.cuda.is_available() else f"{torch.get_num_threads()} thread(s)"
    print(f"{parameters / 1e9:.3f} billion weights, {sum(rows_of.values()):,} rows, {device}", flush=True)
    ours, walls, theirs = [], [], []
    for _ in range(rounds):
        with PeakMemory() as memory:
            started, wall = time.process_time(), time.perf_counter()
            found = run_scan(*sides, plan)
            ours.append(time.process_time() - started)
            walls.append(time.perf_counter() - wall)
        total = 0.0
        for width, rows in rows_of.items():
            tensor = next(tensor for tensor in plan.tested if tensor.num_samples == width and len(tensor.shape) == 2)
            parts = [side.read(tensor.name, (slice(0, SCIPY_ROWS),)).float().numpy() for side in sides]
            started = time.process_time()
            counts = [ks_2samp(*pair).statistic * width for pair in zip(*parts, strict=True)]
            total += (time.process_time() - started) / len(counts) * rows
            at = plan.tested.index(tensor)
            assert [round(count) for count in counts] == found.count_T[at][: len(counts)].tolist()
        theirs.append(total)
        print(
            f"  scan {ours[-1]:.1f} s of processor ({walls[-1]:.1f} s on the clock), scipy {total:,.0f} s; memory {memory}",
            flush=True,
        )
    assert all(bool((count_T > 0).all()) for count_T in found.count_T)
    ratio = median(other / own for own, other in zip(ours, theirs, strict=True))
    seconds = [BILLIONS_7B * 1e9 / parameters * median(times) for times in (walls, ours)]
    print(f"ratio {ratio:.1f}; 7B: {seconds[0]:.0f} s on the clock, {seconds[1]:.0f} s of processor", flush=True)


class Files:
    """Safetensors by their own names, as run_scan reads a checkpoint."""

    def __init__(self, path: Path):
        from ksl_ds.model.safetensors_io import Shards

        self.path, self.shards = path, Shards(path)
        self.names, self.shape, self.dtype = set(self.shards.tensor_names), self.shards.shape, self.shards.dtype
        self.read = self.shards.read_slices


def measure_head(home: Path, rounds: int) -> None:
    from ksl_ds.scan.names import Place
    from ksl_ds.scan.runner import Plan, ScannedTensor, run_scan

    name = "lm_head.weight"
    dtypes = (torch.bfloat16, torch.bfloat16)
    plan = Plan([ScannedTensor(name, name, name, HEAD, dtypes, Place(None, "lm_head"), True, (HEAD[1],), HEAD[0])])
    with PeakMemory() as memory:
        started = time.perf_counter()
        run_scan(Files(home / "before"), Files(home / "after"), plan)
    print(f"columns of a head of {HEAD}: {time.perf_counter() - started:.1f} s; memory {memory}", flush=True)


if __name__ == "__main__":
    main()
