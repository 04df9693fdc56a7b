"""A small data set, a recipe for it, and the real command, for tests that train."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from PIL import Image

from megavl.data.store_writer import StoreWriter
from megavl.data.tokenizer import IMAGE_NAME, Tokenizer

RECIPE = """
import dataclasses
from megavl.config import *
from megavl.model.sizes import SIZES

ROOT = "{root}"


def recipe() -> Recipe:
    small = SIZES["tiny"]
    decoder = dataclasses.replace(small.decoder, layers=2, hidden=32, heads=2, kv_heads=2, ffn=48, vocab=384)
    siglip = dataclasses.replace(small.siglip, image_size=16, width=16, layers=1, heads=2, mlp=32)

    def source(name, modality, share):
        return SourceConfig(name=name, path=f"{{ROOT}}/{{name}}", modality=modality, share=share)

    return Recipe(
        run_dir=f"{{ROOT}}/run",
        model=dataclasses.replace(small, decoder=decoder, siglip=siglip),
        parallel=ParallelConfig(device="cpu"),
        data=DataConfig(
            tokenizer=f"{{ROOT}}/tokenizer.model",
            sources=(source("text", "language", 0.5), source("images", "multimodal", 0.5)),
            validation=(source("held_out", "language", 1.0),),
            seq_length=32,
            workers=1,
        ),
        stage=StageConfig(number=2, steps=4, global_batch=4, micro_batch=1, dtype="fp32", seed=5),
        optim=OptimConfig(lr=1e-2, schedule="cosine", warmup_steps=1),
        checkpoint=CheckpointConfig(background=False),
        logging=LoggingConfig(tensorboard=False, validation_rows=6),
    )
"""


def make_data(root: Path, *, broken_images: bool = False) -> Path:
    """Write a tokenizer, three stores and a recipe; returns the recipe."""
    (root / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog 0123456789\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(root / "corpus.txt"),
        model_prefix=str(root / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=[IMAGE_NAME],
        minloglevel=2,
    )
    tokenizer = Tokenizer(root / "tokenizer.model")
    random = np.random.default_rng(0)
    for name, count in (("text", 40), ("held_out", 6)):
        writer = StoreWriter(root / name, kind="text", tokenizer_fingerprint=tokenizer.fingerprint)
        for _ in range(count):
            ids = random.integers(3, tokenizer.vocab_size, size=random.integers(10, 60))
            ids[ids == tokenizer.image_id] = 5
            writer.add(np.array([tokenizer.bos_id, *ids, tokenizer.eos_id]))
        writer.finish()
    writer = StoreWriter(root / "images", kind="caption", tokenizer_fingerprint=tokenizer.fingerprint)
    for number in range(24):
        ids = np.array([tokenizer.bos_id, tokenizer.image_id, *range(40, 45 + number % 7), tokenizer.eos_id])
        path = root / "image.png"
        Image.fromarray(random.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(path)
        image = b"not an image" if broken_images else path.read_bytes()
        writer.add(ids, ids > 5, [image])
    writer.finish()
    (root / "recipe.py").write_text(RECIPE.format(root=root))
    return root / "recipe.py"


def command(
    recipe: Path, *options: str, processes: int = 2, launcher: tuple[str, ...] = ("--standalone",)
) -> list[str]:
    """The command line of a run on this machine; a free port is chosen by torchrun."""
    run = [sys.executable, "-m", "torch.distributed.run", *launcher, "--nproc-per-node", str(processes)]
    return [*run, "-m", "megavl.train", str(recipe), *options]


def environment() -> dict[str, str]:
    """One thread per process; the loop-back device, as the host name need not resolve.

    Without torch's compiler, which CPU mode never calls: megatron-core hands it its fusions while it is imported, for
    1.8 of the 5.3 s of computing with which each process starts.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCHDYNAMO_DISABLE": "1"}


def start(words: list[str]) -> "subprocess.Popen[str]":
    """Start a command in a process group of its own."""
    pipe = subprocess.PIPE
    return subprocess.Popen(words, env=environment(), stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finish(process: "subprocess.Popen[str]", limit_s: float = 900) -> tuple[int, str, str]:
    """Exit code, standard output and error; a command that hangs is killed with all it started, and fails the test."""
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"no end within {limit_s} s\n{out[-3000:]}\n{err[-3000:]}") from None
    return process.returncode, out, err


def run(recipe: Path, *options: str, processes: int = 2) -> tuple[int, str, str]:
    """Run to the end."""
    return finish(start(command(recipe, *options, processes=processes)))


def lines(run_dir: Path, kind: str = "loss") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that have the field `kind`."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if kind in line]
