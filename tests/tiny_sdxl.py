"""Makes a tiny random folder in the form of SDXL, and photos, for tests."""
import json
from pathlib import Path

import torch

SIDE, WIDTH = 16, 64        # points of a picture's side; channels of the text


def make_sdxl(folder: Path) -> Path:
    """Writes a folder that diffusers loads as a StableDiffusionXLPipeline, with random weights."""
    from diffusers import (AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline,
                           UNet2DConditionModel)
    from transformers import (CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection,
                              CLIPTokenizer)
    torch.manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ends = dict(bos_token_id=52, eos_token_id=53, pad_token_id=53)
    tokenizers = [CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"),
                                model_max_length=77) for _ in range(2)]
    text = CLIPTextConfig(vocab_size=len(words), hidden_size=WIDTH // 2, intermediate_size=32,
                          num_hidden_layers=2, num_attention_heads=2, projection_dim=WIDTH // 2,
                          **ends)
    unet = UNet2DConditionModel(
        sample_size=SIDE // 2, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(32, 64), norm_num_groups=8, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), transformer_layers_per_block=(1, 2),
        cross_attention_dim=WIDTH, use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + WIDTH // 2)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 2, sample_size=SIDE,
                        up_block_types=("UpDecoderBlock2D",) * 2, scaling_factor=0.13025)
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, steps_offset=1,
                                       beta_schedule="scaled_linear", timestep_spacing="leading")
    StableDiffusionXLPipeline(
        vae, CLIPTextModel(text), CLIPTextModelWithProjection(text), *tokenizers, unet,
        scheduler).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    return folder
