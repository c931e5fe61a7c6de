"""`genssd doctor`: every check of a command's inputs, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable

from genssd.distill.doctor.data_checks import check_answers, check_held_out, check_lengths, check_overlap, check_rows
from genssd.distill.doctor.disk_checks import check_disk
from genssd.distill.doctor.findings import Finding
from genssd.distill.doctor.inputs import Inputs, open_inputs
from genssd.distill.doctor.machine_checks import check_kernels
from genssd.distill.doctor.memory_checks import check_caches, check_training
from genssd.distill.doctor.model_checks import check_models, check_vocabularies
from genssd.distill.doctor.option_checks import check_options
from genssd.distill.doctor.run_checks import check_run, check_settings
from genssd.distill.doctor.settings import Settings
from genssd.distill.doctor.team_checks import check_teachers
from genssd.distill.doctor.text_checks import check_masks, check_templates
from genssd.distill.doctor.thinking_checks import check_thinking
from genssd.distill.doctor.token_checks import check_ends, check_tokenizers
from genssd.distill.doctor.upload_checks import check_upload
from genssd.distill.doctor.verify import verify

Check = Callable[[Inputs], list[Finding]]
CHECKS: tuple[Check, ...] = (
    check_settings,
    check_options,
    check_run,
    check_models,
    check_vocabularies,
    check_tokenizers,
    check_teachers,
    check_templates,
    check_thinking,
    check_ends,
    check_rows,
    check_held_out,
    check_answers,
    check_lengths,
    check_overlap,
    check_masks,
    check_caches,
    check_training,
    check_disk,
    check_upload,
    check_kernels,
)
"""The checks in the order in which their findings are shown."""
FORMULA_SECONDS = 20.0
"""Time for trying whether formulas can be verified. The commands themselves do not try."""
QUICK_ROWS = 200
"""Number of rows that the commands themselves have examined before they load their models."""


def examine(settings: Settings, *, rows: int, verify_seconds: float | None = None) -> list[Finding]:
    """Return the findings of all checks. rows: number of rows of the data that are read.

    verify_seconds: how long the engine is compared with transformers; None: not at all, and no weights are loaded.
    """
    inputs = open_inputs(settings, rows, formula_seconds=FORMULA_SECONDS)
    findings = [*inputs.faults, *(finding for check in CHECKS for finding in check(inputs))]
    return findings if verify_seconds is None else [*findings, *verify(inputs, seconds=verify_seconds)]


def summarise(settings: Settings) -> str | None:
    """Return one line on what the checks find for a command that is about to begin.

    None where its inputs cannot be opened: the command then ends with a line of its own.
    """
    inputs = open_inputs(settings, QUICK_ROWS)
    if any(finding.level == "error" for finding in inputs.faults):
        return None
    findings = [finding for check in CHECKS for finding in check(inputs)]
    return describe(findings, f"genssd doctor {settings.command}")


def describe(findings: list[Finding], command: str) -> str:
    """Return one line that names the worst finding. command: that shows the others."""
    worse = [finding for finding in findings if finding.level != "ok"]
    if not worse:
        return f"{len(findings)} checks before loading: all ok"
    worst = max(worse, key=lambda finding: finding.level == "error")
    others = f" (and {len(worse) - 1} more)" if len(worse) > 1 else ""
    return f"{worst.level}: {worst.name}: {worst.line}{others}; `{command}` with the same flags shows all"
