"""Training a few rows with any optimizer, in copies of a model, beside adapters; and what is refused in a sentence."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import warnings
import weakref

import pytest
import torch
import torch.optim.optimizer as optimizer_module
from helpers.tiny import random_model
from torch import nn
from transformers import Adafactor

from ksl_ds import train_only_rows

CHOSEN, ROWS, WIDTH = [1, 3], 50, 8
CHOSEN_MASK = torch.zeros(ROWS, dtype=torch.bool)
CHOSEN_MASK[CHOSEN] = True


def embedding(**options) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(ROWS, WIDTH, **options)


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.arange(ROWS)).pow(3).sum().backward()
        optimizer.step()


def moved(before_VD: torch.Tensor, weight_VD: torch.Tensor) -> torch.Tensor:
    return (before_VD != weight_VD.detach()).any(dim=1)


class PullsAndDecays(torch.optim.Optimizer):
    """A schedule-free SGD: the weights are a mixture of the copy `z` and of an average, which `eval()` puts in place."""

    def __init__(self, params, lr, weight_decay, beta=0.9):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "beta": beta, "steps": 0, "training": True})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["steps"] += 1
            for weight in group["params"]:
                z = self.state[weight].setdefault("z", weight.clone())
                update = weight.grad + group["weight_decay"] * weight
                weight.lerp_(z, 1 / group["steps"])
                weight.add_(update, alpha=group["lr"] * (group["beta"] * (1 - 1 / group["steps"]) - 1))
                z.sub_(update, alpha=group["lr"])

    @torch.no_grad()
    def eval(self):
        for group in self.param_groups:
            for weight in group["params"]:
                weight.lerp_(self.state[weight]["z"], 1 - 1 / group["beta"])


# Every optimizer of torch with a decay, and others, by whether the decay joins the gradient.
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "Adam, decoupled": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "Adam, maximize": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, maximize=True),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1),
    "NAdam, decoupled": lambda p: torch.optim.NAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.1),
    "RAdam, decoupled": lambda p: torch.optim.RAdam(p, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, weight_decay=0.1),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.1, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, weight_decay=0.1),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01, lambd=0, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.1, momentum=0.9, nesterov=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01, weight_decay=0.1),
    "Adafactor of transformers": lambda p: Adafactor(
        p, lr=0.01, weight_decay=0.1, relative_step=False, scale_parameter=False
    ),
    "Adafactor of transformers, scaled": lambda p: Adafactor(p, weight_decay=0.1),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0.1),
    "schedule-free": lambda p: PullsAndDecays(p, lr=0.01, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_pulls_towards_the_base(name):
    """Without a gradient, rows at their base stay there, and rows away from it approach it; no other row moves.

    Adam's kind makes steps even of a gradient that is all rounding; towards 0 it would move rows by 4e-2, others by 3e-3.
    """
    tolerance = 1e-2 if name in ("Adam", "Adam, maximize", "NAdam", "Adamax", "RMSprop", "Adagrad") else 1e-6
    module = embedding()
    before_VD = module.weight.detach().clone()
    base_KD = before_VD[CHOSEN] + 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_only_rows(module, CHOSEN, base_KD)
        optimizer = OPTIMIZERS[name](module.parameters())
        module.weight.data[CHOSEN[1]] = base_KD[1]
        distances = [1.0]
        for _ in range(4):
            optimizer.zero_grad()
            (0 * module(torch.arange(ROWS))).sum().backward()
            optimizer.step()
            distances.append((module.weight.detach()[CHOSEN[0]] - base_KD[0]).abs().max().item())
    assert (module.weight[CHOSEN[1]] - base_KD[1]).abs().max() < tolerance
    assert all(after < before for before, after in itertools.pairwise(distances)), distances
    assert torch.equal(module.weight[~CHOSEN_MASK], before_VD[~CHOSEN_MASK])
    if hasattr(optimizer, "eval"):
        optimizer.eval()
        assert (module.weight[CHOSEN[1]] - base_KD[1]).abs().max() < tolerance
        assert torch.equal(module.weight[~CHOSEN_MASK], before_VD[~CHOSEN_MASK])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_other_rows_stay(name):
    module = embedding()
    before_VD = module.weight.detach().clone()
    train_only_rows(module, CHOSEN)
    optimizer = OPTIMIZERS[name](module.parameters())
    train(module, optimizer)
    assert torch.equal(moved(before_VD, module.weight), CHOSEN_MASK)
    if hasattr(optimizer, "eval"):
        assert torch.equal(moved(before_VD, optimizer.state[module.weight]["z"]), CHOSEN_MASK)
        optimizer.eval()
        assert torch.equal(moved(before_VD, module.weight), CHOSEN_MASK)


def test_decay_that_cannot_be_told_is_named():
    class Odd(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self):
            for weight in self.param_groups[0]["params"]:
                weight.sub_(0.1 * weight.sign())

    module = embedding()
    train_only_rows(module, CHOSEN)
    optimizer = Odd(module.parameters(), {"lr": 0.1, "weight_decay": 0.1})
    with pytest.warns(UserWarning, match="cannot tell how Odd applies weight_decay"):
        train(module, optimizer, steps=1)


def test_group_is_that_of_the_parameter_not_of_its_storage():
    """Two embeddings are views of one buffer, in groups with other decays."""
    buffer = torch.randn(2 * ROWS * WIDTH, generator=torch.Generator().manual_seed(0))
    first, second = embedding(), embedding()
    nn.utils.vector_to_parameters(buffer, [first.weight, second.weight])
    base_KD = second.weight.detach()[CHOSEN].clone()
    train_only_rows(second, CHOSEN)
    groups = [
        {"params": [first.weight], "weight_decay": 0.5},
        {"params": [second.weight], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    (0 * (first(torch.arange(ROWS)) + second(torch.arange(ROWS)))).sum().backward()
    before_VD = first.weight.detach().clone()
    optimizer.step()
    assert torch.equal(second.weight[CHOSEN], base_KD)
    assert torch.allclose(first.weight, 0.95 * before_VD)


def test_step_without_gradient_changes_nothing():
    module = embedding()
    before_VD = module.weight.detach().clone()
    train_only_rows(module, range(ROWS))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(module.weight, before_VD)


def test_copies_are_restricted_too():
    """A deep copy and a pickled one train the same rows; a copy's restriction goes when its handle is asked to, alone."""
    model = nn.Sequential(embedding(), nn.Linear(WIDTH, 1, bias=False))
    train_only_rows(model[0], CHOSEN)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for copied in (copy.deepcopy(model), torch.load(stream, weights_only=False), model):
        before_VD = copied[0].weight.detach().clone()
        train(copied, torch.optim.AdamW(copied.parameters(), lr=0.01, weight_decay=0.1))
        assert torch.equal(moved(before_VD, copied[0].weight), CHOSEN_MASK)


