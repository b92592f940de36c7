"""Train the embedded model: `python -m scalediff.demo.train --workdir runs/demo --export runs/demo-model`.

There are three parts: the autoencoder, the latent diffusion model (U-Net and text encoder together), and the export as a diffusers
pipeline folder. Training can be resumed from the last checkpoint, and is reproducible.

Whole scenes are used at every noise level. A third of them are near pure noise, where only the prompt determines the layout; the first
optimizer steps use only these. With `--close-ups-from STEP`, close-ups (crops of larger renders, with the prompt of their scene) are added
from that optimizer step on, only in the lower half of the noise levels, so that the layout is learned from whole scenes.

Legend: B batch, C latent channels, Y x X latent grid, T text tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel

from scalediff.demo.architecture import NATIVE, TEXT_TOKENS, autoencoder, scheduler, text_encoder, tokenizer, unet
from scalediff.demo.scenes import HELD_OUT_SEED, caption, describe, render

CLOSE_UP_STEPS = 500  # close-ups are used below this training timestep
LAYOUT_STEPS = 900  # from this training timestep on, the prompt determines the layout
LAYOUT_FIRST = 500  # number of first optimizer steps that use only these timesteps


def close_ups(seed: int, n: int, resolution: int, *, per_scene: int) -> Tensor:
    """Random native-size crops of larger renders, `[N * per_scene, 3, 64, 64]`; crops of one scene are adjacent."""
    rng = torch.Generator().manual_seed(seed)
    crops = []
    for image in render(seed, n, resolution):
        for top, left in torch.randint(0, resolution - NATIVE + 1, (per_scene, 2), generator=rng).tolist():
            crops.append(image[:, top : top + NATIVE, left : left + NATIVE])
    return torch.stack(crops)


def dataset(workdir: Path, *, scenes: int) -> dict[str, Tensor]:
    """Pictures in uint8 and the seeds of their scenes: `whole` scenes, and `close`-ups from 2x and 4x renders. Cached in the workdir."""
    path = workdir / f"pictures-{scenes}.pt"
    if not path.exists():
        quarter = scenes // 4
        close = torch.cat([close_ups(0, quarter, 2 * NATIVE, per_scene=2), close_ups(quarter, quarter, 4 * NATIVE, per_scene=3)])
        seeds = torch.cat([torch.arange(quarter).repeat_interleave(2), torch.arange(quarter, 2 * quarter).repeat_interleave(3)])
        whole = render(0, scenes, NATIVE)
        data = {"whole": _to_bytes(whole), "whole_seeds": torch.arange(scenes), "close": _to_bytes(close), "close_seeds": seeds}
        _save(data, path)
    pictures: dict[str, Tensor] = torch.load(path)
    return pictures


def train_autoencoder(workdir: Path, *, steps: int, batch: int, scenes: int, device: str) -> AutoencoderKL:
    """Train the autoencoder with L1 + L2 reconstruction and a small KL term, on half whole scenes and half close-ups."""
    data = dataset(workdir, scenes=scenes)
    torch.manual_seed(0)
    model = autoencoder().to(device, memory_format=torch.channels_last)

    def reconstruction(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(step)
        pictures = torch.cat([_sample_pictures(data[kind], batch // 2, rng) for kind in ("whole", "close")])
        x = _to_signed(pictures).to(device, memory_format=torch.channels_last)
        posterior = model.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng).to(device)
        y = model.decode(posterior.mean + posterior.std * noise).sample
        total: Tensor = F.l1_loss(y, x) + 2 * F.mse_loss(y, x) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        return total

    _fit("autoencoder", workdir, nn.ModuleDict({"vae": model}), reconstruction, steps=steps, rate=1.5e-3, ema_decay=0.995)
    with torch.no_grad():
        latents = model.encode(_to_signed(data["whole"][:512]).to(device)).latent_dist.mean
    model.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    _log(workdir, "autoencoder", model.device, scaling_factor=model.config.scaling_factor, **held_out_psnr(model))
    return model


def given_autoencoder(workdir: Path, folder: Path, *, device: str) -> AutoencoderKL:
    """The autoencoder of a pipeline folder; what the folder says of its training, and its PSNR on the scenes of now, go into the log."""
    model = AutoencoderKL.from_pretrained(folder, subfolder="vae", local_files_only=True).to(device).eval().requires_grad_(False)
    trained = folder / "training.json"
    before = json.loads(trained.read_text()).get("autoencoder", {}) if trained.exists() else {}
    _log(workdir, "autoencoder", model.device, **(before | held_out_psnr(model)))
    return model


@torch.no_grad()
def held_out_psnr(model: AutoencoderKL) -> dict[str, float]:
    """PSNR in dB of held-out scenes that went through an autoencoder: 64 of native size, and 16 of four times the side."""
    found = {}
    for name, n, size in (("psnr_db", 64, NATIVE), ("psnr_db_at_4x", 16, 4 * NATIVE)):
        pictures = render(HELD_OUT_SEED, n, size)
        restored = [
            model.decode(model.encode((part * 2 - 1).to(model.device)).latent_dist.mean).sample.cpu() for part in pictures.split(16)
        ]
        psnr = -10 * ((torch.cat(restored) / 2 + 0.5).clamp(0, 1) - pictures).square().mean(dim=(1, 2, 3)).log10()
        found[name] = round(psnr.mean().item(), 2)
    return found


def batch_parts(step: int, batch: int, close_ups_from: int | None = None) -> list[tuple[str, int, int, int]]:
    """Parts of a batch: kind of picture, number of pictures, first timestep, and timestep after the last."""
    if step < LAYOUT_FIRST:
        return [("whole", batch, LAYOUT_STEPS, 1000)]
    layout = batch // 4
    if close_ups_from is None or step < close_ups_from:
        return [("whole", batch - layout, 0, 1000), ("whole", layout, LAYOUT_STEPS, 1000)]
    close = batch // 3
    return [("whole", batch - close - layout, 0, 1000), ("whole", layout, LAYOUT_STEPS, 1000), ("close", close, 0, CLOSE_UP_STEPS)]


def train_denoiser(
    workdir: Path,
    vae: AutoencoderKL,
    *,
    steps: int,
    batch: int,
    scenes: int,
    device: str,
    close_ups_from: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Train U-Net and text encoder with v-prediction on cached latents, with 10 % empty prompts for classifier-free guidance."""
    latents, seeds = _latents(workdir, vae, scenes=scenes, device=device)
    torch.manual_seed(1)
    text_tokenizer, noise_scheduler = tokenizer(), scheduler()
    denoiser, text = unet().to(device, memory_format=torch.channels_last), text_encoder(text_tokenizer).to(device)
    if device == "cpu":
        denoiser.set_attn_processor(AttnProcessor())  # on CPUs the backward of torch's fused attention is slower than two products

    def prompt(seed: int, draw: int, empty: bool) -> str:
        return "" if empty else caption(describe(seed), draw=draw)

    def loss(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(step)
        samples, timesteps, scene_seeds = [], [], []
        for kind, n, start, stop in batch_parts(step, batch, close_ups_from):
            picks = torch.randint(len(latents[kind]), (n,), generator=rng)
            samples.append(latents[kind][picks])
            timesteps.append(_timesteps(start, stop, n, rng))
            scene_seeds += seeds[kind][picks].tolist()
        x, t = torch.cat(samples), torch.cat(timesteps)
        empty = (torch.rand(batch, generator=rng) < 0.1).tolist()
        prompts = [prompt(seed, step, e) for seed, e in zip(scene_seeds, empty, strict=True)]
        ids = text_tokenizer(prompts, padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt").input_ids
        noise = torch.randn(x.shape, generator=rng)
        noisy, target = noise_scheduler.add_noise(x, noise, t), noise_scheduler.get_velocity(x, noise, t)
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            states = text(ids.to(device))[0]
            v = denoiser(noisy.to(device, memory_format=torch.channels_last), t.to(device), states).sample
        return F.mse_loss(v.float(), target.to(device))

    models = nn.ModuleDict({"unet": denoiser, "text": text})
    _fit("denoiser", workdir, models, loss, steps=steps, rate=8e-4, ema_decay=0.999)
    close_up_steps = 0 if close_ups_from is None else max(0, steps - max(close_ups_from, LAYOUT_FIRST))
    _log(workdir, "denoiser", device, batch=batch, scenes=scenes, dtype=str(dtype).removeprefix("torch."), close_up_steps=close_up_steps)
    denoiser.set_default_attn_processor()
    return denoiser, text


def export(workdir: Path, folder: Path, vae: AutoencoderKL, denoiser: UNet2DConditionModel, text: CLIPTextModel) -> None:
    """Write a diffusers pipeline folder, with the training log next to the weights.

    The U-Net and the autoencoder are stored in fp16; diffusers loads them as fp32 by default. The text encoder is stored in fp32, because
    transformers loads the stored dtype.
    """
    pipe = StableDiffusionPipeline(
        vae=vae.to("cpu", torch.float16),
        unet=denoiser.to("cpu", torch.float16),
        text_encoder=text.cpu(),
        tokenizer=tokenizer(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    (folder / "training.json").write_text((workdir / "training.json").read_text())


def _fit(
    name: str,
    workdir: Path,
    models: nn.Module,
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    ema_decay: float,
    save_every: int = 50,
) -> None:
    """Train with AdamW, warm-up and cosine decay, then load the averaged weights into `models`. Batches depend only on the step."""
    path = workdir / f"{name}.pt"
    average = copy.deepcopy(models).requires_grad_(False)
    optimizer = torch.optim.AdamW(models.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    done, seconds, device = 0, 0.0, next(models.parameters()).device
    if path.exists():
        saved = torch.load(path, map_location=device)
        done, seconds = saved["state"]["step"], saved["state"]["seconds"]
        models.load_state_dict(saved["models"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
    models.train()
    recent, since = [], time.perf_counter()
    for step in range(done, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * _rate_share(step, steps)
        value = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(models.parameters()), 1 - decay)
        recent.append(value.item())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            now = time.perf_counter()
            seconds, since = seconds + now - since, now
            mean, recent = sum(recent) / len(recent), []
            print(f"{name} {step + 1}/{steps} loss {mean:.4f} {seconds:.0f} s", flush=True)
            state = {"step": step + 1, "seconds": seconds}
            weights = {"models": models.state_dict(), "average": average.state_dict()}
            _save({"state": state, "optimizer": optimizer.state_dict()} | weights, path)
            _log(workdir, name, device, steps=step + 1, of=steps, seconds=round(seconds), loss=round(mean, 4))
    models.load_state_dict(average.state_dict())
    models.eval().requires_grad_(False)


def _rate_share(step: int, steps: int) -> float:
    """Factor on the learning rate: warm-up over 100 steps, then cosine decay to 2 %."""
    return min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def _latents(workdir: Path, vae: AutoencoderKL, *, scenes: int, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    data = dataset(workdir, scenes=scenes)
    path = workdir / f"latents-{scenes}-{vae.config.scaling_factor}.pt"  # the scale identifies the autoencoder
    if not path.exists():
        with torch.no_grad():
            encoded = {
                kind: torch.cat([vae.encode(_to_signed(b).to(device)).latent_dist.mean.cpu() for b in data[kind].split(64)])
                for kind in ("whole", "close")
            }
        _save({kind: z * vae.config.scaling_factor for kind, z in encoded.items()}, path)
    return torch.load(path), {"whole": data["whole_seeds"], "close": data["close_seeds"]}


def _timesteps(start: int, stop: int, n: int, rng: torch.Generator) -> Tensor:
    """Stratified timesteps in [start, stop): one from each of n equal strata, which lowers the variance of the loss."""
    return (start + (torch.arange(n) + torch.rand(n, generator=rng)) * (stop - start) / n).long()


def _sample_pictures(pictures: Tensor, n: int, rng: torch.Generator) -> Tensor:
    return pictures[torch.randint(len(pictures), (n,), generator=rng)]


def _to_bytes(pictures: Tensor) -> Tensor:
    return (pictures * 255).round().to(torch.uint8)


def _to_signed(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


def _save(value: object, path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(value, part)
    os.replace(part, path)


def _log(workdir: Path, name: str, device: torch.device | str, **facts: float | str) -> None:
    path, on_gpu = workdir / "training.json", torch.device(device).type == "cuda"
    log = json.loads(path.read_text()) if path.exists() else {}
    log[name] = log.get(name, {}) | facts
    log["machine"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else f"{_processor()}, {torch.get_num_threads()} threads",
    }
    path.write_text(json.dumps(log, indent=1) + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return named[1] if named else platform.processor() or platform.machine()


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True, help="folder for checkpoints, rendered pictures and the log")
    parser.add_argument("--export", type=Path, required=True, help="output folder for the pipeline")
    parser.add_argument("--scenes", type=int, default=8000, help="number of training scenes")
    parser.add_argument("--vae-steps", type=int, default=2500, help="optimizer steps of the autoencoder")
    parser.add_argument("--vae-batch", type=int, default=16, help="batch size of the autoencoder")
    parser.add_argument("--unet-steps", type=int, default=3400, help="optimizer steps of U-Net and text encoder")
    parser.add_argument("--unet-batch", type=int, default=64, help="batch size of U-Net and text encoder")
    parser.add_argument(
        "--close-ups-from", type=int, metavar="STEP", help="optimizer step of the denoiser from which on close-ups are used (never)"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="dtype of the denoiser's products (mixed precision)")
    parser.add_argument(
        "--autoencoder", type=Path, metavar="FOLDER", help="pipeline folder whose autoencoder is used instead of training one"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(None if arguments is None else list(arguments))
    options.workdir.mkdir(parents=True, exist_ok=True)
    common = {"scenes": options.scenes, "device": options.device}
    if options.autoencoder is None:
        vae = train_autoencoder(options.workdir, steps=options.vae_steps, batch=options.vae_batch, **common)
    else:
        vae = given_autoencoder(options.workdir, options.autoencoder, device=options.device)
    denoiser, text = train_denoiser(
        options.workdir,
        vae,
        steps=options.unet_steps,
        batch=options.unet_batch,
        close_ups_from=options.close_ups_from,
        dtype=torch.bfloat16 if options.dtype == "bf16" else torch.float32,
        **common,
    )
    export(options.workdir, options.export, vae, denoiser, text)


if __name__ == "__main__":
    main()
