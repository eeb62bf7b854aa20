"""The command line: one file per group of commands. Thin: asks the client, prints."""

import typer

from ckptfs.cli import (
    cache,
    checkpoints,
    completion,
    config,
    daemon,
    doctor,
    find,
    meta,
    plan,
    prefetch,
    report,
    top,
    topics,
)

app = typer.Typer(
    name="ckptfs",
    help="Mount remote checkpoints as local directories instead of copying them.",
    epilog=topics.LIST,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("mount")(daemon.mount)
app.command("umount")(daemon.umount)
app.command("restart")(daemon.restart)
app.command("config")(config.config)
app.command("reload")(config.reload)
app.command("status")(daemon.status)
app.command("top")(top.top)
app.command("attach")(checkpoints.attach)
app.command("detach")(checkpoints.detach)
app.command("ls")(checkpoints.ls)
app.command("prefetch")(prefetch.prefetch)
app.command("report")(report.report)
app.command("find")(find.find)
app.add_typer(meta.app, name="meta")
app.add_typer(cache.app, name="cache")
app.add_typer(plan.app, name="plan")
app.command("doctor")(doctor.doctor)
app.command("completion")(completion.completion)
app.command("help")(topics.help_)
