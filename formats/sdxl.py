"""Reads and writes folders of Stable Diffusion XL (Podell et al. 2023, arXiv 2307.01952).

A folder is diffusers' own: model_index.json, and a folder for each part. The UNet alone is a model
of ours: it trains and has adapters. The other parts stay diffusers' and transformers' and are
frozen: two text encoders with their tokenizers, the VAE between pictures and latents, and the
scheduler that knows how noisy a latent is at each of its times.
"""
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from formats.json_files import read_json
from formats.tensors import all_stored, few_names
from support.errors import UserError, refuse_not_finite, require
from support.files import writing
from support.processes import is_main

INDEX = "model_index.json"
LATENT = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
FROZEN = ("text_encoder", "text_encoder_2", "vae")
FILES = ("scheduler", "tokenizer", "tokenizer_2")
PREDICTS = ("epsilon", "v_prediction")
STEPS = 50                  # of the scheduler, to draw a picture


@dataclass
class SDXLConfig:
    """Holds what others ask about the model."""
    side: int                           # rows and columns of a picture
    max_positions: int                  # tokens of a caption
    model_type: str = "sdxl"


class SDXL(nn.Module):
    """Predicts what was added to noisy latents: model(z, t, text, pooled, ids) -> like z.

    z: (B, 4, side / 8, side / 8). t: (B,) whole numbers. text: (B, tokens, C). pooled: (B, P).
    ids: (B, 6), the rows and columns of the original photo, those cut off at the top and the left,
    and those of the picture. The UNet is the only submodule, so nothing else is counted or saved.
    """

    def __init__(self, pipeline):
        super().__init__()
        self.pipeline, self.unet = pipeline, pipeline.unet
        self.config = SDXLConfig(self.unet.config.sample_size * pipeline.vae_scale_factor,
                                 pipeline.text_encoder.config.max_position_embeddings)

    @property
    def checkpointing(self) -> bool:
        return self.unet.is_gradient_checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        (self.unet.enable_gradient_checkpointing if on else
         self.unet.disable_gradient_checkpointing)()

    def forward(self, z: Tensor, t: Tensor, text: Tensor, pooled: Tensor, ids: Tensor) -> Tensor:
        z, text, pooled = (part.to(self.unet.dtype) for part in (z, text, pooled))
        return self.unet(z, t, text, added_cond_kwargs=dict(text_embeds=pooled,
                                                            time_ids=ids)).sample

    @torch.no_grad()
    def encode(self, photos: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and deviation of each photo's latent, (n, 4, side / 8, side / 8).

        photos: (n, 3, side, side) in [-1, 1].
        """
        vae = self.pipeline.vae
        found = [vae.encode(photo[None].to(vae.device, vae.dtype)).latent_dist for photo in photos]
        return tuple(vae.config.scaling_factor * torch.cat([getattr(one, part) for one in found])
                     for part in ("mean", "std"))

    @torch.no_grad()
    def read(self, caption: str) -> tuple[Tensor, Tensor]:
        """Returns a caption as the UNet reads it: text (1, tokens, C) and pooled (1, P).

        Raises UserError if it is too long.
        """
        n, most = len(self.pipeline.tokenizer(caption).input_ids), self.config.max_positions
        if n > most:
            raise UserError(f"{caption!r:.80}: has {n} tokens, the model reads {most}")
        text, _, pooled, _ = self.pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        return text, pooled

    @torch.no_grad()
    def draw(self, caption: str) -> Tensor:
        """Draws a caption with diffusers' pipeline -> (1, 3, side, side) in [0, 1], on the CPU."""
        self.read(caption)                  # refuses a long one, which the pipeline would cut
        pipeline, vae = self.pipeline, self.pipeline.vae
        pipeline.set_progress_bar_config(desc="drawing", leave=False, disable=not is_main())
        z = pipeline(caption, num_inference_steps=STEPS, output_type="latent",
                     generator=torch.Generator().manual_seed(0)).images
        picture = vae.decode(z.to(vae.dtype) / vae.config.scaling_factor).sample
        return (picture.float().cpu() / 2 + 0.5).clamp(0, 1)


def load_sdxl(folder: Path, dtype: torch.dtype | None, device) -> tuple[SDXL, object]:
    """Loads a folder -> the model and the first tokenizer.

    dtype: of the UNet and the text encoders; None keeps the UNet's own. The VAE is float32.
    Raises UserError if a part is missing, lacks tensors or holds NaN, or a package is missing.
    """
    require("diffusers", "transformers")
    kind = read_json(folder / INDEX).get("_class_name")
    if kind != "StableDiffusionXLPipeline":
        raise UserError(f"{folder / INDEX}: _class_name is {kind!r:.60}, only "
                        "'StableDiffusionXLPipeline' is read here")
    for part in ("unet", *FROZEN, *FILES):
        if not (folder / part).is_dir():
            raise UserError(f"{folder}: {part} is missing, which {INDEX} promises; SDXL is read "
                            "from a whole folder, not from the hub")
    import transformers  # here, since both packages take seconds
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    import diffusers
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    dtype = dtype or all_stored(folder / "unet", LATENT)[0].dtype
    kinds = {"unet": (diffusers.UNet2DConditionModel, dtype),
             "text_encoder": (transformers.CLIPTextModel, dtype),
             "text_encoder_2": (transformers.CLIPTextModelWithProjection, dtype),
             "vae": (diffusers.AutoencoderKL, torch.float32)}
    parts = {part: load_part(folder / part, *kind) for part, kind in kinds.items()}
    try:
        with warnings.catch_warnings(action="ignore"):
            pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
                folder, **parts, local_files_only=True).to(device)
    except Exception as error:              # a broken file can break its reader in any way
        raise UserError(f"{folder}: cannot be loaded: {one_line(error)}") from None
    predicts = pipeline.scheduler.config.get("prediction_type")
    if not hasattr(pipeline.scheduler, "alphas_cumprod") or predicts not in PREDICTS:
        raise UserError(f"{folder}/scheduler: must be one of noise or velocity, prediction_type "
                        f"{' or '.join(PREDICTS)}")
    if pipeline.vae.config.get("latents_mean") is not None:
        raise UserError(f"{folder}/vae: latents_mean is not read here, only scaling_factor")
    if type(parts["unet"].config.sample_size) is not int:
        raise UserError(f"{folder}/unet/config.json: sample_size must be a whole number")
    return SDXL(pipeline), pipeline.tokenizer


def load_part(folder: Path, kind: type, dtype: torch.dtype) -> nn.Module:
    """Loads one network. Raises UserError if a tensor is missing: it would be drawn at random."""
    try:
        with warnings.catch_warnings(action="ignore"):
            part, found = kind.from_pretrained(folder, dtype=dtype, local_files_only=True,
                                               use_safetensors=True, output_loading_info=True)
    except Exception as error:              # a broken file can break its reader in any way
        raise UserError(f"{folder}: cannot be loaded: {one_line(error)}") from None
    if found["missing_keys"]:
        raise UserError(f"{folder}: has no tensors {few_names(found['missing_keys'])}")
    for name, tensor in part.state_dict().items():
        refuse_not_finite(tensor, f"{folder}: {name}")
    return part.eval().requires_grad_(False)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def save_sdxl(model: SDXL, folder: Path) -> None:
    """Writes all parts, for diffusers. Raises UserError if the UNet has adapters or holds NaN."""
    for name, tensor in model.state_dict().items():
        if ".base." in name:
            raise UserError(f"{folder}: the model has adapters, merge(model) before saving it")
        refuse_not_finite(tensor, f"{folder}: {name}")
    with writing(folder):
        model.pipeline.save_pretrained(folder)
