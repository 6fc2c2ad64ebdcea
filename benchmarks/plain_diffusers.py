"""The plainest script that draws with diffusers, to compare `gen run` with. Folder, prompt, output, seed."""

import sys

import torch
from diffusers import PixArtSigmaPipeline

folder, prompt, output, seed = sys.argv[1:]
pipeline = PixArtSigmaPipeline.from_pretrained(folder)
size = pipeline.transformer.config.sample_size * pipeline.vae_scale_factor
image = pipeline(
    prompt,
    height=size,
    width=size,
    num_inference_steps=20,
    use_resolution_binning=False,
    generator=torch.Generator("cpu").manual_seed(int(seed)),
).images[0]
image.save(output)