def test_model_that_is_collected_takes_its_hooks_along():
    hooks = optimizer_module._global_optimizer_pre_hooks
    number = len(hooks)
    module = embedding()
    weight = weakref.ref(module.weight)
    handle = train_only_rows(module, CHOSEN)
    train(module, torch.optim.AdamW(module.parameters()), steps=1)
    del module
    gc.collect()
    assert weight() is None
    other = embedding()
    train(other, torch.optim.SGD(other.parameters(), lr=0.1), steps=1)
    del handle
    gc.collect()
    assert len(hooks) == number


def test_remove_takes_all_hooks_out():
    hooks = optimizer_module._global_optimizer_pre_hooks
    number = len(hooks)
    module = embedding()
    train_only_rows(module, CHOSEN).remove()
    assert len(hooks) == number
    assert not module._forward_pre_hooks
    before_VD = module.weight.detach().clone()
    train(module, torch.optim.SGD(module.parameters(), lr=0.1), steps=1)
    assert moved(before_VD, module.weight).all()


def test_step_of_another_model_is_untouched():
    """Also between this model's backward pass and its step."""
    module, other = embedding(), embedding()
    before_VD = module.weight.detach().clone()
    train_only_rows(module, CHOSEN)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    others = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        module(torch.arange(ROWS)).pow(3).sum().backward()
        train(other, others, steps=1)
    assert moved(before_VD, other.weight).all()
    optimizer.step()
    assert torch.equal(moved(before_VD, module.weight), CHOSEN_MASK)


