"""The settings of a run: one frozen dataclass per section. What contradicts itself, `megavl/validate.py` says.

A recipe (see `megavl/recipe.py`) builds one `Recipe`. Nothing in this file knows the rest of the package, so every
station can import it. Sizes of the released models are literals in `megavl/model/sizes.py`.
"""

from dataclasses import dataclass
from typing import Literal

Modality = Literal["language", "multimodal"]
AdaptorKind = Literal["hybrid", "mlp_gelu", "shared", "separate", "pool_w", "pool_h"]
Implementation = Literal["auto", "triton", "reference"]
VisionPlacement = Literal["replicate", "split_tensor", "split_model"]
Grouping = Literal["none", "microbatch", "step"]


@dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """The low-resolution tower (SigLIP, report section 3.1)."""

    image_size: int
    """Side of the square input in pixels."""
    patch_size: int
    """Side of a patch in pixels."""
    width: int
    """Feature dimension."""
    layers: int
    """Transformer blocks."""
    heads: int
    """Attention heads per block."""
    mlp: int
    """Hidden dimension of the feed-forward network."""

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class SamConfig:
    """The high-resolution tower (SAM-B ViTDet) with the two stride-2 convolutions that follow it."""

    image_size: int
    """Side of the square input in pixels."""
    patch_size: int
    """Side of a patch in pixels."""
    width: int
    """Feature dimension of the backbone."""
    layers: int
    """Transformer blocks."""
    heads: int
    """Attention heads per block."""
    mlp: int
    """Hidden dimension of the feed-forward network."""
    window: int
    """Side of an attention window in patches."""
    global_layers: tuple[int, ...]
    """Indices (from 0) of the blocks that attend over the whole grid; the first also feeds the `neck_hd` branch."""
    neck: int
    """Channels after the neck."""
    upsample: int
    """Side to which the neck's output is interpolated; four times the side of the final grid."""
    downsample: tuple[int, int]
    """Channels after each of the two stride-2 convolutions."""

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The language model (DeepSeek-LLM, LLaMA micro-design)."""

    layers: int
    """Transformer layers."""
    hidden: int
    """Hidden dimension."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key and value heads; fewer than `heads` is grouped-query attention."""
    ffn: int
    """Hidden dimension of SwiGLU (of each of its two halves)."""
    vocab: int
    """Rows of the embedding table and of the output head, padding included."""
    max_positions: int = 16384
    """Longest sequence the rotary table is meant for, in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Epsilon of RMSNorm."""
    init_std: float = 0.006
    """Standard deviation of the initial weights (DeepSeek-LLM: 0.006)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepSeek-VL model: towers, adaptor, decoder."""

    decoder: DecoderConfig
    """The language model."""
    siglip: SiglipConfig
    """The low-resolution tower; every size has it."""
    sam: SamConfig | None
    """The high-resolution tower, or None (the released 1.3B has SigLIP alone)."""
    adaptor: AdaptorKind
    """`mlp_gelu` for one tower; `hybrid` (released 7B) or another row of the report's Table 10 for two."""
    background: tuple[int, int, int]
    """RGB colour, 0 to 255, that pads an image to a square."""

    @property
    def image_size(self) -> int:
        """Side in pixels of the image that enters the towers."""
        return self.sam.image_size if self.sam else self.siglip.image_size

    @property
    def tokens_per_image(self) -> int:
        """Positions of the sequence that one image takes (576 in the released sizes)."""
        return self.siglip.grid**2


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the model is laid over the ranks. The data-parallel size is what is left of the world."""

    tensor: int = 1
    """Tensor-parallel size, in ranks."""
    pipeline: int = 1
    """Pipeline-parallel size, in ranks."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank; more than one is the interleaved schedule."""
    layout: str = ""
    """Decoder layers per stage in pipeline order, such as `8,8,8,6` (pipeline*virtual stages); empty: an even split;
    `auto`: planned at start from the stores' lengths and the machine's rates, and with it, where they stand at their
    defaults, `vision` and the least `recompute` and `recompute_vision` that fit; none of these changes the numbers."""
    sequence: bool = False
    """Sequence parallelism: activations between the tensor-parallel layers are cut along the sequence."""
    vision: VisionPlacement = "replicate"
    """Who encodes the images: `replicate` = every tensor rank of stage 0 encodes every image (report section 3.3);
    `split_tensor` = the tensor ranks of stage 0 share them; `split_model` = what is frozen of the towers runs on all
    tensor and pipeline ranks before the pipeline's schedule, from the tail of the step before on; the rest as in
    `split_tensor`."""
    vision_batch: int = 8
    """Images in one pass of the frozen towers under `split_model`."""
    vision_ahead_mib: int = 4096
    """Most MiB of their features, of a step and the next, that a rank holds under `split_model`; images beyond that are
    as in `split_tensor`."""
    vision_cache: str = ""
    """Folder, best on a local disk, that keeps features of frozen towers under `split_model`; empty: none."""
    vision_cache_gib: float = 64.0
    """Most GiB in that folder; what was not used for longest goes first."""
    distributed_optimizer: bool = False
    """Shard the optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass of the last micro-batch still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass runs; needs the other two."""
    batch_p2p_comm: bool = True
    """Exchange pipeline messages as one batch of NCCL; off: one by one. Interleaved stages always send one by one, as
    their messages overlap with computing."""
    batch_p2p_sync: bool = True
    """Wait for the device after each such batch, against a race in old versions of torch (megatron-core's default)."""
    overlap_p2p_comm_warmup_flush: bool = False
    """Interleaved stages: overlap messages with computing in the first and last part of the schedule too."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in decoder: `selective` = core attention, `full` = whole layers."""
    recompute_vision: bool = False
    """Recompute each SigLIP block in the backward pass."""
    compile_vision: bool = False
    """Compile the blocks of frozen towers with `torch.compile`; the first steps then take minutes."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """`auto` takes CUDA where there is a device, otherwise CPU with gloo."""
    timeout_s: int = 600
    """Seconds a collective may wait before the run is stopped."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One prepared data source."""

    name: str
    """How logs and plans call it."""
    path: str
    """Store prefix: `path.bin`, `path.idx` and the files that `tools/build_data.py` puts beside them."""
    modality: Modality
    """Which kind of step draws from it. Text-only SFT data is `language`."""
    share: float
    """Share of the rows of the whole mixture; shares of a mixture sum to 1."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read, in which order, and how rows are made of it."""

    tokenizer: str
    """`tokenizer.json` or a SentencePiece `.model`; must be the one the stores were built with."""
    sources: tuple[SourceConfig, ...]
    """The training mixture."""
    validation: tuple[SourceConfig, ...] = ()
    """Held-out sources; their perplexity is logged. Shares are ignored."""
    seq_length: int
    """Longest row in tokens."""
    length_counts: Literal["all", "text"] = "all"
    """`text`: `seq_length` counts text tokens only and image tokens come on top (stage 1: 512 + 576)."""
    packing: bool = False
    """Fill rows with several samples. Language corpora are always read as full rows, as Megatron's GPT data."""
    separate_documents: bool = True
    """Packed documents do not attend to each other and positions restart; off: one causal sequence per row."""
    grouping: Grouping = "step"
    """What holds one modality only: a whole global step (the report), a micro-batch, or nothing."""
    language_warmup: float = 0.0
    """Fraction of the steps over which the language share falls linearly from 1.0 to its target; 0: starts there."""
    workers: int = 2
    """Loader processes per rank; 0 loads in the training process."""
    max_failed_samples: int = 100
    """Stop when more samples than this could not be decoded."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One training stage (report, Table 4)."""

    number: Literal[0, 1, 2, 3]
    """1 adaptor warm-up, 2 joint pre-training, 3 fine-tuning; 0 is language pre-training of the decoder alone."""
    steps: int
    """Optimizer steps."""
    global_batch: int
    """Rows per step over all data-parallel ranks."""
    micro_batch: int = 1
    """Rows per forward pass."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute type; gradients and master weights are always fp32."""
    seed: int = 1234
    """Seed of initialisation, data order and dropout-free randomness."""
    max_nonfinite: int = 10
    """Stop after this many steps in a row with a non-finite loss or gradient."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule (report, Table 4)."""

    lr: float
    """Peak learning rate."""
    vision_lr: float | None = None
    """Peak learning rate of SigLIP; None: the same as `lr`."""
    schedule: Literal["cosine", "multistep", "constant"]
    """After the warm-up: cosine to `final`, or 31.6% of the peak after 80% of the steps and 10% after 90%."""
    warmup_steps: int
    """Steps of linear warm-up."""
    final: float = 0.0
    """Cosine floor as a fraction of the peak."""
    beta1: float = 0.9
    """AdamW."""
    beta2: float = 0.95
    """AdamW."""
    eps: float = 1e-8
    """AdamW."""
    weight_decay: float = 0.0
    """AdamW, decoupled."""
    clip: float = 1.0
    """Largest norm of the global gradient."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """How each operator is computed; start-up prints what runs. Checkpoints do not depend on it.

    `triton`: the kernel of `megavl.kernels`; `reference`: plain PyTorch; `auto`: triton on CUDA, reference on CPU.
    """

    sam_attention: Implementation = "auto"
    """Attention of SAM's blocks, with relative positions."""
    rmsnorm: Implementation = "auto"
    """The decoder's norms."""
    swiglu: Implementation = "auto"
    """Activation of the decoder's feed-forward networks."""
    rope: Implementation = "auto"
    """Rotary positions of query and key."""
    linear_cross_entropy: Implementation = "auto"
    """Output head and loss, in chunks of tokens, so that the logits are never whole in memory."""
    image_scatter: Implementation = "auto"
    """Image features into the embedded text."""
    adaptor: Implementation = "auto"
    """Vision-language adaptor of kind `hybrid` or `mlp_gelu`; the other kinds are plain PyTorch."""
    interpolate: Implementation = "auto"
    """Resizing behind SAM's necks; `auto` takes the reference until triton is measured to be faster."""
    strided_conv: Implementation = "auto"
    """The two stride-2 convolutions behind that; `auto` takes the reference (cuDNN), as for `interpolate`."""
    interpolate_conv: Implementation = "auto"
    """Resizing and the first convolution in one; `auto` takes the reference: the two operators one after the other."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is saved and what a run starts from."""

    init_from: str = ""
    """Run folder or checkpoint whose model weights start this run; ignored once the run has its own checkpoint."""
    every_steps: int = 0
    """Save after this many steps; 0: only at the end and when asked to stop."""
    every_minutes: float = 0.0
    """Save after this many minutes as well; 0: never."""
    keep: int = 2
    """Complete checkpoints to keep."""
    background: bool = True
    """Write in a forked process while training goes on."""


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is written while training."""

    every: int = 1
    """Steps between lines on the terminal; `metrics.jsonl` has every step."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    validate_every: int = 0
    """Steps between measurements of held-out perplexity; 0: at the end only, where there are validation sources."""
    validation_rows: int = 256
    """Rows per validation source."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run."""

    run_dir: str
    """Folder of logs, metrics and checkpoints."""
    model: ModelConfig
    """Sizes."""
    parallel: ParallelConfig
    """Layout over ranks."""
    data: DataConfig
    """Sources and their order."""
    stage: StageConfig
    """Training stage and batch."""
    optim: OptimConfig
    """Optimizer and schedule."""
    kernels: KernelsConfig = KernelsConfig()
    """Fused operators."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    logging: LoggingConfig = LoggingConfig()
    """Reporting."""
