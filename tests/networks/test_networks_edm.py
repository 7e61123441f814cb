"""DDPM++, NCSN++ and ADM: the outputs of EDM's published weights, and the laws of the layers."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import conv2d, conv_transpose2d

from stablefield.networks import ADM, SongUNet, adm, ddpmpp, ncsnpp
from stablefield.networks.adm_unet import ADMBlock
from stablefield.networks.layers import (
    ConvDown,
    DownConv,
    FourierEmbedding,
    PositionalEmbedding,
    UpConv,
    downsample,
    separable_filter,
    upsample,
)
from stablefield.networks.song import SongBlock

EDM_FILES = Path(__file__).parents[1] / "data" / "edm"
RENAMED = {
    "label_dim": "num_classes",
    "embedding_type": "embedding",
    "encoder_type": "encoder",
    "decoder_type": "decoder",
}
SMALL: dict[str, Any] = {"model_channels": 16, "num_blocks": 1, "attn_resolutions": (8,), "dropout": 0.0}


def published(name: str) -> tuple[SongUNet, dict[str, Tensor], str]:
    """A network with published weights, published inputs and outputs, and the name of its preconditioning."""
    config = json.loads((EDM_FILES / name / "config.json").read_text())
    options = {RENAMED.get(key, key): value for key, value in config["kwargs"].items()}
    channels, side = options.pop("img_channels"), options.pop("img_resolution")
    network = SongUNet(
        (channels, side, side), **{k: v for k, v in options.items() if k not in ("model_type", "sigma_data")}
    )
    state = load_file(EDM_FILES / name / "state.safetensors")
    network.load_state_dict({key.removeprefix("model."): value for key, value in state.items()}, strict=True)
    with np.load(EDM_FILES / name / "io.npz") as arrays:
        return network.eval(), {key: torch.from_numpy(arrays[key]) for key in arrays}, config["precond"]


def preconditioning(precond: str, s: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """c_skip, c_out, c_in, c_noise (Karras et al. 2022, table 1)."""
    if precond == "EDMPrecond":
        return 0.25 / (s**2 + 0.25), 0.5 * s / (s**2 + 0.25).sqrt(), (s**2 + 0.25).rsqrt(), s.log() / 4
    if precond == "VPPrecond":
        t = ((0.01 + 2 * 19.9 * (1 + s**2).log()).sqrt() - 0.1) / 19.9
        return torch.ones_like(s), -s, (s**2 + 1).rsqrt(), 999 * t
    return torch.ones_like(s), s, torch.ones_like(s), (s / 2).log()


def perturbed(network: nn.Module) -> nn.Module:
    """The network moved away from its initial zeros, so that every parameter matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)
    return network


