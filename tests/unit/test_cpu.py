"""The faster gradient of strided depthwise convolutions is the same gradient."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional

from bt_core.training import cpu
from bt_core.training.cpu import FastDepthwise


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that our own gradient was asked for."""
    seen: list[tuple[int, ...]] = []
    forward = cpu._Depthwise.forward

    def counted(ctx: object, input: torch.Tensor, *rest: object) -> torch.Tensor:
        seen.append(tuple(input.shape))
        return forward(ctx, input, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(cpu._Depthwise, "forward", staticmethod(counted))
    return seen


def gradients(conv: nn.Conv2d, image: torch.Tensor, fast: bool) -> list[torch.Tensor]:
    conv.zero_grad()
    input = image.clone().requires_grad_()
    if fast:
        with FastDepthwise():
            output = conv(input)
    else:
        output = conv(input)
    torch.manual_seed(1)
    (output * torch.randn_like(output)).sum().backward()
    assert input.grad is not None
    return [output.detach(), input.grad, *(p.grad for p in conv.parameters() if p.grad is not None)]


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (7, 12)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("side", "stride", "padding"),
    [(3, 2, 1), (3, 2, 0), (5, 2, 2), (3, 3, 1), (7, 4, 3), (2, 2, 1), ((3, 5), (2, 1), (1, 2))],
)
def test_gradients_are_those_of_torch(
    side: int, stride: int, padding: int, bias: bool, size: tuple[int, int], calls: list[object]
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 6, side, stride, padding, groups=6, bias=bias).double()
    image = torch.randn(2, 6, *size, dtype=torch.float64)
    theirs = gradients(conv, image, fast=False)
    assert not calls
    mine = gradients(conv, image, fast=True)
    assert len(calls) == 1
    assert len(mine) == len(theirs) == 3 + bias
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_layers_that_pad_by_themselves_are_met_too(calls: list[object]) -> None:
    timm = pytest.importorskip("timm")
    backbone = timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=0)
    with FastDepthwise():
        backbone(torch.randn(2, 3, 64, 64))
    assert len(calls) == 4  # one for each halving behind the stem


def test_gradients_in_bf16_are_those_of_float32_but_for_rounding() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 1, 3, 3).to(torch.bfloat16).float()
    image = torch.randn(2, 16, 20, 20).to(torch.bfloat16).float()
    found = []
    for dtype, mode in ((torch.float32, nullcontext()), (torch.bfloat16, FastDepthwise())):
        inputs = [t.detach().to(dtype).requires_grad_() for t in (image, weight)]
        with mode:
            output = functional.conv2d(*inputs, stride=(2,), padding=1, groups=16)
        output.float().sum().backward()
        found.append([t.grad.float() for t in inputs if t.grad is not None])
    for exact, narrow in zip(*found, strict=True):
        assert (exact - narrow).norm() < 0.02 * exact.norm()


def test_autocast_leaves_float64_alone_as_torch_does(calls: list[object]) -> None:
    conv = nn.Conv2d(6, 6, 3, 2, 1, groups=6).double()
    image = torch.randn(1, 6, 8, 8, dtype=torch.float64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), FastDepthwise():
        assert conv(image).dtype == torch.float64
    assert calls


def test_a_frozen_weight_has_no_gradient(calls: list[object]) -> None:
    conv = nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False).requires_grad_(False)
    image = torch.randn(1, 6, 8, 8, requires_grad=True)
    with FastDepthwise():
        conv(image).sum().backward()
    assert calls
    assert image.grad is not None
    assert conv.weight.grad is None


def test_under_autocast_it_computes_in_the_narrow_type(calls: list[object]) -> None:
    conv = nn.Conv2d(6, 6, 3, 2, 1, groups=6)
    image = torch.randn(2, 6, 8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = conv(image)
        with FastDepthwise():
            mine = conv(image)
    assert calls
    assert mine.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs, atol=0.02, rtol=0.02)
    mine.float().sum().backward()
    assert conv.weight.grad is not None
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(6, 6, 3, 1, 1, groups=6),
        nn.Conv2d(6, 12, 3, 2, 1, groups=6),
        nn.Conv2d(6, 6, 3, 2, 1),
        nn.Conv2d(6, 6, 3, 2, 3, groups=6),
        nn.Conv2d(6, 6, 3, 2, 2, dilation=2, groups=6),
        nn.Conv2d(6, 6, 3, 1, "same", groups=6),
    ],
)
def test_other_convolutions_are_left_to_torch(conv: nn.Conv2d, calls: list[object]) -> None:
    image = torch.randn(2, 6, 9, 9, requires_grad=True)
    with FastDepthwise():
        output = conv(image)
    assert not calls
    torch.testing.assert_close(output, conv(image))


def test_without_gradients_nothing_changes(calls: list[object]) -> None:
    weight, image = torch.randn(6, 1, 3, 3), torch.randn(1, 6, 8, 8)
    with FastDepthwise():
        output = functional.conv2d(image, weight, stride=2, padding=1, groups=6)
    assert not calls
    assert output.shape == (1, 6, 4, 4)
