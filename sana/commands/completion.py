"""Prints a script that completes sana's commands and options in a shell.

    eval "$(sana completion bash)"                                 (in ~/.bashrc)
    eval "$(sana completion zsh)"                                  (in ~/.zshrc, after compinit)
    sana completion fish > ~/.config/fish/completions/sana.fish

Exit codes: 0 done, 2 wrong usage.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sana.commands.parsing import new_parser

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Word:
    """An option, or the name of a command, with its help and the values that it may take."""

    text: str
    help: str = ""
    values: tuple[str, ...] = ()
    takes_value: bool = False


def build_parser(prog: str | None = None, description: str | None = None) -> argparse.ArgumentParser:
    """Returns the parser."""
    parser = new_parser(prog, description or __doc__)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(
    argv: Sequence[str] | None = None,
    *,
    parsers: Mapping[str, argparse.ArgumentParser],
    helps: Mapping[str, str],
    prog: str | None = None,
    description: str | None = None,
) -> int:
    """Prints the script for these commands ("data check" is two words); returns the exit code."""
    shell = build_parser(prog, description).parse_args(argv).shell
    write = {"bash": bash, "zsh": zsh, "fish": fish}[shell]
    print(write(table(parsers, helps)), end="")
    return 0


def table(parsers: Mapping[str, argparse.ArgumentParser], helps: Mapping[str, str]) -> dict[str, list[Word]]:
    """Returns what may follow "", "data", "data check", ...: names of commands, and options of whole commands."""
    follows: dict[str, list[Word]] = {"": [Word("--help", "show help"), Word("--version", "show the version")]}
    for name, parser in parsers.items():
        words = name.split(" ")
        for depth, word in enumerate(words):
            known = follows.setdefault(" ".join(words[:depth]), [])
            if word not in [one.text for one in known]:
                whole = depth == len(words) - 1
                of_group = [other.removeprefix(f"{word} ") for other in parsers if other.startswith(f"{word} ")]
                known.append(Word(word, helps[name] if whole else ", ".join(of_group)))
        follows[name] = options(parser)
    return follows


def options(parser: argparse.ArgumentParser) -> list[Word]:
    """Returns a parser's options, and as words without dashes the choices of its arguments."""
    found = []
    for action in parser._actions:  # argparse has no public way to ask
        values = tuple(str(one) for one in action.choices or ())
        takes = action.nargs != 0
        found += [Word(text, action.help or "", values, takes) for text in action.option_strings]
        found += [Word(value, action.help or "") for value in values if not action.option_strings]
    return found


def groups_of(follows: Mapping[str, Sequence[Word]]) -> str:
    """Returns the first words of commands of two words."""
    return " ".join(sorted({name.split(" ")[0] for name in follows if " " in name}))


def plain_of(follows: Mapping[str, Sequence[Word]]) -> str:
    """Returns "|name|name|" of what is followed by words without dashes, in which "" is `sana` itself."""
    return "|" + "".join(f"{name}|" for name, words in follows.items() if any(w.text[0] != "-" for w in words))


def bash(follows: Mapping[str, Sequence[Word]]) -> str:
    """Returns the script for bash: options and values where they are known, else files."""
    commands = "\n".join(f"    {quoted(name)}) words={quoted(joined(words))} ;;" for name, words in follows.items())
    values = "\n".join(
        f"    {quoted(f'{name} {word.text}')}) values={quoted(' '.join(word.values))} ;;"
        for name, words in follows.items()
        for word in words
        if word.values
    )
    groups, plain = groups_of(follows), plain_of(follows)
    return f"""# bash completion of sana; made by: sana completion bash
_sana() {{
  local line=${{COMP_LINE:0:COMP_POINT}} current="" previous="" name="" words="" values=""
  local -a typed
  read -ra typed <<< "$line"
  case "$line" in *[[:space:]]) typed+=("") ;; esac
  current="${{typed[${{#typed[@]}}-1]}}"
  previous="${{typed[${{#typed[@]}}-2]}}"
  if [ ${{#typed[@]}} -gt 2 ]; then name="${{typed[1]}}"; fi
  if [ ${{#typed[@]}} -gt 3 ]; then
    case " {groups} " in *" $name "*) name="$name ${{typed[2]}}" ;; esac
  fi
  local prefix=""
  case "$current" in
    --*=*) previous="${{current%%=*}}"; current="${{current#*=}}" ;;
  esac
  case "$name $previous" in
{values}
  esac
  case "$name" in
{commands}
  esac
  COMPREPLY=()
  if [ -n "$values" ]; then
    COMPREPLY=($(compgen -W "$values" -- "$current"))
  elif [ -n "$words" ] && {{ [[ "$current" == -* ]] || [[ "{plain}" == *"|$name|"* ]]; }}; then
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  else
    COMPREPLY=($(compgen -f -- "$current"))
  fi
}}
complete -o bashdefault -o filenames -F _sana sana
"""


