"""Rows that train in place of an embedding's: the same function and gradients as the dense matrix, at the rows' size."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import SHAPES, random_model
from peft import TrainableTokensConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from ksl_ds.model.row_parameter import TicketRows

VOCABULARY, WIDTH = 67, 32
TICKET = torch.tensor([0, 3, 5, 66])  # the padding row among them


def build(architecture: str = "llama", *, tied: bool = True, **settings):
    return random_model(architecture, VOCABULARY, tied=tied, **settings).requires_grad_(False).eval()  # no dropout


def batch() -> torch.Tensor:
    ids = torch.randint(0, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))
    ids[:, ::3] = TICKET[torch.arange(ids[:, ::3].numel()).view(3, -1) % 4]
    return ids


def with_moved_rows(model) -> TicketRows:
    rows = TicketRows(model, TICKET, model.get_input_embeddings().weight.detach()[TICKET])
    torch.manual_seed(2)
    with torch.no_grad():
        rows.delta_KD.normal_(std=0.1)
    return rows


MODELS = [*((name, {}) for name in SHAPES), ("gemma3_text", {"head_dim": 8}), ("phi", {})]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("architecture", "settings"), MODELS, ids=[name for name, _ in MODELS])
def test_logits_and_gradients_are_those_of_the_dense_matrix(architecture, settings, tied):
    """Scaled embeddings (Gemma, Gemma 3), a head with bias (Phi), padding rows, tied or not."""
    model, dense = (build(architecture, tied=tied, **settings) for _ in range(2))
    if architecture == "phi":  # its bias starts at 0
        for one in (model, dense):
            one.lm_head.bias.copy_(torch.linspace(-1, 1, VOCABULARY))
    weight = dense.get_input_embeddings().weight
    rows = with_moved_rows(model)
    with torch.no_grad():
        weight[TICKET] += rows.delta_KD
    weight.requires_grad_(True)
    ids = batch()
    outputs = [one(input_ids=ids, labels=ids, use_cache=False) for one in (model, dense)]
    for output in outputs:
        output.loss.backward()
    assert torch.allclose(outputs[0].logits, outputs[1].logits, atol=1e-6)
    assert torch.allclose(rows.delta_KD.grad, weight.grad[TICKET], atol=1e-6)
    assert weight.grad[TICKET].abs().max() > 1e-4
    assert model.get_input_embeddings().weight.grad is None


def test_removing_gives_the_model_back():
    model = build()
    ids, names = batch(), set(model.state_dict())
    before = model(input_ids=ids).logits
    rows = with_moved_rows(model)
    assert not torch.equal(model(input_ids=ids).logits, before)
    rows.remove()
    assert torch.equal(model(input_ids=ids).logits, before)
    assert set(model.state_dict()) == names
    assert not any(parameter is rows.delta_KD for parameter in model.parameters())


def test_decay_pulls_towards_the_base_rows():
    model = build()
    rows = with_moved_rows(model)
    base_KD, delta_KD = rows.base_KD.clone(), rows.delta_KD.detach().clone()
    optimizer = torch.optim.AdamW([rows.delta_KD], lr=0.1, weight_decay=0.5)
    rows.delta_KD.grad = torch.zeros_like(delta_KD)
    optimizer.step()
    assert torch.allclose(rows.moved(rows.delta_KD.detach()), base_KD + 0.95 * delta_KD)


class LargeTensors(TorchDispatchMode):
    """Lists the operations whose results have as many elements as the matrix, but for views of a model's weights."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.made: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        tensors = [one for one in (result if isinstance(result, tuple) else [result]) if torch.is_tensor(one)]
        large = [tensor for tensor in tensors if tensor.numel() >= VOCABULARY * WIDTH]
        self.made += [str(function) for tensor in large if tensor.untyped_storage().data_ptr() not in self.weights]
        return result


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_of_the_matrix_size_is_made(tied):
    """In forward and backward pass; the control is PEFT, which copies the matrix and gives it a gradient."""
    ids = batch()[:1, :8]

    def made(model) -> list:
        with LargeTensors(model) as large:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return large.made

    model = build(tied=tied)
    with_moved_rows(model)
    assert made(model) == []
    peft = get_peft_model(
        build(tied=tied), TrainableTokensConfig(token_indices=TICKET.tolist(), target_modules=["embed_tokens"])
    )
    assert made(peft) != []
