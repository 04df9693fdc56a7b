"""What a recipe says that cannot be, found before anything is built.

In: a `Recipe`. Out: a sentence per contradiction, all of them at once, with the field and both numbers. A check is a
pair: is this wrong, and the sentence that says so. Layouts that cannot work are in `megavl/parallel/validate.py`.
"""

from megavl.config import KernelsConfig, ModelConfig, OptimConfig, Recipe, SamConfig, SiglipConfig, StageConfig

Checks = list[tuple[object, str]]
"""(is this wrong?, the sentence that says so)."""


def validate(recipe: Recipe) -> list[str]:
    """Every contradiction of a recipe that shows without the machine: one sentence each, field and both numbers.

    What depends on the layout and the number of ranks is in `megavl/parallel/validate.py`.
    """
    small = [sentence for wrong, sentence in _size_checks(recipe.model) if wrong]
    if small:  # others divide by them
        return small
    checks = [
        *_model_checks(recipe.model),
        *_kernel_checks(recipe.kernels, recipe.model),
        *_source_checks(recipe),
        *_length_checks(recipe),
        *_stage_checks(recipe.stage, recipe.optim),
        *_saving_checks(recipe),
    ]
    return [sentence for wrong, sentence in checks if wrong]


def _size_checks(model: ModelConfig) -> Checks:
    sections = {"decoder": model.decoder, "siglip": model.siglip, "sam": model.sam}
    return [
        (value < 1 if isinstance(value, int) else value <= 0, f"model.{section}.{field} {value} is not above 0")
        for section, sizes in sections.items()
        if sizes is not None
        for field, value in vars(sizes).items()
        if isinstance(value, int | float)
    ]


def _model_checks(model: ModelConfig) -> Checks:
    decoder, siglip, sam, kind = model.decoder, model.siglip, model.sam, model.adaptor
    towers = 1 if sam is None else 2
    odd = kind in ("pool_w", "pool_h") and siglip.grid % 2
    checks: Checks = [
        *_multiple("model.decoder.hidden", decoder.hidden, "heads", decoder.heads),
        *_multiple("model.decoder.heads", decoder.heads, "kv_heads", decoder.kv_heads),
        *_multiple("model.siglip.image_size", siglip.image_size, "patch_size", siglip.patch_size),
        *_multiple("model.siglip.width", siglip.width, "heads", siglip.heads),
        ((kind == "mlp_gelu") != (sam is None), f"model.adaptor {kind} does not fit a model of {towers} tower(s)"),
        (odd, f"model.adaptor {kind} pools pairs, but model.siglip has {siglip.grid} patches a side, an odd number"),
        (any(not 0 <= c <= 255 for c in model.background), f"model.background {model.background} is outside 0 to 255"),
    ]
    return checks if sam is None else checks + _sam_checks(sam, siglip)


def _kernel_checks(kernels: KernelsConfig, model: ModelConfig) -> Checks:
    fused = model.adaptor in ("hybrid", "mlp_gelu")
    return [
        (
            kernels.adaptor == "triton" and not fused,
            f"kernels.adaptor triton computes hybrid and mlp_gelu, but model.adaptor is {model.adaptor}",
        ),
        (
            kernels.interpolate_conv == "triton" and kernels.interpolate == "triton",
            "kernels.interpolate_conv triton contains the interpolation, so kernels.interpolate triton would never run",
        ),
    ]


def _sam_checks(sam: SamConfig, siglip: SiglipConfig) -> Checks:
    outside = [i for i in sam.global_layers if not 0 <= i < sam.layers]
    side = 4 * siglip.grid
    return [
        *_multiple("model.sam.image_size", sam.image_size, "patch_size", sam.patch_size),
        *_multiple("model.sam.width", sam.width, "heads", sam.heads),
        (not sam.global_layers, f"model.sam.global_layers is empty: 0 of {sam.layers} layers feed the neck_hd branch"),
        (outside, f"model.sam.global_layers {outside} are outside the {sam.layers} layers"),
        (sam.upsample != side, f"model.sam.upsample {sam.upsample} is not {side}, 4 times the grid of model.siglip"),
    ]


