"""Exports loaded by `transformers`: no missing or unexpected key, the same logits, and generation from text and image.

In: random weights in the released form, as a converter finds them. The reference is built from the same weights without
any file.
"""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from hf_reference import build_reference, from_transformers, randomise, reference_images, relative_difference
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.formats import WriteOptions
from megavl.checkpoint.convert.hf_folder import DEEPSEEK
from megavl.checkpoint.convert.lazy import in_memory
from megavl.checkpoint.convert.run import Request, convert, open_checkpoint
from megavl.checkpoint.hf_names import to_megavl, unused_names
from megavl.config import DecoderConfig, ModelConfig
from megavl.data.tokenizer import BOS_NAMES, EOS_NAMES, IMAGE_NAME
from megavl.model.sizes import SIZES

TINY = SIZES["tiny"]
_SAM = SIZES["tiny_hybrid"].sam
assert _SAM is not None
HYBRID = replace(
    SIZES["tiny_hybrid"],
    decoder=DecoderConfig(layers=2, hidden=96, heads=6, kv_heads=2, ffn=136, vocab=500, rope_theta=500.0),
    sam=replace(_SAM, neck=16, downsample=(32, 64)),
)
IMAGE = 258
"""Placeholder id of the tokenizer below: 256 bytes, begin, end, image."""


def write_tokenizer(path: Path) -> Path:
    """Bytes, and the three marks; nothing else beside it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS_NAMES[0], EOS_NAMES[0], IMAGE_NAME])
    tokenizer.save(str(path))
    return path


def write_source(folder: Path, model: ModelConfig) -> torch.nn.Module:
    """The released form of random weights, and the reference with them."""
    reference = build_reference(model, image_id=IMAGE).float().eval()
    randomise(reference, seed=3)
    state = {name: in_memory(tensor, name) for name, tensor in reference.state_dict().items()}
    unused = {name: in_memory(torch.randn(4, 4), name) for name in unused_names(model)}
    contents = Contents(model=model, tensors=to_megavl(state, model, "transformers"), unused=unused)
    folder.mkdir()
    DEEPSEEK.write(contents, folder, WriteOptions(), lambda count: None)
    return reference


@pytest.mark.parametrize("names", ["5", "4.56"])
@pytest.mark.parametrize("model", [TINY, HYBRID], ids=["siglip", "hybrid"])
def test_from_pretrained(model: ModelConfig, names: str, tmp_path: Path) -> None:
    reference = write_source(tmp_path / "source", model)
    target = tmp_path / "export"
    request = Request(
        source=tmp_path / "source",
        target=target,
        to="hf-transformers",
        options=WriteOptions(names=names),  # type: ignore[arg-type]
        tokenizer=write_tokenizer(tmp_path / "tokenizer.json"),
    )
    convert(request, lambda what, total: nullcontext(lambda count: None))
    assert (target / "unused.safetensors").exists()
    loaded, report = transformers.AutoModelForImageTextToText.from_pretrained(
        target, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert type(loaded) is type(reference)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.image_token_id == IMAGE
    assert loaded.config.vision_config.hidden_act == "gelu"
    assert loaded.config.vision_config.vision_use_head is False

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (1, 30), generator=generator)
    ids[0, 5 : 5 + model.tokens_per_image] = IMAGE
    pixels = torch.rand(1, 3, model.image_size, model.image_size, generator=generator)
    with torch.no_grad():
        ours, theirs = (side(input_ids=ids, **reference_images(pixels, model)).logits for side in (loaded, reference))
    assert relative_difference(ours, theirs) <= 1e-5


@pytest.mark.parametrize("model", [TINY, HYBRID], ids=["siglip", "hybrid"])
def test_what_transformers_saves_is_read(model: ModelConfig, tmp_path: Path) -> None:
    """Its own configuration leaves defaults out; its own names are those of its version."""
    size = replace(model, siglip=replace(model.siglip, patch_size=16, image_size=64))  # patch 16 is a default
    if size.sam:
        size = replace(size, sam=replace(size.sam, patch_size=16, image_size=128, window=14))
    reference = build_reference(size)
    reference.save_pretrained(tmp_path / "saved")
    form, contents = open_checkpoint(tmp_path / "saved")
    assert form.name == "hf-transformers"
    initial = replace(size.decoder, init_std=contents.model.decoder.init_std)
    sam = size.sam and replace(size.sam, upsample=4 * size.siglip.grid)
    assert contents.model == replace(size, decoder=initial, sam=sam)
    expected = from_transformers(reference.state_dict(), size)
    assert expected.keys() == contents.tensors.keys()
    assert all(torch.equal(contents.tensors[name].read(), tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("model", [TINY, HYBRID], ids=["siglip", "hybrid"])
def test_processor_and_generation(model: ModelConfig, tmp_path: Path) -> None:
    """A chat with an image, from the exported folder alone."""
    write_source(tmp_path / "source", model)
    target = tmp_path / "export"
    tokenizer = write_tokenizer(tmp_path / "tokenizer.json")
    request = Request(source=tmp_path / "source", target=target, to="hf-transformers", tokenizer=tokenizer)
    convert(request, lambda what, total: nullcontext(lambda count: None))
    processor = transformers.AutoProcessor.from_pretrained(target)
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(target)
    content = [
        {"type": "image", "image": Image.new("RGB", (50, 20), (200, 30, 30))},
        {"type": "text", "text": " What? "},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert (inputs["input_ids"] == IMAGE).sum() == model.tokens_per_image
    text = processor.tokenizer.decode(inputs["input_ids"][0]).replace(IMAGE_NAME, "")
    assert text.startswith(BOS_NAMES[0] + "You are a helpful language and vision assistant.")
    assert text.endswith("using natural language.\n\nUser: What?\n\nAssistant:")
    assert inputs["pixel_values"].shape[-1] == model.siglip.image_size
    generated = loaded.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] > inputs["input_ids"].shape[1]
    settings = json.loads((target / "generation_config.json").read_text())
    assert settings["eos_token_id"] == 257
