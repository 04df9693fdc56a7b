"""The data mixtures of the report as configuration: Table 1 (pre-training), Table 2 (fine-tuning) and stage 1's pairs.

Every data set is a store at `$MEGAVL_DATA/<name>` (default `data/<name>`), built by `tools/build_data.py`; the text
corpus is a plain Megatron `.bin/.idx` pair. The report gives shares per category. Within a category they are even
here, which is our choice: change them, drop what you do not have, and keep the sum at 1 (`scaled` helps).
"""

import dataclasses
import os

from megavl.config import Modality, SourceConfig

DATA = os.environ.get("MEGAVL_DATA", "data")
"""Root folder of stores and tokenizer."""
TOKENIZER = f"{DATA}/tokenizer.json"
"""DeepSeek's tokenizer, with `<image_placeholder>`."""
SFT_SHARE = 0.02
"""Fine-tuning data in stage 2; the report says a minimal share, without a number."""


def category(folder: str, percent: float, modality: Modality, *names: str) -> tuple[SourceConfig, ...]:
    """One row of a table: its percentage, divided evenly over its data sets."""
    share = percent / 100 / len(names)
    return tuple(
        SourceConfig(name=f"{folder}/{name}", path=f"{DATA}/{folder}/{name}", modality=modality, share=share)
        for name in names
    )


def scaled(sources: tuple[SourceConfig, ...], factor: float) -> tuple[SourceConfig, ...]:
    """The sources with every share times `factor`."""
    return tuple(dataclasses.replace(source, share=source.share * factor) for source in sources)


def held_out(name: str, modality: Modality) -> SourceConfig:
    """A source whose perplexity is logged and that is never trained on."""
    return SourceConfig(name=f"held_out/{name}", path=f"{DATA}/held_out/{name}", modality=modality, share=1.0)


ALIGNMENT = (  # stage 1: 1.25 M captions and 2.5 M rendered documents, by their counts
    *category("alignment", 100 / 3, "multimodal", "sharegpt4v_captions"),
    *category("alignment", 200 / 3, "multimodal", "document_ocr"),
)

PRETRAINING = (  # Table 1
    *category("pretrain", 13.1, "multimodal", "mmc4", "wikipedia_en_cn", "wikihow", "pdf_epub_textbooks"),
    *category("pretrain", 11.1, "multimodal", "capsfusion", "taisu", "detailed_caption"),
    *category(
        *("pretrain", 2.1, "multimodal"),
        *("chart2text", "geo170k", "ureader", "unichart", "m_paper", "science_qa", "screen_qa", "scigraphqa_295k"),
        *("paper2figure100k", "widget_captioning", "screen2words", "refexp"),
    ),
    *category("pretrain", 0.4, "multimodal", "websight", "notebook_python_plots"),
    *category(
        *("pretrain", 1.2, "multimodal"),
        *("art", "mlt_17", "lsvt", "ubertext", "coco_text", "rctw_17", "rects", "textocr", "openvino", "hiertext"),
    ),
    *category("pretrain", 2.1, "multimodal", "arxiv_rendered_markdown"),
    *category("pretrain", 70.0, "language", "text_corpus"),
)

FINE_TUNING = (  # Table 2
    *category("sft", 10.5, "multimodal", "in_house"),
    *category(
        *("sft", 35.5, "multimodal"),
        *("sharegpt4v", "laion_gptv", "lvis_instruct4v", "textocr_gpt4v", "llava_1_6_gpt4v", "icon_qa"),
    ),
    *category("sft", 4.1, "multimodal", "ureader", "geo170k", "science_qa"),
    *category("sft", 2.0, "multimodal", "screen_to_code", "screen_qa"),
    *category("sft", 47.9, "language", "text_sft"),
)

JOINT = (*scaled(PRETRAINING, 1 - SFT_SHARE), *scaled(FINE_TUNING, SFT_SHARE))
"""Stage 2: Table 1 and a little of Table 2."""
