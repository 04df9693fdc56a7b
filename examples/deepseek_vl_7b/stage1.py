"""Stage 1, adaptor warm-up, DeepSeek-VL 7B (SigLIP + SAM): the report's Table 4.

Only the adaptor is trained, on image captions and rendered documents.
Starts from a checkpoint that holds the language model and the towers: deepseek_vl_7b/init in `$MEGAVL_RUNS`
(see tools/convert_checkpoint.py, --to megatron-dist).

Command   NODES=16 examples/launch/torchrun.sh examples/deepseek_vl_7b/stage1.py
          (on every node; or sbatch --nodes=16 examples/launch/slurm.sbatch examples/deepseek_vl_7b/stage1.py)
Hardware  16 nodes of 8 H100-class GPUs with 80 GB: tensor 1 x pipeline 1 x data 128, 1 micro-batches of 2 rows a step.
          The layout is plain configuration: any other that divides gives the same numbers.
Expect    loss, tokens/s and MFU: not measured yet.
"""

import os

from mixtures import ALIGNMENT, TOKENIZER

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
        run_dir=f"{RUNS}/deepseek_vl_7b/stage1",
        model=SIZES["7b"],
        parallel=ParallelConfig(
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            recompute="selective",
        ),
        data=DataConfig(
            tokenizer=TOKENIZER,
            sources=ALIGNMENT,
            seq_length=512,
            length_counts="text",  # 512 text tokens; the 576 of the image come on top
            workers=4,
        ),
        stage=StageConfig(number=1, steps=15000, global_batch=256, micro_batch=2),
        optim=OptimConfig(
            lr=1.0e-3,
            schedule="cosine",
            warmup_steps=128,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.0,
            clip=1.0,
        ),
        checkpoint=CheckpointConfig(init_from=f"{RUNS}/deepseek_vl_7b/init", every_steps=1000, every_minutes=5),
        logging=LoggingConfig(validate_every=1000),
    )
