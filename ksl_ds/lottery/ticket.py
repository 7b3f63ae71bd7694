"""The ticket: which embedding rows a KS test draws, their values before and after, and where they came from.

    shift = measure_shift(before_VD, after_VD)       one test of the whole vocabulary
    ids = choose_rows(shift, selection="alpha")      the rows drawn
    ticket = make_ticket(shift, ids, ...)            the rows with their statistics
    ticket.save(folder, "model.embed_tokens")        kilobytes that PEFT loads; Ticket.load(folder) reads them back

Choices: rows are absolute values, not differences, so that `apply` and `remove` are exact to the bit in every dtype;
the base rows travel along for that (twice the kilobytes). The base model is recognised by those rows' values.

V tokens, D coordinates of a row (num_samples), K ticket rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ksl_ds.lottery.pvalues import Method, pvalues
from ksl_ds.lottery.shift import Shift, choose_rows, dtype_name, explain_empty, measure_shift
from ksl_ds.lottery.ticket_files import read_ticket, tensor_sha256, write_ticket

__all__ = ["SCOPES", "Shift", "Ticket", "choose_rows", "draw_ticket", "explain_empty", "make_ticket", "measure_shift"]
SCOPES = ("input", "shared")
_REPLACED = "_ksl_ds_replaced"  # on an embedding: (token_ids, rows before, head untied)


@dataclass
class Ticket:
    """Drawn rows: lists with one entry a row, how they were drawn, and the rows themselves.

    Attributes
    ----------
    token_ids, tokens, count, statistic, pvalue, shift_ratio : lists of length K, token_ids ascending. `tokens` are the
        tokenizer's raw pieces ("Ġthe", "<0x0A>"), "" where no tokenizer was given
    alpha, selection, method, num_samples, vocab_size, embedding_scope, tested_dtype : how they were drawn
    base : fingerprint of the base model: vocab_size, num_samples, dtype, and sha256 of base_rows_KD
    source : where the rows came from (`before`, `after`, `stage`, versions); what a JSON file can hold
    rows_KD : float32 (K, D), the tuned rows; absolute values
    base_rows_KD : (K, D) in the base model's dtype, the same rows before tuning
    count_V : int32 (V,), k of every token: another alpha needs no second test
    """

    token_ids: list[int]
    tokens: list[str]
    count: list[int]
    statistic: list[float]
    pvalue: list[float]
    shift_ratio: list[float]
    alpha: float
    selection: str
    method: Method
    num_samples: int
    vocab_size: int
    embedding_scope: str
    tested_dtype: str
    base: dict[str, Any]
    source: dict[str, Any]
    rows_KD: Tensor = dataclasses.field(repr=False)
    base_rows_KD: Tensor = dataclasses.field(repr=False)
    count_V: Tensor = dataclasses.field(repr=False)

    def __len__(self) -> int:
        return len(self.token_ids)

    def with_rows(self, rows_KD: Tensor, **source: Any) -> Ticket:
        """The same ticket with newly tuned rows (K, D); `source` entries are added to those there are."""
        if rows_KD.shape != self.rows_KD.shape:
            raise ValueError(f"the ticket has rows {tuple(self.rows_KD.shape)}, not {tuple(rows_KD.shape)}")
        rows_KD = rows_KD.detach().cpu().float().clone()
        return dataclasses.replace(self, rows_KD=rows_KD, source={**self.source, **source})

    def save(self, folder: str | Path, module_name: str, tied_module_name: str | None = None) -> None:
        """Writes the ticket as a folder that `PeftModel.from_pretrained(base, folder)` loads, whole or not at all.

        Parameters
        ----------
        folder : a new folder, or an older ticket's, which is replaced
        module_name : the input embedding's name within the base model, such as "model.embed_tokens"
        tied_module_name : the output head's name where it is tied to the embedding, such as "lm_head"

        Raises
        ------
        ValueError
            For an empty ticket, and where `folder` exists and is no ticket.
        """
        if not self.token_ids:
            raise ValueError("an empty ticket has no rows to save")
        tensors = {"rows_KD", "base_rows_KD", "count_V"}
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in tensors}
        names = [module_name] + ([tied_module_name] if tied_module_name else [])
        write_ticket(Path(folder), record, names, self.rows_KD, self.base_rows_KD, self.count_V)

    @classmethod
    def load(cls, folder: str | Path) -> Ticket:
        """Reads a ticket folder: safetensors and JSON only, checksums compared.

        Raises
        ------
        ValueError
            Naming the file that is missing, truncated, changed or at odds with another.
        """
        record, rows_KD, base_rows_KD, count_V = read_ticket(Path(folder))
        scalars = {f.name: record[f.name] for f in dataclasses.fields(cls) if f.name in record}
        return cls(**scalars, rows_KD=rows_KD, base_rows_KD=base_rows_KD, count_V=count_V)

    def check_shape(self, vocab_size: int, num_samples: int) -> None:
        """Raises ValueError unless the ticket was drawn on an embedding of this shape."""
        if (vocab_size, num_samples) != (self.vocab_size, self.num_samples):
            own = f"({self.vocab_size}, {self.num_samples})"
            raise ValueError(f"the ticket was drawn on an embedding of shape {own}, not ({vocab_size}, {num_samples})")

    def check_base(self, rows_KD: Tensor, tokens: Sequence[str | None] | None = None) -> None:
        """Raises ValueError unless a model with these rows at `token_ids` is the one that the ticket was drawn on.

        The coarser of the two dtypes decides: a base in float32 is recognised by a model that computes in bfloat16, and
        the other way round. `tokens` are the texts that the model's tokenizer gives the ticket's ids.
        """
        dtype = min(rows_KD.dtype, self.base_rows_KD.dtype, key=lambda dtype: dtype.itemsize)
        differs_K = differing_rows(rows_KD.to(dtype), self.base_rows_KD.to(dtype))
        if differs_K.any():
            first = self.token_ids[int(differs_K.int().argmax())]
            raise ValueError(
                f"the ticket was drawn on another base model: {int(differs_K.sum())} of its {len(self)} rows have other "
                f"values there, the first is token {first} (force overrides)"
            )
        for number, own, other in zip(self.token_ids, self.tokens, tokens or self.tokens, strict=True):
            if own and own != other:
                raise ValueError(
                    f"the ticket was drawn with another tokenizer: token {number} is {own!r} there and {other!r} here "
                    "(force overrides)"
                )

    def apply(self, model: Any, *, tokenizer: Any = None, force: bool = False) -> None:
        """Puts the tuned rows into a Hugging Face model, in the model's dtype.

        With embedding_scope "input" a tied head is untied first and keeps the base values (one more V x D matrix);
        with "shared" a tied head moves too. `remove` undoes it to the bit.

        Raises
        ------
        ValueError
            Where `model` is not the base that the ticket was drawn on (`force` accepts any of the same shape), already
            carries a ticket, or is partitioned by ZeRO-3.
        """
        embedding, head = _plain_embedding(model), model.get_output_embeddings()
        if hasattr(embedding, _REPLACED):
            raise ValueError("the model carries a ticket already; remove that one first")
        weight_VD, ids_K = embedding.weight, torch.tensor(self.token_ids, device=embedding.weight.device)
        self.check_shape(*weight_VD.shape)
        if not force:
            self.check_base(
                weight_VD.detach()[ids_K],
                tokenizer.convert_ids_to_tokens(self.token_ids) if tokenizer is not None else None,
            )
        untie = self.embedding_scope == "input" and head is not None and head.weight is weight_VD
        if untie:
            head.weight = nn.Parameter(weight_VD.detach().clone(), requires_grad=weight_VD.requires_grad)
            _set_tied(model, False)
        setattr(embedding, _REPLACED, (self.token_ids, weight_VD.detach()[ids_K], untie))
        with torch.no_grad():
            weight_VD[ids_K] = self.rows_KD.to(weight_VD)

    def remove(self, model: Any) -> None:
        """Undoes `apply`: the rows get their earlier bits back, and a head that was untied for it is tied again.

        In a model whose rows were merged elsewhere (by `transfer`, or by PEFT) the ticket's base rows are put back.

        Raises
        ------
        ValueError
            Where the model does not carry this ticket's rows.
        """
        embedding = _plain_embedding(model)
        weight_VD, ids_K = embedding.weight, torch.tensor(self.token_ids, device=embedding.weight.device)
        self.check_shape(*weight_VD.shape)
        ids, earlier_KD, untied = getattr(embedding, _REPLACED, (self.token_ids, self.base_rows_KD, False))
        carried_KD = self.rows_KD.to(weight_VD.dtype)
        if ids != self.token_ids or differing_rows(weight_VD.detach()[ids_K], carried_KD).any():
            raise ValueError("the model does not carry this ticket's rows, so they cannot be removed")
        with torch.no_grad():
            weight_VD[ids_K] = earlier_KD.to(weight_VD)
        if untied:
            model.get_output_embeddings().weight = weight_VD
            _set_tied(model, True)
        if hasattr(embedding, _REPLACED):
            delattr(embedding, _REPLACED)


def make_ticket(
    shift: Shift,
    ids: Tensor,  # int64 (K,), ascending
    base_rows_KD: Tensor,  # in the base model's dtype
    rows_KD: Tensor,
    *,
    selection: str,
    alpha: float,
    method: Method,
    tokens: Sequence[str] | None = None,
    embedding_scope: str = "input",
    source: dict[str, Any] | None = None,
) -> Ticket:
    """A ticket from a test, the ids drawn, and those rows before and after; `tokens` are the K rows' texts."""
    if embedding_scope not in SCOPES:
        raise ValueError(f"embedding_scope is {embedding_scope!r}; it must be one of {', '.join(SCOPES)}")
    ids = ids.cpu()
    base_rows_KD = base_rows_KD.detach().cpu().clone()
    vocab_size, num_samples = len(shift.count_V), shift.num_samples
    count_K = shift.count_V.cpu()[ids].long()
    return Ticket(
        token_ids=ids.tolist(),
        tokens=list(tokens) if tokens is not None else [""] * len(ids),
        count=count_K.tolist(),
        statistic=(count_K.double() / num_samples).tolist(),
        pvalue=pvalues(count_K, num_samples, method).tolist(),
        shift_ratio=shift.shift_ratio_V.cpu()[ids].tolist(),
        alpha=float(alpha),
        selection=selection,
        method=method,
        num_samples=num_samples,
        vocab_size=vocab_size,
        embedding_scope=embedding_scope,
        tested_dtype=shift.tested_dtype,
        base={
            "vocab_size": vocab_size,
            "num_samples": num_samples,
            "dtype": dtype_name(base_rows_KD.dtype),
            "sha256": tensor_sha256(base_rows_KD),
        },
        source=dict(source or {}),
        rows_KD=rows_KD.detach().cpu().float().clone(),
        base_rows_KD=base_rows_KD,
        count_V=shift.count_V.cpu().to(torch.int32),
    )


