"""torch.library operators, ``torch.ops.autofocus``: what PyTorch needs to see through the convolution and branch norm.

Importing the package defines them. Calls go through ``derivatives.apply`` and ``branch_norm.apply``.
"""

from . import branch_norm, conv, derivatives, vmap  # noqa: F401
