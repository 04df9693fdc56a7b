"""Train DeepSeek-VL vision-language models on megatron-core."""

import warnings

# megatron-core causes these on every rank: optional libraries are absent (torch's are used instead), a
# default of its own and functions that it calls are deprecated. Nothing a user can act on.
warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed")
warnings.filterwarnings("ignore", message="full scope is deprecated")
warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
