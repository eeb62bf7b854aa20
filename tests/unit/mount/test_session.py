"""The FUSE_INIT handshake: the answer has only features that the kernel offers."""

import socket
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptfs._mount import session
from ckptfs.errors import CannotMount

FUSE_INIT = 26
INIT_EXT = 1 << 30
ASYNC_READ, PARALLEL_DIROPS, MAX_PAGES, DO_READDIRPLUS = 1, 1 << 18, 1 << 22, 1 << 13
WRITEBACK_CACHE, READDIRPLUS_AUTO, POSIX_ACL = 1 << 16, 1 << 14, 1 << 20
ALLOW_IDMAP = 1 << 40
ALL = 0xFFFFFFFF


def request(
    major: int = 7, minor: int = 41, flags: int = ALL, flags2: int = ALL, *, opcode: int = FUSE_INIT
) -> bytes:
    """A FUSE_INIT as a kernel sends it: fuse_in_header, then fuse_init_in."""
    body = struct.pack("<IIIII44x", major, minor, 128 << 10, flags, flags2)
    return struct.pack("<IIQQIIIHH", 40 + len(body), opcode, 77, 0, 0, 0, 0, 0, 0) + body


def answer(message: bytes, *, allow_other: bool = False) -> "tuple[int, ...]":
    """The fields of our fuse_init_out for a kernel's message."""
    kernel, daemon = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with kernel, daemon:
        kernel.send(message)
        session.answer_init(daemon.fileno(), allow_other=allow_other)
        reply = kernel.recv(4096)
    length, error, unique = struct.unpack_from("<IiQ", reply)
    assert (length, error, unique) == (len(reply), 0, 77)
    assert len(reply) == 16 + 64  # sizeof(struct fuse_init_out)
    return struct.unpack_from("<IIIIHHIIHHI", reply, 16)


def flags_of(fields: "tuple[int, ...]") -> int:
    return fields[3] | fields[10] << 32


@given(st.integers(0, ALL), st.integers(0, ALL), st.integers(28, 60), st.booleans())
def test_answer_init_chooses_among_the_offered_features(
    flags: int, flags2: int, minor: int, allow_other: bool
) -> None:
    fields = answer(request(minor=minor, flags=flags, flags2=flags2), allow_other=allow_other)
    offered = flags | (flags2 << 32 if flags & INIT_EXT else 0)
    assert flags_of(fields) & ~offered == 0
    assert fields[0] == 7
    assert fields[1] <= min(minor, 45)


def test_answer_init_has_the_wanted_features() -> None:
    fields = answer(request())
    flags = flags_of(fields)
    for wanted in (ASYNC_READ, PARALLEL_DIROPS, MAX_PAGES, DO_READDIRPLUS):
        assert flags & wanted
    for unwanted in (WRITEBACK_CACHE, READDIRPLUS_AUTO, POSIX_ACL):
        assert not flags & unwanted
    major, minor, readahead, _, background, congestion, max_write, gran, pages, _, _ = fields
    assert (major, minor) == (7, 41)
    assert readahead >= 1 << 20
    assert background >= congestion > 12
    assert max_write >= 4096
    assert gran == 1
    assert pages == 256  # requests of 1 MiB


def test_idmapped_mounts_are_for_mounts_where_the_kernel_checks_permissions() -> None:
    assert flags_of(answer(request(), allow_other=True)) & ALLOW_IDMAP
    assert not flags_of(answer(request())) & ALLOW_IDMAP  # the kernel would fail the session
    before_6_12 = request(flags2=ALL & ~(ALLOW_IDMAP >> 32))
    assert not flags_of(answer(before_6_12, allow_other=True)) & ALLOW_IDMAP


def test_answer_init_accepts_the_shorter_message_of_an_older_kernel() -> None:
    message = request(minor=31, flags=ASYNC_READ | MAX_PAGES)[: 40 + 16]
    fields = answer(message)
    assert fields[1] == 31
    assert flags_of(fields) == ASYNC_READ | MAX_PAGES


@pytest.mark.parametrize(
    "message", [request(minor=27), request(major=6, minor=45), request(opcode=3)]
)
def test_answer_init_refuses_an_old_protocol(
    message: bytes,
) -> None:
    with pytest.raises(CannotMount, match="cannot mount"):
        answer(message)


def test_made_init_can_be_answered() -> None:
    made = session.made_init()
    length, opcode, unique = struct.unpack_from("<IIQ", made)
    assert (length, opcode) == (len(made), FUSE_INIT)
    assert unique
    major, minor, _, flags = struct.unpack_from("<IIII", made, 40)
    assert (major, minor) == (7, 41)
    patched = bytearray(made)
    patched[8:16] = struct.pack("<Q", 77)
    assert flags_of(answer(bytes(patched))) & ~flags == 0
