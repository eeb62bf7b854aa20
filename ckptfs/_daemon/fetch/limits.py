"""The limits of all fetches together, from the settings and the machine.

S3 gives one connection some 90 MB/s, whatever the node's link. So a fast link needs many
connections, each with a span in flight. A node with many cores has a fast link and much memory.

Measured on 2 cores, with 90 MB/s for each connection and 20 ms for each request: a load of 1 GiB
took 2.59 s with 16 connections and 2.14 s with 32. Without these limits, both took the same time.
"""

from typing import Final, NamedTuple

from ckptfs._model.config import MIB, Config
from ckptfs._os.machine import usable_cores, usable_memory_bytes

_CONNECTIONS_MIN: Final = 32
_CONNECTIONS_MAX: Final = 128
"""At 90 MB/s each they bring 11 GB/s, nearly 100 Gbit/s."""
_CONNECTIONS_PER_CORE: Final = 2
_BYTES_PER_CONNECTION: Final = 4 * MIB
"""Half of the longest span by default, because many spans are shorter."""
_IN_FLIGHT_MIN: Final = _CONNECTIONS_MIN * _BYTES_PER_CONNECTION
_MEMORY_SHARE: Final = 32
"""The bytes in flight take one part in so many of the memory, unless that is less than the minimum.
Fetch processes hold them a second time."""
_WINDOW_MIN: Final = 64 * MIB
_WINDOW_MAX: Final = 256 * MIB
"""The window of a reader that stops is fetched in vain."""


class Limits(NamedTuple):
    """The most requests for data at once, the most bytes of them, and the longest window."""

    connections: int
    in_flight_bytes: int
    window_bytes: int


def limits_of(config: Config) -> Limits:
    """The limits that the settings stand for on this machine."""
    connections, in_flight_bytes = config.connections_max, config.in_flight_bytes_max
    window_bytes = config.window_bytes_max
    if connections == "auto":
        wanted = _CONNECTIONS_PER_CORE * usable_cores()
        connections = max(_CONNECTIONS_MIN, min(_CONNECTIONS_MAX, wanted))
    if in_flight_bytes == "auto":
        in_flight_bytes = min(
            connections * _BYTES_PER_CONNECTION, usable_memory_bytes() // _MEMORY_SHARE
        )
        in_flight_bytes = max(_IN_FLIGHT_MIN, in_flight_bytes)
    if window_bytes == "auto":
        window_bytes = max(_WINDOW_MIN, min(_WINDOW_MAX, in_flight_bytes // 2))
    return Limits(connections, in_flight_bytes, window_bytes)
