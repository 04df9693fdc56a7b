"""Quickstart, stage 1: the adaptor warms up on captions and pages; towers and decoder are frozen.

No packing, image tokens do not count towards the sequence length, as in the report.

    python -m torch.distributed.run --nproc-per-node 4 -m megavl.train examples/quickstart/stage1.py

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
    """Stage 1 of the quickstart."""
    return Recipe(
        run_dir="runs/quickstart/stage1",
        model=SIZES["tiny_hybrid"],
        parallel=ParallelConfig(tensor=2, pipeline=2),
        data=DataConfig(
            tokenizer="runs/quickstart/data/tokenizer.model",
            sources=(
                SourceConfig(
                    name="digit_captions",
                    path="runs/quickstart/data/train_digit_captions",
                    modality="multimodal",
                    share=0.8,
                ),
                SourceConfig(name="pages", path="runs/quickstart/data/train_pages", modality="multimodal", share=0.2),
            ),
            validation=(
                SourceConfig(
                    name="validation_text", path="runs/quickstart/data/validation_text", modality="language", share=1.0
                ),
            ),
            seq_length=64,
            length_counts="text",
            workers=0,
        ),
        stage=StageConfig(number=1, steps=60, global_batch=40, micro_batch=20, dtype="fp32"),
        optim=OptimConfig(lr=3e-3, schedule="cosine", warmup_steps=5, final=0.1),
        checkpoint=CheckpointConfig(init_from="runs/quickstart/stage0", every_steps=100),
        logging=LoggingConfig(every=10),
    )
