"""Congestion control for connections that lose packets although their line has room.

TCP as systems have it takes each lost packet for a sign of a full line: with a share p of them lost it keeps
about 1 / sqrt(p) segments under way, whatever the line could carry. At 5 % and 100 ms there and back that is
60 KB/s. BBR (Cardwell, Cheng, Gunn, Yeganeh and Jacobson, "BBR: Congestion-Based Congestion Control", 2016)
goes by the rate at which packets arrive instead. The kernel changes a connection over while it lasts.

Losses of a full line are left to the system's own control: that is how lines are shared. A full line has a
queue, so its round trips are longer than the shortest one. Radio links lose packets with no queue at all.
"""

from __future__ import annotations

import logging
import math
import socket
import struct
from typing import Final

import trio

CONTROL: Final = "bbr"
LOOK_EVERY_S: Final = 0.2
ENOUGH_SEGMENTS: Final = 64  # sent, before losses are a share and no accident
LOST_SHARE: Final = 0.01  # of segments; the system's own control then has 12 of them under way
LEAST_LOST: Final = 3  # segments
ROOM: Final = 1.5  # times the shortest round trip: longer ones have waited in a queue
ROOM_S: Final = 0.01  # of round trips, by which processors lengthen them

# Fields of Linux's `struct tcp_info`, by what is before them (include/uapi/linux/tcp.h).
# Its shortest round trip is of no use: where two peers connect to each other at once, it is too short.
_ROUND_TRIP_AT, _AGAIN_AT, _SENT_AT = 68, 100, 156
_INFO_BYTES: Final = 160

logger = logging.getLogger(__name__)


def has_room(rtt_s: float, least_rtt_s: float) -> bool:
    """True for a connection whose packets wait in no queue, as far as its round trips tell.

    Args:
        rtt_s: Round trip of late.
        least_rtt_s: The shortest one; 0 if none was measured.
    """
    return least_rtt_s > 0 and rtt_s < ROOM * least_rtt_s + ROOM_S


def is_lossy(sent: int, again: int) -> bool:
    """True if a connection that has room loses so much that its control holds it back.

    Args:
        sent: Segments with data that went out.
        again: How many of them had been sent before.
    """
    return sent >= ENOUGH_SEGMENTS and again >= max(LEAST_LOST, LOST_SHARE * sent)


class Losses:
    """Losses of a connection: once they say nothing about its line, it is given another congestion control.

    Does nothing where a system has no such choice, which is everything but Linux.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._look_at = trio.current_time() if hasattr(socket, "TCP_CONGESTION") else math.inf
        self._sent = self._again = 0  # when the line was last full, or at the beginning

    def look(self, least_rtt_s: float) -> None:
        """Look at the connection, unless that was done just now.

        Args:
            least_rtt_s: The shortest round trip; 0 if none was measured.
        """
        now = trio.current_time()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY_S
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except OSError:  # no TCP, or gone
            info = b""
        if len(info) < _INFO_BYTES:  # or a kernel of before 4.6
            self._look_at = math.inf
            return
        again, sent = _number(info, _AGAIN_AT), _number(info, _SENT_AT)
        if not has_room(_number(info, _ROUND_TRIP_AT) / 1e6, least_rtt_s):
            self._sent, self._again = sent, again
        elif is_lossy(sent - self._sent, again - self._again):
            self._look_at = math.inf
            self._change((again - self._again) / (sent - self._sent))

    def _change(self, share: float) -> None:
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, CONTROL.encode())
        except OSError as exc:
            logger.info(
                "a connection loses %.1f %% of its packets though its line has room; %s would not mind, but "
                "this system does not lend it (%s): see net.ipv4.tcp_allowed_congestion_control",
                *(100 * share, CONTROL, exc.strerror),
            )
        else:
            logger.debug("a connection loses %.1f %% of its packets: %s from now on", 100 * share, CONTROL)


def _number(info: bytes, at: int) -> int:
    return int(struct.unpack_from("=I", info, at)[0])
