"""What one training step of a model holds beside its states, found by running it without data on the meta device.

Forward and backward run for real, operator by operator, on tensors that have shapes and no memory; every allocation and
every release is counted. So activations, logits, gradients on their way to the optimizer and recomputation under
checkpointing are those of the architecture's own code, not of a formula that fits LLaMA only. It costs the time of
transformers' Python code, about a second for 80 layers. It assumes that attention is a fused kernel that keeps
queries, keys, values, output, log-sum-exp and the padding mask, as torch's kernels for GPUs and CPUs do. Some architectures
cannot be run this way: their code reads values of tensors, or loops over the tokens for minutes. `Unmeasured` says so.

Legend: B pairs, L positions, N response tokens, V vocabulary, D width, H heads, C channels of a head.
"""

from __future__ import annotations

import json
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ksl_ds.errors import UserError
from ksl_ds.hub import hub_reason
from ksl_ds.model.check_folder import check_folder, check_is_decoder, config_problem, needs_code

SHAPES_FILE = Path(__file__).parent.parent / "data" / "model_shapes.json"
ATTENTION = "ksl_ds_dry_run"
FEW_LAYERS = (3, 4)  # what is run of a model of many equal layers
MAX_SECONDS = 20  # of one dry run


class Unmeasured(Exception):
    """A dry run that found nothing, and why."""


