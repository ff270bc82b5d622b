#!/usr/bin/env python3
"""Writes a Stable Diffusion 1.5 of full size with random weights as one f16 file in LDM names (2 GB).

For measuring speed and memory where no real weights are at hand; it draws noise. Needs torch, diffusers, transformers,
safetensors. usage: random_sd15.py OUTPUT.safetensors
"""
import re
import sys

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_norm_out": "out.0", "conv_out": "out.2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def resnet(rest):
    part, end = rest.rsplit(".", 1)
    return f"{RESNET[part]}.{end}"


def unet_name(key):
    for name, ldm in ENDS.items():
        if key.startswith(name + "."):
            return ldm + key[len(name):]
    side, level, kind, index, rest = re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", key).groups()
    level, index = int(level or 0), int(index)
    if side == "mid":
        return f"middle_block.{2 * index}.{resnet(rest)}" if kind == "resnets" else f"middle_block.1.{rest}"
    block = 3 * level + index + (1 if side == "down" else 0)
    place = "input_blocks" if side == "down" else "output_blocks"
    if kind == "resnets":
        return f"{place}.{block}.0.{resnet(rest)}"
    if kind == "attentions":
        return f"{place}.{block}.1.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{3 * (level + 1)}.0.op.{rest.split('.')[-1]}"
    return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{rest}"


def vae_name(key):
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    for name, ldm in VAE_ATTENTION.items():
        key = key.replace(f"mid_block.attentions.0.{name}.", f"mid.attn_1.{ldm}.")
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample", key)
    return key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")


def main(output):
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        text = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=768, intermediate_size=3072,
                                            num_hidden_layers=12, num_attention_heads=12))
    shapes = {f"model.diffusion_model.{unet_name(k)}": v.shape for k, v in unet.state_dict().items()}
    shapes |= {f"first_stage_model.{vae_name(k)}": v.shape for k, v in vae.state_dict().items()}
    shapes |= {f"cond_stage_model.transformer.{k}": v.shape for k, v in text.state_dict().items() if "position_ids" not in k}
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for key, shape in shapes.items():
        if len(shape) == 1:
            tensors[key] = torch.full(shape, float(key.endswith("weight")), dtype=torch.float16)
        else:
            fan_in = shape[1:].numel()
            tensors[key] = (torch.randn(shape, generator=random) / fan_in**0.5).half()
    save_file(tensors, output)
    print(f"{output}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()) / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main(*sys.argv[1:])
