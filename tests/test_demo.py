"""The demo in its quick mode: it runs, judges and writes its pictures. What it shows takes the two minutes."""

import pytest
import torch

demo = pytest.importorskip("examples.demo", reason="the demo needs the extra [segmentation]", exc_type=ImportError)


def test_quick_demo_writes_its_pictures(tmp_path, capsys):
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in ("attention.png", "speed.png"):
        assert (tmp_path / name).stat().st_size > 20_000
        assert str(tmp_path / name) in printed
    assert "naive" in printed and "autofocus" in printed


def test_image_is_the_real_one():
    image = demo.read_image()
    assert image.shape == (1, 1, 33, 41, 25)
    assert abs(image.mean()) < 1e-4 and abs(image.std() - 1) < 1e-4


def test_holes_are_balls_and_hide_the_image():
    image = torch.ones(1, 1, 9, 10, 11)
    input, hole = demo.cut_holes(image, [((4, 5, 5), 2)])
    assert hole.sum() == 33  # lattice points within 2 of one of them
    assert torch.equal(input[:, :1], input[:, 1:]) and torch.equal(input[:, 1:] == 0, hole)


def test_taps_gathered_for_least_squares_are_those_of_a_convolution():
    input = torch.randn(1, 2, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    hole = torch.zeros(1, 1, 6, 7, 8, dtype=torch.bool)
    hole[0, 0, 2, 3, 4] = True
    taps = demo.gather_taps(input, hole, (2,))
    assert taps.shape == (1, 2 * 27 + 1) and taps[0, -1] == 1
    # Kernel tap (0, 1, 2) of channel 1 at dilation 2.
    assert taps[0, 27 + 0 * 9 + 1 * 3 + 2] == input[0, 1, 0, 3, 6].double()
