"""What a run that was stopped has left on disk, in words."""

from __future__ import annotations

from pathlib import Path

from genssd.distill.runs.journal import count_lines

WORK = {
    "select": "prompt",
    "generate": "prompt",
    "score": "trace",
    "prefix": "trace",
    "leaf": "trace",
    "diagnose": "question",
    "evaluate": "problem",
    "distill": "round",
    "reproduce": "arm",
}
"""What a line of a command's journal is the finished work of."""


def describe_stopped(output_dir: Path, command: str, journal: Path | None, *, can_resume: bool) -> str:
    """Return what the output directory holds of a run that was stopped, and how the run goes on."""
    if not (output_dir / "run.json").exists():
        return "nothing was written"
    if command == "train":
        return _describe_training(output_dir)
    if journal is None:
        return f"{output_dir} holds no finished results; run the command again"
    work, count = WORK.get(command, "line"), count_lines(journal)
    begun = sorted(path.name for path in output_dir.glob("round-*") if command == "distill")
    if count == 0 and not begun:
        return f"no {work} is finished in {output_dir}"
    held = f"{journal} holds {count} finished {work}{'' if count == 1 else 's'}"
    return f"{held}; {'--resume continues' if can_resume else 'run the command again'}"


def _describe_training(output_dir: Path) -> str:
    steps = [
        path.parent.name.removeprefix("checkpoint-") for path in output_dir.glob("checkpoint-*/trainer_state.json")
    ]
    newest = max((int(step) for step in steps if step.isdecimal()), default=None)
    if newest is None:
        return f"{output_dir} holds no checkpoint (save_steps writes them); the training begins anew"
    return f"{output_dir / f'checkpoint-{newest}'} is complete; --resume-from-checkpoint last continues"
