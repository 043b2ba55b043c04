"""bf16 on a CPU, where oneDNN's convolutions are wrong."""

import torch
import torch.nn.functional as F
from tiny_training import make_recipe

from pipeline.parallel.precision import sound_convolutions


def test_the_gradient_of_a_convolution_onto_one_pixel_is_right_in_bf16(tmp_path):
    train = make_recipe(tmp_path, train={"steps": 1, "precision": "bf16"}).train
    generator = torch.Generator().manual_seed(0)
    before = torch._C._get_mkldnn_enabled()
    for groups in (1, 7):
        for _ in range(10):
            x = torch.randn(12, 56, 1, 1, generator=generator).bfloat16()
            weight = torch.randn(56, 56 // groups, 3, 3, generator=generator).bfloat16().requires_grad_()
            exact = weight.detach().double().requires_grad_()
            with sound_convolutions(train, torch.device("cpu")):
                F.conv2d(x, weight, stride=2, padding=1, groups=groups).double().square().sum().backward()
            F.conv2d(x.double(), exact, stride=2, padding=1, groups=groups).square().sum().backward()
            torch.testing.assert_close(
                weight.grad.double(), exact.grad, rtol=0.05, atol=0.02 * exact.grad.abs().max().item()
            )
    assert torch._C._get_mkldnn_enabled() == before
