"""Quickstart, stage 2: adaptor and decoder learn language and images together, 70% language.

Rows are packed; a step holds one modality; the language share falls from 1.0 to 0.7 over the first half.

    python -m torch.distributed.run --nproc-per-node 4 -m megavl.train examples/quickstart/stage2.py

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
    """Stage 2 of the quickstart."""
    return Recipe(
        run_dir="runs/quickstart/stage2",
        model=SIZES["tiny_hybrid"],
        parallel=ParallelConfig(tensor=2, pipeline=2),
        data=DataConfig(
            tokenizer="runs/quickstart/data/tokenizer.model",
            sources=(
                SourceConfig(name="text", path="runs/quickstart/data/train_text", modality="language", share=0.7),
                SourceConfig(
                    name="digit_captions",
                    path="runs/quickstart/data/train_digit_captions",
                    modality="multimodal",
                    share=0.12,
                ),
                SourceConfig(
                    name="digit_questions",
                    path="runs/quickstart/data/train_digit_questions",
                    modality="multimodal",
                    share=0.12,
                ),
                SourceConfig(name="pages", path="runs/quickstart/data/train_pages", modality="multimodal", share=0.06),
            ),
            validation=(
                SourceConfig(
                    name="validation_text", path="runs/quickstart/data/validation_text", modality="language", share=1.0
                ),
            ),
            seq_length=136,
            packing=True,
            grouping="step",
            language_warmup=0.5,
            workers=0,
        ),
        stage=StageConfig(number=2, steps=140, global_batch=16, micro_batch=8, dtype="fp32"),
        optim=OptimConfig(lr=1e-3, schedule="multistep", warmup_steps=10),
        checkpoint=CheckpointConfig(init_from="runs/quickstart/stage1", every_steps=100),
        logging=LoggingConfig(every=10),
    )
