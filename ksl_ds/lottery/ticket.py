"""The ticket: the embedding rows that a KS test draws, their values before and after tuning, and their provenance.

    shift = measure_shift(before_VD, after_VD)       test the whole vocabulary
    ids = choose_rows(shift, selection="alpha")      select rows
    ticket = make_ticket(shift, ids, ...)            the rows with their statistics
    ticket.save(folder, "model.embed_tokens")        kilobytes that PEFT loads; Ticket.load(folder) reads them

Choices: rows are stored as absolute values, not differences, with the base rows, so that `apply` and `remove` are bit-exact
in every dtype (at twice the size). The base model is recognised by the values of these rows.

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

from ksl_ds.lottery.pvalues import PValueMethod, pvalues
from ksl_ds.lottery.shift import Shift, choose_rows, dtype_name, explain_empty, measure_shift
from ksl_ds.lottery.ticket_files import read_ticket, tensor_sha256, write_ticket

__all__ = ["SCOPES", "Shift", "Ticket", "choose_rows", "draw_ticket", "explain_empty", "make_ticket", "measure_shift"]
SCOPES = ("input", "shared")
_CARRIED = "_ksl_ds_carried"  # on an embedding: the `_Carried` of its tickets


@dataclass
class _Carried:
    """The tickets that a model carries, and what is needed to remove them in any order."""

    tickets: list[tuple[list[int], str]]  # token_ids and embedding_scope
    earlier: dict[int, Tensor]  # by token id: the row (D,) before any ticket
    untied: bool  # whether the head was untied for one of them

    def ids(self, *scopes: str) -> set[int]:
        """Token ids of the tickets with these scopes."""
        return {number for ids, scope in self.tickets if scope in scopes for number in ids}


@dataclass
class Ticket:
    """Drawn rows with their statistics, how they were drawn, and their values.

    Attributes
    ----------
    token_ids, tokens, count, statistic, pvalue, shift_ratio : lists of length K
        One entry per row, by ascending token id. `tokens` are the tokenizer's raw pieces ("Ġthe", "<0x0A>"), or "" if no
        tokenizer was given.
    alpha, selection, method, num_samples, vocab_size, embedding_scope, tested_dtype
        How they were drawn.
    base : dict
        Fingerprint of the base model: vocab_size, num_samples, dtype, and sha256 of base_rows_KD.
    source : dict
        Provenance (`base`, `before`, `after`, `stage`, versions), as JSON.
    rows_KD : float32 tensor (K, D)
        The tuned rows, absolute values.
    base_rows_KD : tensor (K, D) of the base model's dtype
        The same rows before tuning.
    count_V : int32 tensor (V,)
        k of every token, so that another alpha needs no second test.
    """

    token_ids: list[int]
    tokens: list[str]
    count: list[int]
    statistic: list[float]
    pvalue: list[float]
    shift_ratio: list[float]
    alpha: float
    selection: str
    method: PValueMethod
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
        """A copy with other rows (K, D) and additional `source` entries."""
        if rows_KD.shape != self.rows_KD.shape:
            raise ValueError(f"the ticket has rows {tuple(self.rows_KD.shape)}, not {tuple(rows_KD.shape)}")
        rows_KD = rows_KD.detach().cpu().float().clone()
        return dataclasses.replace(self, rows_KD=rows_KD, source={**self.source, **source})

    def save(
        self,
        folder: str | Path,
        module_name: str,
        tied_module_name: str | None = None,
        *,
        base_model: str | None = None,
        card: str = "",
    ) -> None:
        """Writes the ticket as a folder that `PeftModel.from_pretrained(base, folder)` loads, atomically.

        Parameters
        ----------
        folder
            A new folder, or a ticket's, which is replaced.
        module_name
            The input embedding's name in the base model, such as "model.embed_tokens".
        tied_module_name
            The output head's name if it is tied to the embedding, such as "lm_head".
        base_model
            Folder or Hub id of the base model, by which `AutoPeftModelForCausalLM.from_pretrained(folder)` finds
            it; recorded as `source["base"]`. Default: `base` or `before` of `source`.
        card
            Text of the folder's README.md.

        Raises
        ------
        ValueError
            For an empty ticket, or if `folder` exists and is not a ticket.
        """
        if not self.token_ids:
            raise ValueError("an empty ticket has no rows to save")
        tensors = {"rows_KD", "base_rows_KD", "count_V"}
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in tensors}
        if base_model is not None:
            record["source"] = {**self.source, "base": base_model}
        names = [module_name] + ([tied_module_name] if tied_module_name else [])
        write_ticket(Path(folder), record, names, self.rows_KD, self.base_rows_KD, self.count_V, card)

    @classmethod
    def load(cls, folder: str | Path) -> Ticket:
        """Reads a ticket folder (safetensors and JSON) and verifies its checksums.

        Raises
        ------
        ValueError
            Names the file that is missing, truncated, changed or inconsistent with another.
        """
        record, rows_KD, base_rows_KD, count_V = read_ticket(Path(folder))
        scalars = {f.name: record[f.name] for f in dataclasses.fields(cls) if f.name in record}
        return cls(**scalars, rows_KD=rows_KD, base_rows_KD=base_rows_KD, count_V=count_V)

    def check_shape(self, vocab_size: int, num_samples: int, *, resized: bool = False) -> None:
        """Raises ValueError unless the ticket was drawn on an embedding of this shape.

        With `resized`, the vocabulary may have another size if it has all of the ticket's ids.
        """
        fits = num_samples == self.num_samples and max(self.token_ids, default=0) < vocab_size
        if fits and (resized or vocab_size == self.vocab_size):
            return
        own = f"({self.vocab_size}, {self.num_samples})"
        hint = " (force accepts a vocabulary that was resized later)" if fits else ""
        raise ValueError(
            f"the ticket was drawn on an embedding of shape {own}, not ({vocab_size}, {num_samples}){hint}"
        )

    def check_base(self, rows_KD: Tensor, tokens: Sequence[str | None] | None = None) -> None:
        """Raises ValueError unless the ticket was drawn on a model with these rows at `token_ids`.

        Parameters
        ----------
        rows_KD : tensor (K, D)
            The model's rows. They are compared in the narrower of the two dtypes, so that a float32 base is recognised in
            bfloat16 and vice versa.
        tokens : sequence of K strings, optional
            The ticket's ids in the model's tokenizer.
        """
        dtype = min(rows_KD.dtype, self.base_rows_KD.dtype, key=lambda dtype: dtype.itemsize)
        differs_K = differing_rows(rows_KD.to(dtype), self.base_rows_KD.to(dtype))
        if differs_K.any():
            first = self.token_ids[int(differs_K.int().argmax())]
            raise ValueError(
                f"the ticket was drawn on another base model: {int(differs_K.sum())} of its {len(self)} rows differ, the "
                f"first is token {first} (force overrides)"
            )
        for number, own, other in zip(self.token_ids, self.tokens, tokens or self.tokens, strict=True):
            if own and own != other:
                raise ValueError(
                    f"the ticket was drawn with another tokenizer: token {number} is {own!r} there and {other!r} here "
                    "(force overrides)"
                )

    def apply(self, model: Any, *, tokenizer: Any = None, force: bool = False) -> None:
        """Writes the tuned rows into a Hugging Face model, in the model's dtype.

        With embedding_scope "input", a tied head is first untied and keeps the base values (another V x D matrix); with
        "shared", a tied head changes too. `remove` restores the model bit by bit. A model can have several tickets if
        their common rows agree; they can be removed in any order.

        Parameters
        ----------
        model : Hugging Face causal language model
            The base model, in any floating dtype.
        tokenizer : transformers tokenizer, optional
            The model's; its tokens are compared with the ticket's.
        force : bool
            Accept any model with the ticket's ids and row width.

        Raises
        ------
        ValueError
            If `model` is not the base that the ticket was drawn on, already has this ticket or another with different
            values for one of its rows, is an encoder-decoder, or is partitioned by ZeRO-3.
        """
        embedding = _plain_embedding(model)
        head = model.get_output_embeddings()
        weight_VD = embedding.weight
        ids_K = torch.tensor(self.token_ids, dtype=torch.int64, device=weight_VD.device)
        self.check_shape(*weight_VD.shape, resized=force)
        carried = getattr(embedding, _CARRIED, _Carried([], {}, untied=False))
        if any(ids == self.token_ids for ids, _ in carried.tickets):
            raise ValueError("the model already has a ticket of these rows; remove it first")
        rows_KD = self.rows_KD.to(weight_VD)
        earlier_KD = weight_VD.detach()[ids_K]
        other_K = differing_rows(earlier_KD, rows_KD)
        for place, number in enumerate(self.token_ids):
            if number in carried.earlier:
                if other_K[place]:
                    raise ValueError(
                        f"the model already has a ticket with another value for token {number}; remove it first"
                    )
                earlier_KD[place] = carried.earlier[number]
        if not force:
            self.check_base(
                earlier_KD, tokenizer.convert_ids_to_tokens(self.token_ids) if tokenizer is not None else None
            )
        if self.embedding_scope == "input" and head is not None and head.weight is weight_VD:
            _check_only_head_is_tied(model, head)
            head.weight = nn.Parameter(weight_VD.detach().clone(), requires_grad=weight_VD.requires_grad)
            _set_tied(model, False)
            carried.untied = True
        with torch.no_grad():
            weight_VD[ids_K] = rows_KD
            if self.embedding_scope == "shared" and carried.untied:
                head.weight[ids_K] = rows_KD
        carried.tickets.append((self.token_ids, self.embedding_scope))
        carried.earlier = dict(zip(self.token_ids, earlier_KD, strict=True)) | carried.earlier
        setattr(embedding, _CARRIED, carried)

    def remove(self, model: Any) -> None:
        """Undoes `apply`: restores the rows bit by bit, and ties a head again that was untied for it.

        If the rows were merged by `transfer` or PEFT, the ticket's base rows are written. Rows of another applied ticket
        are kept until that one is removed.

        Raises
        ------
        ValueError
            If the model does not have this ticket's rows.
        """
        embedding = _plain_embedding(model)
        head = model.get_output_embeddings()
        weight_VD = embedding.weight
        self.check_shape(*weight_VD.shape, resized=True)
        ids_K = torch.tensor(self.token_ids, dtype=torch.int64, device=weight_VD.device)
        carried = getattr(embedding, _CARRIED, _Carried([], {}, untied=False))
        own = (self.token_ids, self.embedding_scope)
        if (not carried.earlier.keys().isdisjoint(self.token_ids) and own not in carried.tickets) or differing_rows(
            weight_VD.detach()[ids_K], self.rows_KD.to(weight_VD.dtype)
        ).any():
            raise ValueError("the model does not have this ticket's rows, so they cannot be removed")
        earlier = dict(zip(self.token_ids, self.base_rows_KD.to(weight_VD), strict=True))
        if own in carried.tickets:
            carried.tickets.remove(own)
            earlier |= carried.earlier
        kept, kept_in_head = carried.ids(*SCOPES), carried.ids("shared")
        with torch.no_grad():
            for number in self.token_ids:
                if number not in kept:
                    weight_VD[number] = earlier[number]
                    carried.earlier.pop(number, None)
                if self.embedding_scope == "shared" and carried.untied and number not in kept_in_head:
                    head.weight[number] = earlier[number]
        if carried.untied and not carried.ids("input"):
            head.weight = weight_VD
            _set_tied(model, True)
            carried.untied = False
        if not carried.tickets and hasattr(embedding, _CARRIED):
            delattr(embedding, _CARRIED)


def make_ticket(
    shift: Shift,
    ids: Tensor,  # int64 (K,), ascending
    base_rows_KD: Tensor,  # in the base model's dtype
    rows_KD: Tensor,
    *,
    selection: str,
    alpha: float,
    method: PValueMethod,
    tokens: Sequence[str] | None = None,
    embedding_scope: str = "input",
    source: dict[str, Any] | None = None,
) -> Ticket:
    """A ticket from a test, the selected ids, and these rows before and after tuning.

    Parameters
    ----------
    shift : Shift
        The test of all tokens.
    ids : int64 tensor (K,)
        Selected token ids, ascending.
    base_rows_KD : tensor (K, D)
        These rows before tuning, in the base model's dtype.
    rows_KD : floating tensor (K, D)
        These rows after tuning.
    selection, alpha, method
        How they were selected, to be recorded.
    tokens : sequence of K strings, optional
        The tokens as text.
    embedding_scope : {'input', 'shared'}
        As in `draw_ticket`.
    source : dict, optional
        Provenance, to be recorded.

    Raises
    ------
    ValueError
        For an unknown embedding_scope.
    """
    if embedding_scope not in SCOPES:
        raise ValueError(f"embedding_scope is {embedding_scope!r}; it must be one of {', '.join(SCOPES)}")
    ids = ids.cpu()
    base_rows_KD = base_rows_KD.detach().cpu().clone()
    vocab_size = len(shift.count_V)
    num_samples = shift.num_samples
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
    method: PValueMethod = "exact",
    top_k: int = 18,
    seed: int = 0,
    frequency: Tensor | None = None,
    tokens: Sequence[str] | None = None,
    embedding_scope: str = "input",
) -> Ticket:
    """Draws the rows of an embedding whose distribution shifted between two checkpoints.

    The two-sample Kolmogorov-Smirnov test compares every row of `after` with the same row of `before`; a row's D
    coordinates are the sample.

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
        Its rows are the drawn rows of `after`. It is empty if no row passes.

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
    """Which rows of two matrices of one dtype differ in any bit, bool (K,) on the CPU; a NaN equals itself."""
    left, right = (matrix.cpu().contiguous().view(torch.uint8) for matrix in (left_KD, right_KD))
    return (left != right).any(1)


def _plain_embedding(model: Any) -> Any:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; tickets are for causal language models")
    embedding = model.get_input_embeddings()
    if embedding.weight.numel() == 0:  # as ZeRO-3 leaves it
        raise ValueError("the embedding is partitioned by ZeRO-3; apply the ticket before deepspeed.initialize")
    return embedding


def _check_only_head_is_tied(model: Any, head: Any) -> None:
    """Raises ValueError if more than the head's weight is tied, since the config has one flag for all of it."""
    for name in model.get_expanded_tied_weights_keys(all_submodels=True):
        module, _, parameter = name.rpartition(".")
        if model.get_submodule(module) is not head or parameter != "weight":
            raise ValueError(
                f"untying the output head would also untie {name} of {type(model).__name__}, and the model could not be "
                "saved; draw the ticket with embedding_scope 'shared', which changes the head too"
            )


def _set_tied(model: Any, tied: bool) -> None:
    """Sets tie_word_embeddings and updates transformers' list of tied weights."""
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.tie_word_embeddings = tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