def inputs(network: SongUNet | ADM, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Random x, c_noise, label_one_hot and augment_label."""
    generator = torch.Generator().manual_seed(2)
    widths = (tuple(network.shape), (), (network.num_classes,), (network.augment_dim,))
    x, c_noise, label, augment = (torch.randn((batch, *width), generator=generator, dtype=dtype) for width in widths)
    return x, c_noise, label, augment


# -- published weights ----


@pytest.mark.parametrize("name", ["ddpmpp-edm", "ddpmpp-vp", "ncsnpp-edm-cond", "ncsnpp-ve"])
def test_published_weights_give_the_published_outputs(name: str) -> None:
    network, io, precond = published(name)
    c_skip, c_out, c_in, c_noise = (c[:, None, None, None] for c in preconditioning(precond, io["sigma"]))
    with torch.no_grad():
        output = network(c_in * io["x"], c_noise.flatten(), io.get("class_labels"), io.get("augment_labels"))
    error = (c_skip * io["x"] + c_out * output - io["denoised"]).abs().amax((1, 2, 3))
    assert (error <= 1e-5 * io["denoised"].abs().amax((1, 2, 3))).all()


@pytest.mark.parametrize(
    ("build", "millions"),
    [
        (lambda: ddpmpp(augment_dim=9), 55.73),
        (lambda: ncsnpp(augment_dim=9), 56.40),
        (lambda: ddpmpp((3, 64, 64), augment_dim=9), 61.81),
        (lambda: ncsnpp((3, 64, 64), augment_dim=9), 62.76),
        (lambda: adm(num_classes=1000), 295.90),
    ],
    ids=["ddpmpp-32", "ncsnpp-32", "ddpmpp-64", "ncsnpp-64", "adm-64"],
)
def test_presets_have_the_published_sizes(build: Any, millions: float) -> None:
    with torch.device("meta"):
        network = build()
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_full_size_layers_have_the_names_and_shapes_of_edms_files() -> None:
    with torch.device("meta"):
        song, large = ncsnpp(num_classes=10, augment_dim=9).state_dict(), adm(num_classes=1000).state_dict()
    shapes = {key: tuple(value.shape) for key, value in song.items()}
    assert shapes["enc.32x32_conv.weight"] == (128, 3, 3, 3)
    assert shapes["enc.16x16_aux_residual.weight"] == (256, 3, 3, 3)
    assert shapes["enc.8x8_down.skip.weight"] == (256, 256, 1, 1)
    assert shapes["dec.8x8_in0.qkv.weight"] == (768, 256, 1, 1)
    assert shapes["dec.32x32_block4.conv0.weight"] == (256, 384, 3, 3)
    assert shapes["dec.32x32_aux_conv.weight"] == (3, 256, 3, 3)
    assert shapes["map_noise.freqs"] == (128,)
    assert shapes["map_layer0.weight"] == (512, 256)
    shapes = {key: tuple(value.shape) for key, value in large.items()}
    assert shapes["enc.64x64_conv.weight"] == (192, 3, 3, 3)
    assert shapes["dec.64x64_up.skip.resample_filter"] == (1, 1, 2, 2)
    assert "dec.64x64_up.skip.weight" not in shapes
    assert shapes["dec.8x8_block0.affine.weight"] == (1536, 768)
    assert shapes["map_label.weight"] == (768, 1000)


def test_attention_is_where_the_papers_have_it() -> None:
    with torch.device("meta"):
        song, large = ncsnpp().state_dict(), adm().state_dict()
    assert {key.removesuffix(".qkv.bias") for key in song if key.endswith("qkv.bias")} == {
        *(f"enc.16x16_block{i}" for i in range(4)),
        "dec.8x8_in0",
        "dec.16x16_block4",
    }
    assert {key.removesuffix(".qkv.bias") for key in large if key.endswith("qkv.bias")} == {
        *(f"enc.{r}x{r}_block{i}" for r in (32, 16, 8) for i in range(3)),
        *(f"dec.{r}x{r}_block{i}" for r in (32, 16, 8) for i in range(4)),
        "dec.8x8_in0",
    }


def test_parameters_are_in_the_order_of_edms_optimiser_states() -> None:
    with torch.device("meta"):
        song, large = ncsnpp(num_classes=10, augment_dim=9), adm(num_classes=10, augment_dim=9)
        block = SongBlock(16, 32, emb_channels=8, resampling="down", num_heads=1)
    assert [name for name, _ in song.named_children()] == [
        *("map_noise", "map_label", "map_augment", "map_layer0", "map_layer1", "enc", "dec"),
    ]
    assert [name for name, _ in large.named_children()] == [
        *(
            "map_noise",
            "map_augment",
            "map_layer0",
            "map_layer1",
            "map_label",
            "enc",
            "dec",
            "out_norm",
            "out_conv",
        ),
    ]
    assert list(song.enc)[:7] == [
        "32x32_conv",
        *(f"32x32_block{i}" for i in range(4)),
        "16x16_down",
        "16x16_aux_residual",
    ]
    assert list(song.dec)[:3] == ["8x8_in0", "8x8_in1", "8x8_block0"]
    assert list(song.dec)[-2:] == ["32x32_aux_norm", "32x32_aux_conv"]
    assert list(dict.fromkeys(name.split(".")[0] for name, _ in block.named_parameters())) == [
        *("norm0", "conv0", "affine", "norm1", "conv1", "skip", "norm2", "qkv", "proj"),
    ]


# -- whole networks ----


ARCHITECTURES: dict[str, Any] = {
    "ncsnpp, not square": lambda **o: ncsnpp((3, 16, 24), **SMALL, num_classes=3, augment_dim=9, **o),
    "skip paths, four levels, one channel": lambda **o: SongUNet(
        (1, 16, 16), **SMALL, channel_mult=(1, 2, 1, 2), encoder="skip", decoder="skip", **o
    ),
    "residual, four levels": lambda **o: SongUNet(
        (3, 16, 8), **SMALL, channel_mult=(1, 2, 1, 3), encoder="residual", resample_filter=(1, 3, 3, 1), **o
    ),
    "adm, several heads, two images out": lambda **o: ADM(
        (3, 16, 16),
        **SMALL,
        channel_mult=(1, 2),
        channels_per_head=16,
        num_classes=3,
        augment_dim=9,
        out_channels=6,
        **o,
    ),
    "ddpmpp, one level": lambda **o: ddpmpp((3, 5, 7), **SMALL, channel_mult=(1,), **o),
}


@pytest.mark.parametrize("build", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_every_parameter_and_every_input_matters(build: Any) -> None:
    network = perturbed(build().double())
    given = [value.requires_grad_() for value in inputs(network)]
    out = network(*given)
    assert out.shape == (2, getattr(network, "out_channels", 6), *network.shape[1:])
    out.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert all(value.grad.any() for value in given if value.numel())


@pytest.mark.parametrize("build", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_checkpointing_changes_no_gradient(build: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(3)
        network = perturbed(build(checkpointing=checkpointing).double())
        for module in network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.1
        network(*inputs(network)).square().sum().backward()
        gradients.append([p.grad for p in network.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_the_memory_format_does_not_change_the_output(build: Any) -> None:
    network = perturbed(build().double()).eval()
    x, *rest = inputs(network)
    expected = network(x, *rest)
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        network(x.to(memory_format=torch.channels_last), *rest), expected, rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("build", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_omitted_labels_equal_labels_of_zeros(build: Any) -> None:
    network = perturbed(build().double()).eval()
    x, c_noise, label, augment = inputs(network)
    torch.testing.assert_close(network(x, c_noise), network(x, c_noise, 0 * label, 0 * augment), rtol=0, atol=0)


@pytest.mark.parametrize("build", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_bfloat16_autocast_agrees_to_its_precision(build: Any) -> None:
    network = build().eval()
    given = inputs(network, dtype=torch.float32)
    perturbed(network)
    with torch.no_grad():
        full = network(*given)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(*given).float()
    assert (half - full).norm() <= 0.05 * full.norm()


def test_the_output_of_an_example_is_independent_of_the_rest_of_the_batch() -> None:
    network = perturbed(ARCHITECTURES["ncsnpp, not square"]().double()).eval()
    given = inputs(network, batch=3)
    torch.testing.assert_close(network(*given)[1:2], network(*(v[1:2] for v in given)), rtol=1e-10, atol=1e-10)


COMPILED = """
import torch
from stablefield.networks import ADM, SongUNet, ncsnpp
small = dict(model_channels=16, num_blocks=1, attn_resolutions=(8,), channel_mult=(1, 2))
networks = [
    ncsnpp((3, 16, 16), **small, num_classes=3, augment_dim=9),
    SongUNet((3, 16, 16), **small, encoder="skip", decoder="skip", checkpointing=True),
    ADM((3, 16, 16), **small, channels_per_head=16, dropout=0.0),
]
for network in networks:
    network.eval()
    x, c_noise = torch.randn(2, 3, 16, 16), torch.randn(2)
    for p in network.parameters():
        p.data += 0.1 * torch.randn_like(p)
    loss = lambda f: torch.autograd.grad(f(x, c_noise).square().sum(), list(network.parameters()))
    graph = torch.compile(network, fullgraph=True, backend="aot_eager")
    for ours, compiled in zip(loss(network), loss(graph)):
        assert (ours - compiled).norm() <= 1e-4 * ours.norm() + 1e-4, (ours.norm(), (ours - compiled).norm())
    with torch.autocast("cpu", torch.bfloat16):
        assert graph(x, c_noise).isfinite().all()
"""


@pytest.mark.slow
def test_networks_compile_into_one_graph_with_equal_gradients() -> None:
    # In a process of its own, because the shape checks of these tests would end up in the graph.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- layers ----


def test_positional_frequencies_run_from_1_to_a_ten_thousandth() -> None:
    x = torch.tensor([0.3, 7.0], dtype=torch.float64)
    f = 10000 ** -(torch.arange(4, dtype=torch.float64) / 3)
    expected = torch.cat([(x[:, None] * f).cos(), (x[:, None] * f).sin()], 1)
    torch.testing.assert_close(PositionalEmbedding(8, True)(x), expected)
    assert PositionalEmbedding(8, False)(x)[0, 7] == pytest.approx(math.sin(0.3 * 10000**-0.75))


def test_fourier_frequencies_have_standard_deviation_16() -> None:
    embedding = FourierEmbedding(20_000)
    assert embedding.freqs.std().item() == pytest.approx(16, rel=0.03)
    assert embedding(torch.zeros(1)).tolist() == [[1.0] * 10_000 + [0.0] * 10_000]


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)])
def test_fast_resampling_layers_equal_their_definitions(taps: tuple[int, ...]) -> None:
    """The definitions: filters as depthwise convolutions, before or after the k x k convolution."""
    x = torch.randn(2, 3, 8, 10, dtype=torch.float64)
    f, p = separable_filter(taps).double(), (len(taps) - 1) // 2
    depthwise = f.expand(3, 1, -1, -1)
    up = conv_transpose2d(x, 4 * depthwise, stride=2, padding=p, groups=3)
    down = conv2d(x, depthwise, stride=2, padding=p, groups=3)
    torch.testing.assert_close(upsample(x, f), up)
    torch.testing.assert_close(downsample(x, f), down)
    for kernel in (1, 3):
        layers = (UpConv(3, 5, kernel, taps), DownConv(3, 5, kernel, taps), ConvDown(3, 5, kernel, taps))
        up_conv, down_conv, conv_down = (layer.double() for layer in layers)
        wide = conv2d(x, conv_down.weight, padding=kernel // 2 + p)
        wide = conv2d(wide, f.expand(5, 1, -1, -1), stride=2, groups=5) + conv_down.bias[:, None, None]
        torch.testing.assert_close(conv_down(x), wide)
        torch.testing.assert_close(up_conv(x), conv2d(up, up_conv.weight, up_conv.bias, padding=kernel // 2))
        torch.testing.assert_close(down_conv(x), conv2d(down, down_conv.weight, down_conv.bias, padding=kernel // 2))


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_attention_is_a_softmax_over_pixels_in_every_head(num_heads: int) -> None:
    block = perturbed(ADMBlock(16, 16, emb_channels=8, num_heads=num_heads).double())
    x = torch.randn(2, 16, 3, 5, dtype=torch.float64)
    q, k, v = block.qkv(block.norm2(x)).reshape(2 * num_heads, 16 // num_heads, 3, 15).unbind(2)
    weights = torch.einsum("bcq,bck->bqk", q, k).div(math.sqrt(16 / num_heads)).softmax(2)
    expected = block.proj(torch.einsum("bqk,bck->bcq", weights, v).reshape(2, 16, 3, 5))
    torch.testing.assert_close(block.attention(x), expected)


def test_song_starts_with_xavier_weights_and_branches_near_zero() -> None:
    network = ddpmpp(**{**SMALL, "model_channels": 128, "attn_resolutions": (16,)})
    block = network.enc["16x16_block0"]
    assert block.conv0.weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 512)), rel=0.02)
    assert block.conv1.weight.std().item() == pytest.approx(1e-5 * math.sqrt(2 / (9 * 512)), rel=0.02)
    assert block.proj.weight.std().item() == pytest.approx(1e-5 * math.sqrt(2 / 512), rel=0.02)
    assert block.qkv.weight.std().item() == pytest.approx(math.sqrt(0.2 * 2 / 1024), rel=0.02)
    assert block.affine.weight.std().item() == pytest.approx(math.sqrt(2 / 768), rel=0.02)
    assert network.dec["32x32_aux_conv"].weight.abs().max() < 1e-5
    assert all(not p.any() for name, p in network.named_parameters() if name.endswith("bias"))


def test_adm_starts_at_zero_with_label_embeddings_of_unit_variance() -> None:
    network = ADM((3, 16, 16), **{**SMALL, "model_channels": 64}, channel_mult=(1, 2), num_classes=10, augment_dim=9)
    x, *rest = inputs(network, dtype=torch.float32)
    assert not network(x, *rest).any()
    assert network.map_label is not None
    assert network.map_label.weight.std().item() == pytest.approx(1, rel=0.05)
    conv0 = network.dec["16x16_block0"].conv0
    limit = 1 / math.sqrt(9 * conv0.in_channels)
    assert 0.9 * limit < conv0.weight.abs().max() <= limit
    assert 0.5 * limit < conv0.bias.abs().max() <= limit


# -- errors ----


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ddpmpp((3, 30, 32)), r"divisible by 4, not 30 x 32"),
        (lambda: ddpmpp((2, 32), channel_mult=(1, 1)), r"images \(C, H, W\), not \(2, 32\)"),
        (lambda: ddpmpp(model_channels=100), r"200 channels do not divide into 32 groups"),
        (lambda: adm((3, 8, 8), model_channels=224), r"224 channels do not divide into 3 heads"),
        (lambda: ddpmpp(encoder="residuals"), r"encoder must be one of standard, skip, residual, not 'residuals'"),
        (lambda: ncsnpp(resample_filter=(1, 2, 1)), r"even number of taps.*not 3"),
        (lambda: ddpmpp(**SMALL)(torch.zeros(1, 3, 30, 32), torch.zeros(1)), r"divisible by 4, not 30 x 32"),
        (
            lambda: ddpmpp(**SMALL, num_classes=5)(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 7)),
            r"label_one_hot has 7 columns.*num_classes=5",
        ),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_arguments_that_do_not_fit_are_refused_with_their_values(build: Any, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build()