def draw_ticket(
    before: Tensor,
    after: Tensor,
    *,
    alpha: float = 0.05,
    selection: str = "alpha",
    method: Method = "exact",
    top_k: int = 18,
    seed: int = 0,
    frequency: Tensor | None = None,
    tokens: Sequence[str] | None = None,
    embedding_scope: str = "input",
) -> Ticket:
    """Draws the rows of an embedding whose distribution shifted between two checkpoints.

    Every row of `after` is compared with the same row of `before` by the two-sample Kolmogorov-Smirnov test, its D
    coordinates being the sample.

    Parameters
    ----------
    before, after : tensor (V, D)
        The embedding before and after tuning, of any floating dtype; memory-mapped tensors are read in blocks.
    alpha : float, default 0.05
        Significance level of one row's test: rows with p < alpha are drawn. Tickets are nested in alpha.
    selection : {'alpha', 'top_k', 'bonferroni', 'benjamini_hochberg', 'frequency', 'random', 'shift_norm', \
'shift_ratio'}
        'alpha' is the method's own rule; 'bonferroni' and 'benjamini_hochberg' correct it for V tests; 'top_k' takes
        the `top_k` rows of largest statistic; the rest are controls of `top_k` rows.
    method : {'exact', 'asymp'}
        The p-value, as in `scipy.stats.ks_2samp`.
    top_k : int, default 18
        Rows taken by 'top_k' and by the controls.
    seed : int, default 0
        Of 'random'.
    frequency : integer tensor (V,), optional
        How often each token occurs; needed by 'frequency'.
    tokens : sequence of V strings, optional
        The vocabulary as text, to be recorded beside the ids.
    embedding_scope : {'input', 'shared'}
        Whether a tied output head moves with the embedding when the ticket is applied.

    Returns
    -------
    Ticket
        With the drawn rows of `after` as its rows. It is empty where no row passes.

    Raises
    ------
    ValueError
        For matrices of different shapes, NaN in a row, alpha outside (0, 1), an unknown selection.

    Notes
    -----
    Before and after are paired, not independent, samples: alpha is a nominal level. An untouched row has p = 1.

    References
    ----------
    Yuan et al., "KS-Lottery: Finding Certified Lottery Tickets for Multilingual Language Models", arXiv:2402.02801.

    Examples
    --------
    >>> import torch
    >>> from ksl_ds import draw_ticket
    >>> before = torch.randn(1000, 256, generator=torch.Generator().manual_seed(0))
    >>> after = before.clone()
    >>> after[[13, 278]] += 0.5
    >>> ticket = draw_ticket(before, after)
    >>> ticket.token_ids
    [13, 278]
    >>> torch.equal(ticket.rows_KD, after[[13, 278]])
    True
    """
    shift = measure_shift(before, after)
    ids = choose_rows(
        shift, selection=selection, alpha=alpha, method=method, top_k=top_k, seed=seed, frequency_V=frequency
    )
    return make_ticket(
        shift,
        ids,
        before[ids],
        after[ids],
        selection=selection,
        alpha=alpha,
        method=method,
        tokens=[tokens[number] for number in ids.tolist()] if tokens is not None else None,
        embedding_scope=embedding_scope,
    )


def differing_rows(left_KD: Tensor, right_KD: Tensor) -> Tensor:
    """Which rows of two matrices of one dtype differ in any bit, bool (K,) on the CPU; NaN equals itself here."""
    left, right = (matrix.cpu().contiguous().view(torch.uint8) for matrix in (left_KD, right_KD))
    return (left != right).any(1)


def _plain_embedding(model: Any) -> Any:
    embedding = model.get_input_embeddings()
    if hasattr(embedding.weight, "ds_id"):
        raise ValueError("the embedding is partitioned by ZeRO-3; apply the ticket before deepspeed.initialize")
    return embedding


def _set_tied(model: Any, tied: bool) -> None:
    """Says in the config whether head and embedding are one, and makes transformers' list of tied weights agree."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = tied
    if hasattr(model, "get_expanded_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
