"""The networks of the paper in plain PyTorch, layer by layer, with the module names of the authors' checkpoints.

Written from a description of the published code and independent of the package: what the networks are tested
against, and what they are measured against in benchmarks/networks.py.
"""

import torch
import torch.nn.functional as F
from torch import nn

CONV = {2: nn.Conv2d, 3: nn.Conv3d}
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
BLOCKS = {
    "Basic": "BBB",
    "ASPP-c": "BBB",
    "ASPP-s": "BBB",
    "AFN-1": "BBS",
    "AFN-2": "BBA",
    "AFN-3": "BSA",
    "AFN-4": "BAA",
    "AFN-5": "SAA",
    "AFN-6": "AAA",
}


class Sizes:
    """Widths, rates and padding of one network."""

    def __init__(self, dims=3, inputs=4, classes=5, widths=(30, 40, 40, 50), aspp=30, rates=(2, 6, 10, 14), same=False):
        self.dims, self.inputs, self.classes, self.widths, self.aspp = dims, inputs, classes, widths, aspp
        self.rates, self.same = rates, same

    def conv(self, inputs, outputs, size=3, rate=1):
        return CONV[self.dims](inputs, outputs, size, dilation=rate, padding=rate * (size // 2) if self.same else 0)

    def norm(self, channels):
        return NORM[self.dims](channels)

    def crop(self, x, margin):
        """``margin`` off both ends of each axis; nothing in a network that keeps sizes."""
        if self.same or margin == 0:
            return x
        return x[(slice(None), slice(None)) + (slice(margin, -margin),) * self.dims]


class BasicBlock(nn.Module):
    def __init__(self, sizes, inputs, outputs):
        super().__init__()
        self.sizes = sizes
        self.conv1 = sizes.conv(inputs, outputs, rate=sizes.rates[0])
        self.bn1 = sizes.norm(outputs)
        self.conv2 = sizes.conv(outputs, outputs, rate=sizes.rates[0])
        self.bn2 = sizes.norm(outputs)
        self.downsample = downsample(sizes, inputs, outputs)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + residual(self, x))


class AutofocusSingle(nn.Module):
    def __init__(self, sizes, inputs, outputs):
        super().__init__()
        self.sizes = sizes
        self.conv1 = sizes.conv(inputs, outputs, rate=sizes.rates[0])
        self.bn1 = sizes.norm(outputs)
        self.conv2 = sizes.conv(outputs, outputs)
        self.convatt1 = sizes.conv(outputs, outputs // 2)
        self.convatt2 = sizes.conv(outputs // 2, len(sizes.rates), size=1)
        self.bn_list2 = nn.ModuleList(sizes.norm(outputs) for _ in sizes.rates)
        self.downsample = downsample(sizes, inputs, outputs)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = autofocus(self.sizes, y, self.conv2, self.convatt1, self.convatt2, self.bn_list2)
        return F.relu(y + residual(self, x))


class Autofocus(nn.Module):
    def __init__(self, sizes, inputs, outputs):
        super().__init__()
        self.sizes = sizes
        self.conv1 = sizes.conv(inputs, outputs)
        self.convatt11 = sizes.conv(inputs, inputs // 2)
        self.convatt12 = sizes.conv(inputs // 2, len(sizes.rates), size=1)
        self.bn_list1 = nn.ModuleList(sizes.norm(outputs) for _ in sizes.rates)
        self.conv2 = sizes.conv(outputs, outputs)
        self.convatt21 = sizes.conv(outputs, outputs // 2)
        self.convatt22 = sizes.conv(outputs // 2, len(sizes.rates), size=1)
        self.bn_list2 = nn.ModuleList(sizes.norm(outputs) for _ in sizes.rates)
        self.downsample = downsample(sizes, inputs, outputs)

    def forward(self, x):
        y = F.relu(autofocus(self.sizes, x, self.conv1, self.convatt11, self.convatt12, self.bn_list1))
        y = autofocus(self.sizes, y, self.conv2, self.convatt21, self.convatt22, self.bn_list2)
        return F.relu(y + residual(self, x))


def downsample(sizes, inputs, outputs):
    if inputs == outputs:
        return None
    return nn.Sequential(sizes.conv(inputs, outputs, size=1), sizes.norm(outputs))


def residual(block, x):
    x = block.sizes.crop(x, 2 * block.sizes.rates[0])
    return x if block.downsample is None else block.downsample(x)


def autofocus(sizes, x, conv, gate1, gate2, norms):
    """The layer: softmax gate of the detached input, one convolution per rate, a norm each, weighted sum."""
    attention = F.softmax(gate2(F.relu(gate1(x.detach()))), dim=1)
    attention = sizes.crop(attention, sizes.rates[0] - 1)
    convolve = {2: F.conv2d, 3: F.conv3d}[sizes.dims]
    total = 0
    for k, rate in enumerate(sizes.rates):
        padding = rate if sizes.same else rate - sizes.rates[0]
        bias = conv.bias if k == 0 else None
        branch = convolve(x, conv.weight, bias, padding=padding, dilation=rate)
        total = total + attention[:, k : k + 1] * norms[k](branch)
    return total


class PlainNetwork(nn.Module):
    def __init__(self, name, **sizes):
        super().__init__()
        self.name, self.sizes = name, sizes
        sizes = Sizes(**sizes)
        stem, *widths = sizes.widths
        self.conv1 = sizes.conv(sizes.inputs, stem)
        self.bn1 = sizes.norm(stem)
        self.conv2 = sizes.conv(stem, stem)
        self.bn2 = sizes.norm(stem)
        kinds = {"B": BasicBlock, "S": AutofocusSingle, "A": Autofocus}
        blocks = [
            kinds[kind](sizes, inputs, outputs) for kind, inputs, outputs in zip(BLOCKS[name], sizes.widths, widths)
        ]
        if name.startswith("AFN"):
            self.layers = nn.ModuleList(blocks)
        else:
            self.layer3, self.layer4, self.layer5 = blocks
        parallel = [CONV[sizes.dims](widths[-1], sizes.aspp, 3, dilation=rate, padding=rate) for rate in sizes.rates]
        if name == "ASPP-c":
            self.aspp = nn.ModuleList(parallel)
            self.bn9 = sizes.norm(len(sizes.rates) * sizes.aspp)
            self.fc9 = sizes.conv(len(sizes.rates) * sizes.aspp, sizes.classes, size=1)
        elif name == "ASPP-s":
            self.conv_list = nn.ModuleList(parallel)
            self.bn_list = nn.ModuleList(sizes.norm(sizes.aspp) for _ in sizes.rates)
            self.last_list = nn.ModuleList(sizes.conv(sizes.aspp, sizes.classes, size=1) for _ in sizes.rates)
        else:
            self.fc = sizes.conv(widths[-1], sizes.classes, size=1)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        blocks = self.layers if self.name.startswith("AFN") else (self.layer3, self.layer4, self.layer5)
        for block in blocks:
            x = block(x)
        if self.name == "ASPP-c":
            x = torch.cat([conv(x) for conv in self.aspp], dim=1)
            return self.fc9(F.relu(self.bn9(x)))
        if self.name == "ASPP-s":
            rates = zip(self.conv_list, self.bn_list, self.last_list)
            return sum(last(F.relu(norm(conv(x)))) for conv, norm, last in rates)
        return self.fc(x)
