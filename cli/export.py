"""`vlprune export`: write the ONNX graphs of a run and compare each with PyTorch; pack them; unpack them."""

from vlprune.cli import options as o
from vlprune.cli.show import show
from vlprune.errors import RequestError


def export(
    run: o.RunOrPacked,
    data: o.Data = None,
    tasks: o.Tasks = None,
    precision: o.Precision = None,
    fuse: o.Fuse = None,
    pack: o.Pack = "none",
    values: o.Values = "fp32",
    target: o.Target = "auto",
    pack_threshold: o.PackThreshold = None,
    unpack: o.Unpack = False,
    threads: o.Threads = None,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Write the ONNX graphs of RUN, each compared with PyTorch.

    \b
    Examples:
      vlprune export run --tasks retrieval
      vlprune export run --pack sparse --values fp16 --resume
      vlprune export --unpack run/onnx/multiflow-0.9-finetuned/vqa/packed/image_encoder.onnx
    """
    data_of = o.sources(data)
    if unpack and pack != "none":
        raise RequestError("--pack and --unpack exclude each other: give one of them")
    if not unpack:
        o.check_run(run)
    from vlprune import pipeline
    from vlprune.report.terminal import print_report

    if unpack:
        show(pipeline.unpack(run), json)
        return
    report = pipeline.export(
        run,
        data=data_of,
        tasks=o.as_list(tasks),
        precision=o.as_list(precision),
        fuse=fuse,
        pack=pack,
        values=values,
        target=target,
        pack_threshold=pack_threshold,
        threads=threads,
        resume=resume,
    )
    show(report, json, print_report)
