"""The files beside the weights of a Hugging Face folder: tokenizer, processor, chat template, generation settings.

In: `Contents`. Out: everything that `from_pretrained` wants besides weights. Tokenizer and generation files are handed
on; processor files are too within one dialect, and made from the sizes for the other. A file that transformers 4.56 and
5 want differently is written so that both read it.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavl.checkpoint.folder import CheckpointError
from megavl.config import ModelConfig
from megavl.data.prompt import SYSTEM_PROMPT
from megavl.data.tokenizer import BOS_NAMES, EOS_NAMES, IMAGE_NAME
from megavl.model.vision.tower import CLIP_MEAN, CLIP_STD

TOKENIZER = ("tokenizer.json", "tokenizer.model")
"""Either is a tokenizer."""
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PREPROCESSOR, PROCESSOR, GENERATION = "preprocessor_config.json", "processor_config.json", "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
CONFIG = "config.json"
KNOWN = (*TOKENIZER, *TOKENIZER_SETTINGS, PREPROCESSOR, PROCESSOR, GENERATION, CHAT_TEMPLATE, CONFIG)
"""What is handed on; the original `config.json` tells later which dialect the others are written for."""

RELEASED_IMAGE_ID = 100015
"""Placeholder id of the released tokenizer."""

_TEMPLATE = (
    "{{ bos_token }}{% if messages and messages[0].role != 'system' %}{{ '$SYSTEM\\n\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{{ 'User: ' }}{% elif message.role == 'assistant' %}{{ 'Assistant: ' }}{% endif %}"
    "{% if message.content is string %}{{ message.content | trim }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<image_placeholder>' }}{% else %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def with_tokenizer(files: Mapping[str, Path], tokenizer: Path) -> dict[str, Path]:
    """The files with another tokenizer: a `tokenizer.json`, a SentencePiece `.model`, or a folder of tokenizer files.

    Raises:
        CheckpointError: there is none.
    """
    rest = {name: path for name, path in files.items() if name not in (*TOKENIZER, *TOKENIZER_SETTINGS)}
    if tokenizer.is_dir():
        found = {name: tokenizer / name for name in (*TOKENIZER, *TOKENIZER_SETTINGS) if (tokenizer / name).is_file()}
    else:
        found = {TOKENIZER[tokenizer.suffix != ".json"]: tokenizer} if tokenizer.is_file() else {}
    if not any(name in found for name in TOKENIZER):
        raise CheckpointError(f"{tokenizer}: neither {' nor '.join(TOKENIZER)}")
    return rest | found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a table.

    Raises:
        CheckpointError: it is not one.
    """
    try:
        table = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: holds a {type(table).__name__}, not a table")
    return table


def write_json(path: Path, table: Mapping[str, Any]) -> None:
    """As transformers writes its own."""
    path.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


def token_ids(files: Mapping[str, Path]) -> dict[str, int]:
    """Ids of the begin, end and image marks, as far as `tokenizer.json` tells them."""
    if "tokenizer.json" not in files:
        return {}
    content = read_json(files["tokenizer.json"])
    ids = {token.get("content"): token.get("id") for token in content.get("added_tokens", [])}
    wanted = {"bos": BOS_NAMES, "eos": EOS_NAMES, "image": (IMAGE_NAME,)}
    found = {role: next((ids[name] for name in names if name in ids), None) for role, names in wanted.items()}
    return {role: token for role, token in found.items() if token is not None}


def image_id(files: Mapping[str, Path]) -> int:
    """The placeholder's id: the tokenizer's, the original configuration's, or the released one."""
    original = read_json(files[CONFIG]).get("image_token_id") if CONFIG in files else None
    return token_ids(files).get("image", original or RELEASED_IMAGE_ID)


