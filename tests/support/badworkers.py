"""Workers that do not do what they should: ``python -m support.badworkers CONTROL-FD PARENT-PID``.

The path of the directory that a caller asks for names the fault of the first worker.
"""

import os
import socket
import sys
import time

from ckptfs._workers.messages import (
    BEAT_S,
    MESSAGE_BYTES_MAX,
    Came,
    Done,
    decode_call,
    encode,
)


def main() -> None:
    """Answer calls wrongly."""
    control = socket.socket(fileno=int(sys.argv[1]))
    socket.recv_fds(control, MESSAGE_BYTES_MAX, 2)
    _, fds, _, _ = socket.recv_fds(control, MESSAGE_BYTES_MAX, 2)
    channel, memory = socket.socket(fileno=fds[0]), fds[1]
    call = decode_call(channel.recv(MESSAGE_BYTES_MAX))
    if call.path == "garbage":
        channel.send(b"\xc1 no message")
    elif call.path == "another type":
        channel.send(encode({"came": "a"}))
    elif call.path == "short memory":
        channel.send(encode(Done(is_true=True, size=10)))
    elif call.path == "long object":
        os.ftruncate(memory, 1 << 40)
        channel.send(encode(Done(is_true=True, size=1 << 40)))
    elif call.path == "endless part":
        os.pwrite(memory, b"\xff\xff\xff\xff", 0)
        channel.send(encode(Done(size=1 << 32)))
    elif call.path == "closed channel":
        channel.close()
    elif call.path == "half an answer":
        os.pwrite(memory, b"half", 0)
        channel.send(encode(Came(4)))
        os._exit(0)
    while True:
        time.sleep(BEAT_S)


if __name__ == "__main__":
    main()
