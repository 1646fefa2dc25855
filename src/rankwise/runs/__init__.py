"""Finished stages on disk."""

from rankwise.runs.run import Run, Stage, default_run_directory, stage_key

__all__ = ["Run", "Stage", "default_run_directory", "stage_key"]