def test_optimizer_of_hidden_copies_is_refused_at_its_first_step():
    """Masters that nobody knows of would move all rows."""
    module = embedding()
    train_only_rows(module, CHOSEN)
    master = module.weight.detach().clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([master], lr=0.1)
    module(torch.arange(ROWS)).sum().backward()
    master.grad = module.weight.grad
    with pytest.raises(RuntimeError, match="no optimizer holds the embedding's weight or its fp32 master"):
        optimizer.step()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def replace_weight(model):
    old = model.get_input_embeddings().weight
    model.get_input_embeddings().weight = nn.Parameter(old.detach().clone())


def parametrize(model):
    nn.utils.parametrize.register_parametrization(model.get_input_embeddings(), "weight", Doubled())


def replace_embedding(model):
    model.set_input_embeddings(nn.Embedding(ROWS, 32))


@pytest.mark.parametrize("change", [replace_weight, parametrize, replace_embedding])
def test_replaced_weight_is_named(change):
    model = random_model("llama", ROWS, tied=False)
    train_only_rows(model, CHOSEN)
    change(model)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(RuntimeError, match="the embedding or its weight was replaced"):
        model(input_ids=ids)
    with torch.no_grad():  # nothing trains here
        model(input_ids=ids)


def test_resized_embedding_stays_restricted():
    model = random_model("llama", ROWS, tied=False)
    train_only_rows(model, CHOSEN)
    model.resize_token_embeddings(ROWS + 3, mean_resizing=False)
    weight = model.get_input_embeddings().weight
    before_VD = weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    ids = torch.arange(ROWS)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert moved(before_VD, weight).nonzero().flatten().tolist() == CHOSEN


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


