"""`vlprune prune`: calibrate once and write the masks."""

from vlprune.cli import options as o
from vlprune.cli.show import show


def prune(
    model: o.Model,
    output: o.Output,
    ratio: o.Ratio = o.RATIOS,
    method: o.Method = "multiflow",
    pattern: o.Pattern = "unstructured",
    permute: o.Permute = False,
    round_widths: o.RoundWidths = True,
    mope_pairs: o.MopePairs = None,
    family: o.Family = None,
    calibration: o.Calibration = None,
    calibration_samples: o.CalibrationSamples = None,
    batch_size: o.BatchSize = None,
    image_size: o.ImageSize = None,
    device: o.Device = "auto",
    threads: o.Threads = None,
    seed: o.Seed = 0,
    skip_broken: o.SkipBroken = False,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Calibrate MODEL once and write the masks of every ratio.

    \b
    Example:
      vlprune prune blip-tiny --ratio 0.63,0.75,0.9 --output run
    """
    from vlprune import pipeline
    from vlprune.report.terminal import print_report

    report = pipeline.prune(
        model,
        output=output,
        ratios=list(ratio),
        method=method,
        pattern=pattern,
        permute=permute,
        round_widths=round_widths,
        mope=o.mope(pairs=mope_pairs),
        family=family,
        calibration=calibration,
        calibration_samples=calibration_samples,
        batch_size=batch_size,
        image_size=image_size,
        device=device,
        threads=threads,
        seed=seed,
        skip_broken=skip_broken,
        resume=resume,
    )
    show(report, json, print_report)
