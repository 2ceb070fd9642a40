"""What a network looks like: a table of its layers."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

_MAX_ROWS: Final = 60


@dataclass(frozen=True)
class LayerRow:
    """One line of the table.

    Attributes:
        name: path of the module, as in `backbone.features.0`.
        kind: its class.
        output_shape: of one image, without the batch.
        num_parameters: of the module and all below it.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    num_parameters: int


@torch.no_grad()
def layer_table(model: nn.Module, image_CHW: tuple[int, int, int]) -> list[LayerRow]:
    """Return the layers in the order in which they run.

    Of a network with more than 60 layers, blocks stand for their layers, as deep as that allows.

    Args:
        model: the network; it is left in evaluation mode.
        image_CHW: channels, height and width of its input.
    """
    rows: list[LayerRow] = []
    paths = {id(module): name for name, module in model.named_modules() if name}
    depths = range(max(name.count(".") for name in paths.values()), -1, -1)
    levels = (_rows_at(model, depth) for depth in depths)
    chosen = next((rows for rows in levels if len(rows) <= _MAX_ROWS), _rows_at(model, 0))

    def note(module: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple | list) else output
        shape = tuple(first.shape[1:]) if isinstance(first, torch.Tensor) else ()
        count = sum(p.numel() for p in module.parameters())
        rows.append(LayerRow(paths[id(module)], type(module).__name__, shape, count))

    hooks = [module.register_forward_hook(note) for module in chosen]
    try:
        model.eval()(torch.zeros(1, *image_CHW))
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def _rows_at(model: nn.Module, depth: int) -> list[nn.Module]:
    """Return the modules at a depth of the tree, and leaves above it."""
    return [
        module
        for name, module in model.named_modules()
        if name
        and (name.count(".") == depth or (name.count(".") < depth and not list(module.children())))
        and not isinstance(module, nn.Identity)
    ]
