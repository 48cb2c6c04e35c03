"""Options of mp-pretrain. Sizes of the model come from config.json, never from a flag."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Optional

from megapatch.models.cli import opt
from megapatch.trainer.data.options import DataOptions
from megapatch.trainer.layout.fp8_options import Fp8Options
from megapatch.trainer.layout.moe_options import MoeOptions
from megapatch.trainer.layout.overlap import OverlapOptions
from megapatch.trainer.layout.recompute_options import RecomputeOptions
from megapatch.trainer.offload.activation_options import ActivationOptions
from megapatch.trainer.offload.options import OffloadOptions
from megapatch.trainer.saving.options import ReliabilityOptions
from megapatch.trainer.tuning.lora_options import LoraOptions
from megapatch.trainer.watching.options import Watching

COUNT = "at least 1", lambda value: value >= 1
POSITIVE = "above 0, and finite", lambda value: 0 < value < math.inf
NOT_NEGATIVE = "0 or more", lambda value: 0 <= value < math.inf
SHARE = "at least 0 and below 1", lambda value: 0 <= value < 1
NUMBERS = {  # option: what its number must be
    **dict.fromkeys(("seq_length", "micro_batch_size", "global_batch_size", "train_iters"), COUNT),
    **dict.fromkeys(("log_interval", "eval_iters", "lr_decay_iters"), COUNT),
    **dict.fromkeys(("lr", "adam_eps"), POSITIVE),
    **dict.fromkeys(("lr_warmup_iters", "weight_decay", "clip_grad", "eval_interval", "mtp_loss_weight"), NOT_NEGATIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), SHARE),
    "seed": ("0 or more, and below 2^31", lambda value: 0 <= value < 2**31),
}


@dataclass(frozen=True, kw_only=True)
class TrainOptions(
    RecomputeOptions,
    ActivationOptions,
    OffloadOptions,
    MoeOptions,
    Fp8Options,
    OverlapOptions,
    LoraOptions,
    ReliabilityOptions,
    Watching,
):
    """What every kind of training shares."""

    tool: ClassVar[str] = "mp-pretrain"
    save: Path = opt("folder for checkpoints and the log; training resumes from the newest checkpoint found in it")
    model: Optional[Path] = opt("start from these weights: a Hugging Face folder or a core checkpoint", None)
    init_from: Optional[Path] = opt(
        "start from random weights for this config.json (or the folder that holds it)", None
    )
    tokenizer: Optional[Path] = opt("tokenizer folder, where --model or --init-from brings none", None)
    trust_remote_code: bool = opt("run the tokenizer's own Python code, for folders without tokenizer.json", False)
    device: Literal["auto", "cpu", "gpu"] = opt("what to compute on", "auto")
    precision: Literal["fp32", "bf16"] = opt(
        "of weights and activations; bf16 keeps fp32 masters and gradients", "fp32"
    )
    seed: int = opt("of weights, data order and dropout", 1234)

    seq_length: int = opt("tokens per sample", 1024)
    micro_batch_size: int = opt("samples per forward pass of one data-parallel rank", 1)
    global_batch_size: int = opt("samples per optimizer step, over all ranks and accumulated passes", 8)
    train_iters: int = opt("optimizer steps in all", flags=["--train-iters", "--steps"])

    lr: float = opt("highest learning rate", 3e-4)
    min_lr: float = opt("lowest learning rate after decay", 0.0)
    lr_schedule: Literal["cosine", "linear", "wsd", "constant"] = opt(
        "decay of the learning rate after warm-up", "cosine"
    )
    lr_warmup_iters: int = opt("steps of linear warm-up", 0)
    lr_decay_iters: Optional[int] = opt("step at which --min-lr is reached, if not --train-iters", None)
    lr_wsd_decay_iters: Optional[int] = opt("for --lr-schedule wsd: steps of decay at the end", None)
    weight_decay: float = opt("decoupled weight decay; norms and biases have none", 0.1)
    adam_beta1: float = opt("decay of the gradient's running mean", 0.9)
    adam_beta2: float = opt("decay of the gradient's running square", 0.95)
    adam_eps: float = opt("added to the root of the running square", 1e-8)
    clip_grad: float = opt("largest gradient norm; 0 switches clipping off", 1.0)

    mtp_loss_weight: float = opt(
        "weight of the loss of layers that predict later tokens, which config.json counts in num_nextn_predict_layers; "
        "0 leaves these layers out, and checkpoints then have none",
        0.0,
    )

    data_cache_path: Optional[Path] = opt(
        "folder for what is made of the data once, such as indices, if not SAVE/data-cache", None
    )
    requeue_file: Optional[Path] = opt(
        "made when a signal ended the run and all is saved, for a job script to see", None
    )
    eval_interval: int = opt("steps between evaluations on the validation split; 0: none", 0)
    eval_iters: int = opt("global batches per evaluation", 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_recompute()
        self.refuse_activations(self.recompute, self.recompute_modules, linked=self.offload_optimizer is not None)
        self.refuse_offload()
        self.refuse_moe()
        self.refuse_fp8(self.precision)
        self.refuse_overlap(self)
        for name, (words, fits) in NUMBERS.items():
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be {words}")
        decay = self.lr_decay_iters or self.train_iters
        refused = {
            "give one of --model (weights to start from) and --init-from (config.json for random ones)": (
                (self.model is None) == (self.init_from is None)
            ),
            "--lora-rank and --lora-from need --model, whose weights the adapters are for": (
                self.adapts and self.model is None
            ),
            "--mtp-loss-weight: not with adapters; layers for multi-token prediction get none": (
                self.adapts and self.mtp_loss_weight > 0
            ),
            f"--save {self.save}: is the folder of --model; name another one": (
                self.model is not None and self.model.resolve() == self.save.resolve()
            ),
            "--lr-schedule wsd and --lr-wsd-decay-iters need each other": (
                (self.lr_schedule == "wsd") != bool(self.lr_wsd_decay_iters)
            ),
            f"--lr-warmup-iters {self.lr_warmup_iters}: must be below {decay}, the steps until --min-lr is reached": (
                self.lr_warmup_iters >= decay
            ),
            f"--lr-wsd-decay-iters {self.lr_wsd_decay_iters}: more than the {decay - self.lr_warmup_iters} steps after "
            "--lr-warmup-iters": (self.lr_wsd_decay_iters or 0) > decay - self.lr_warmup_iters,
            f"--profile-steps {self.profile_steps}: the run ends with step {self.train_iters}": (
                self.profiled().start > self.train_iters
            ),
            f"--mtp-loss-weight needs --recompute-unit 1, found {self.recompute_unit}": (
                self.mtp_loss_weight > 0 and self.recompute_unit != 1
            ),
            f"--min-lr {self.min_lr}: must be between 0 and --lr {self.lr}": not 0 <= self.min_lr <= self.lr,
            f"--seq-length {self.seq_length}: must be divisible by 2 x --cp": (
                self.cp > 1 and self.seq_length % (2 * self.cp) != 0
            ),
            f"--seq-length {self.seq_length}: must be divisible by --cp x --tp with --sequence-parallel": (
                self.sequence_parallel and self.seq_length // self.cp % self.tp != 0
            ),
        }
        for message in (text for text, wrong in refused.items() if wrong):
            raise ValueError(message)

    @property
    def pass_shape(self) -> tuple[int, int]:
        """Tokens of a sample and samples, as the layers meet them in a forward pass."""
        return self.seq_length, self.micro_batch_size

    @property
    def data_cache(self) -> Path:
        """Folder for what is made of the data once, and then read by every run."""
        return self.data_cache_path or self.save / "data-cache"

    @property
    def tests(self) -> bool:
        """Is there an evaluation after the last step?"""
        return False

    @property
    def log_path(self) -> Path:
        """Where the JSON-lines log goes."""
        return self.log_file or self.save / "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(DataOptions, TrainOptions):
    """Train a language model with megatron-core on .bin/.idx data, or straight from files of text, on a CPU or on GPUs;
    run it under torchrun for more than one process. It resumes by itself from --save, to the bit where the layout is
    the same."""

    eod_mask_loss: bool = opt("no loss on end-of-document tokens", False)
    reset_position_ids: bool = opt("positions start again after an end-of-document token", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_data()
