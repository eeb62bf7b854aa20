"""The driver starts on a socket only, and a call shows an error by its status and one line."""

import logging
import sys
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

import ckptfs._csi
from ckptfs import errors
from ckptfs._csi import server
from ckptfs._csi.messages import CLASSES
from ckptfs._csi.publishing import Publishing
from ckptfs._csi.records import Records
from ckptfs.cli.csi import csi
from ckptfs.errors import CannotMount, ConfigError, PlaceUnusable


def test_an_endpoint_is_a_socket(tmp_path: Path) -> None:
    place = tmp_path / "csi.sock"
    assert server.socket_path(f"unix://{place}") == str(place)
    for endpoint in ("tcp://0.0.0.0:1", "csi.sock", "unix://csi.sock", ""):
        with pytest.raises(ConfigError, match=r"unix:///csi/csi\.sock"):
            server.socket_path(endpoint)
    place.write_text("a file of someone")
    with pytest.raises(PlaceUnusable, match="is not a socket"):
        server.socket_path(f"unix://{place}")
    assert place.read_text() == "a file of someone"


def test_without_the_extra_the_command_names_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "ckptfs._csi.server")
    monkeypatch.delattr(ckptfs._csi, "server")
    with pytest.raises(CannotMount, match="grpc is not installed; install ckptfs with its extra"):
        csi(f"unix://{tmp_path}/csi.sock", state_dir=tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_errors_have_a_status_and_bugs_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    raised: list[Exception] = []

    def fail(*_: Any) -> None:
        raise raised[-1]

    monkeypatch.setattr(Publishing, "unpublish", fail)
    place = tmp_path / "csi.sock"
    settings = server.Settings(f"unix://{place}", "csi.test", "node", [])
    stopped, ready = threading.Event(), threading.Event()
    thread = threading.Thread(
        target=server.serve, args=(settings, Publishing(Records(tmp_path)), stopped, ready.set)
    )
    thread.start()
    try:
        assert ready.wait(30)
        assert place.stat().st_mode & 0o777 == 0o600
        with grpc.insecure_channel(f"unix:{place}") as channel:
            call = channel.unary_unary(
                "/csi.v1.Node/NodeUnpublishVolume",
                request_serializer=CLASSES["NodeUnpublishVolumeRequest"].SerializeToString,
                response_deserializer=CLASSES["NodeUnpublishVolumeResponse"].FromString,
            )
            for error, status, said in (
                (errors.LimitExceeded("a limit"), "RESOURCE_EXHAUSTED", "a limit"),
                (OSError(28, "No space"), "INTERNAL", "[Errno 28] No space"),
                (ZeroDivisionError("S3CR3T"), "INTERNAL", "internal error of ckptfs csi; see its"),
            ):
                raised.append(error)
                with pytest.raises(grpc.RpcError) as caught:
                    call(CLASSES["NodeUnpublishVolumeRequest"](volume_id="v"), timeout=30)
                assert caught.value.code().name == status
                assert str(caught.value.details()).startswith(said)
    finally:
        stopped.set()
        thread.join()
    assert [r.levelno for r in caplog.records if r.levelno > logging.INFO] == [logging.ERROR]
