//! Flows of datagrams: UDP of the guest, UDP that comes in through a forwarded port, and ICMP echo.
//!
//! Called by: `usernet::nat`.
//!
//! Invariants:
//! - A flow speaks with one peer of the world: others cannot reach the guest through it.
//! - Nothing is buffered here. While the link is full, datagrams wait (and are dropped) in the host's socket.
//! - A flow that is silent for `idle_time` ends.

use std::net::{SocketAddr, SocketAddrV4};

use rustix::io::Errno;
use smoltcp::time::Duration;
use smoltcp::wire::{Icmpv4Message, Icmpv4Packet, Icmpv4Repr};

use super::link::Link;
use super::world::HostSocket;

/// Datagrams that a flow hands to the guest before another flow gets its turn.
const BURST: usize = 32;
/// Queries whose identifiers are remembered, to see which are asked again.
const REMEMBERED: usize = 16;

/// A flow and what it needs to know beside its key.
pub(super) enum DatagramFlow<S> {
    /// UDP from the guest to `SocketAddrV4` in its own eyes.
    Udp {
        socket: S,
        readable: bool,
        /// Something came back: a conversation, which is given more time.
        answered: bool,
    },
    /// DNS to the host's name servers.
    Names {
        socket: S,
        readable: bool,
        /// Which of the servers.
        server: usize,
        /// Identifiers of the latest queries.
        asked: Vec<[u8; 2]>,
    },
    /// UDP from `peer` through the forwarded port number `forward`.
    Forwarded { forward: usize, peer: SocketAddr },
    /// Echo requests with the identifier that is in the key.
    Echo { socket: S, readable: bool },
}

/// What a pump of a flow left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Received {
    /// There was nothing.
    Nothing,
    /// There was something, and that was all.
    All,
    /// There may be more to do right away.
    More,
    /// The world says that nobody is there.
    Refused,
}

impl<S: HostSocket> DatagramFlow<S> {
    /// How long the flow may be silent (RFC 4787 §4.3: two minutes for a conversation).
    pub(super) fn idle_time(&self) -> Duration {
        Duration::from_secs(match self {
            DatagramFlow::Udp { answered: true, .. } | DatagramFlow::Forwarded { .. } => 120,
            DatagramFlow::Udp { .. } | DatagramFlow::Echo { .. } => 30,
            DatagramFlow::Names { .. } => 15,
        })
    }

    /// The host's socket became ready.
    pub(super) fn host_ready(&mut self) {
        match self {
            DatagramFlow::Udp { readable, .. }
            | DatagramFlow::Names { readable, .. }
            | DatagramFlow::Echo { readable, .. } => *readable = true,
            DatagramFlow::Forwarded { .. } => {}
        }
    }

    /// Notes a DNS query. `Some(n)`: it is asked again, so the caller shall try the flow's `n`-th server.
    pub(super) fn note_query(&mut self, query: &[u8]) -> Option<usize> {
        let DatagramFlow::Names { server, asked, .. } = self else { return None };
        let id = [*query.first()?, *query.get(1)?];
        if asked.contains(&id) {
            asked.clear();
            asked.push(id);
            *server = server.wrapping_add(1);
            return Some(*server);
        }
        asked.truncate(REMEMBERED - 1);
        asked.insert(0, id);
        None
    }

    /// Puts another socket in place.
    pub(super) fn replace_socket(&mut self, new: S) {
        if let DatagramFlow::Names { socket, readable, .. } = self {
            *socket = new;
            *readable = false;
        }
    }

    /// Hands what the world sent to the guest. `guest` and `remote` are the flow's key.
    pub(super) fn pump(
        &mut self,
        guest: SocketAddrV4,
        remote: SocketAddrV4,
        buf: &mut [u8],
        link: &mut Link,
    ) -> Received {
        let mut received = Received::Nothing;
        for _ in 0..BURST {
            if !link.has_room() {
                return Received::More; // Stays on the list until the guest has taken something.
            }
            let (socket, readable) = match self {
                DatagramFlow::Udp { socket, readable, .. }
                | DatagramFlow::Names { socket, readable, .. }
                | DatagramFlow::Echo { socket, readable } => (socket, readable),
                DatagramFlow::Forwarded { .. } => return Received::Nothing,
            };
            if !*readable {
                return received;
            }
            let got = match socket.recv(buf) {
                Ok(got) => &buf[..got.min(buf.len())],
                Err(Errno::INTR) => continue,
                Err(Errno::CONNREFUSED) => return Received::Refused,
                Err(Errno::AGAIN) => {
                    *readable = false;
                    return received;
                }
                Err(_) => continue, // An error of one datagram (unreachable, ...): the next may pass.
            };
            received = Received::All;
            match self {
                DatagramFlow::Echo { .. } => send_echo_reply(guest, remote, got, link),
                DatagramFlow::Udp { answered, .. } => {
                    *answered = true;
                    link.send_udp(remote, guest, got);
                }
                _ => link.send_udp(remote, guest, got),
            }
        }
        Received::More
    }

    /// Sends a datagram of the guest into the world.
    pub(super) fn send(&self, datagram: &[u8]) -> Result<(), Errno> {
        let socket = match self {
            DatagramFlow::Udp { socket, .. }
            | DatagramFlow::Names { socket, .. }
            | DatagramFlow::Echo { socket, .. } => socket,
            DatagramFlow::Forwarded { .. } => return Ok(()),
        };
        match socket.send(datagram) {
            // The refusal of an earlier datagram is reported once; this one has not been sent yet.
            Err(Errno::CONNREFUSED) => match socket.send(datagram) {
                Err(Errno::AGAIN) | Ok(_) => Err(Errno::CONNREFUSED),
                Err(error) => Err(error),
            },
            Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS | Errno::MSGSIZE) | Ok(_) => Ok(()), // Datagrams get lost.
            Err(error) => Err(error),
        }
    }
}

/// Translates an echo reply: the host's socket has an identifier of its own, the guest expects its own.
fn send_echo_reply(guest: SocketAddrV4, remote: SocketAddrV4, message: &[u8], link: &mut Link) {
    let Ok(packet) = Icmpv4Packet::new_checked(message) else { return };
    if packet.msg_type() == Icmpv4Message::EchoReply {
        let (seq_no, data) = (packet.echo_seq_no(), packet.data());
        let reply = Icmpv4Repr::EchoReply { ident: guest.port(), seq_no, data };
        link.send_icmp(*remote.ip(), *guest.ip(), &reply);
    }
}
