"""Each kind of store that looks at credentials: wrong ones, and ones that are taken away."""

import errno
import os
import random

import pytest
from conftest import Node
from support.stores.common import MIB, configure, directory, fill, read_once
from support.stores.realstore import RealStore

import ckptfs

pytestmark = pytest.mark.mount


def test_wrong_keys_are_said_in_one_line(store: RealStore, node: Node, path: str) -> None:
    if not store.has_keys:
        pytest.skip("the server looks at no credentials")
    fill(store, path, {"config.json": b"{}"})
    checkpoint = store.with_wrong_keys(path)
    actions = {
        "attach": lambda: checkpoint.as_directory(mode="mount").__enter__(),
        "copy": checkpoint.to_directory,
        "metadata": checkpoint.get_metadata,
        "write": lambda: checkpoint.update_metadata({"a": 1}),
    }
    for name, action in actions.items():
        with pytest.raises(ckptfs.AccessDenied) as caught:
            action()
        text = str(caught.value)
        assert "\n" not in text, name
        assert path.rpartition("/")[2] in text, name
        assert "credentials" in text or "key" in text, name
        for secret in store.secrets:
            assert secret not in text


def test_rights_that_are_taken_away_are_eacces(store: RealStore, node: Node, path: str) -> None:
    """The server refuses from some moment on, or says that they have expired; what is cached stays
    readable."""
    if store.proxy is None:
        pytest.skip("no network is between")
    node.expected_in_log.append("weights")
    configure(node, store, window_bytes_max=0)
    node.here("reload")
    data = random.Random(6).randbytes(8 * MIB)
    fill(store, path, {"weights": data})
    with directory(store, path) as top:
        file = f"{top}/weights"
        assert read_once(file, 0, 100) == data[:100]
        for refusal in store.refusals:
            store.break_down({"fault": refusal})
            with pytest.raises(OSError, check=lambda error: error.errno == errno.EACCES):
                read_once(file, 4 * MIB, 100)
            assert read_once(file, 0, 100) == data[:100]
            assert os.getxattr(file, "user.ckptfs.error")
            for action in (
                store.checkpoint(path).get_metadata,
                store.checkpoint(path).to_directory,
            ):
                with pytest.raises(ckptfs.AccessDenied):
                    action()
        store.break_down()
        assert read_once(file, 4 * MIB, 100) == data[4 * MIB : 4 * MIB + 100]
