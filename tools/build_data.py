r"""Turn raw data into a store that `megavl.train` reads.

    python tools/build_data.py text corpus/ --output stores/corpus --tokenizer tokenizer.json
    python tools/build_data.py conversations llava.json --image-root images/ --output stores/sft \
        --tokenizer tokenizer.json
    python tools/build_data.py webdataset shard-*.tar --output stores/captions --tokenizer tokenizer.json

Exit status: 0 if the store is written and at most `--max-rejected` of the inputs were left out, 1 with one sentence
otherwise. Forms of input: `megavl/data/importers/`.
"""

import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import tyro

from megavl.data.importers.build import BuildOptions, build, describe


def main(arguments: Sequence[str] | None = None) -> int:
    """Build a store from the command line; returns the exit status."""
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")  # no Transformer Engine is needed here
    options = tyro.cli(BuildOptions, description=__doc__, args=arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        manifest = build(options)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    print(f"{options.output}: {describe(manifest['counts'])}")
    for rejected in manifest["rejected"][:5]:
        print(f"  left out {rejected['input']}: {rejected['reason']}")
    return 0


def _interrupt(*_: object) -> NoReturn:
    """SIGTERM ends a build as ctrl-C does: what was written so far is removed."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
