"""The scripts that complete commands and flags do so in the shells that are installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from genssd.cli import SUMMARIES, main
from genssd.completion import SHELLS, list_typed_names, render_completion
from genssd.configs import CONFIGS
from genssd.engine.common.errors import InputError
from genssd.flags import read_config


def complete(shell: str, words: list[str], directory: Path) -> list[str]:
    """What the script of a shell offers for the last of some words."""
    script = directory / "completion"
    script.write_text(render_completion(shell, SUMMARIES))
    if shell == "bash":
        quoted = " ".join(f"'{word}'" for word in words)
        program = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _genssd"
        program += '; printf "%s\\n" "${COMPREPLY[@]}"'
    else:
        program = f"source {script}; complete -C '{' '.join(words)}' | string split -f1 \\t"
    done = subprocess.run([shell, "-c", program], cwd=directory, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_commands_and_flags_are_completed(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    assert set(complete(shell, ["genssd", "d"], tmp_path)) == {"demo", "distill", "diagnose", "doctor"}
    offered = complete(shell, ["genssd", "select", "--data", "x", "--chunk."], tmp_path)
    assert {"--chunk.tokens", "--chunk.until"} <= set(offered)
    assert all(word.startswith("--chunk.") for word in offered)
    assert "--no-resume" in complete(shell, ["genssd", "evaluate", "--no-"], tmp_path)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_names_all_commands_and_is_sound(shell: str, tmp_path: Path) -> None:
    text = render_completion(shell, SUMMARIES)
    assert all(command in text for command in SUMMARIES)
    if shutil.which(shell) is not None:
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_what_is_offered_is_a_flag() -> None:
    """Where a flag that is not known stands after all that are offered, that one is refused."""
    for command in CONFIGS:
        names = [name for name in list_typed_names(command) if name not in ("--config", "--print-config", "--help")]
        with pytest.raises(InputError, match=r"^unknown flag --bogus"):
            read_config(command, [*names, "--bogus"], CONFIGS[command])


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--print-completion", "fsh"])
    assert "no completion for 'fsh'; did you mean 'fish'?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--print-completion"])
    assert "known: bash, zsh, fish" in capsys.readouterr().err
    main(["--print-completion", "bash"])
    assert "complete -o filenames -F _genssd genssd" in capsys.readouterr().out
