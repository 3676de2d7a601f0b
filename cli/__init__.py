"""The command line: one file per verb, no logic; imported as `vlprune.cli`."""
