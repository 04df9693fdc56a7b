"""Stage 3, supervised fine-tuning, DeepSeek-VL 7B (SigLIP + SAM): the report's Table 4.

Language model, adaptor and SigLIP are trained on Table 2's mixture; answers and end marks are learnt, SAM stays frozen.
Starts from stage 2's newest checkpoint.

Command   NODES=8 examples/launch/torchrun.sh examples/deepseek_vl_7b/stage3.py
          (on every node; or sbatch --nodes=8 examples/launch/slurm.sbatch examples/deepseek_vl_7b/stage3.py)
Hardware  8 nodes of 8 H100-class GPUs with 80 GB: tensor 1 x pipeline 4 x data 16, 16 micro-batches of 1 row a step.
          The layout is plain configuration: any other that divides gives the same numbers.
Expect    loss, tokens/s and MFU: not measured yet.
"""

import os

from mixtures import FINE_TUNING, TOKENIZER, held_out

from megavl.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimConfig,
    ParallelConfig,
    Recipe,
    StageConfig,
)
from megavl.model.sizes import SIZES

RUNS = os.environ.get("MEGAVL_RUNS", "runs")
"""Root of the run folders."""


def recipe() -> Recipe:
    """The run."""
    return Recipe(
        run_dir=f"{RUNS}/deepseek_vl_7b/stage3",
        model=SIZES["7b"],
        parallel=ParallelConfig(
            pipeline=4,
            layout="7,8,8,7",  # the first stage also encodes images and trains SigLIP
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            recompute="selective",
            recompute_vision=True,
        ),
        data=DataConfig(
            tokenizer=TOKENIZER,
            sources=FINE_TUNING,
            validation=(held_out("text", "language"), held_out("conversations", "multimodal")),
            seq_length=4096,
            grouping="step",
            workers=4,
        ),
        stage=StageConfig(number=3, steps=10000, global_batch=256, micro_batch=1),
        optim=OptimConfig(
            lr=2.0e-5,
            schedule="cosine",
            warmup_steps=256,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.0,
            clip=1.0,
        ),
        checkpoint=CheckpointConfig(init_from=f"{RUNS}/deepseek_vl_7b/stage2", every_steps=1000, every_minutes=5),
        logging=LoggingConfig(validate_every=1000),
    )
