"""What our overrides expect of the pinned libp2p. If one of these fails, reread the module it names."""

from __future__ import annotations

import inspect
from importlib.metadata import version

from libp2p.host.basic_host import BasicHost, _IdentifyNotifee  # pyright: ignore[reportPrivateUsage]
from libp2p.io.trio import TrioTCPStream
from libp2p.network.auto_connector import AutoConnector
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.network.connection.swarm_connection import SwarmConn
from libp2p.network.stream.net_stream import NetStream
from libp2p.network.swarm import Swarm
from libp2p.peer.peerstore import env_to_send_in_RPC
from libp2p.pubsub.gossipsub import GossipSub
from libp2p.pubsub.pubsub import Pubsub
from libp2p.pubsub.pubsub_notifee import PubsubNotifee
from libp2p.security.noise.io import BaseNoiseMsgReadWriter
from libp2p.security.secure_session import SecureSession
from libp2p.stream_muxer.muxer_multistream import MuxerMultistream
from libp2p.transport.tcp.tcp import TCP, TCPListener
from libp2p.transport.upgrader import TransportUpgrader
from noise.backends.default.ciphers import ChaCha20Cipher
from noise.connection import NoiseConnection
from noise.state import CipherState

from p2pinfer.node.transport.noise import NoiseMessages


def source(thing: object) -> str:
    return inspect.getsource(thing)  # type: ignore[arg-type]


def test_the_pinned_version_is_installed() -> None:
    assert version("libp2p") == "0.8.1"


def test_yamux_py_is_what_the_swarm_needs_of_a_muxer() -> None:
    assert "await self.muxed_conn.accept_stream()" in source(SwarmConn)
    assert "except MuxedConnUnavailable" in source(SwarmConn)
    assert "self.manager.run_task(muxed_conn.start)" in source(Swarm.add_conn)
    assert "await muxed_conn.event_started.wait()" in source(Swarm.add_conn)


def test_libp2p_host_py_replaces_a_muxer_that_is_hard_wired() -> None:
    assert "yamux_conn = Yamux(" in source(MuxerMultistream.new_conn)
    assert "self.muxer_multistream.new_conn" in source(TransportUpgrader.upgrade_connection)


def test_libp2p_host_py_guards_handlers_that_run_below_the_host() -> None:
    assert "nursery.start_soon(self._handle_muxed_stream, stream)" in source(SwarmConn)
    assert "await self.swarm.common_stream_handler(net_stream)" in source(SwarmConn)
    assert "set_stream_handler(self._swarm_stream_handler)" in source(BasicHost)


def test_libp2p_host_py_stops_a_connector_that_dials_on_its_own() -> None:
    assert "await self.maybe_connect()" in source(AutoConnector)
    assert "self.auto_connector.run_background_task" in source(Swarm.run)


def test_libp2p_host_py_tells_of_no_streams_since_nobody_does_anything_about_them() -> None:
    assert 'await self._notify("opened_stream", stream)' in source(Swarm.notify_opened_stream)
    assert 'await self._notify("closed_stream", stream)' in source(Swarm.notify_closed_stream)
    for name in ("opened_stream", "closed_stream"):
        assert source(getattr(PubsubNotifee, name)).strip().endswith("await trio.lowlevel.checkpoint()")
        assert source(getattr(_IdentifyNotifee, name)).strip().endswith("-> None:\n        return None")


def test_tcp_py_is_read_and_written_by_noise_without_a_suspension_in_between() -> None:
    """`TcpStream.write` takes its bytes at once; so nothing above it may suspend after encrypting."""
    for function in (SecureSession.write, NoiseMessages.write_msg):
        assert "lock" not in source(function)
        assert "checkpoint" not in source(function)


def test_noise_py_takes_the_ciphers_that_the_handshake_has_made() -> None:
    assert "self.conn = conn" in source(SecureSession.__init__)
    assert "await self.conn.read_msg()" in source(SecureSession.read)
    assert "self.noise_state = noise_state" in source(BaseNoiseMsgReadWriter.__init__)
    assert "cipher_state_encrypt.encrypt_with_ad(None, data)" in source(NoiseConnection.encrypt)
    assert "self.cipher.encrypt(self.k, self.n, ad, plaintext)" in source(CipherState.encrypt_with_ad)
    assert "return b'\\x00\\x00\\x00\\x00' + n.to_bytes(length=8, byteorder='little')" in source(
        ChaCha20Cipher
    )
    for function in (RawConnection.read, RawConnection.write):
        assert "await self.stream." in source(function)


def test_tcp_py_wraps_what_the_listener_accepts() -> None:
    assert "await self.handler(tcp_stream)" in source(TCPListener.listen)
    assert "return TCPListener(handler_function)" in source(TCP.create_listener)
    assert "await self.manager.wait_finished()" in source(Swarm)
    assert set(inspect.signature(TrioTCPStream.__init__).parameters) == {"self", "stream"}


def test_stream_py_keeps_the_account_that_netstream_keeps() -> None:
    assert "self.muxed_stream = muxed_stream" in source(NetStream.__init__)
    assert "notify_closed_stream(self)" in source(NetStream.remove)


def test_pubsub_py_guards_what_pubsub_runs_as_tasks() -> None:
    assert "self.manager.run_task(self.push_msg, peer_id, msg)" in source(Pubsub)
    assert "self.router.flush_pending_messages" in source(Pubsub.handle_subscription)
    assert "self.router.on_peer_subscribed" in source(Pubsub.handle_subscription)
    assert "self.manager.run_daemon_task(self.heartbeat)" in source(GossipSub.run)
    assert "self.notify_subscriptions(msg)" in source(Pubsub.push_msg)


def test_pubsub_py_mends_a_greeting_that_is_late_and_saves_what_frames_cost() -> None:
    greeting = source(Pubsub._handle_new_peer)  # pyright: ignore[reportPrivateUsage]
    assert greeting.index("self.get_hello_packet()") < greeting.index("self.peers[peer_id] = stream")
    assert "await self.router.join(topic_id)" in source(Pubsub.subscribe)
    assert "if topic in self.mesh:\n            return" in source(GossipSub.join)
    record = source(env_to_send_in_RPC)
    assert "host.get_peerstore().get_local_record()" in record
    assert "return local_env.marshal_envelope()" in record
    assert "await self._emit_idontwant_for_message(" in source(GossipSub.publish)
    assert "maybe_consume_signed_record(" in source(Pubsub.continuously_read_stream)
    assert "maybe_consume_signed_record(" in source(GossipSub.handle_rpc)
