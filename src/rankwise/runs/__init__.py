"""Stages on disk: listed with their hashes, taken over as they were written, by one process at a time."""

from rankwise.runs.executor import SCRATCH, Crew, Done, Here, Job, clear_scratch
from rankwise.runs.files import make_writable, replacing, take_space, to_disk, write_atomically
from rankwise.runs.folder import MANIFEST, Folder
from rankwise.runs.holding import keeping, locked
from rankwise.runs.kept import KeptRun, delete_kept, kept_named, kept_runs
from rankwise.runs.lines import Lines
from rankwise.runs.run import Run, Stage, cache_root, default_run_directory, stage_key

__all__ = [
    "MANIFEST",
    "SCRATCH",
    "Crew",
    "Done",
    "Folder",
    "Here",
    "Job",
    "KeptRun",
    "Lines",
    "Run",
    "Stage",
    "cache_root",
    "clear_scratch",
    "default_run_directory",
    "delete_kept",
    "keeping",
    "kept_named",
    "kept_runs",
    "locked",
    "make_writable",
    "replacing",
    "stage_key",
    "take_space",
    "to_disk",
    "write_atomically",
]
