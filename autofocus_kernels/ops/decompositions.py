"""The operator written out in plain PyTorch, for programs of torch.export and runtimes that know no custom operators.

torch.onnx.export of a module needs none of this: while it looks, the layers are plain PyTorch
(derivatives.py, branch_norm.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import reference
from ..call import from_operator


def decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """A table for ``run_decompositions``: K plain convolutions and their weighted sum for each call of the operator.

    ::

        program = torch.export.export(layer.eval(), (input,))
        program = program.run_decompositions(autofocus_kernels.decompositions())     # aten operators only

    Nothing else of the program changes; add ``torch.export.default_decompositions()`` for core aten operators. It is
    the table of inference: training with ``branch_norm`` has an operator of its own, which is left as it is.
    """
    return {torch.ops.autofocus.forward.default: _forward}


def _forward(*arguments):
    return reference.weighted_sum(from_operator(*arguments))