class TooSlow(Unmeasured):
    """A dry run has reached its deadline."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the block and still alive: `now`, and their `peak`.

    Counts storages, so a view costs nothing. What existed before the block is not counted. The first operator after
    `deadline`, a time of time.monotonic, raises TooSlow.
    """

    def __init__(self, deadline: float = float("inf")) -> None:
        super().__init__()
        self.deadline = deadline
        self.now = self.peak = 0
        self.phases: list[int] = []
        self._known: dict[int, Any] = {}  # by id of a live storage's Python object

    def end_phase(self) -> None:
        """Puts the peak since the last call into `phases` and starts the next one."""
        self.phases.append(self.peak)
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if time.monotonic() > self.deadline:
            raise TooSlow(f"its dry run takes more than {MAX_SECONDS} s")
        for value in tree_iter((args, kwargs)):
            if isinstance(value, Tensor):
                self._see(value, new=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._see(value, new=True)
        return result

    def _see(self, tensor: Tensor, *, new: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._known:
            return
        size = storage.nbytes() if new else 0
        self.now += size
        self.peak = max(self.peak, self.now)

        def forget(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, forget)


def model_config(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """The transformers config of a built-in shape, a config.json, a model folder or a Hub id. Raises UserError."""
    from transformers import AutoConfig

    shapes = json.loads(SHAPES_FILE.read_text())
    path = Path(name)
    try:
        if name in shapes:
            return AutoConfig.for_model(**shapes[name])
        # A config.json stands for its folder; of a Hub model the config alone is fetched, not the weights.
        where: Path | str = path.parent if path.is_file() else name
        if path.is_dir():
            where = path
            check_folder(path)
        config = AutoConfig.from_pretrained(where, revision=revision, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None):
            raise UserError(f"model {name}: quantised folders are not supported; give the 16-bit model")
        check_is_decoder(config, f"model {name}")
        return config
    except (ValueError, OSError, KeyError, TypeError) as error:
        if path.exists() or needs_code(error):
            raise UserError(f"model {name}: {config_problem(error)}") from None
        known = f"built-in shapes are {', '.join(shapes)}"
        raise UserError(f"model {name}: {hub_reason(error, name)}; {known}") from None


def meta_model(config: Any, dtype: torch.dtype, *, untied: bool, trust_remote_code: bool = False) -> Any:
    """The causal language model of a config in `dtype`, without memory; `untied` gives a tied head a matrix of its own."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.modeling_utils import set_zero3_state

    AttentionInterface.register(ATTENTION, _attention)
    if untied:
        config.tie_word_embeddings = False

    def build(attention: str | None) -> Any:
        # That state keeps transformers from partitioning this model where a ZeRO-3 configuration is alive.
        with torch.device("meta"), set_zero3_state():
            return AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
            )

    try:
        try:
            return build(ATTENTION)
        except KeyError as error:
            if error.args != (ATTENTION,):
                raise
        return build(None)  # the architecture has attention classes of its own
    except Exception as error:  # an architecture's code may raise anything about a config
        raise UserError(f"no causal language model: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """The first line of an error, with its kind where it has no words of its own."""
    lines = str(error).strip().splitlines()
    kind = "" if isinstance(error, (ValueError, RuntimeError)) and lines else f"{type(error).__name__} "
    return (kind + (lines[0] if lines else "")).strip().rstrip(".")


class _FusedAttention(torch.autograd.Function):
    """Allocates and keeps what a fused kernel does; computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        # Multi-head latent attention has values of another width.
        same = query.shape[-1] == value.shape[-1]
        output = torch.empty_like(query) if same else query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, bias, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def _attention(
    module: nn.Module, query_BHLC: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **ignored: Any
) -> tuple[Tensor, None]:
    # As transformers' sdpa does under a padding mask: keys and values are copied for every query head.
    copies = query_BHLC.shape[1] // key.shape[1]
    if copies > 1:
        key, value = key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)
    batch, _, length, _ = query_BHLC.shape
    bias_B1LL = query_BHLC.new_empty(batch, 1, length, key.shape[2])  # keys are more under a trained prefix
    if attention_mask is not None and attention_mask.dtype == query_BHLC.dtype:
        bias_B1LL = attention_mask  # a packed row's: one for all layers
    output_BHLC = _FusedAttention.apply(query_BHLC, key, value, bias_B1LL)
    return output_BHLC.transpose(1, 2).contiguous(), None


def _direct_attention(query_BHLC: Tensor, key: Tensor, value: Tensor, *ignored: Any, **also_ignored: Any) -> Tensor:
    """Stands in for torch's function where an architecture calls it itself."""
    batch, _, length, _ = query_BHLC.shape
    bias_B1LL = query_BHLC.new_empty(batch, 1, length, key.shape[2])
    return _FusedAttention.apply(query_BHLC, key, value, bias_B1LL)


def step_bytes(
    model: Any,
    batch_size: int,
    length: int,
    response_length: int,
    *,
    checkpointing: bool,
    linear: Callable[..., Tensor] = F.linear,
    packed_positions: int = 0,
) -> int:
    """Peak bytes of activations, logits and passing gradients of one forward and backward pass of a rank.

    Of a model of many equal layers a few are run: the peak of each phase is a straight line in their number.

    Parameters
    ----------
    model
        The model on the meta device; parameters with requires_grad train. Complete gradients are freed, as ZeRO does.
    batch_size, length
        B pairs of L tokens, prompt and response together.
    response_length
        How many of the L positions the loss reads logits of.
    checkpointing
        Recompute each layer in the backward pass.
    linear
        Replaces torch.nn.functional.linear; ZeRO-3's saves the input even for frozen weights.
    packed_positions
        Positions of the row into which the pairs are packed, with a mask of their own; 0: they are padded.

    Raises
    ------
    Unmeasured
        Where the architecture's code does not run without data; TooSlow where it takes longer than MAX_SECONDS.
    """
    deadline = time.monotonic() + MAX_SECONDS
    reason = ""
    # Most run without a mask, and the fused attention has its own; a few build one from the padding.
    for masked in (False, True):
        run = _Passes(model, batch_size, length, response_length, masked, linear, deadline, packed_positions)
        try:
            return _step_bytes(run, checkpointing)
        except TooSlow:
            raise
        except Exception as error:  # the architecture's code, on tensors without data, raises whatever it likes
            reason = reason or first_line(error)
    raise Unmeasured(reason)


@dataclass(frozen=True)
class _Passes:
    """What a forward and a backward pass are run on."""

    model: Any
    batch_size: int
    length: int
    response_length: int
    masked: bool  # whether the model gets an attention mask
    linear: Callable[..., Tensor]
    deadline: float
    packed_positions: int


def _step_bytes(run: _Passes, checkpointing: bool) -> int:
    model = run.model
    switch = model.activation_checkpointing_enable if checkpointing else model.activation_checkpointing_disable
    # There is no random state on the meta device to be kept.
    switch(*([{"use_reentrant": False, "preserve_rng_state": False}] if checkpointing else []))
    model.train()
    stack = _equal_layers(model)
    if stack is None:
        return max(_phase_peaks(run))
    owner, name, layers = stack
    few, more = FEW_LAYERS
    peaks = {}
    try:
        for number in FEW_LAYERS:
            setattr(owner, name, layers[:number])
            peaks[number] = _phase_peaks(run)
    finally:
        setattr(owner, name, layers)
    steps = (len(layers) - more) // (more - few)
    return max(last + steps * (last - first) for first, last in zip(peaks[few], peaks[more], strict=True))


def _equal_layers(model: Any) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The module that holds the stack of layers, its name there, and the stack, where that is long and all are alike."""
    config = model.config.get_text_config(decoder=True)
    for owner in model.modules():
        for name, child in owner.named_children():
            if isinstance(child, nn.ModuleList) and len(child) == getattr(config, "num_hidden_layers", None):
                kinds = {
                    tuple((key, value.shape, value.requires_grad) for key, value in layer.named_parameters())
                    for layer in child
                }
                return (owner, name, child) if len(kinds) == 1 and len(child) > FEW_LAYERS[1] else None
    return None


def _phase_peaks(run: _Passes) -> list[int]:
    """Peaks of the forward pass, of the backward pass down to the embedding, and of the embedding's own."""
    model = run.model
    batch_size = run.batch_size
    length = run.length
    handles = [
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    live = LiveBytes(run.deadline)

    def mark(module: nn.Module, inputs: Any, output_BLD: Tensor) -> None:
        if output_BLD.requires_grad:
            output_BLD.register_hook(lambda gradient: live.end_phase())

    handles.append(model.get_input_embeddings().register_forward_hook(mark))
    mask = {"attention_mask": torch.ones(batch_size, length, dtype=torch.int64, device="meta")} if run.masked else {}
    num_targets = batch_size * run.response_length
    with ExitStack() as block:
        block.enter_context(torch.device("meta"))
        block.enter_context(mock.patch.object(F, "linear", run.linear))
        if model.config._attn_implementation != ATTENTION:
            block.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _direct_attention))
        for handle in handles:
            block.callback(handle.remove)
        block.enter_context(live)
        if run.packed_positions:
            ids_P = torch.empty(1, run.packed_positions, dtype=torch.int64)
            mask_PP = torch.empty(1, 1, run.packed_positions, run.packed_positions, dtype=model.dtype)
            kept_N = torch.empty(num_targets, dtype=torch.int64)
            logits_BLV = model(
                input_ids=ids_P, position_ids=ids_P, attention_mask=mask_PP, use_cache=False, logits_to_keep=kept_N
            ).logits
            logits_NV = logits_BLV[0].float()
        else:
            input_ids = torch.empty(batch_size, length, dtype=torch.int64)
            mask_B1LL = torch.empty(batch_size, 1, length, length, dtype=torch.bool)  # noqa: F841  every layer's, alive
            logits_BLV = model(
                input_ids=input_ids, use_cache=False, logits_to_keep=run.response_length + 1, **mask
            ).logits
            rows, columns = (torch.empty(num_targets, dtype=torch.int64) for _ in range(2))
            logits_NV = logits_BLV[:, :-1][rows, columns].float()
        loss = F.cross_entropy(logits_NV, torch.empty(num_targets, dtype=torch.int64), reduction="sum")
        del logits_BLV, logits_NV
        live.end_phase()
        loss.backward()
        live.end_phase()
    return live.phases
