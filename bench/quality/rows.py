"""What `bench.quality` measures: the rows, by table, and the columns of each."""

from __future__ import annotations

from typing import Any

from bench.harness import rows as harness

# Settings of the embedded model's preset that a row changes.
ABLATION: dict[str, dict[str, Any]] = {
    "full": {"attention": "full"},
    "npa": {"attention": "npa"},
    "npa-no-lfm": {"attention": "npa", "lfm": False},
    "npa-no-sg": {"attention": "npa", "sg": False},
    "npa-alone": {"attention": "npa", "lfm": False, "sg": False},
}
SWEEP: dict[str, dict[str, Any]] = {
    f"restart-{restart}-cutoff-{cutoff}": {"attention": "npa", "restart": restart, "lfm_cutoff": cutoff, "sg_cutoff": cutoff}
    for restart in (0.2, 0.3, 0.4, 0.5)
    for cutoff in (0.125, 0.25, 0.5)
}
SWITCHES: dict[str, dict[str, Any]] = {  # each alone, beside the row with none
    "no-switch": {},
    "lfm-cutoff-0.25": {"lfm_cutoff": 0.25},
    "sg-cutoff-0.25": {"sg_cutoff": 0.25},
    "sg-annealed": {"sg_cutoff_start": 0.5},
    "gaussian": {"filter": "gaussian"},
    "butterworth": {"filter": "butterworth"},
    "trajectory": {"anchor": "trajectory"},
    "alternate": {"jitter": "alternate"},
    "guided-two-thirds": {"guidance_until": 2 / 3},
}
CASCADES = ABLATION | SWEEP | SWITCHES
METHODS = ("multidiffusion", "demofusion")
UNDRAWN = ("autoencoded", "true")  # rows that no model draws
LABELS = {
    "direct": "direct inference",
    "full": "full attention + LFM + SG",
    "npa": "NPA + LFM + SG",
    "npa-no-lfm": "NPA without LFM",
    "npa-no-sg": "NPA without SG",
    "npa-alone": "NPA without both",
    "multidiffusion": "MultiDiffusion",
    "demofusion": "DemoFusion",
    "no-switch": "as in the preset",
    "lfm-cutoff-0.25": "LFM cutoff 0.25 in place of 0.125",
    "sg-cutoff-0.25": "SG cutoff 0.25 in place of 0.125",
    "sg-annealed": "SG cutoff from 0.5 to 0.125",
    "gaussian": "Gaussian filter",
    "butterworth": "Butterworth filter",
    "trajectory": "SG to the base stage's trajectory",
    "alternate": "alternating patch grid",
    "guided-two-thirds": "guidance in the first two thirds",
    "autoencoded": "true renders, autoencoded",
    "true": "true renders",
    "native": "native size",
    "native-true": "true renders, native size",
    "words": "prompts of an hour and a place",
}
TABLES = {
    "The parts of the method": ("direct", *METHODS, *ABLATION, *UNDRAWN),
    "The switches": tuple(SWITCHES),
    "Restart and cutoff": tuple(SWEEP),
    "At native size": ("native", "native-true"),
    "Words": ("words",),
}
COLUMNS = {  # heading and format
    "n": ("pictures", "{:.0f}"),
    "size": ("pixels", "{:.0f}"),
    "one_disc": ("exactly one disc", "{:.1%}"),
    "hour": ("hour as prompted", "{:.1%}"),
    "place": ("place as prompted", "{:.1%}"),
    "discs": ("discs", "{:.2f}"),
    "swd": ("SWD, all levels", "{:.1f}"),
    "swd_fine": ("SWD, finest", "{:.1f}"),
    "spectrum": ("spectrum distance", "{:.3f}"),
    "hf_ratio": ("HF ratio", "{:.4f}"),
    "seam": ("seam z", "{:+.2f}"),
    "seam_control": ("control z", "{:+.2f}"),
    "seconds": ("s per picture", "{:.2f}"),
    "gflops": ("attention GFLOPs", "{:.2f}"),
    "all_gflops": ("all GFLOPs", "{:.1f}"),
}
SPREAD = ("seconds_p20", "seconds_p80")  # beside the median, in its cell
BATCH = 4  # pictures
FACTS = ("command", "model", *harness.FACTS)
FIELDS = ("row", *COLUMNS, *SPREAD, *FACTS)
