"""`vlprune export`: write the ONNX graphs of a run and compare each with PyTorch."""

from vlprune.cli import options as o
from vlprune.cli.show import show


def export(
    run: o.Run,
    data: o.Data = None,
    tasks: o.Tasks = None,
    threads: o.Threads = None,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Write the ONNX graphs of RUN, each compared with PyTorch.

    \b
    Example:
      vlprune export run --tasks retrieval
    """
    data_of = o.sources(data)
    from vlprune import pipeline
    from vlprune.report.terminal import print_report

    report = pipeline.export(run, data=data_of, tasks=o.as_list(tasks), threads=threads, resume=resume)
    show(report, json, print_report)
