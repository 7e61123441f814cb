"""The section `training`: length, batch size, optimisation, averages, precision, and how often a run writes."""

from dataclasses import dataclass
from typing import Literal

from stablefield.precision import Precision
from stablefield.schedule import EMA, Decay, LearningRate, average_names

MOST_PREFETCHED = 2**16  # examples; memory is allocated for all of them
_USUAL_SHARE = 0.1  # of a GPU's memory that data may need to be kept there
_MOST = 2**53  # of images; beyond, floats do not hold every integer
_POSITIVE: tuple[str, ...] = ("images", "batch_size", "micro_batch_size", "learning_rate", "gradient_clip", "adam_eps")
_POSITIVE += ("save_every", "keep_checkpoints", "log_every", "probes")
_NOT_NEGATIVE = ("learning_rate_warmup", "ema_rampup_ratio", "learning_rate_decay_start", "sample_every", "probe_every")


@dataclass(frozen=True)
class Training:
    """Settings of a training run. Numbers of images count every image of every step, over all ranks.

    Attributes:
        images: length of the run.
        batch_size: images per step, over all ranks.
        micro_batch_size: images per forward and backward pass on one rank, whose gradients are accumulated; by default
            the rank's whole part of the batch.
        learning_rate: peak learning rate of Adam, after the warmup.
        learning_rate_warmup: images over which the learning rate rises linearly from 0.
        learning_rate_decay: "none", "cosine" (to 0 at the end of the run) or "inverse-sqrt" (see `LearningRate`).
        learning_rate_decay_start: images after which the learning rate decays.
        gradient_clip: norm that longer gradients are scaled down to; None clips nothing.
        adam_eps: eps of Adam. The loss is a mean over dimensions: for a sum over D of them, divide by D.
        ema_half_life: half-life of the moving average of the weights, in images. Several half-lives give several
            averages, the first of which is used for sampling.
        ema_rampup_ratio: early in training a half-life is at most this share of the images seen.
        precision: arithmetic of matrix products and convolutions: "float32", "tf32", "bfloat16" or "float16". Weights,
            averages and sums are float32 in all of them, and TF32 is off in all but "tf32".
        target_prefetch: examples of a rank whose exact targets are computed in one call, from as many steps as fit;
            other targets are computed step by step.
        target_sharding: shards the data of an exact target over the ranks.
        resident: data that are kept on a GPU: "auto" (those that need at most a tenth of its memory), another share of
            its memory, or false for none. Other data are copied to it as they are stored, bytes as bytes, batch by
            batch.
        compile: compiles the network with `torch.compile` (a minute or more at the start). "auto" compiles in new runs
            on CUDA that take ten times as long as the compilation, if a trial step agrees with the eager one; the
            decision replaces "auto" in the run's configuration.
        deterministic: restricts torch to deterministic operations, so that a GPU repeats results bit for bit.
        stratified: spreads the times of a batch evenly over the distribution of t.
        conditional: gives the network the class of each image.
        label_dropout: probability that an image is trained without its label, for classifier-free guidance.
        seed: seed of the initial weights, the order of the data, the noise and the references.
        device: "auto" (a GPU if there is one), or a name as torch has it, such as "cuda:1".
        save_every: images between checkpoints.
        keep_checkpoints: number of recent checkpoints that are kept.
        log_every: images between lines of the metrics.
        sample_every: images between sheets of samples; 0 draws none.
        probe_every: images between measurements of the excess of the network over the floor of its loss; 0 measures
            none. A run of at least that many images is also measured at its end.
        probes: noisy examples in each of 8 ranges of the noise level, at which the excess is measured.

    Raises:
        ValueError: a value out of range, or settings that exclude each other.
    """

    images: int = 96_000
    batch_size: int = 64
    micro_batch_size: int | None = None
    learning_rate: float = 1e-3
    learning_rate_warmup: int = 10_000
    learning_rate_decay: Decay = "none"
    learning_rate_decay_start: int = 0
    gradient_clip: float | None = None
    adam_eps: float = 1e-8
    ema_half_life: float | tuple[float, ...] = 20_000
    ema_rampup_ratio: float = 0.1
    precision: Precision = "float32"
    target_prefetch: int = 1024
    target_sharding: bool = False
    resident: Literal["auto", False] | float = "auto"
    compile: bool | Literal["auto"] = False
    deterministic: bool = False
    stratified: bool = False
    conditional: bool = False
    label_dropout: float = 0.0
    seed: int = 0
    device: str = "auto"
    save_every: int = 50_000
    keep_checkpoints: int = 1
    log_every: int = 1_000
    sample_every: int = 0
    probe_every: int = 25_000
    probes: int = 16

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            if (value := getattr(self, name)) is not None and not 0 < value <= _MOST:
                raise ValueError(f"{name} must be positive, not {value}, and at most 2^53")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) <= _MOST:
                raise ValueError(f"{name} must not be negative, but is {getattr(self, name)}")
        for half_life in self.half_lives:
            if not 0 <= half_life <= _MOST:
                raise ValueError(f"ema_half_life must not be negative, but is {half_life}")
        if not 1 <= self.target_prefetch <= MOST_PREFETCHED:
            raise ValueError(f"target_prefetch must be between 1 and {MOST_PREFETCHED:,}, not {self.target_prefetch}")
        if not 0 <= self.resident_share <= 1:
            raise ValueError(f'resident is "auto", false or a share of memory, from 0 to 1, not {self.resident}')
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout is a probability between 0 and 1, not {self.label_dropout}")
        if self.label_dropout and not self.conditional:
            raise ValueError(f"label_dropout={self.label_dropout} needs labels to drop: set conditional=true")
        average_names(self.half_lives)
        self.rate  # noqa: B018 (it checks the decay)

    @property
    def resident_share(self) -> float:
        """Largest share of a GPU's memory that data may need to be kept there."""
        return _USUAL_SHARE if self.resident == "auto" else float(self.resident)

    @property
    def half_lives(self) -> tuple[float, ...]:
        """Half-lives of all averages, in images."""
        return self.ema_half_life if isinstance(self.ema_half_life, tuple) else (self.ema_half_life,)

    @property
    def emas(self) -> tuple[EMA, ...]:
        """Moving averages of the weights, in the order of the half-lives."""
        return tuple(EMA(half_life, self.ema_rampup_ratio) for half_life in self.half_lives)

    @property
    def rate(self) -> LearningRate:
        """Learning rate as a function of the images seen."""
        return LearningRate(
            self.learning_rate,
            self.learning_rate_warmup,
            self.learning_rate_decay,
            self.learning_rate_decay_start,
            self.images,
        )
