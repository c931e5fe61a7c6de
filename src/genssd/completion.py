"""Scripts that complete commands and flags in bash, zsh and fish: `genssd --print-completion SHELL`."""

from __future__ import annotations

from collections.abc import Mapping

from genssd.configs import CONFIGS
from genssd.engine.common.closest import suggest_or_list
from genssd.engine.common.errors import InputError
from genssd.flag_list import list_flags

SHELLS = ("bash", "zsh", "fish")
COMMON = ("--config", "--print-config", "--help")
"""Flags of every command that are no options of it."""

_BASH = """\
# genssd --print-completion bash > ~/.local/share/bash-completion/completions/genssd
_genssd() {
    local current=${COMP_WORDS[COMP_CWORD]} word command=
    for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
        case $word in
            COMMANDS) command=$word ;;
        esac
    done
    if [[ -z $command ]]; then
        COMPREPLY=($(compgen -W "NAMES --help --version --print-completion" -- "$current"))
        return
    fi
    if [[ $current != -* ]]; then
        COMPREPLY=($(compgen -f -- "$current"))
        return
    fi
    case $command in
CASES    esac
}
complete -o filenames -F _genssd genssd
"""
_ZSH = """\
#compdef genssd
# genssd --print-completion zsh > a directory of $fpath, as _genssd
_genssd() {
    local command=${words[(r)(COMMANDS)]}
    if [[ -z $command || $command == $words[CURRENT] ]]; then
        compadd -- NAMES --help --version --print-completion
        return
    fi
    if [[ $words[CURRENT] != -* ]]; then
        _files
        return
    fi
    case $command in
CASES    esac
}
if [[ $funcstack[1] == _genssd ]]; then _genssd "$@"; else compdef _genssd genssd; fi
"""


def render_completion(shell: str, summaries: Mapping[str, str]) -> str:
    """Return the script for a shell. summaries: the commands, each with what it does in one line.

    Raises InputError on a shell without a script.
    """
    if shell not in SHELLS:
        raise InputError(f"no completion for {shell!r}{suggest_or_list(shell, SHELLS)}")
    flags = {command: list_typed_names(command) for command in summaries}
    if shell == "fish":
        return _render_fish(summaries, flags)
    template = _BASH if shell == "bash" else _ZSH
    cases = "".join(f"        {command}) {_offer(shell, ' '.join(words))} ;;\n" for command, words in flags.items())
    text = template.replace("COMMANDS", "|".join(summaries), 1).replace("NAMES", " ".join(summaries))
    return text.replace("CASES", cases)


def list_typed_names(command: str) -> list[str]:
    """Return the flags of a command, with those that turn an option off, and those of every command."""
    names = [name for flag in list_flags(CONFIGS[command]) for name in flag.names]
    return [*names, *(COMMON if "--config" not in names else COMMON[-1:])]


def _offer(shell: str, words: str) -> str:
    """Return the statement that offers words."""
    return f'COMPREPLY=($(compgen -W "{words}" -- "$current"))' if shell == "bash" else f"compadd -- {words}"


def _render_fish(summaries: Mapping[str, str], flags: Mapping[str, list[str]]) -> str:
    lines = ["# genssd --print-completion fish > ~/.config/fish/completions/genssd.fish"]
    for command, summary in summaries.items():
        text = summary.replace("\\", "\\\\").replace("'", "\\'")
        lines.append(f"complete -c genssd -f -n __fish_use_subcommand -a {command} -d '{text}'")
    for command, words in flags.items():
        seen = f"'__fish_seen_subcommand_from {command}'"
        lines += [f"complete -c genssd -n {seen} -l {word.removeprefix('--')}" for word in words]
    return "\n".join(lines) + "\n"
