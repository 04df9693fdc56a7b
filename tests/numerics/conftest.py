"""Comparisons with `transformers`, whose configurations and weights are made here: it must not look for any online."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
