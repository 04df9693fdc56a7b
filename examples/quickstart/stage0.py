"""Quickstart, language pre-training: there is no public language model of this size to start from.

The decoder alone learns the documentation of the running Python, in rows of 128 tokens.

    python -m torch.distributed.run --nproc-per-node 4 -m megavl.train examples/quickstart/stage0.py

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
    """Stage 0 of the quickstart."""
    return Recipe(
        run_dir="runs/quickstart/stage0",
        model=SIZES["tiny_hybrid"],
        parallel=ParallelConfig(tensor=2, pipeline=2),
        data=DataConfig(
            tokenizer="runs/quickstart/data/tokenizer.model",
            sources=(
                SourceConfig(name="text", path="runs/quickstart/data/train_text", modality="language", share=1.0),
            ),
            validation=(
                SourceConfig(
                    name="validation_text", path="runs/quickstart/data/validation_text", modality="language", share=1.0
                ),
            ),
            seq_length=128,
            workers=0,
        ),
        stage=StageConfig(number=0, steps=250, global_batch=16, micro_batch=8, dtype="fp32"),
        optim=OptimConfig(lr=6e-3, schedule="cosine", warmup_steps=20, final=0.1),
        checkpoint=CheckpointConfig(every_steps=100),
        logging=LoggingConfig(every=10),
    )
