"""`vlprune bench`: time the exported graphs of a run with ONNX Runtime."""

from vlprune.cli import options as o
from vlprune.cli.show import show


def bench(
    run: o.Run,
    tasks: o.Tasks = None,
    provider: o.Providers = o.CPU,
    batch: o.Batches = o.BATCHES,
    seconds: o.Seconds = None,
    cuda_graph: o.CudaGraph = False,
    threads: o.Threads = None,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Time the ONNX graphs of RUN against the dense ones; needs no data.

    Packed graphs stand beside the dense ones in dynamic int8, which are made for this and not kept. On a GPU the times
    are those of the device alone; report.json has those with copies, too.

    \b
    Examples:
      vlprune bench run --batch 1,8,32 --threads 2 --seconds 10
      vlprune bench run --provider cuda --batch 1,8,32,128 --cuda-graph
    """
    from vlprune import pipeline
    from vlprune.report.terminal import print_report

    report = pipeline.bench(
        run,
        tasks=o.as_list(tasks),
        providers=list(provider),
        bench_batches=list(batch),
        seconds=seconds,
        cuda_graph=cuda_graph,
        threads=threads,
        resume=resume,
    )
    show(report, json, print_report)
