"""The definition of the layer as nested loops over numbers; independent of the package on purpose.

y_k(p) = sum over taps j of W[j] x(stride*p + r_k*j - pad_k), zeros outside,
pad_k  = pad_0 + (r_k - r_0)(kernel - 1)/2 on every axis, r_0 the smallest dilation of the axis,
out(p) = sum_k a_k(p) (s_k y_k(p) + h_k)
"""

import itertools

import numpy as np


def autofocus_conv(
    input, weight, attention, bias=None, *, dilations, stride, padding, branch_scale=None, branch_shift=None
):
    """Arrays in float64; ``dilations`` K tuples, ``stride`` and ``padding`` tuples, one int per axis."""
    batch, in_channels, *size = input.shape
    out_channels, _, *kernel = weight.shape
    axes = range(len(size))
    smallest = [min(dilation[axis] for dilation in dilations) for axis in axes]
    out_size = [(size[a] + 2 * padding[a] - smallest[a] * (kernel[a] - 1) - 1) // stride[a] + 1 for a in axes]
    output = np.zeros((batch, out_channels, *out_size))
    for n, o, *p in itertools.product(range(batch), range(out_channels), *map(range, out_size)):
        for k, dilation in enumerate(dilations):
            pad = [padding[a] + (dilation[a] - smallest[a]) * (kernel[a] - 1) // 2 for a in axes]
            branch = 0.0
            for tap in itertools.product(*map(range, kernel)):
                q = [stride[a] * p[a] + dilation[a] * tap[a] - pad[a] for a in axes]
                if all(0 <= q[a] < size[a] for a in axes):
                    for c in range(in_channels):
                        branch += weight[(o, c, *tap)] * input[(n, c, *q)]
            if branch_scale is not None:
                branch *= branch_scale[k, o]
            if branch_shift is not None:
                branch += branch_shift[k, o]
            if bias is not None:
                branch += bias[o]
            output[(n, o, *p)] += attention[(n, k, *p)] * branch
    return output
