#!/usr/bin/env python3
"""Does diffusers load a LoRA of lorasmith without a warning, and does the UNet then answer as lorasmith's does?

usage: check.py BASE_FOLDER LORA.safetensors [LORASMITH_PROGRAM]

`lorasmith lora-output` writes the input that it used and the output that it got; this computes the same with
`load_lora_weights`. Needs what requirements.txt lists.
"""
import logging
import subprocess
import sys
import tempfile
import warnings

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

TOLERANCE = 1e-4


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def main(base, lora, program="lorasmith"):
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/output.safetensors"
        subprocess.run([program, "lora-output", "--base", base, "--lora", lora, "--output", out], check=True)
        ours = load_file(out)
    pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=torch.float32, safety_checker=None)
    seen = Warnings()
    for name in ("diffusers", "peft", "transformers"):
        logging.getLogger(name).addHandler(seen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            before = pipe.unet(ours["sample"], ours["timesteps"], ours["context"]).sample
        pipe.load_lora_weights(lora)
    messages = seen.messages + [str(w.message) for w in caught]
    with torch.no_grad():
        after = pipe.unet(ours["sample"], ours["timesteps"], ours["context"]).sample
    error = (after - ours["output"]).abs().max().item()
    effect = (after - before).abs().max().item()
    print(f"largest difference {error:.1e} (allowed {TOLERANCE:.0e}), effect of the LoRA {effect:.1e}, warnings: {messages}")
    return 0 if error <= TOLERANCE and effect > 10 * TOLERANCE and not messages else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
