"""The command-line reference in Markdown, from the commands themselves; docs/CLI.md is held against it by a test."""

from __future__ import annotations

import click


def render_reference(group: click.Group) -> str:
    """Every command with its help and its own options, and the global options once."""
    context = click.Context(group, info_name="cli.py")
    shared = {name for option in group.params for name in option.opts}
    lines = [
        "# Command line",
        "",
        "Written by `make docs` from the commands themselves. Run as `python cli.py COMMAND …`.",
        "",
        "Options of every command (they may also stand before it):",
        "",
        *_options(context, group, hide=set()),
    ]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if command.hidden:
            continue
        usage = " ".join(command.collect_usage_pieces(click.Context(command, info_name=name, parent=context)))
        lines += ["", f"## {name}", "", f"`python cli.py {name} {usage}`", "", (command.help or "").strip(), ""]
        lines += _options(context, command, hide=shared)
    return "\n".join(lines).rstrip() + "\n"


def _options(context: click.Context, command: click.Command, *, hide: set[str]) -> list[str]:
    rows = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in parameter.opts and not hide & set(parameter.opts):
            name, text = record
            rows.append(f"| `{name.replace('|', ' · ')}` | {text.replace('|', ' · ')} |")
    return ["| option | |", "|---|---|", *rows] if rows else ["No options of its own."]