def write_files(files: Mapping[str, Path], folder: Path, model: ModelConfig, dialect: str) -> None:
    """Write all files but `config.json` and the weights.

    Args:
        files: what the source had.
        folder: where to.
        model: sizes.
        dialect: `deepseek` or `transformers`.
    """
    made = _deepseek_files(model) if dialect == "deepseek" else _transformers_files(files, model)
    same = CONFIG in files and (read_json(files[CONFIG]).get("model_type") == "multi_modality") == (
        dialect == "deepseek"
    )
    for name in KNOWN:
        by_size = name in (PREPROCESSOR, PROCESSOR, CHAT_TEMPLATE)
        if name in files and name != CONFIG and (same or not by_size):
            shutil.copyfile(files[name], folder / name)
        elif name in made:
            write_json(folder / name, made[name])
    if dialect == "transformers" and not (folder / CHAT_TEMPLATE).exists():
        (folder / CHAT_TEMPLATE).write_text(_TEMPLATE.replace("$SYSTEM", SYSTEM_PROMPT) + "\n")
    if dialect == "transformers" and any(name in files for name in TOKENIZER):
        _name_image_token(folder / "tokenizer_config.json")


def _deepseek_files(model: ModelConfig) -> dict[str, Any]:
    mean, std = (CLIP_MEAN, CLIP_STD) if model.sam else ([0.5] * 3, [0.5] * 3)
    return {
        PREPROCESSOR: {
            "background_color": list(model.background),
            "do_normalize": False,
            "image_mean": list(mean),
            "image_processor_type": "VLMImageProcessor",
            "image_size": model.image_size,
            "image_std": list(std),
            "min_size": 14,
            "processor_class": "VLChatProcessor",
            "rescale_factor": 1 / 255,
        },
        PROCESSOR: {
            "add_special_token": False,
            "ignore_id": -100,
            "image_tag": IMAGE_NAME,
            "mask_prompt": True,
            "num_image_tokens": model.tokens_per_image,
            "processor_class": "VLChatProcessor",
            "sft_format": "deepseek",
        },
    }


def _transformers_files(files: Mapping[str, Path], model: ModelConfig) -> dict[str, Any]:
    """The low resolution is made of the padded high one (2: bilinear), as the towers do; 3 is bicubic."""
    name = "DeepseekVLHybrid" if model.sam else "DeepseekVL"
    images: dict[str, Any] = {
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "min_size": 14,
        "resample": 2 if model.sam else 3,
        "rescale_factor": 1 / 255,
        "size": {"height": model.siglip.image_size, "width": model.siglip.image_size},
    }
    if model.sam:
        images |= {
            "high_res_image_mean": list(CLIP_MEAN),
            "high_res_image_std": list(CLIP_STD),
            "high_res_resample": 3,
            "high_res_size": {"height": model.sam.image_size, "width": model.sam.image_size},
        }
    ids = token_ids(files)
    generation = {f"{role}_token_id": ids[role] for role in ("bos", "eos") if role in ids}
    return {
        PREPROCESSOR: images,
        PROCESSOR: {"num_image_tokens": model.tokens_per_image, "processor_class": f"{name}Processor"},
        GENERATION: generation | ({"pad_token_id": ids["eos"]} if "eos" in ids else {}),
        **({"tokenizer_config.json": _tokenizer_config(files)} if any(name in files for name in TOKENIZER) else {}),
    }


def _tokenizer_config(files: Mapping[str, Path]) -> dict[str, Any]:
    """For a bare tokenizer. transformers 5 builds a tokenizer of its own for LlamaTokenizer, so it is not named."""
    fast = "tokenizer.json" in files
    content = read_json(files["tokenizer.json"]) if fast else {}
    names = {token.get("content") for token in content.get("added_tokens", [])}
    bos, eos = (next((name for name in known if name in names), known[0]) for known in (BOS_NAMES, EOS_NAMES))
    if not fast:
        bos, eos = BOS_NAMES[1], EOS_NAMES[1]
    return {
        "bos_token": bos,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": 16384,
        "pad_token": eos,
        "tokenizer_class": "PreTrainedTokenizerFast" if fast else "LlamaTokenizer",
    }


def _name_image_token(path: Path) -> None:
    """transformers' processor asks the tokenizer which token stands for an image."""
    table = read_json(path)
    named = table.get("extra_special_tokens")
    table["extra_special_tokens"] = {**(named if isinstance(named, dict) else {}), "image_token": IMAGE_NAME}
    write_json(path, table)
