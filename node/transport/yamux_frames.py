"""Frames of yamux, and its limits on unacknowledged bytes.

Frame: version 0, type, flags, stream id, length; 12 bytes, big-endian. -- hashicorp/yamux, spec.md
"""

from __future__ import annotations

import struct

from libp2p.exceptions import BaseLibp2pError

from .line_rate import is_local

HEADER = struct.Struct("!BBHII")
DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
NORMAL, PROTOCOL_ERROR = 0, 1  # in a GO_AWAY

INITIAL_WINDOW = 256 * 1024  # "Both sides assume the initial 256KB window" -- spec.md, Flow Control
MAX_WINDOW = 4 << 20  # 40 MB/s over 100 ms
MAX_GROWTH = 64 << 20  # what all streams of a connection may have on top of their initial windows
MAX_PAYLOAD = 65535 - 16 - HEADER.size  # header and payload fit one Noise message, so one write
SMALL_BYTES = 1024  # pieces up to this are put together while nobody reads them
MAX_CONTROL_BYTES = 5000 * HEADER.size  # answers under way, all in one write; more is an attack
MAX_STREAM_ID = (1 << 32) - 1
FRAMES_AT_ONCE = 64  # taken in before others run: half a millisecond where each is a ping

# A frame of data is as long as a line takes in a tenth of a second, since what is urgent waits for its end.
FRAME_S = 0.1
MIN_FRAME_BYTES = 4 << 10
FIRST_FRAME_BYTES = 16 << 10  # while the rate is not known


def frame_bytes(bytes_per_s: float, rtt_s: float) -> int:
    """Most payload of a frame on a line of this rate and round trip, each 0 if it is not known."""
    if is_local(bytes_per_s, rtt_s):
        return MAX_PAYLOAD
    if bytes_per_s:
        return min(max(int(bytes_per_s * FRAME_S), MIN_FRAME_BYTES), MAX_PAYLOAD)
    return FIRST_FRAME_BYTES


class YamuxViolation(BaseLibp2pError):
    """The peer sent what the protocol forbids."""


class GoneAway(Exception):
    """The peer said goodbye, with this code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"{code:#x}")
        self.code = code
