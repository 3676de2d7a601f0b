"""Exporters: one file per model family; imported as `vlprune.exporters`."""
