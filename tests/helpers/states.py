"""The whole state of a training run, gathered by DeepSpeed's own functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def whole_state(engine: Any) -> dict[str, Tensor]:
    """Every trained parameter's fp32 master and AdamW moments on the CPU, by name; gathered under ZeRO. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    moments = ("exp_avg", "exp_avg_sq")
    found = {}
    if engine.zero_optimization_stage() == 0:
        for number, tensor in enumerate(tensor for group in inner.param_groups for tensor in group["params"]):
            found[str(number)] = tensor
            found |= {f"{number} {moment}": inner.state[tensor][moment] for moment in moments}
    else:
        if engine.zero_optimization_stage() < 3:
            # The getters' views of the moments, which are otherwise made in the first step.
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                found[name] = safe_get_full_fp32_param(parameter)
                found |= {f"{name} {moment}": safe_get_full_optimizer_state(parameter, moment) for moment in moments}
    steps = {float(state["step"]) for state in inner.state.values()}
    assert len(steps) == 1, steps
    return {name: tensor.detach().cpu().clone() for name, tensor in found.items()}
