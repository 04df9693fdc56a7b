"""Quickstart, stage 3: fine-tuning on questions and answers, a third of them without an image.

SAM stays frozen, SigLIP is trained. Two differences from the report: rows are packed, so that a text step and an image
step cost the same, and the text share is 34% instead of Table 2's 48%, because digits are learnt in this stage alone
(the towers start from random weights) while text stays well within its bar. Pages are left out, see README.md.

    python -m torch.distributed.run --nproc-per-node 4 -m megavl.train examples/quickstart/stage3.py

Hardware: 4 processes on 2 CPU cores. Paths are relative to the folder it is started in; `run.py` prepares the data.
"""

from megavl.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    OptimConfig,
    ParallelConfig,
    Recipe,
    SourceConfig,
    StageConfig,
)
from megavl.model.sizes import SIZES


def recipe() -> Recipe:
    """Stage 3 of the quickstart."""
    return Recipe(
        run_dir="runs/quickstart/stage3",
        model=SIZES["tiny_hybrid"],
        parallel=ParallelConfig(tensor=2, pipeline=2),
        data=DataConfig(
            tokenizer="runs/quickstart/data/tokenizer.model",
            sources=(
                SourceConfig(
                    name="text_sft", path="runs/quickstart/data/train_text_sft", modality="language", share=0.34
                ),
                SourceConfig(
                    name="digit_questions",
                    path="runs/quickstart/data/train_digit_questions",
                    modality="multimodal",
                    share=0.66,
                ),
            ),
            validation=(
                SourceConfig(
                    name="validation_text", path="runs/quickstart/data/validation_text", modality="language", share=1.0
                ),
            ),
            seq_length=136,
            packing=True,
            grouping="step",
            workers=0,
        ),
        stage=StageConfig(number=3, steps=330, global_batch=12, micro_batch=6, dtype="fp32"),
        optim=OptimConfig(lr=1.5e-3, schedule="cosine", warmup_steps=10, final=0.02),
        checkpoint=CheckpointConfig(init_from="runs/quickstart/stage2", every_steps=100),
        logging=LoggingConfig(every=10),
    )
