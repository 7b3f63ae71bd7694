"""The tables of `estimate`."""

from __future__ import annotations

from dataclasses import replace

from ksl_ds import distributed
from ksl_ds.config.schema import EstimateCommand
from ksl_ds.errors import UserError
from ksl_ds.estimate.memory import AUTO, MethodCost, ModelDims, Needs, Zero, fits, min_ranks, rank_needs
from ksl_ds.estimate.plan import (
    RESERVED,
    Estimated,
    Plan,
    seconds_of_a_row,
)
from ksl_ds.report.tables import Column, Table, count, duration, size

KINDS = ("weights", "gradients", "optimizer", "buffers", "gathered")


def tables(plan: Plan, command: EstimateCommand) -> list[Table]:
    """Memory of a rank, and traffic, for every method on `command.gpus` GPUs."""
    training = plan.training()
    zero = plan.zero.on_hosts(command.gpus_per_host)
    hosts = command.gpus_per_host is not None and command.gpus_per_host < command.gpus and zero.stage == 3
    unknown = plan.zero.host_ranks == AUTO and command.gpus_per_host is None
    memory = None if command.gpu_memory is None else round(command.gpu_memory * 2**30)
    memory_rows = []
    traffic_rows = []
    host_rows: list[list[str]] = []
    with distributed.progress([(name, at) for name in Estimated for at in (False, True)], "dry runs") as cases:
        found = {case: _method_or_problem(plan, *case) for case in cases}
    total = sum(parameter.numel() for parameter in plan.meta_model().parameters())
    for name in Estimated:
        cases_of_name = [found[name, checkpointing] for checkpointing in (False, True)]
        possible = [method for method in cases_of_name if isinstance(method, MethodCost)]
        if not possible:
            memory_rows.append([name, *["–"] * (len(KINDS) + 8)])
            traffic_rows.append([name, *["–"] * (2 if command.network is None else 4)])
            host_rows.append([name, *["–"] * 4])
            continue
        needs = [
            rank_needs(method, training, zero, command.gpus) if isinstance(method, MethodCost) else None
            for method in cases_of_name
        ]
        states = next(each for each in needs if each is not None)  # the same with and without checkpointing
        memory_rows.append(
            [
                name,
                count(sum(possible[0].trained)),
                *(size(getattr(states, kind)) + ("*" if kind in states.on_host else "") for kind in KINDS),
                *(_activations(each) for each in needs),
                *(_peak(each) for each in needs),
                *(_verdict(each, method, training, zero, memory)
                  for each, method in zip(needs, cases_of_name, strict=True)),
                size(states.host),
            ]
        )  # fmt: skip
        steps = ["–" if each is None else size(each.wire_step) for each in needs]
        seconds = []
        if command.network is not None:
            bits_per_second = command.network * 1e9
            seconds = ["–" if each is None else duration(each.wire_step * 8 / bits_per_second) for each in needs]
        traffic_rows.append([name, *steps, *seconds])
        if hosts:
            host_rows.append([name, *_host_cells(possible[0], training, zero, command)])
    draw = rank_needs(plan.embedding(), training, zero, command.gpus)
    rows = -(-training.vocab_size // command.gpus)
    draw_seconds = rows * seconds_of_a_row(training.width)
    of = f"{command.gpus} GPU{'s' if command.gpus > 1 else ''}"
    step = plan.recipe.training
    memory_table = Table(
        f"{plan.name}: memory of each of {of}" + ("" if memory is None else f" of {command.gpu_memory:g} GiB"),
        [
            Column("", numeric=False),
            Column("trained parameters", optional=True),
            *(Column(kind, optional=True) for kind in KINDS),
            Column("activations, plain", optional=True),
            Column("activations, checkpointed", optional=True),
            Column("peak, plain"),
            Column("peak, checkpointed"),
            Column("fits on, plain"),
            Column("fits on, checkpointed"),
            Column("host", optional=True),
        ],
        memory_rows,
        [
            f"{total:,} parameters; {plan.recipe.deepspeed}, {step.precision}; a rank runs {step.micro_batch_size} pairs of "
            f"{plan.recipe.text.max_length:,} tokens at once, {plan.response_length:,} of them response; ticket of "
            f"{plan.ticket_rows} rows.",
            *_packing_note(plan),
            "peak: weights, gradients, optimizer, buffers, and the larger of gathered + activations and the optimizer's "
            "fp32 gradients. activations: with logits and passing gradients.",
            f"fits on: the fewest GPUs, with {size(RESERVED)} of each left to CUDA and NCCL. host: memory of the host for a "
            "rank, in embed tuning for the snapshot.",
            *(["* in host memory: offloaded."] if draw.on_host else []),
            *_evaluation_note(plan, total, training),
            *_left_open(found),
        ],
    )  # fmt: skip
    traffic_table = Table(
        "What a rank receives",
        [Column("", numeric=False), Column("a step, plain"), Column("a step, checkpointed")]
        + [
            Column(f"at {command.network:g} Gbit/s, {how}")
            for how in ("plain", "checkpointed")
            if command.network is not None
        ],
        traffic_rows,
        [
            *(["Frozen weights in 8 bits, but for the embedding."] * zero.rounds_frozen),
            *(["Hierarchical partitioning (hpZ): frozen weights come from the host's copy."] * (zero.host_ranks > 1)),
            *(
                ["As on one host; gpus_per_host=N counts the copy of the weights that each of several keeps (hpZ)."]
                * unknown
            ),
            "A step of one micro-batch; each further one (training.batch_size / training.micro_batch_size / GPUs) adds the "
            "same.",
            f"A draw: {size(draw.wire_draw)} received, {rows:,} rows tested in {duration(draw_seconds)} where all have "
            f"changed, at the pace of this machine's {distributed.device().type.upper()}; snapshot: {size(draw.snapshot)} of "
            "host memory a rank.",
        ],
    )
    if not hosts:
        return [memory_table, traffic_table]
    hosts_table = Table(
        f"What hosts of {command.gpus_per_host} GPUs receive",
        [Column("", numeric=False), Column("between hosts, plain"), Column("between hosts, hpZ")]
        + [Column("within a host, hpZ"), Column("copy of the weights, hpZ")],
        host_rows,
        [
            "A step without checkpointing; between hosts for the whole host, within it for each GPU. Hierarchical "
            "partitioning (hpZ, deepspeed=zero3_hpz.json): every host keeps a copy of the weights, which takes so much more "
            "of each GPU.",
            f"The tables above are {'with' if zero.host_ranks > 1 else 'without'} it.",
        ],
    )
    return [memory_table, traffic_table, hosts_table]


def _host_cells(method: MethodCost, training: ModelDims, zero: Zero, command: EstimateCommand) -> list[str]:
    """Bytes of a step between hosts and within, and of a copy of the weights: plain, and with one on each host."""
    plain, copied = (
        rank_needs(method, training, replace(zero, host_ranks=ranks), command.gpus)
        for ranks in (1, command.gpus_per_host or 1)
    )
    cells = [plain.wire_between, copied.wire_between, copied.wire_within, copied.weights - plain.weights]
    return list(map(size, cells))


def _method_or_problem(plan: Plan, name: Estimated, checkpointing: bool) -> MethodCost | str:
    try:
        return plan.method(name, checkpointing=checkpointing)
    except UserError as error:
        return str(error)


def _activations(needs: Needs | None) -> str:
    if needs is None:
        return "–"
    return "unknown" if needs.working is None else size(needs.working)


def _peak(needs: Needs | None) -> str:
    if needs is None:
        return "–"
    return ("> " if needs.working is None else "") + size(needs.device)


def _verdict(needs: Needs | None, method: MethodCost | str, training: ModelDims, zero: Zero, memory: int | None) -> str:
    if memory is None or needs is None or isinstance(method, str):
        return "–"
    if method.working is None:
        return "unknown"
    fewest = min_ranks(method, training, zero, memory)
    return "none" if fewest is None else f"{fewest:,}{'' if fits(needs, training, memory) else ' (not here)'}"


def _left_open(found: dict[tuple[str, bool], MethodCost | str]) -> list[str]:
    """A line for every reason why a number is missing, with the cases it concerns."""
    cases: dict[str, list[str]] = {}
    for (name, checkpointing), method in found.items():
        if isinstance(method, str):
            reason = method
        elif method.working is None:
            reason = f"activations: unknown for this architecture: {method.unknown}; peak is without them"
        else:
            continue
        cases.setdefault(reason, []).append(f"{name} ({'checkpointed' if checkpointing else 'plain'})")
    everything = len(found)
    return [
        reason + ("." if len(names) == everything else f". Concerns {', '.join(names)}.")
        for reason, names in cases.items()
    ]


def _packing_note(plan: Plan) -> list[str]:
    positions = plan.packed_positions(plan.meta_model()) if plan.shared_length else 0
    if not positions:
        return []
    padded = plan.recipe.training.micro_batch_size * plan.recipe.text.max_length
    return [f"Packed (training.packing={plan.recipe.training.packing}): {positions:,} positions of {padded:,}."]


def _evaluation_note(plan: Plan, total: int, training: ModelDims) -> list[str]:
    if plan.zero.stage < 3 or not plan.recipe.evaluation.gather_weights:
        return []
    return [
        f"Translating with evaluation.gather_weights=true holds the whole model, {size(total * training.weight_bytes)}, on "
        "every GPU."
    ]
