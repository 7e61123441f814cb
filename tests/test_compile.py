"""Networks, denoisers and the loss compile into one graph."""

import subprocess
import sys

COMPILED = """
import torch
from stablefield import VE, DSMTarget
from stablefield.objective import EDMWeight, Objective
from stablefield.denoise import Preconditioned
from stablefield.networks import ADM, MLP, UNet, ncsnpp
from stablefield.networks.group_norm import GroupNormByChannel
from stablefield.preconditioning import EDMPreconditioning
from stablefield.times import LogNormal

shape, small = (3, 8, 8), dict(model_channels=8, num_blocks=1, attn_resolutions=(4,), channel_mult=(1, 2))
networks = [
    UNet(shape, num_classes=3, channels=8),
    MLP(shape, num_classes=3, width=16),
    ncsnpp(shape, **small, num_classes=3),
    ADM(shape, **small, num_classes=3, channels_per_head=8),
]
process, objective = VE(), Objective(LogNormal(), DSMTarget(), EDMWeight())
x, label = torch.randn(4, *shape), torch.tensor([0, 1, 2, -1])
for network in networks:
    denoiser = Preconditioned(network.eval(), process, EDMPreconditioning(), 3)
    noisy = process.perturb(x, torch.rand(4) + 0.1, torch.randn_like(x), label=label)
    target = objective.target(noisy)

    def loss(mean):
        return objective.loss(denoiser, process, noisy, type(target)(mean, target.ess, target.variance)).loss

    graph = torch.compile(loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(graph(target.mean), loss(target.mean))
    names = dict(denoiser.named_parameters())
    found, expected = (torch.autograd.grad(f(target.mean), names.values(), allow_unused=True) for f in (graph, loss))
    torch.testing.assert_close(found, expected)

h = torch.randn(2, 8, 4, 4, requires_grad=True)
weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)

def on_gpu(h):
    if h.device.type != "cpu" or torch._C._are_functorch_transforms_active():
        return h
    return GroupNormByChannel.apply(h, 2, weight, bias, 1e-5)

for backend in ("eager", "aot_eager"):
    torch._dynamo.reset()
    graph = torch.compile(on_gpu, fullgraph=True, backend=backend)
    torch.testing.assert_close(graph(h), on_gpu(h))
    found, expected = (torch.autograd.grad(f(h).square().sum(), (h, weight, bias)) for f in (graph, on_gpu))
    torch.testing.assert_close(found, expected)
"""


def test_networks_labels_and_loss_compile_into_one_graph() -> None:
    # In a process of its own, because the shape checks of these tests would end up in the graph.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
