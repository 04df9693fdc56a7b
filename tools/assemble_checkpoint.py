r"""Assemble the start of stage 1 from weights that are published one by one.

    tools/assemble_checkpoint.py --model 7b --language deepseek-llm-7b-base/ --siglip ViT-L-16-SigLIP-384/ \
        --sam sam_vit_b_01ec64.pth --dtype bfloat16 start/
    tools/assemble_checkpoint.py --model 1.3b --language llm/ --siglip siglip-large-patch16-384/ start/

`--language` is a Llama-format folder; `--siglip` has the names of timm, open_clip or transformers, `--sam` those of
Meta's file or of transformers. The adaptor, the stride-2 convolutions and SAM's side branch, which nobody publishes,
are what a run with `--stage.seed SEED` draws. Every tensor that is fresh, left over or absent is listed; one that is
missing, or has another size than the model's, is an error. A run starts from the result with
`--checkpoint.init_from DST`.

Exit status: 0 if the target is there, 1 otherwise, with one sentence on what is wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from convert_checkpoint import progress_bar

from megavl.checkpoint.convert.assemble import Inventory, assemble
from megavl.checkpoint.convert.contents import Contents
from megavl.checkpoint.convert.public_files import read_source
from megavl.checkpoint.convert.public_names import Part
from megavl.checkpoint.convert.run import FORMATS, Request, carry_out, plan_contents
from megavl.checkpoint.folder import CheckpointError
from megavl.config import ModelConfig, StageConfig
from megavl.model.sizes import SIZES
from megavl.recipe import load_recipe


def main(arguments: Sequence[str]) -> int:
    """Assemble; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        contents, inventory = _assemble(options)
        print("\n".join(inventory.lines()), flush=True)
        if options.dry_run:
            return 0
        request = Request(
            source=options.language,
            target=options.target,
            to=options.to,
            tokenizer=options.tokenizer,
            verify=not options.no_verify,
        )
        record = carry_out(plan_contents(contents, inventory.record(), request), request, progress_bar)
    except ValueError as error:
        print(f"assemble_checkpoint: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("assemble_checkpoint: interrupted, nothing was made", file=sys.stderr)
        return 130
    told = "verified" if record["verified"] else "not verified"
    print(f"{options.target}: {record['tensors']} tensors, {record['bytes']:,} bytes, {told}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, metavar="DST", help="a folder that does not exist")
    parser.add_argument("--model", required=True, help=f"{', '.join(SIZES)}, or a recipe file, whose model is taken")
    parser.add_argument("--language", type=Path, required=True, help="folder of the language model")
    parser.add_argument("--siglip", type=Path, required=True, help="folder or file of SigLIP")
    parser.add_argument("--sam", type=Path, help="folder or file of SAM, for models with a high-resolution tower")
    parser.add_argument("--seed", type=int, default=StageConfig.seed, help="of the fresh tensors (%(default)s)")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="cast all tensors")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer to hand on: a file, or a folder with one")
    formats = [name for name in FORMATS if name != "megatron-ranks"]
    parser.add_argument("--to", choices=formats, default="megatron-dist", help="format (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list where every tensor comes from, write nothing")
    parser.add_argument("--no-verify", action="store_true", help="do not read the target back")
    return parser


def _assemble(options: argparse.Namespace) -> tuple[Contents, Inventory]:
    """Open the sources and put them together."""
    if options.target.exists():
        raise CheckpointError(f"{options.target}: exists already, assembling makes a new folder")
    paths: dict[Part, Path | None] = {"language": options.language, "siglip": options.siglip, "sam": options.sam}
    sources = {part: read_source(path) for part, path in paths.items() if path is not None}
    dtype = getattr(torch, options.dtype) if options.dtype else None
    return assemble(sources, _model(options.model), seed=options.seed, dtype=dtype)


def _model(name: str) -> ModelConfig:
    if name in SIZES:
        return SIZES[name]
    if Path(name).suffix not in (".py", ".json"):
        raise ValueError(f"--model is {name}, known are {', '.join(SIZES)} and recipe files")
    return load_recipe(Path(name)).model


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
