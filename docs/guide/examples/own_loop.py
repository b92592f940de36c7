"""Your own sampling loop: the denoiser is patched, and every pass above its native size attends in windows.

`python docs/guide/examples/own_loop.py`
"""

import torch

import scalediff

pipe = scalediff.load_demo()
unet, scheduler = pipe.unet, pipe.scheduler
text, empty = pipe.encode_prompt("a red disc at noon", "cpu", 1, True)  # [1, T, 64] each
text = torch.cat([empty, text])

scheduler.set_timesteps(10)
latents = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))  # native: 16 x 16
with torch.no_grad(), scalediff.patch_model(unet, jitter="alternate") as handle:
    for t in scheduler.timesteps:
        both = torch.cat([latents, latents])  # a new tensor: the next offset of the patches
        unconditional, conditional = unet(both, t, encoder_hidden_states=text).sample.chunk(2)
        guided = unconditional + 1.5 * (conditional - unconditional)
        latents = scheduler.step(guided, t, latents).prev_sample
    print(handle.report)
    pixels = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
pipe.image_processor.postprocess(pixels)[0].save("disc.png")
