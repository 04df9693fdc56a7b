"""Stage 2, joint vision-language pre-training, DeepSeek-VL 7B (SigLIP + SAM): the report's Table 4.

Adaptor and language model are trained on Table 1's mixture, 70% language, with 2% of fine-tuning data; rows are packed
to 4096 tokens and every global step is of one modality. The language share falls from 1.0 to its target over the first
10% of the steps.
Starts from stage 1's newest checkpoint.

Command   NODES=64 examples/launch/torchrun.sh examples/deepseek_vl_7b/stage2.py
          (on every node; or sbatch --nodes=64 examples/launch/slurm.sbatch examples/deepseek_vl_7b/stage2.py)
Hardware  64 nodes of 8 H100-class GPUs with 80 GB: tensor 1 x pipeline 4 x data 128, 18 micro-batches of 1 row a step.
          The layout is plain configuration: any other that divides gives the same numbers.
Expect    loss, tokens/s and MFU: not measured yet.
"""

import os

from mixtures import JOINT, TOKENIZER, held_out

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
        run_dir=f"{RUNS}/deepseek_vl_7b/stage2",
        model=SIZES["7b"],
        parallel=ParallelConfig(
            pipeline=4,
            layout="8,8,8,6",  # the last stage also has the head, worth about two layers
            distributed_optimizer=True,
            overlap_grad_reduce=True,
            recompute="selective",
        ),
        data=DataConfig(
            tokenizer=TOKENIZER,
            sources=JOINT,
            validation=(held_out("text", "language"), held_out("captions", "multimodal")),
            seq_length=4096,
            packing=True,
            grouping="step",
            language_warmup=0.1,
            workers=4,
        ),
        stage=StageConfig(number=2, steps=42000, global_batch=2304, micro_batch=1),
        optim=OptimConfig(
            lr=4.2e-5,
            schedule="multistep",
            warmup_steps=2000,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.0,
            clip=1.0,
        ),
        checkpoint=CheckpointConfig(init_from=f"{RUNS}/deepseek_vl_7b/stage1", every_steps=1000, every_minutes=5),
        logging=LoggingConfig(validate_every=1000),
    )
