"""`vlprune validate`: score and time the exported graphs of a run with ONNX Runtime."""

from vlprune.cli import options as o
from vlprune.cli.show import show


def validate(
    run: o.Run,
    data: o.Data = None,
    tasks: o.Tasks = None,
    provider: o.Providers = o.CPU,
    bench_batch: o.BenchBatches = o.BATCHES,
    precision: o.Precision = None,
    samples: o.Samples = None,
    batch_size: o.BatchSize = None,
    threads: o.Threads = None,
    skip_broken: o.SkipBroken = False,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Score and time the ONNX graphs of RUN with ONNX Runtime.

    \b
    Example:
      vlprune validate run --provider cpu --bench-batch 1,8,32
    """
    data_of = o.sources(data)
    from vlprune import pipeline
    from vlprune.report.terminal import print_report

    report = pipeline.validate(
        run,
        data=data_of,
        tasks=o.as_list(tasks),
        providers=list(provider),
        bench_batches=list(bench_batch),
        precision=o.as_list(precision),
        samples=samples,
        batch_size=batch_size,
        threads=threads,
        skip_broken=skip_broken,
        resume=resume,
    )
    show(report, json, print_report)
