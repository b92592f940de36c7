"""A diffusers pipeline: patch it, and its own call draws above the native size. `python docs/guide/examples/pipeline.py`"""

import torch

import scalediff

pipe = scalediff.load_demo()  # or diffusers.DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
with scalediff.patch_model(pipe) as handle:
    picture = pipe("a red disc at noon", height=128, width=128, generator=torch.Generator().manual_seed(0)).images[0]
    print(handle.report)
picture.save("disc.png")
