"""A bundle on its way: checked, packed, signed, installed, taken back, listed and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from commands.app import Settings, command

KeyOption = Annotated[Path | None, typer.Option("--key", metavar="PUB.pem", help="Public key it must be signed with.")]
ElsewhereOption = Annotated[
    bool, typer.Option("--elsewhere", help="The bundle is for another machine: its engines need not run here.")
]
RootOption = Annotated[Path, typer.Option("--root", metavar="DIR", help="Where bundles are installed.")]


@command("verify")
def verify(
    settings: Settings,
    path: Annotated[Path, typer.Argument(help="An artifact, a bundle or a shipped bundle.")],
    run: Annotated[bool, typer.Option("--run", help="Replay the golden inputs too.")] = False,
    key: KeyOption = None,
    signature: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The bundle's signature (default: where install put it).")
    ] = None,
    elsewhere: ElsewhereOption = False,
) -> None:
    """Check every byte of an artifact; of a bundle its signature, lineage, fit to this machine and (--run) answers."""
    from stages.verify import render
    from stages.verify import verify as check

    result = check(path, run=run, key=key, signature=signature, elsewhere=elsewhere)
    settings.show(result, render(result))


@command("ship", panel="Ship")
def ship(
    settings: Settings,
    output: Annotated[Path, typer.Option(metavar="DIR", help="The shipped bundle: an OCI image layout.")],
    bundle: Annotated[Path, typer.Option(metavar="DIR", help="The bundle to ship.")] = Path("artifacts/bundle"),
    sign: Annotated[Path | None, typer.Option(metavar="KEY.pem", help="Private key to sign it with.")] = None,
) -> None:
    """Pack a bundle into a folder that registries carry; the same bundle and key give the same bytes."""
    from stages.shipping import ship as shipping

    result = shipping.ship(bundle, output, key=sign)
    settings.show(result, shipping.render(result))


@command("install", panel="Ship")
def install(
    settings: Settings,
    shipped: Annotated[Path, typer.Argument(help="A shipped bundle.")],
    root: RootOption,
    key: KeyOption = None,
    allow_downgrade: Annotated[
        bool, typer.Option("--allow-downgrade", help="Take it though it is not newer than what was installed.")
    ] = False,
    elsewhere: ElsewhereOption = False,
    max_gib: Annotated[float, typer.Option(min=0.0, help="Refuse a larger one, GiB.")] = 64.0,
) -> None:
    """Check a shipped bundle, unpack it below a root and switch ROOT/current to it, whole or not at all."""
    from stages.shipping import install as installing

    result = installing.install(
        shipped, root, key=key, allow_downgrade=allow_downgrade, elsewhere=elsewhere, max_gib=max_gib
    )
    settings.show(result, installing.render(result))


@command("rollback", panel="Ship")
def rollback(settings: Settings, root: RootOption, key: KeyOption = None) -> None:
    """Switch ROOT/current back to the version that served before."""
    from stages.shipping import install as installing

    result = installing.rollback(root, key=key)
    settings.show(result, installing.render(result))


@command("bundles", panel="Ship")
def bundles(
    settings: Settings,
    folder: Annotated[Path, typer.Argument(help="A root of install, or a folder of bundles.")] = Path("artifacts"),
) -> None:
    """List bundles, oldest version first, with the metrics of each."""
    from stages.bundle_list import list_bundles, render

    rows = list_bundles(folder)
    settings.show(rows, render(rows))


@command("diff", panel="Ship")
def diff(
    settings: Settings,
    a: Annotated[Path, typer.Argument(help="A bundle.")],
    b: Annotated[Path, typer.Argument(help="Another.")],
) -> None:
    """Say what changed from one bundle to another: parameters, weights, metrics, engines, tools."""
    from stages.bundle_diff import diff_bundles, render

    found = diff_bundles(a, b)
    settings.show(found, render(found))


@command("lineage")
def lineage(settings: Settings, path: Annotated[Path, typer.Argument(help="An artifact or a bundle.")]) -> None:
    """Show what an artifact was made from, up to its sources."""
    from stages.lineage import lineage as trace

    tree = trace(path, settings.artifacts)
    settings.show(tree.to_dict(), tree.text)
