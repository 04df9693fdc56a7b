"""Stage 3, supervised fine-tuning, DeepSeek-VL 1.3B (SigLIP): the report's Table 4.

Language model, adaptor and SigLIP are trained on Table 2's mixture; answers and end marks are learnt, SAM stays frozen.
Starts from stage 2's newest checkpoint.

Command   NODES=4 examples/launch/torchrun.sh examples/deepseek_vl_1.3b/stage3.py
          (on every node; or sbatch --nodes=4 examples/launch/slurm.sbatch examples/deepseek_vl_1.3b/stage3.py)
Hardware  4 nodes of 8 H100-class GPUs with 80 GB: tensor 1 x pipeline 1 x data 32, 4 micro-batches of 2 rows a step.
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
        run_dir=f"{RUNS}/deepseek_vl_1.3b/stage3",
        model=SIZES["1.3b"],
        parallel=ParallelConfig(
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
        ),
        data=DataConfig(
            tokenizer=TOKENIZER,
            sources=FINE_TUNING,
            validation=(held_out("text", "language"), held_out("conversations", "multimodal")),
            seq_length=4096,
            grouping="step",
            workers=4,
        ),
        stage=StageConfig(number=3, steps=10000, global_batch=256, micro_batch=2),
        optim=OptimConfig(
            lr=2.0e-5,
            schedule="cosine",
            warmup_steps=256,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.0,
            clip=1.0,
        ),
        checkpoint=CheckpointConfig(init_from=f"{RUNS}/deepseek_vl_1.3b/stage2", every_steps=1000, every_minutes=5),
        logging=LoggingConfig(validate_every=1000),
    )
