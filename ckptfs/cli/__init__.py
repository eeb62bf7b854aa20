"""The command line, with a module for each group of commands.

A command asks the client and prints the reply.
"""

from functools import partial
from importlib.metadata import version as version_of
from typing import Annotated

import typer
from typer.completion import get_completion_inspect_parameters

from ckptfs._config import environment
from ckptfs.cli import (
    cache,
    checkpoints,
    completion,
    config,
    csi,
    daemon,
    doctor,
    find,
    install_node,
    meta,
    plan,
    prefetch,
    report,
    top,
    topics,
    upload,
    uploads,
)
from ckptfs.cli.help_text import HELP_OPTIONS, Group, command

app = typer.Typer(
    name="ckptfs",
    cls=Group,
    epilog=topics.EPILOG,
    no_args_is_help=True,
    add_completion=False,  # `ckptfs completion` prints the scripts
    context_settings=HELP_OPTIONS,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
get_completion_inspect_parameters()  # registers the shells, as add_completion would


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ckptfs {version_of('ckptfs')}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            "-V",
            callback=_print_version,
            is_eager=True,
            help="Print the version of this command and exit.",
        ),
    ] = False,
) -> None:
    """Mount remote checkpoints as local directories instead of copying them."""
    if not context.resilient_parsing:
        environment.warn_of_unknown()


_CHECKPOINTS, _NODE, _DAEMON, _HELP = "Checkpoints", "This node", "The daemon", "Help"
_URI = "s3://bucket/run7/checkpoint_000100"

of_checkpoints = partial(command, app, panel=_CHECKPOINTS)
of_node = partial(command, app, panel=_NODE)
of_daemon = partial(command, app, panel=_DAEMON)
of_help = partial(command, app, panel=_HELP)

# In the order of the help.
of_checkpoints(
    "attach",
    f"ckptfs attach {_URI}",
    "ckptfs attach prod:run7/checkpoint_000100      # prod: a named store",
    "ckptfs attach --anonymous gs://public/model",
    f'cd "$(ckptfs attach {_URI})"',
)(checkpoints.attach)
of_checkpoints(
    "detach",
    f"ckptfs detach {_URI}",
    "ckptfs detach /run/ckptfs/mnt/checkpoint_000100-6f1d0c2a9b3e",
    "ckptfs detach .                                # inside the checkpoint",
)(checkpoints.detach)
of_checkpoints(
    "ls",
    "ckptfs ls                                      # the attached checkpoints",
    f"ckptfs ls {_URI}",
    "ckptfs ls --tensors .",
)(checkpoints.ls)
of_checkpoints(
    "find",
    "ckptfs find s3://bucket/run7 --where 'val_loss < 0.3 and step > 1000'",
    "ckptfs find s3://bucket/run7 --sort val_loss --limit 1",
    'ckptfs attach "$(ckptfs find s3://bucket/run7 --sort step --reverse --limit 1)"',
)(find.find)
of_checkpoints(
    "prefetch",
    f"ckptfs prefetch {_URI}",
    f"ckptfs prefetch {_URI} 'model-0000*' '*.json'",
    f"ckptfs prefetch --limit-rate 50M {_URI}",
)(prefetch.prefetch)
of_checkpoints(
    "upload",
    f"ckptfs upload ./checkpoint_000100 {_URI}",
    f"ckptfs upload --include '*.json' --include 'model-*' ./checkpoint_000100 {_URI}",
    f"ckptfs upload --limit-rate 100M --overwrite ./checkpoint_000100 {_URI}",
    f"ckptfs upload --background ./checkpoint_000100 {_URI}",
)(upload.upload)
of_checkpoints(
    "uploads",
    "ckptfs uploads                                 # those in the background",
    "ckptfs uploads --wait",
    "ckptfs uploads --retry 3f2a90c1d4e7",
)(uploads.uploads)
app.add_typer(plan.app, name="plan", rich_help_panel=_CHECKPOINTS)
of_checkpoints("report", f"ckptfs report {_URI} -o report.html", f"ckptfs report --json {_URI}")(
    report.report
)
app.add_typer(meta.app, name="meta", rich_help_panel=_CHECKPOINTS)
of_node("status", "ckptfs status", "ckptfs status --json")(daemon.status)
of_node("top", "ckptfs top", "ckptfs top --once --interval 10s", "ckptfs top --sort store")(top.top)
app.add_typer(cache.app, name="cache", rich_help_panel=_NODE)
of_node(
    "doctor",
    "ckptfs doctor",
    "ckptfs doctor s3://bucket/run7",
    "ckptfs doctor --json | jq '.checks[] | select(.status == \"failed\")'",
)(doctor.doctor)
of_daemon(
    "mount",
    "ckptfs mount",
    "ckptfs mount --cache-size 500G --set read_deadline_s=5min",
    "ckptfs mount --foreground --config ./ckptfs.toml",
)(daemon.mount)
of_node(
    "install-node",
    "ckptfs install-node",
    "ckptfs install-node --dry-run",
    "ckptfs install-node --uninstall",
)(install_node.install_node)
of_daemon(
    "csi",
    "ckptfs csi --endpoint unix:///csi/csi.sock",
    "ckptfs csi --endpoint unix:///csi/csi.sock --node-credentials-namespace training",
)(csi.csi)
of_daemon("umount", "ckptfs umount", "ckptfs umount --force")(daemon.umount)
of_daemon("restart", "ckptfs restart")(daemon.restart)
of_daemon("reload", "ckptfs reload")(config.reload)
of_daemon(
    "config",
    "ckptfs config",
    "ckptfs config --config ./ckptfs.toml           # the effect of this file",
)(config.config)
of_help("help", "ckptfs help prefetch", "ckptfs help cache gc", "ckptfs help semantics")(
    topics.help_
)
of_help(
    "completion",
    "ckptfs completion bash > /usr/share/bash-completion/completions/ckptfs",
    "ckptfs completion zsh > /usr/share/zsh/vendor-completions/_ckptfs",
    "ckptfs completion fish > /usr/share/fish/vendor_completions.d/ckptfs.fish",
)(completion.completion)