def zsh(follows: Mapping[str, Sequence[Word]]) -> str:
    """Returns the script for zsh: names with their help, values where they are known, else files."""
    commands = "\n".join(
        f"    {quoted(name)}) words_of=({' '.join(quoted(described(word)) for word in words)}) ;;"
        for name, words in follows.items()
    )
    values = "\n".join(
        f"    {quoted(f'{name} {word.text}')}) values_of=({' '.join(map(quoted, word.values))}) ;;"
        for name, words in follows.items()
        for word in words
        if word.values
    )
    groups, plain = groups_of(follows), plain_of(follows)
    return f"""#compdef sana
# zsh completion of sana; made by: sana completion zsh
_sana() {{
  local name="" current="${{words[CURRENT]}}" previous="${{words[CURRENT-1]}}"
  local -a words_of values_of
  (( CURRENT > 2 )) && name="${{words[2]}}"
  if (( CURRENT > 3 )) && [[ " {groups} " == *" $name "* ]]; then name="$name ${{words[3]}}"; fi
  if [[ "$current" == --*=* ]]; then previous="${{current%%=*}}"; compset -P '*='; fi
  case "$name $previous" in
{values}
  esac
  case "$name" in
{commands}
  esac
  if (( ${{#values_of}} )); then
    compadd -a values_of
  elif (( ${{#words_of}} )) && {{ [[ "$current" == -* || "{plain}" == *"|$name|"* ]] }}; then
    _describe sana words_of
  else
    _files
  fi
}}
compdef _sana sana
"""


def fish(follows: Mapping[str, Sequence[Word]]) -> str:
    """Returns the script for fish, one line a word; values where they are known, else files."""
    lines = ["# fish completion of sana; made by: sana completion fish"]
    for name, words in follows.items():
        nested = {other.split(" ")[-1] for other in follows if name and other.startswith(f"{name} ")}
        condition = "__fish_use_subcommand"
        if name:
            condition = "; and ".join(f"__fish_seen_subcommand_from {part}" for part in name.split(" "))
            condition += f"; and not __fish_seen_subcommand_from {' '.join(sorted(nested))}" if nested else ""
        for word in words:
            lines.append(fish_line(word, condition))
    return "\n".join(lines) + "\n"


def fish_line(word: Word, condition: str) -> str:
    """Returns the line of fish that offers one word."""
    parts = ["complete -c sana", f"-n {quoted(condition)}"]
    if word.text.startswith("--"):
        parts.append(f"-l {word.text[2:]}")
    elif word.text.startswith("-"):
        parts.append(f"-s {word.text[1:]}")
    else:
        parts.append(f"-f -a {quoted(word.text)}")
    if word.values:
        parts.append(f"-x -a {quoted(' '.join(word.values))}")
    elif word.takes_value and word.text.startswith("-"):
        parts.append("-r")
    if word.help:
        parts.append(f"-d {quoted(word.help)}")
    return " ".join(parts)


def described(word: Word) -> str:
    """Returns `word:help` as zsh's _describe reads it."""
    return f"{word.text}:{word.help}" if word.help else word.text


def joined(words: Iterable[Word]) -> str:
    """Returns the texts of words with spaces between them."""
    return " ".join(word.text for word in words)


def quoted(text: str) -> str:
    """Returns a text in single quotes; a quote in it becomes a typographic one, which no shell reads."""
    return "'" + text.replace("'", "\u2019").replace("\\", "/") + "'"