def test_adapter_after_the_call_is_named():
    from peft import get_peft_model

    model = random_model("llama", ROWS, tied=False)
    train_only_rows(model, CHOSEN)
    model = get_peft_model(model, lora())
    with pytest.raises(RuntimeError, match="call train_only_rows after get_peft_model"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_adapter_on_the_embedding_is_named():
    from peft import get_peft_model

    ids = torch.tensor([[1, 2, 3]])
    for options in ({"target_modules": ["embed_tokens"]}, {"trainable_token_indices": [2]}):
        model = get_peft_model(random_model("llama", ROWS, tied=False), lora(**options))
        with pytest.raises(ValueError, match="wraps the embedding"):
            train_only_rows(model, CHOSEN)
        model = random_model("llama", ROWS, tied=False)
        train_only_rows(model, CHOSEN)
        peft_model = get_peft_model(model, lora(**options))
        model.requires_grad_(True)
        with pytest.raises((ValueError, RuntimeError), match="wraps the embedding|was replaced"):
            peft_model(input_ids=ids)


def test_rows_beside_an_adapter(tmp_path):
    """They train, and a warning says that the adapter's file does not have them; where PEFT copies the embedding it does."""
    from peft import get_peft_model

    for options, count in (({}, 1), ({"modules_to_save": ["embed_tokens"]}, 0)):
        model = get_peft_model(random_model("llama", ROWS, tied=False), lora(**options))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_only_rows(model, CHOSEN)
        named = [str(warning.message) for warning in caught if "no part of PEFT's adapter" in str(warning.message)]
        assert len(named) == count
        weight = model.get_input_embeddings().weight
        before_VD = weight.detach().clone()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
        ids = torch.arange(ROWS)[None]
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        assert torch.equal(moved(before_VD, weight), CHOSEN_MASK)


def test_embedding_that_an_adapter_copies_later_stays_restricted():
    from peft import get_peft_model

    model = random_model("llama", ROWS, tied=False)
    train_only_rows(model, CHOSEN)
    model = get_peft_model(model, lora(modules_to_save=["embed_tokens"]))
    weight = model.get_input_embeddings().weight
    before_VD = weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    ids = torch.arange(ROWS)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert torch.equal(moved(before_VD, weight), CHOSEN_MASK)


def test_sparse_gradients():
    module = embedding(sparse=True)
    before_VD = module.weight.detach().clone()
    train_only_rows(module, CHOSEN)
    train(module, torch.optim.SparseAdam(module.parameters(), lr=0.01))
    assert torch.equal(moved(before_VD, module.weight), CHOSEN_MASK)


def test_compiled_model():
    """fullgraph, compiled before the call and after it."""
    for is_compiled_first in (True, False):
        module = embedding()
        before_VD = module.weight.detach().clone()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        if is_compiled_first:
            compiled(torch.arange(ROWS))
        train_only_rows(compiled, CHOSEN)
        train(compiled, torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1))
        assert torch.equal(moved(before_VD, module.weight), CHOSEN_MASK)


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_parallel_wrappers(one_rank):
    """DDP works, but for an embedding that it does not train; DTensor weights and FSDP are one sentence."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    module = embedding()
    parallel = nn.parallel.DistributedDataParallel(module)
    before_VD = module.weight.detach().clone()
    train_only_rows(parallel, CHOSEN)
    train(parallel, torch.optim.AdamW(parallel.parameters(), lr=0.01, weight_decay=0.1))
    assert torch.equal(moved(before_VD, module.weight), CHOSEN_MASK)

    model = random_model("llama", ROWS, tied=False)
    model.get_input_embeddings().weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen when DistributedDataParallel was created"):
        train_only_rows(nn.parallel.DistributedDataParallel(model), CHOSEN)

    sharded = fully_shard(embedding(), mesh=one_rank)
    with pytest.raises(ValueError, match="does not support DTensor weights"):
        train_only_rows(sharded, CHOSEN)
    for plan in (RowwiseParallel(input_layouts=Replicate()), ColwiseParallel()):
        split = parallelize_module(embedding(), one_rank, plan)
        with pytest.raises(ValueError, match="does not support DTensor weights"):
            train_only_rows(split, CHOSEN)
    with pytest.raises(ValueError, match="does not support FSDP"):
        train_only_rows(FullyShardedDataParallel(embedding(), device_id=torch.device("cpu")), CHOSEN)
    # The step of an unrelated sharded model goes on, with a restriction elsewhere alive and with it gone.
    kept = embedding()
    handle = train_only_rows(kept, CHOSEN)
    kept(torch.arange(ROWS)).sum().backward()
    optimizer = torch.optim.SGD(kept.parameters(), lr=0.1)
    train(sharded, torch.optim.AdamW(sharded.parameters()), steps=1)
    optimizer.step()
    del kept, optimizer
    gc.collect()
    train(sharded, torch.optim.AdamW(sharded.parameters()), steps=1)
    handle.remove()


def no_embedding():
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1]))


def parametrized():
    module = embedding()
    nn.utils.parametrize.register_parametrization(module, "weight", Doubled())
    return module


def integers():
    module = embedding()
    module.weight = nn.Parameter(torch.zeros(ROWS, WIDTH, dtype=torch.int8), requires_grad=False)
    return module


def transposed():
    module = embedding()
    module.weight = nn.Parameter(torch.randn(WIDTH, ROWS).T)
    return module


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (nn.ReLU, "needs a module with a .V, D. parameter `weight`; that of ReLU is missing"),
        (no_embedding, "ResNetModel has no input embedding"),
        (lambda: nn.LayerNorm(4), "LayerNorm has .4,. in torch.float32"),
        (parametrized, "is computed from other tensors"),
        (integers, "Embedding has .50, 8. in torch.int8"),
        (transposed, "is not contiguous"),
        (lambda: nn.Embedding(ROWS, WIDTH, device="meta"), "is on the meta device"),
    ],
)
def test_what_has_no_rows_is_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        train_only_rows(make(), CHOSEN)


# ---- rows of an output head


def with_biased_head():
    """A small Llama whose own output head has a bias."""
    model = random_model("llama", ROWS, tied=False)
    model.set_output_embeddings(nn.Linear(32, ROWS))
    return model


def train_model(model, optimizer, steps=3):
    ids = torch.arange(ROWS)[None]
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "Muon"])  # takes matrices only
def test_rows_of_the_head_and_its_bias_train_too(name):
    """Rows outside the ticket stay in all three, whatever the optimizer; decay pulls towards the values at the start."""
    model = with_biased_head()
    model.requires_grad_(False)
    handle = train_only_rows(model, CHOSEN, head=True)
    head = model.get_output_embeddings()
    weights = [model.get_input_embeddings().weight, head.weight, head.bias]
    before = [weight.detach().clone().view(ROWS, -1) for weight in weights]
    train_model(model, OPTIMIZERS[name](weights))
    for before_VD, weight in zip(before, weights, strict=True):
        assert torch.equal(moved(before_VD, weight.view(ROWS, -1)), CHOSEN_MASK)
    handle.remove()
    train_model(model, torch.optim.SGD(weights, lr=0.1), steps=1)
    assert moved(before[1], head.weight).all() and not head._forward_pre_hooks


def test_decay_pulls_rows_of_the_head_towards_their_start():
    model = with_biased_head()
    train_only_rows(model, CHOSEN, head=True)
    head = model.get_output_embeddings()
    start_KD = head.weight.detach()[CHOSEN].clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    with torch.no_grad():
        head.weight[CHOSEN] += 1
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    # The base is what the rows were at the first step, hence with the 1 in it.
    optimizer.step()
    assert torch.allclose(head.weight[CHOSEN], start_KD + 1)
    with torch.no_grad():
        head.weight[CHOSEN] += 1
    head.weight.grad.zero_()
    optimizer.step()
    assert torch.allclose(head.weight[CHOSEN], start_KD + 1 + 0.95, atol=1e-6)


def test_a_tied_head_needs_nothing_more():
    model = random_model("llama", ROWS, tied=True)
    assert train_only_rows(model, CHOSEN, head=True).of_head == []


def test_copies_of_a_model_keep_the_restriction_of_the_head():
    model = with_biased_head()
    train_only_rows(model, CHOSEN, head=True)
    for twin in (copy.deepcopy(model), torch.load(saved(model), weights_only=False)):
        head = twin.get_output_embeddings()
        before_VD = head.weight.detach().clone()
        train_model(twin, torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1), steps=1)
        assert torch.equal(moved(before_VD, head.weight), CHOSEN_MASK)


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_a_head_that_is_replaced_is_named():
    model = with_biased_head()
    train_only_rows(model, CHOSEN, head=True)
    model.set_output_embeddings(nn.Linear(32, ROWS))
    with pytest.raises(RuntimeError, match="the output head or its weight was replaced"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def no_head():
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(
        LlamaConfig(vocab_size=ROWS, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )


def small_head():
    model = random_model("llama", ROWS, tied=False)
    model.set_output_embeddings(nn.Linear(32, 3, bias=False))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (embedding, "head=True needs a model with an output head; Embedding is none"),
        (no_head, "LlamaModel has no output head"),
        (small_head, "row ids must lie in 0 .. 2; got 1 .. 3"),
    ],
)
def test_what_has_no_head_is_a_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        train_only_rows(make(), CHOSEN, head=True)
