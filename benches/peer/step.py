#!/usr/bin/env python3
"""The training step of `lorasmith bench` in torch, diffusers and peft; prints the same JSON.

It trains on the same file with the same settings: LoRA on the layers that sd-scripts covers (192 of the UNet, 72 of the
text encoder), AdamW, gradients clipped to norm 1, cached latents, mean squared error, one more step before those that
are timed. With bf16 the frozen weights are bf16 and the rest runs under autocast, as in diffusers' training scripts.
The VAE is not loaded: with cached latents a trainer can drop it.

usage: step.py --model FILE.safetensors [--resolution 512] [--steps 10] ...; `--help` lists them all
"""
import time

STARTED = time.perf_counter()  # before the imports: they belong to the start

import argparse
import json
import statistics
import sys

import diffusers
import peft
import torch
import torch.nn.functional as F
import transformers
from accelerate import init_empty_weights
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_ldm_unet_checkpoint
from peft import LoraConfig
from safetensors import safe_open
from transformers import CLIPTextConfig, CLIPTextModel

UNET_LAYERS = r".*attentions\.\d+\.(proj_in|proj_out|.*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2))"
TEXT_LAYERS = r".*\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)"
ADAPTERS = 192 + 72


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="single file of Stable Diffusion 1.5 (LDM names)")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after a first one")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--gradient-checkpointing", choices=["none", "blocks"], default="none")
    parser.add_argument("--device", default="cpu", help="a torch device: cpu, cuda")
    return parser.parse_args()


def stored(path, prefix):
    """The file's tensors below a prefix; one part at a time is in memory twice, not the whole model."""
    with safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}


def load(args):
    """UNet and text encoder as published, with the file's weights, on the device and in the base precision."""
    with init_empty_weights(include_buffers=False):
        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
        text = CLIPTextModel(CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    weights = convert_ldm_unet_checkpoint(stored(args.model, "model.diffusion_model."), unet.config)
    unet.load_state_dict(weights, assign=True)
    del weights
    unet = unet.to(args.device, dtype)
    weights = convert_ldm_clip_checkpoint(stored(args.model, "cond_stage_model."))
    weights.pop("text_model.embeddings.position_ids", None)  # no weights
    text.load_state_dict(weights, assign=True)
    del weights
    return unet, text.to(args.device, dtype)


def add_adapters(unet, text, args):
    """LoRA in f32 on frozen models; the trained parameters of each."""
    groups = []
    for model, layers in [(unet, UNET_LAYERS), (text, TEXT_LAYERS)]:
        model.requires_grad_(False)
        model.add_adapter(LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=layers))
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        groups.append(trained)
    found = sum(map(len, groups)) // 2
    if found != ADAPTERS:
        sys.exit(f"found {found} layers to adapt, expected {ADAPTERS}: is this a Stable Diffusion 1.5 model?")
    if args.gradient_checkpointing == "blocks":
        unet.enable_gradient_checkpointing()
        text.gradient_checkpointing_enable({"use_reentrant": False})
    return groups


class Clock:
    """Wall and processor seconds since a moment, after the device has finished."""

    def __init__(self, args):
        self.cuda = torch.device(args.device).type == "cuda"
        self.wall, self.cpu = self.now()

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def spent(self):
        wall, cpu = self.now()
        return {"wall_s": wall - self.wall, "cpu_s": cpu - self.cpu}


class Trainer:
    """Everything that a step needs."""

    def __init__(self, args):
        self.args = args
        self.unet, self.text = load(args)
        unet_group, text_group = add_adapters(self.unet, self.text, args)
        self.trained = unet_group + text_group
        self.optimizer = torch.optim.AdamW([
            {"params": unet_group, "lr": 1e-4}, {"params": text_group, "lr": 5e-5}], weight_decay=0.01)
        self.schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        side = args.resolution // 8
        self.random = torch.Generator().manual_seed(0)
        self.latents = self.normal((args.batch_size, 4, side, side))
        words = torch.randint(0, 49406, (1, 75), generator=self.random)
        row = torch.cat([torch.tensor([[49406]]), words, torch.tensor([[49407]])], dim=1)
        self.ids = row.repeat(args.batch_size, 1).to(args.device)

    def normal(self, shape):
        return torch.randn(shape, generator=self.random).to(self.args.device)

    def step(self):
        """One optimizer step; returns the loss and the seconds of its parts."""
        phases, clock = {}, Clock(self.args)

        def done(phase):
            nonlocal clock
            phases[phase] = clock.spent()["wall_s"]
            clock = Clock(self.args)

        noise = self.normal(self.latents.shape)
        timesteps = torch.randint(0, 1000, (len(noise),), generator=self.random).to(self.args.device)
        noisy = self.schedule.add_noise(self.latents, noise, timesteps)
        done("data_s")
        device_type = torch.device(self.args.device).type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.args.precision == "bf16"):
            states = self.text(self.ids)[0]
            done("text_encoder_s")
            prediction = self.unet(noisy, timesteps, states, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), noise)
        done("forward_s")
        loss.backward()
        done("backward_s")
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss = loss.item()
        done("optimizer_s")
        return loss, phases


def peak_rss_bytes():
    """The most memory that this process has had in RAM (Linux)."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024


def summary(values):
    return {"median": statistics.median(values), "min": min(values)}


def main():
    args = arguments()
    torch.manual_seed(0)
    trainer = Trainer(args)
    Clock(args)  # what was queued is part of the start
    start = {"wall_s": time.perf_counter() - STARTED, "cpu_s": time.process_time()}
    spent, phases = [], []
    for _ in range(1 + args.steps):
        clock = Clock(args)
        loss, parts = trainer.step()
        spent.append(clock.spent())
        phases.append(parts)
    cuda = torch.device(args.device).type == "cuda"
    print(json.dumps({
        "program": "torch",
        "version": torch.__version__,
        "libraries": {library.__name__: library.__version__ for library in (diffusers, transformers, peft)},
        "family": "sd1",
        "model": args.model,
        "resolution_px": args.resolution,
        "batch_size": args.batch_size,
        "rank": args.rank,
        "trained_parameters": sum(parameter.numel() for parameter in trainer.trained),
        "gradient_checkpointing": args.gradient_checkpointing,
        "precision": args.precision,
        "device": args.device,
        "device_name": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "steps": args.steps,
        "start": start,
        "first_step": spent[0],
        "step_s": summary([step["wall_s"] for step in spent[1:]]),
        "step_cpu_s": summary([step["cpu_s"] for step in spent[1:]]),
        "phases": {phase: statistics.median(parts[phase] for parts in phases[1:]) for phase in phases[0]},
        "peak_rss_bytes": peak_rss_bytes(),
        **({"device_memory": {"in_use_bytes": torch.cuda.max_memory_allocated(),
                              "reserved_bytes": torch.cuda.max_memory_reserved()}} if cuda else {}),
        "loss": loss,
    }, indent=2))


if __name__ == "__main__":
    main()
