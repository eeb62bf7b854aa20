"""nginx in front of a store, or as a store: its configuration, and its process."""

from __future__ import annotations

import os
import pwd
import socket
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

NGINX = Path("/usr/sbin/nginx")
ECHO_MODULE = Path("/usr/lib/nginx/modules/ngx_http_echo_module.so")
START_DEADLINE_S = 10.0

# nginx makes a TLS record of each buffer that it passes on at once. With its default buffers of 4
# to 8 KiB the records have that size, which doubles the CPU of a client: 2.2 s per GiB were
# measured, against 1.0 s with these buffers. The stores of clouds send full records of 16 KiB, as
# do these. They also speak TLS 1.3, which nginx leaves out by default before version 1.23.4.
CONFIG = """\
daemon off;
user {user};
worker_processes {workers};
pid {folder}/pid;
error_log {folder}/error.log;
{modules}
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  keepalive_requests 1000000;
  sendfile on;
  client_max_body_size 0;
  proxy_request_buffering off;
  proxy_max_temp_file_size 0;
  proxy_buffers 16 128k;
  proxy_buffer_size 128k;
  ssl_protocols TLSv1.2 TLSv1.3;
  ssl_buffer_size 16k;
{upstream}  server {{
    listen {listen};
{locations}  }}
}}
"""

UPSTREAM = "  upstream server {{ server {upstream}; keepalive 64; }}\n"

# The client's Host header is part of what it signed.
PASS = """\
proxy_pass http://server;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
"""


@dataclass(frozen=True)
class Site:
    """One server of nginx.

    Attributes:
        endpoint: Its address, "host:port".
        upstream: Address of the server that it passes requests on to; without one it shows `root`.
        root: Folder of files, with listings.
        pem: File with certificate and key. With it the site speaks HTTPS only.
        latency_s: Time that each request waits.
        rate: nginx's `limit_rate`, for each connection; "" for none.
        workers: Number of processes, or "auto" for one per CPU.
    """

    endpoint: str
    upstream: str = ""
    root: Path | None = None
    pem: Path | None = None
    latency_s: float = 0.0
    rate: str = ""
    workers: str = "1"


def configuration(site: Site, folder: Path) -> str:
    """The text of nginx.conf; nginx keeps its files in `folder`."""
    locations = ""
    if site.pem:
        locations += f"    ssl_certificate {site.pem};\n    ssl_certificate_key {site.pem};\n"
    action = PASS if site.upstream else f"root {site.root}; autoindex on;\n"
    if site.rate:
        action += f"      limit_rate {site.rate};\n"
    if site.latency_s:
        # echo_sleep waits in nginx's event loop: neither a process nor a second copy of the bytes
        # is needed for the latency.
        locations += f"    location / {{ echo_sleep {site.latency_s}; echo_exec @server; }}\n"
    where = "@server" if site.latency_s else "/"
    locations += f"    location {where} {{\n      {action}    }}\n"
    return CONFIG.format(
        user=pwd.getpwuid(os.geteuid()).pw_name,
        workers=site.workers,
        folder=folder,
        modules=f"load_module {ECHO_MODULE};" if site.latency_s else "",
        upstream=UPSTREAM.format(upstream=site.upstream) if site.upstream else "",
        listen=f"{site.endpoint} ssl" if site.pem else site.endpoint,
        locations=locations,
    )


def why_missing(*, latency: bool = False) -> str:
    """The reason why nginx, or its module that waits, cannot run here; "" if it can."""
    if not NGINX.exists():
        return "nginx is not installed (Debian: nginx)"
    if latency and not ECHO_MODULE.exists():
        return "nginx has no module echo (Debian: libnginx-mod-http-echo)"
    return ""


@contextmanager
def serving(site: Site, folder: Path, listener: socket.socket | None = None) -> Iterator[None]:
    """Run nginx until the end; `folder` is made for its files.

    Args:
        site: The server.
        folder: A path at which nothing is yet.
        listener: A socket that listens at the site's endpoint already.

    Raises:
        RuntimeError: nginx or its module is not installed, or does not start.
    """
    if why := why_missing(latency=bool(site.latency_s)):
        raise RuntimeError(why)
    folder.mkdir()
    (folder / "nginx.conf").write_text(configuration(site, folder))
    # nginx takes over the listening sockets that this variable lists, as it does for an upgrade.
    inherited = [listener.fileno()] if listener else []
    environment = os.environ | ({"NGINX": f"{inherited[0]};"} if inherited else {})
    command = [NGINX, "-p", folder, "-c", folder / "nginx.conf", "-e", folder / "error.log"]
    process = subprocess.Popen(
        command,
        env=environment,
        pass_fds=inherited,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_serving(process, site.endpoint, folder)
        yield
    finally:
        process.terminate()
        process.wait()


def _wait_serving(process: subprocess.Popen[bytes], endpoint: str, folder: Path) -> None:
    host, _, port = endpoint.rpartition(":")
    deadline_s = time.monotonic() + START_DEADLINE_S
    while process.poll() is None and time.monotonic() < deadline_s:
        try:
            socket.create_connection((host, int(port)), 1.0).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    process.terminate()
    log = folder / "error.log"
    said = log.read_text().strip().splitlines() if log.exists() else []
    raise RuntimeError(f"nginx does not start: {said[-1] if said else 'it said nothing'}")
