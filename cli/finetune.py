"""`vlprune finetune`: train the pruned models of a run, masked weights held at zero."""

from vlprune.cli import options as o
from vlprune.cli.show import show


def finetune(
    run: o.Run,
    finetune: o.Finetune = "full",
    data: o.Data = None,
    tasks: o.Tasks = None,
    max_steps: o.MaxSteps = None,
    epochs: o.Epochs = None,
    lr: o.LearningRate = None,
    batch_size: o.BatchSize = None,
    gradient_checkpointing: o.GradientCheckpointing = False,
    compile: o.Compile = False,
    device: o.Device = "auto",
    threads: o.Threads = None,
    seed: o.RunSeed = None,
    skip_broken: o.SkipBroken = False,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Fine-tune the dense and pruned models of RUN per task.

    \b
    Example:
      vlprune finetune run --tasks vqa --epochs 2 --lr 3e-4
    """
    data_of = o.sources(data)
    from vlprune import pipeline
    from vlprune.report.terminal import print_report

    report = pipeline.finetune(
        run,
        finetune=finetune,
        data=data_of,
        tasks=o.as_list(tasks),
        max_steps=max_steps,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        gradient_checkpointing=gradient_checkpointing,
        compile=compile,
        device=device,
        threads=threads,
        seed=seed,
        skip_broken=skip_broken,
        resume=resume,
    )
    show(report, json, print_report)
