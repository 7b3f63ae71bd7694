"""Where a tensor sits in a model, from its name alone: the number of its layer and the kind of its module.

    model.layers.3.self_attn.q_proj.weight           layer 3   self_attn.q_proj
    transformer.h.3.attn.c_attn.bias                 layer 3   attn.c_attn.bias
    model.layers.3.mlp.experts.5.w1.weight           layer 3   mlp.experts.w1
    model.embed_tokens.weight                        none      embed_tokens

No architecture is known here: the first number of a name is its layer, later ones (experts) are left out of the kind. A model
may have several stacks of layers (a vision tower beside the language model): all kinds but those of the largest stack carry
the stack's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple


class Place(NamedTuple):
    """`layer` is None outside the layers."""

    layer: int | None
    kind: str


def places(names: Iterable[str]) -> dict[str, Place]:
    """The place of each of a model's tensors; all its names are needed to find the largest stack of layers."""
    split = {name: _split(name) for name in names}
    stacks = Counter(stack for stack, layer, _ in split.values() if layer is not None)
    main = stacks.most_common(1)[0][0] if stacks else ""
    around = main.rpartition(".")[0] + "."  # "model." of model.layers
    found = {}
    for name, (stack, layer, kind) in split.items():
        if layer is None:
            kind = kind.removeprefix(around) or kind
        elif stack != main:
            kind = f"{stack}.{kind}".rstrip(".")
        found[name] = Place(layer, kind or stack)
    return found


def _split(name: str) -> tuple[str, int | None, str]:
    """The stack of layers, the layer's number and the rest of a tensor's name."""
    parts = name.removesuffix(".weight").split(".")
    at = next((index for index, part in enumerate(parts) if index and part.isdecimal()), None)
    if at is None:
        return "", None, ".".join(parts)
    return ".".join(parts[:at]), int(parts[at]), ".".join(part for part in parts[at + 1 :] if not part.isdecimal())
