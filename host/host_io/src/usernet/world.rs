//! What the NAT asks of the host's network, as traits: the protocol logic above does no I/O of its own and is tested
//! against a world made of memory.
//!
//! Called by: `usernet::nat` and its flows; implemented by `usernet::sockets` for Linux.

use std::net::{Ipv4Addr, SocketAddr};

use rustix::io::Errno;

/// Names a flow for as long as it lives; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct FlowId(pub(super) u64);

/// A socket of the host that belongs to one flow. Dropping it closes it. Nothing blocks (`Errno::AGAIN`).
pub(super) trait HostSocket {
    /// Whether a connection that was begun has succeeded; `AGAIN` while it is undecided.
    fn connect_result(&self) -> Result<(), Errno>;
    /// Receives bytes or one datagram; 0 bytes of a connection mean that the peer has finished sending.
    fn recv(&self, buf: &mut [u8]) -> Result<usize, Errno>;
    /// Sends a first part of the bytes, or one datagram.
    fn send(&self, bytes: &[u8]) -> Result<usize, Errno>;
    /// Tells the peer that nothing more will be sent.
    fn shutdown_write(&self);
    /// Makes the closing abrupt: the peer gets a reset.
    fn reset_on_close(&self);
}

/// The host's network.
pub(super) trait World {
    /// A socket of a flow. Its readiness is reported by `Nat::host_ready`.
    type Socket: HostSocket;

    /// Begins a TCP connection.
    fn tcp_connect(&mut self, flow: FlowId, to: SocketAddr) -> Result<Self::Socket, Errno>;
    /// Takes the next connection that waits at a forwarded port.
    fn tcp_accept(&mut self, flow: FlowId, forward: usize) -> Result<Self::Socket, Errno>;
    /// Resets the next connection that waits at a forwarded port.
    fn tcp_turn_away(&mut self, forward: usize) -> Result<(), Errno>;
    /// Opens a UDP socket that speaks with `to` only.
    fn udp_connect(&mut self, flow: FlowId, to: SocketAddr) -> Result<Self::Socket, Errno>;
    /// Opens an unprivileged ICMP echo socket; `send` takes and `recv` gives whole ICMP messages.
    fn echo_connect(&mut self, flow: FlowId, to: Ipv4Addr) -> Result<Self::Socket, Errno>;
    /// Receives a datagram at a forwarded port.
    fn forward_recv(&mut self, forward: usize, buf: &mut [u8]) -> Result<(usize, SocketAddr), Errno>;
    /// Sends a datagram from a forwarded port.
    fn forward_send(&mut self, forward: usize, datagram: &[u8], to: SocketAddr) -> Result<(), Errno>;
    /// The host's name servers, best first.
    fn name_servers(&mut self) -> Vec<SocketAddr>;
    /// An answer to a DNS query out of the host's own names.
    fn local_name_answer(&mut self, query: &[u8]) -> Option<Vec<u8>>;
}
