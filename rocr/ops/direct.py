"""Calls that bypass torch's dispatcher, whose overhead is longer than a small kernel launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from rocr.ops.checks import is_plain


def bypass_dispatcher(
    operator: Callable[..., Any], function: Callable[..., None], written: list[Tensor], *rest: Any
) -> None:
    """Call function directly, or the torch operator made from it where torch traces or intercepts the call.

    Args:
        operator: torch.library.custom_op of the function.
        function: changes the tensors of its first argument in place.
        written: tensors that the function changes.
        rest: the other arguments.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or not all(map(is_plain, written)):
        operator(written, *rest)
        return
    function(written, *rest)
    for tensor in written:
        # The operator does this too: autograd then knows that saved tensors have changed.
        torch.autograd.graph.increment_version(tensor)
