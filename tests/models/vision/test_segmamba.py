"""SegMamba: its gated spatial convolution, its orientations, and the names of the official repository's weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support import close, refused, shaken

from regard.models.vision.segmentation import create_segmenter
from regard.models.vision.segmentation.segmamba import GatedSpatialConvolution, TriMamba

SMALL = {"widths": (6, 8), "depths": (2, 1), "bottom": 10, "channels": 2, "num_classes": 3}


def official(widths: tuple[int, ...], depths: tuple[int, ...], bottom: int, channels: int, classes: int) -> dict:
    """Names and shapes of the official code's tensors, copied from the code."""
    found: dict[str, tuple[int, ...]] = {}

    def convolution(name: str, into: int, out: int, side: int, *, bias: bool = True) -> None:
        found[f"{name}.weight"] = (out, into, side, side, side)
        if bias:
            found[f"{name}.bias"] = (out,)

    def block(name: str, into: int, out: int) -> None:
        convolution(f"{name}.conv1.conv", into, out, 3, bias=False)
        convolution(f"{name}.conv2.conv", out, out, 3, bias=False)
        if into != out:
            convolution(f"{name}.conv3.conv", into, out, 1, bias=False)

    for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        before, side = (widths[i - 1], 2) if i else (channels, 7)
        convolution(f"vit.downsample_layers.{i}.{int(i > 0)}", before, width, side)
        for number, side in (("", 3), ("2", 3), ("3", 1), ("4", 1)):
            convolution(f"vit.gscs.{i}.proj{number}", width, width, side)
        for j in range(depth):
            place, inner, rank = f"vit.stages.{i}.{j}", 2 * width, 1
            found |= {f"{place}.norm.weight": (width,), f"{place}.norm.bias": (width,)}
            place += ".mamba"
            found |= {f"{place}.in_proj.weight": (2 * inner, width), f"{place}.out_proj.weight": (width, inner)}
            for path in ("", "_b", "_s"):
                found |= {f"{place}.conv1d{path}.weight": (inner, 1, 4), f"{place}.conv1d{path}.bias": (inner,)}
                found |= {f"{place}.x_proj{path}.weight": (rank + 32, inner), f"{place}.D{path}": (inner,)}
                found |= {f"{place}.dt_proj{path}.weight": (inner, rank), f"{place}.dt_proj{path}.bias": (inner,)}
                found[f"{place}.A{path}_log"] = (inner, 16)
        convolution(f"vit.mlps.{i}.fc1", width, 2 * width, 1)
        convolution(f"vit.mlps.{i}.fc2", 2 * width, width, 1)
    levels = (channels, *widths), (*widths, bottom)
    for i, (into, out) in enumerate(zip(*levels, strict=True)):
        block(f"encoder{i + 1}.layer", into, out)
        if i:
            found[f"decoder{i + 1}.transp_conv.conv.weight"] = (out, into, 2, 2, 2)
            block(f"decoder{i + 1}.conv_block", 2 * into, into)
    block("decoder1.layer", widths[0], widths[0])
    convolution("out.conv.conv", widths[0], classes, 1)
    return found


def test_weights_load_by_their_official_names() -> None:
    state = {name: torch.randn(shape) for name, shape in official((6, 8), (2, 1), 10, 2, 3).items()}
    model = create_segmenter("segmamba", **SMALL)
    model.load_released(state)
    own = model.state_dict()
    assert sum(value.numel() for value in own.values()) == sum(value.numel() for value in state.values())
    layer = "stages.0.2.mamba."
    for path, mark in enumerate(("", "_b", "_s")):
        place = "vit.stages.0.1.mamba."
        assert torch.equal(own[f"{layer}A_log"][path], state[f"{place}A{mark}_log"])
        assert torch.equal(own[f"{layer}dt_bias"][path], state[f"{place}dt_proj{mark}.bias"])
        assert torch.equal(own[f"{layer}convs.{path}.weight"], state[f"{place}conv1d{mark}.weight"].flatten(1))
        assert torch.equal(own[f"{layer}x_proj.{path}.weight"], state[f"{place}x_proj{mark}.weight"])
    assert torch.equal(own["decoder.0.up.weight"], state["decoder3.transp_conv.conv.weight"])
    refused("without", model.load_released, {name: x for name, x in state.items() if not name.startswith("decoder2")})


def test_the_gated_spatial_convolution_is_its_equation() -> None:
    gate = shaken(GatedSpatialConvolution(3))
    x = torch.randn(2, 3, 4, 2, 5, dtype=torch.float64)

    def normed(y: torch.Tensor) -> torch.Tensor:
        centred = y - y.mean((2, 3, 4), keepdim=True)
        return (centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()).clamp(min=0)

    def convolved(y: torch.Tensor, which: torch.nn.Conv3d) -> torch.Tensor:
        return F.conv3d(y, which.weight, which.bias, padding=which.kernel_size[0] // 2)

    spatial = normed(convolved(normed(convolved(x, gate.conv1)), gate.conv2))
    close(gate(x), x + normed(convolved(spatial + normed(convolved(x, gate.conv3)), gate.conv4)))


def test_the_third_orientation_goes_across_the_slices_of_the_map() -> None:
    """Through that path alone, a place sees those before it in the order (place within the slice, slice)."""
    layer = shaken(TriMamba(4, {"scan": "slices", "combine": "sum", "axes": 3}))
    with torch.no_grad():
        for path in (0, 1):  # the other scans and their skip connections contribute nothing
            layer.mamba.x_proj[path].weight.zero_()
            layer.mamba.D[path] = 0
    x = torch.randn(1, 4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((layer(x) - x)[0, :, 1, 1, 0].sum(), x)
    seen = gradient[0].abs().sum(0) > 1e-12
    order = [(s, y, z) for y in range(2) for z in range(2) for s in range(3)]
    ahead = order.index((1, 1, 0))
    assert all(bool(seen[place]) == (number <= ahead) for number, place in enumerate(order))


def test_any_sides_in_multiples_are_taken() -> None:
    model = create_segmenter("segmamba", **SMALL).eval()
    assert model(torch.randn(1, 2, 8, 4, 12)).shape == (1, 3, 8, 4, 12)
    refused("multiples of 4", model, torch.randn(1, 2, 8, 6, 8))
    refused("one position, too few to norm", model, torch.randn(1, 2, 4, 4, 4))
    refused("depths", create_segmenter, "segmamba", depths=(1, 2))
