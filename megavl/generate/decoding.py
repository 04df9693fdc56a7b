"""Greedy decoding: the most likely next token, again and again, until the end mark.

In: prompts with their images. Out: the ids that the model appends. Each new token is one more forward pass over the
whole sequences (there is no cache of keys and values yet), so the cost grows with the square of the answer: meant
for short answers and small models. All prompts advance in the same forward passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megavl.data.collate import CollateSettings
from megavl.data.microbatch import MicroBatch
from megavl.generate.samples import Sample, sample_microbatch

Logits = Callable[[MicroBatch], Tensor]
"""Logits over the whole vocabulary, [t, v]: `Stage.logits` of one process, or a parallel model behind a function."""


@torch.no_grad()
def greedy(
    prompts: Sequence[Sample],
    logits: Logits,
    settings: CollateSettings,
    *,
    end_id: int,
    max_new_tokens: int,
    blind: bool = False,
) -> list[list[int]]:
    """Continue every prompt.

    Args:
        prompts: sequences that end where the answer begins.
        logits: the model.
        settings: how samples become micro-batches.
        end_id: id of the end mark; it is not part of the result.
        max_new_tokens: longest answer.
        blind: set all pixels to zero.

    Returns:
        New ids of each prompt.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    for _ in range(max_new_tokens):
        if not running:
            break
        batch = sample_microbatch([_continued(prompts[i], answers[i]) for i in running], settings)
        if blind and batch.pixels is not None:
            batch = replace(batch, pixels=torch.zeros_like(batch.pixels))
        last = batch.cu_seqlens[1:].long() - 1  # position of the last token of each sequence
        chosen = logits(batch)[last].argmax(dim=-1).tolist()
        for index, token in zip(running, chosen, strict=True):
            if token != end_id:
                answers[index].append(token)
        running = [index for index, token in zip(running, chosen, strict=True) if token != end_id]
    return answers


def _continued(prompt: Sample, answer: Sequence[int]) -> Sample:
    tokens = np.concatenate([prompt.tokens, np.array(answer, dtype=np.int32)])
    return Sample(tokens, np.zeros(len(tokens), dtype=bool), prompt.images)
