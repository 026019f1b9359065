"""The backends. Each module gives ``unavailable``, ``can_use``, ``forward`` and ``backward``.

``unavailable() -> str | None``
    why the backend cannot run in this process; None if it can.
``can_use(geometry, input, weight, branch_mode) -> str | None``
    why the backend refuses this call; None if it takes it.
``forward(geometry, input, weight, attention, bias, branch_scale, branch_shift, output) -> None``
    fills ``output``.
``backward(geometry, grad_output, input, weight, attention, bias, branch_scale, branch_shift,
grad_input, grad_weight, grad_attention, grad_branch_scale) -> None``
    fills every gradient that is not None and does no work for the others. ``grad_attention`` includes the bias
    and shift terms; ``grad_bias`` and ``grad_branch_shift`` are computed by ops.py for all backends.

Tensors are validated, of one dtype and device, of any strides, and no axis is empty. Outputs arrive uninitialised.
A function that finds only when it runs that it cannot raises :class:`CannotRun`, and another backend takes the call.
"""


class CannotRun(RuntimeError):
    """The call is beyond this backend on this device, as turned out only while it ran; the message is the reason."""