def _source_checks(recipe: Recipe) -> Checks:
    data, sources = recipe.data, recipe.data.sources
    total, lowest = sum(s.share for s in sources), min((s.share for s in sources), default=0.0)
    modalities = {s.modality for s in sources}
    names, held_out = [s.name for s in sources], [s.name for s in data.validation]
    warmup = data.language_warmup
    return [
        (not sources, "data.sources is empty: 0 sources, at least 1 is needed"),
        (sources and abs(total - 1.0) > 1e-6, f"data.sources: the shares sum to {total:.6g} instead of 1"),
        (lowest < 0, f"data.sources: a share is {lowest}, below 0"),
        (len(set(names)) < len(names), f"data.sources: {len(names)} sources have {len(set(names))} different names"),
        (
            len(set(held_out)) < len(held_out),
            f"data.validation: {len(held_out)} sources have {len(set(held_out))} different names",
        ),
        (not 0 <= warmup <= 1, f"data.language_warmup {warmup} is outside 0 to 1"),
        (
            warmup > 0 and len(modalities) == 1,
            f"data.language_warmup {warmup} moves between 2 modalities, but data.sources has {len(modalities)}",
        ),
        (
            recipe.stage.number == 0 and "multimodal" in modalities,
            "stage.number 0 trains the decoder alone, but data.sources has multimodal sources",
        ),
        (data.workers < 0, f"data.workers {data.workers} is below 0"),
        (data.max_failed_samples < 0, f"data.max_failed_samples {data.max_failed_samples} is below 0"),
    ]


def _length_checks(recipe: Recipe) -> Checks:
    data, longest = recipe.data, recipe.model.decoder.max_positions
    length, image = data.seq_length, recipe.model.tokens_per_image
    images = any(s.modality == "multimodal" for s in data.sources)
    return [
        (length < 2, f"data.seq_length {length} is below 2"),
        (length > longest, f"data.seq_length {length} exceeds model.decoder.max_positions {longest}"),
        (
            images and data.length_counts == "all" and image >= length,
            f"data.seq_length {length} cannot hold an image of {image} tokens and text (see data.length_counts)",
        ),
    ]


def _stage_checks(stage: StageConfig, optim: OptimConfig) -> Checks:
    betas = (optim.beta1, optim.beta2)
    return [
        (stage.steps < 1, f"stage.steps {stage.steps} is below 1"),
        (stage.global_batch < 1, f"stage.global_batch {stage.global_batch} is below 1"),
        *_multiple("stage.global_batch", stage.global_batch, "micro_batch", stage.micro_batch),
        (stage.max_nonfinite < 1, f"stage.max_nonfinite {stage.max_nonfinite} is below 1"),
        (
            not 0 <= optim.warmup_steps <= stage.steps,
            f"optim.warmup_steps {optim.warmup_steps} is outside 0 to stage.steps {stage.steps}",
        ),
        (optim.lr <= 0, f"optim.lr {optim.lr} is not above 0"),
        (optim.vision_lr is not None and optim.vision_lr < 0, f"optim.vision_lr {optim.vision_lr} is below 0"),
        (not 0 <= optim.final <= 1, f"optim.final {optim.final} is outside 0 to 1"),
        (any(not 0 <= b < 1 for b in betas), f"optim.beta1, optim.beta2 {betas} must be at least 0 and below 1"),
        (optim.eps <= 0, f"optim.eps {optim.eps} is not above 0"),
        (optim.clip < 0, f"optim.clip {optim.clip} is below 0"),
        (optim.weight_decay < 0, f"optim.weight_decay {optim.weight_decay} is below 0"),
    ]


def _saving_checks(recipe: Recipe) -> Checks:
    saving, logging = recipe.checkpoint, recipe.logging
    return [
        (not recipe.run_dir, "run_dir is empty: a run needs a folder"),
        (saving.keep < 1, f"checkpoint.keep {saving.keep} is below 1"),
        (saving.every_steps < 0, f"checkpoint.every_steps {saving.every_steps} is below 0"),
        (saving.every_minutes < 0, f"checkpoint.every_minutes {saving.every_minutes} is below 0"),
        (logging.every < 1, f"logging.every {logging.every} is below 1"),
        (logging.validate_every < 0, f"logging.validate_every {logging.validate_every} is below 0"),
        (logging.validation_rows < 1, f"logging.validation_rows {logging.validation_rows} is below 1"),
    ]


def _multiple(name: str, value: int, of: str, unit: int) -> Checks:
    """`value` must be a multiple of `unit`, the field `of` of the same section."""
    return [(unit < 1 or value % unit, f"{name} {value} is not a multiple of {of} {unit}")]
