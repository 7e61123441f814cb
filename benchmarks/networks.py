"""Speed of DDPM++ and NCSN++ at CIFAR-10's size, forward and in training, and memory of a training step.

    python benchmarks/networks.py             on the CPU, or a GPU where there is one; a few minutes
    python benchmarks/networks.py --quick     only NCSN++ in float32
    python benchmarks/networks.py --compile   also with torch.compile (some minutes more)

The plain form is the same network in a direct implementation of its definition: every filter is a depthwise
convolution, layers are applied one after the other, attention is two matrix products and a softmax, and tensors have
PyTorch's default memory layout. It has the same weights, and its outputs are compared before it is timed. The network
of this package has its weights in the channels-last layout. Compare ratios within one run; times depend on the machine.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable

import torch
from common import headline, interleaved, peak_memory, peak_of
from torch import Tensor, nn
from torch.nn import functional as F

from stablefield.networks import SongUNet, ddpmpp, ncsnpp

PRESETS: dict[str, Callable[..., SongUNet]] = {"ncsnpp": ncsnpp, "ddpmpp": ddpmpp}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class PlainUNet(nn.Module):
    """Direct implementation of DDPM++ or NCSN++, with the weights of a network of the package."""

    def __init__(self, network: SongUNet) -> None:
        super().__init__()
        self.fourier = network.encoder == "residual"
        self.resolutions, self.blocks, self.dropout = network.resolutions, network.num_blocks, 0.1
        state = network.state_dict()
        buffers = {name for name, _ in network.named_buffers()}
        self.name = {name: name.replace(".", "/") for name in state}
        for name, value in state.items():
            if name in buffers:
                self.register_buffer(self.name[name], value.clone())
            else:
                self.register_parameter(self.name[name], nn.Parameter(value.clone()))

    def get(self, name: str) -> Tensor | None:
        return getattr(self, self.name[name]) if name in self.name else None

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.get(f"{name}.weight"), self.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        groups = min(32, x.shape[1] // 4)
        return F.group_norm(x, groups, self.get(f"{name}.weight"), self.get(f"{name}.bias"), 1e-6)

    def filter(self, x: Tensor, name: str, resample: str | None, padding: int | None = None) -> Tensor:
        taps = self.get(f"{name}.resample_filter")
        if taps is None:
            return x
        filters, channels = taps.expand(x.shape[1], -1, -1, -1), x.shape[1]
        padding = (taps.shape[-1] - 1) // 2 if padding is None else padding
        if resample == "up":
            return F.conv_transpose2d(x, 4 * filters, stride=2, padding=padding, groups=channels)
        return F.conv2d(x, filters, stride=2, padding=padding, groups=channels)

    def conv(self, x: Tensor, name: str, resample: str | None = None) -> Tensor:
        weight, bias = self.get(f"{name}.weight"), self.get(f"{name}.bias")
        return F.conv2d(self.filter(x, name, resample), weight, bias, padding=weight.shape[-1] // 2)

    def conv_down(self, x: Tensor, name: str) -> Tensor:
        weight, taps = self.get(f"{name}.weight"), self.get(f"{name}.resample_filter")
        x = F.conv2d(x, weight, padding=1 + (taps.shape[-1] - 1) // 2)
        return self.filter(x, name, "down", padding=0) + self.get(f"{name}.bias")[:, None, None]

    def block(self, x: Tensor, name: str, emb: Tensor, resample: str | None = None) -> Tensor:
        h = self.conv(F.silu(self.norm(x, f"{name}.norm0")), f"{name}.conv0", resample)
        h = h + self.linear(emb, f"{name}.affine")[:, :, None, None]
        h = F.dropout(F.silu(self.norm(h, f"{name}.norm1")), self.dropout, self.training)
        h = self.conv(h, f"{name}.conv1")
        x = (h + (self.conv(x, f"{name}.skip", resample) if f"{name}.skip.weight" in self.name else x)) * math.sqrt(0.5)
        if f"{name}.qkv.weight" not in self.name:
            return x
        batch, channels, height, width = x.shape
        qkv = self.conv(self.norm(x, f"{name}.norm2"), f"{name}.qkv")
        q, k, v = qkv.reshape(batch, channels, 3, height * width).unbind(2)
        weight = torch.einsum("bcq,bck->bqk", q, k / math.sqrt(channels)).float().softmax(2).to(q.dtype)
        mixed = torch.einsum("bqk,bck->bcq", weight, v).reshape(x.shape)
        return (x + self.conv(mixed, f"{name}.proj")) * math.sqrt(0.5)

    def noise_embedding(self, c_noise: Tensor) -> Tensor:
        if self.fourier:
            angle = c_noise[:, None] * (2 * math.pi * self.get("map_noise.freqs"))
        else:
            half = self.get("map_layer0.weight").shape[1] // 2
            angle = c_noise[:, None] * 10000 ** -(torch.arange(half, device=c_noise.device) / (half - 1))
        return torch.cat([angle.sin(), angle.cos()], 1)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        emb = F.silu(self.linear(self.noise_embedding(c_noise), "map_layer0"))
        emb = F.silu(self.linear(emb, "map_layer1"))
        residual, skips = x, []
        for r in self.resolutions:
            if r == self.resolutions[0]:
                x = self.conv(x, f"enc.{r}_conv")
            else:
                x = self.block(x, f"enc.{r}_down", emb, "down")
                if self.fourier:
                    x = residual = (x + self.conv_down(residual, f"enc.{r}_aux_residual")) / math.sqrt(2)
            skips.append(x)
            for i in range(self.blocks):
                x = self.block(x, f"enc.{r}_block{i}", emb)
                skips.append(x)
        for r in reversed(self.resolutions):
            if r == self.resolutions[-1]:
                x = self.block(self.block(x, f"dec.{r}_in0", emb), f"dec.{r}_in1", emb)
            else:
                x = self.block(x, f"dec.{r}_up", emb, "up")
            for i in range(self.blocks + 1):
                x = self.block(torch.cat([x, skips.pop()], 1), f"dec.{r}_block{i}", emb)
        r = self.resolutions[0]
        return self.conv(F.silu(self.norm(x, f"dec.{r}_aux_norm")), f"dec.{r}_aux_conv")


def both_forms(preset: str, device: str, compiled: bool) -> dict[str, nn.Module]:
    """The network in both forms with equal weights; zero-initialized weights are perturbed, and outputs compared."""
    torch.manual_seed(0)
    ours = PRESETS[preset]()
    for parameter in ours.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    plain, ours = PlainUNet(ours).to(device), ours.to(device, memory_format=torch.channels_last)
    forms: dict[str, nn.Module] = {"plain": plain, "stablefield": ours}
    x, c_noise = torch.randn(2, 3, 32, 32, device=device), torch.randn(2, device=device)
    with torch.no_grad():
        expected, output = (form.eval()(x, c_noise) for form in forms.values())
    assert (output - expected).abs().max() <= 1e-5 * expected.abs().max(), "the outputs of the two forms differ"
    if compiled:
        forms["compiled"] = torch.compile(ours, fullgraph=True)
    return forms


def work(form: nn.Module, batch: int, device: str, dtype: torch.dtype, training: bool) -> Callable[[], None]:
    """Function that runs one forward pass, or one forward and backward pass."""
    x, c_noise = torch.randn(batch, 3, 32, 32, device=device), torch.randn(batch, device=device)

    def once() -> None:
        form.train(training)
        with torch.set_grad_enabled(training):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = form(x, c_noise).square().mean()
            if training:
                loss.backward()
                form.zero_grad()

    return once


def speed(preset: str, precision: str, batch: int, device: str, repeats: int, compiled: bool) -> None:
    forms = both_forms(preset, device, compiled)
    for training in (False, True):
        steps = {k: work(form, batch, device, PRECISIONS[precision], training) for k, form in forms.items()}
        times = interleaved(steps, repeats)
        for name, (middle, low, high) in times.items():
            print(
                f"  {preset} {precision:8} {'forward and backward' if training else 'forward':20} {name:12}"
                f" {batch / middle:9.2f} images/s   ({batch / high:.2f} to {batch / low:.2f})"
                f"   x {times['plain'][0] / middle:.2f}",
                flush=True,
            )


def memory(preset: str, precision: str, batch: int, device: str) -> None:
    base = None
    for name in ("plain", "stablefield", "checkpointing"):
        used = peak_memory(__file__, "--peak", name, preset, precision, str(batch), device)
        base = base or used
        print(f"  {preset} {precision:8} {name:15} {used / batch:7.1f} MB per image   x {used / base:.2f}", flush=True)


def report_peak(name: str, preset: str, precision: str, batch: str, device: str) -> None:
    """Print the peak memory of one training step of one form, beyond weights and gradients, after a smaller step."""
    network: nn.Module = PRESETS[preset](checkpointing=name == "checkpointing")
    form = PlainUNet(network).to(device) if name == "plain" else network.to(device, memory_format=torch.channels_last)
    work(form, 1, device, PRECISIONS[precision], True)()
    for parameter in form.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = work(form, int(batch), device, PRECISIONS[precision], True)
    if device == "cpu":
        return print(peak_of(step))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    print((torch.cuda.max_memory_allocated() - before) / 2**20)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only NCSN++ in float32, two rounds")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--repeats", type=int, default=3, help="number of rounds (3)")
    parser.add_argument("--threads", type=int, help="number of CPU threads; use fewer than the cores on a busy machine")
    parser.add_argument("--batch", type=int, help="images per batch (4 on a CPU, 128 on a GPU)")
    parser.add_argument("--peak", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
        os.environ["OMP_NUM_THREADS"] = str(options.threads)  # for the processes that measure memory
    if options.peak:
        sys.exit(report_peak(*options.peak))
    where = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    images, rounds = options.batch or (4 if where == "cpu" else 128), 2 if options.quick else options.repeats
    cases = [(preset, precision) for preset in PRESETS for precision in PRECISIONS][: 1 if options.quick else None]
    print(headline(__file__))
    print(f"load of this machine before: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores\n")
    print(f"Images per second in batches of {images} (median, minimum and maximum, in turns; ratio to the plain form)")
    for case in cases:
        speed(*case, images, where, rounds, options.compile)
    print(f"\nPeak memory of forward and backward beyond the weights, in batches of {images}")
    for case in cases[::2]:
        memory(*case, images, where)
    print(f"\nload of this machine after: {os.getloadavg()[0]:.1f} of {os.cpu_count()} cores")
