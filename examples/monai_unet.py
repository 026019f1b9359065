"""Swaps layers of a MONAI UNet for autofocus layers and trains it for a few steps on a synthetic volume.

python examples/monai_unet.py
"""

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet

import autofocus_kernels as ak


def make_volumes(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy volumes [count, 1, 24, 24, 24] with a ball each, of radius 3 to 9, and the labels."""
    axis = torch.arange(24.0)
    centre = 8 + 8 * torch.rand(count, 3, 1, generator=generator)
    z, y, x = ((axis - centre[:, i]) ** 2 for i in range(3))
    radius = 3 + 6 * torch.rand(count, 1, 1, 1, generator=generator)
    ball = z[:, :, None, None] + y[:, None, :, None] + x[:, None, None, :] < radius**2
    noise = 0.5 * torch.randn(count, 1, 24, 24, 24, generator=generator)
    return ball[:, None] + noise, ball[:, None].long()


def main() -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2), num_res_units=1)

    # The convolution of the deepest level, found by its number of channels. Weights stay, so a checkpoint of the UNet
    # would load; the gate's are new, and so the optimizer comes afterwards.
    ak.convert(network, dilations=(1, 2, 3), select=lambda name, conv: conv.out_channels == 32, initial_attention=None)
    swapped = [name for name, module in network.named_modules() if isinstance(module, ak.AutofocusConv3d)]
    print("autofocus layers:", ", ".join(swapped))

    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-2)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    for step in range(30):
        images, labels = make_volumes(4, generator)
        loss = loss_of(network(images), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step % 10 == 0 or step == 29:
            print(f"step {step:2}: loss {loss.item():.3f}")

    images, labels = make_volumes(4, generator)
    with torch.no_grad():
        found = network.eval()(images).argmax(1, keepdim=True)
    dice = 2 * (found * labels).sum() / (found.sum() + labels.sum())
    print(f"Dice on new volumes: {dice.item():.3f}")


if __name__ == "__main__":
    main()
