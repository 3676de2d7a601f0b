"""SigLIP's graphs: those of CLIP."""

from vlprune.exporters.clip import graphs, task_spec, torch_graphs


__all__ = ["graphs", "task_spec", "torch_graphs"]
