"""Lightning: callbacks that save a stable target with the checkpoints, and log the excess of the loss."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from typing_extensions import override

from stablefield.extras import how_to_install
from stablefield.floor import Probes
from stablefield.stable import StableTarget

try:
    from lightning.pytorch import Callback
except ImportError:  # so that this module can be listed; making a callback says what is missing
    Callback = object


class StableTargetCallback(Callback):
    """Saves the draws and the bank of a `StableTarget` with Lightning's checkpoints, and logs its effective sizes.

    A training that resumes from such a checkpoint uses the references that it would have used without the interruption.

    Attributes:
        stable: the stable target that the module's `training_step` calls.
        name: name of the metric, and of the state in the checkpoint.

    Raises:
        ImportError: Lightning is not installed.
    """

    def __init__(self, stable: StableTarget, name: str = "target/ess") -> None:
        if Callback is object:
            raise ImportError(how_to_install("StableTargetCallback", "lightning"))
        self.stable, self.name = stable, name

    @property
    def state_key(self) -> str:
        """Name of the state in a checkpoint, one for each metric name."""
        return f"StableTargetCallback({self.name})"

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.stable.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.stable.load_state_dict(state_dict)

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % max(1, trainer.log_every_n_steps) == 0 and self.stable.ess is not None:
            pl_module.log(self.name, self.stable.ess.mean(), batch_size=len(self.stable.ess))


class LossExcessCallback(Callback):
    """Logs how far the network is from the best prediction: `loss/excess`, beside `loss/floor_dsm`.

    A DSM loss is the sum of both on average. The network is examined in evaluation mode.

    Args:
        probes: fixed noisy examples, `stablefield.floor.Probes`.
        prediction: the network as `Probes.excess` calls it, prediction(x_t, t) or prediction(x_t, t, label); the
            module itself by default.
        every: number of steps between two measurements.

    Raises:
        ImportError: Lightning is not installed.
        ValueError: `every` is below 1.
    """

    def __init__(self, probes: Probes, prediction: Callable[..., Tensor] | None = None, every: int = 1000) -> None:
        if Callback is object:
            raise ImportError(how_to_install("LossExcessCallback", "lightning"))
        if every < 1:
            raise ValueError(f"every must be at least 1 step, not {every}")
        self.probes, self.prediction, self.every = probes, prediction, every

    @override
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step % self.every:
            return
        was_training = {module: module.training for module in pl_module.modules()}
        pl_module.eval()
        excess = self.probes.excess(self.prediction or pl_module)
        for module, training in was_training.items():
            module.training = training
        found = {"loss/excess": excess.value, "loss/floor_dsm": self.probes.floor("dsm").value}
        pl_module.log_dict(found, batch_size=len(self.probes))


def gather(module: Any) -> Any:
    """The `gather` of a `StableTarget` in a Lightning module: concatenates a tensor of all ranks.

    Lightning's own `all_gather` stacks them, except on a single device.

    Args:
        module: the Lightning module; it must be attached to a trainer when the stable target is called.

    Returns:
        A function of a tensor (B, ...), which returns (ranks * B, ...).
    """

    def concatenated(tensor: Tensor) -> Tensor:
        found = module.all_gather(tensor)
        return found.flatten(0, 1) if found.ndim > tensor.ndim else found

    return concatenated
