//! The NAT: what happens to a frame of the guest, to a ready socket of the host, and to time that passes.
//!
//! Called by: `usernet::driver` (with Linux's sockets) and the tests (with a world in memory). Does no I/O of its own.
//!
//! Walk of a frame: `guest_frame` ► ARP | IPv4 ► (reassembly) ► TCP | UDP | ICMP ► a flow, made if need be ► the flow is
//! listed ► `service` pumps listed flows ► frames for the guest wait in the `Link`.
//!
//! Invariants:
//! - No frame makes this panic, loop, or hold more than the limits allow.
//! - Only addresses of 10.0.2.0/24 are served as senders; where they may go is decided in one place (`addresses::route`).

use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::{SocketAddr, SocketAddrV4};

use rustix::io::Errno;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{
    EthernetFrame, EthernetProtocol, Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, Icmpv4Repr,
    IpProtocol, Ipv4Packet, TcpControl, TcpPacket, TcpRepr, UdpPacket,
};

use super::addresses::{DNS, DNS_PORT, GATEWAY, OUR_MAC, Route, can_be_guest, route};
use super::config::{Forward, Protocol, UserNetConfig};
use super::datagram::{DatagramFlow, Received};
use super::dhcp;
use super::flows::{Body, Flows, Key, Kind};
use super::fragments::Reassembly;
use super::link::{IPV4_HEADER, Link, UDP_HEADER};
use super::tcp::{Connect, Pumped, TcpFlow};
use super::world::{FlowId, World};

/// Ports that connections from outside seem to come from.
const EPHEMERAL: std::ops::RangeInclusive<u16> = 32_768..=60_999;
/// Flows pumped in one `service`, so that new frames get their turn.
const FLOWS_A_SERVICE: usize = 64;
/// Datagrams taken from a forwarded port at once.
const FORWARD_BURST: usize = 32;
/// A half-closed or unanswered connection that was silent this long may be ended when connections run out.
const DISPENSABLE_IDLE: Duration = Duration::from_secs(60);

/// The whole of one guest's user-mode network, without I/O.
pub(super) struct Nat<W: World> {
    world: W,
    config: UserNetConfig,
    /// Towards the guest.
    pub(super) link: Link,
    flows: Flows<W::Socket>,
    reassembly: Reassembly,
    next_port: u16,
    seeds: RandomState,
    seeds_used: u64,
    buf: Vec<u8>,
}

impl<W: World> Nat<W> {
    pub(super) fn new(config: UserNetConfig, world: W) -> Nat<W> {
        Nat {
            world,
            config,
            link: Link::default(),
            flows: Flows::new(),
            reassembly: Reassembly::default(),
            next_port: *EPHEMERAL.start(),
            seeds: RandomState::new(),
            seeds_used: 0,
            buf: vec![0; 65_536],
        }
    }

    /// How many flows there are: TCP, and others.
    #[cfg(test)]
    pub(super) fn flow_counts(&self) -> (usize, usize) {
        (self.flows.tcp_count(), self.flows.datagram_count())
    }

    #[cfg(test)]
    pub(super) fn world(&mut self) -> &mut W {
        &mut self.world
    }

    /// A frame from the guest.
    pub(super) fn guest_frame(&mut self, frame: &[u8], now: Instant) {
        let Ok(frame) = EthernetFrame::new_checked(frame) else { return };
        if frame.dst_addr() != OUR_MAC && !frame.dst_addr().is_broadcast() && !frame.dst_addr().is_multicast()
        {
            return;
        }
        match frame.ethertype() {
            EthernetProtocol::Arp => self.link.handle_arp(frame.payload()),
            EthernetProtocol::Ipv4 => {
                let Ok(packet) = Ipv4Packet::new_checked(frame.payload()) else { return };
                if packet.version() != 4 || !packet.verify_checksum() {
                    return;
                }
                if can_be_guest(packet.src_addr()) {
                    self.link.learn(packet.src_addr(), frame.src_addr());
                } else if !packet.src_addr().is_unspecified() {
                    return;
                }
                if packet.more_frags() || packet.frag_offset() != 0 {
                    if let Some(whole) = self.reassembly.add(&packet, now) {
                        self.packet(&whole, now);
                    }
                    return;
                }
                let exact = &frame.payload()[..usize::from(packet.total_len())];
                self.packet(exact, now);
            }
            _ => {} // No IPv6: its router solicitations stay unanswered, and the guest uses IPv4.
        }
    }

    /// A whole IPv4 packet of the guest, its header checked, exactly as long as it says.
    fn packet(&mut self, bytes: &[u8], now: Instant) {
        let Ok(packet) = Ipv4Packet::new_checked(bytes) else { return };
        let (from, to) = (packet.src_addr(), packet.dst_addr());
        match packet.next_header() {
            IpProtocol::Udp => self.udp_packet(bytes, &packet, now),
            _ if from.is_unspecified() => {} // Only DHCP speaks without an address.
            IpProtocol::Tcp => self.tcp_packet(bytes, &packet, now),
            IpProtocol::Icmp => self.icmp_packet(bytes, &packet, now),
            _ if route(SocketAddrV4::new(to, 1), false) == Route::Ignored => {}
            _ => self.link.send_unreachable(bytes, Icmpv4DstUnreachable::ProtoUnreachable),
        }
    }

    fn tcp_packet(&mut self, bytes: &[u8], packet: &Ipv4Packet<&[u8]>, now: Instant) {
        let Ok(segment) = TcpPacket::new_checked(packet.payload()) else { return };
        let guest = SocketAddrV4::new(packet.src_addr(), segment.src_port());
        let remote = SocketAddrV4::new(packet.dst_addr(), segment.dst_port());
        let key = Key { kind: Kind::Tcp, guest, remote };
        let caps = ChecksumCapabilities::default();
        let (from, to) = ((*guest.ip()).into(), (*remote.ip()).into());
        let Ok(parsed) = TcpRepr::parse(&segment, &from, &to, &caps) else { return };
        let is_syn = parsed.control == TcpControl::Syn && parsed.ack_number.is_none();

        if let Some(id) = self.flows.find(&key)
            && let Some(flow) = self.flows.get_mut(id)
            && let Body::Tcp(tcp) = &mut flow.body
        {
            if !(is_syn && tcp.is_over()) {
                flow.last_active = now;
                tcp.guest_packet(bytes, &mut self.link, now);
                return self.flows.list(id);
            }
            self.flows.remove(id);
        }
        if !is_syn {
            return self.link.send_tcp_reset(guest, remote, &segment);
        }
        match route(remote, self.config.host_loopback) {
            Route::Outside(to) => self.open_tcp(key, to, bytes, now),
            Route::NameServer => match self.world.name_servers().first() {
                Some(&to) => self.open_tcp(key, to, bytes, now),
                None => self.link.send_tcp_reset(guest, remote, &segment),
            },
            Route::Closed => self.link.send_tcp_reset(guest, remote, &segment),
            Route::NoHost => self.link.send_unreachable(bytes, Icmpv4DstUnreachable::HostUnreachable),
            Route::Prohibited => self.link.send_unreachable(bytes, Icmpv4DstUnreachable::CommProhibited),
            Route::Ignored => {}
        }
    }

    /// Begins a connection for the guest's SYN.
    fn open_tcp(&mut self, key: Key, to: SocketAddr, syn: &[u8], now: Instant) {
        if !self.make_room_for_tcp(now) {
            return self.refuse(Errno::CONNREFUSED, syn);
        }
        let id = self.flows.reserve_id();
        match self.world.tcp_connect(id, to) {
            Ok(socket) => {
                let flow = TcpFlow::connecting(socket, syn.to_vec());
                self.flows.insert(id, key, Body::Tcp(flow), now);
                self.flows.list(id);
            }
            Err(error) => self.refuse(error, syn),
        }
    }

    /// Whether one more connection is within the limit, ending one that is as good as over if need be.
    fn make_room_for_tcp(&mut self, now: Instant) -> bool {
        if self.flows.tcp_count() < self.config.limits.tcp_flows {
            return true;
        }
        let stale = self.flows.oldest(|flow| match &flow.body {
            Body::Tcp(tcp) => {
                tcp.is_over() || (tcp.is_dispensable() && now > flow.last_active + DISPENSABLE_IDLE)
            }
            Body::Datagram(_) => false,
        });
        stale.and_then(|id| self.flows.remove(id)).is_some()
    }

    /// Tells the guest why its packet (a SYN or a datagram) leads nowhere.
    fn refuse(&mut self, error: Errno, packet: &[u8]) {
        let reason = match error {
            Errno::CONNREFUSED | Errno::CONNRESET => {
                let Ok(ip) = Ipv4Packet::new_checked(packet) else { return };
                if let (IpProtocol::Tcp, Ok(segment)) =
                    (ip.next_header(), TcpPacket::new_checked(ip.payload()))
                {
                    let guest = SocketAddrV4::new(ip.src_addr(), segment.src_port());
                    let remote = SocketAddrV4::new(ip.dst_addr(), segment.dst_port());
                    return self.link.send_tcp_reset(guest, remote, &segment);
                }
                Icmpv4DstUnreachable::PortUnreachable
            }
            Errno::NETUNREACH | Errno::NETDOWN => Icmpv4DstUnreachable::NetUnreachable,
            Errno::ACCESS | Errno::PERM => Icmpv4DstUnreachable::CommProhibited,
            _ => Icmpv4DstUnreachable::HostUnreachable,
        };
        self.link.send_unreachable(packet, reason);
    }

    fn udp_packet(&mut self, bytes: &[u8], packet: &Ipv4Packet<&[u8]>, now: Instant) {
        let (from, to) = (packet.src_addr(), packet.dst_addr());
        let Ok(udp) = UdpPacket::new_checked(packet.payload()) else { return };
        if !udp.verify_checksum(&from.into(), &to.into()) {
            return;
        }
        let remote = SocketAddrV4::new(to, udp.dst_port());
        let to_dhcp = remote.port() == dhcp::SERVER_PORT && (to.is_broadcast() || to == GATEWAY);
        if to_dhcp && udp.src_port() == dhcp::CLIENT_PORT {
            if let Some(reply) = dhcp::answer(udp.payload(), self.config.hostname.as_deref()) {
                let server = SocketAddrV4::new(GATEWAY, dhcp::SERVER_PORT);
                let client = SocketAddrV4::new(reply.to, dhcp::CLIENT_PORT);
                self.link.send_udp_to_mac(reply.mac, server, client, &reply.message);
            }
            return;
        }
        if from.is_unspecified() {
            return;
        }
        let key = Key { kind: Kind::Udp, guest: SocketAddrV4::new(from, udp.src_port()), remote };
        if let Some(id) = self.flows.find(&key) {
            return self.send_datagram(id, udp.payload(), bytes, now);
        }
        match route(remote, self.config.host_loopback) {
            Route::Outside(to) => self.open_datagram(key, udp.payload(), bytes, now, |world, id| {
                let socket = world.udp_connect(id, to)?;
                Ok(DatagramFlow::Udp { socket, readable: false, answered: false })
            }),
            Route::NameServer => self.name_query(key, udp.payload(), bytes, now),
            Route::Closed => self.link.send_unreachable(bytes, Icmpv4DstUnreachable::PortUnreachable),
            Route::NoHost => self.link.send_unreachable(bytes, Icmpv4DstUnreachable::HostUnreachable),
            Route::Prohibited => self.link.send_unreachable(bytes, Icmpv4DstUnreachable::CommProhibited),
            Route::Ignored => {}
        }
    }

    fn name_query(&mut self, key: Key, query: &[u8], bytes: &[u8], now: Instant) {
        match self.world.name_servers().first().copied() {
            Some(server) => self.open_datagram(key, query, bytes, now, |world, id| {
                let socket = world.udp_connect(id, server)?;
                Ok(DatagramFlow::Names { socket, readable: false, server: 0, asked: Vec::new() })
            }),
            None => {
                if let Some(answer) = self.world.local_name_answer(query) {
                    self.link.send_udp(key.remote, key.guest, &answer);
                }
            }
        }
    }

    /// Makes a flow for the guest's first datagram, and sends that.
    fn open_datagram(
        &mut self,
        key: Key,
        datagram: &[u8],
        packet: &[u8],
        now: Instant,
        make: impl FnOnce(&mut W, FlowId) -> Result<DatagramFlow<W::Socket>, Errno>,
    ) {
        self.make_room_for_datagrams();
        let id = self.flows.reserve_id();
        match make(&mut self.world, id) {
            Ok(flow) => {
                self.flows.insert(id, key, Body::Datagram(flow), now);
                self.send_datagram(id, datagram, packet, now);
            }
            Err(error) => self.refuse(error, packet),
        }
    }

    fn make_room_for_datagrams(&mut self) {
        if self.flows.datagram_count() >= self.config.limits.datagram_flows
            && let Some(id) = self.flows.oldest(|flow| matches!(flow.body, Body::Datagram(_)))
        {
            self.flows.remove(id);
        }
    }

    /// Sends a datagram of the guest (in `packet`) through its flow.
    fn send_datagram(&mut self, id: FlowId, datagram: &[u8], packet: &[u8], now: Instant) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        flow.last_active = now;
        let Body::Datagram(body) = &mut flow.body else { return };
        if let Some(attempt) = body.note_query(datagram) {
            let servers = self.world.name_servers();
            if let Some(&server) = servers.get(attempt % servers.len().max(1))
                && let Ok(socket) = self.world.udp_connect(id, server)
            {
                body.replace_socket(socket);
            }
        }
        let sent = match body {
            DatagramFlow::Forwarded { forward, peer } => self.world.forward_send(*forward, datagram, *peer),
            _ => body.send(datagram),
        };
        let deadline = now + body.idle_time();
        self.flows.set_deadline(id, Some(deadline));
        if let Err(error) = sent {
            self.refuse(error, packet);
        }
    }

    fn icmp_packet(&mut self, bytes: &[u8], packet: &Ipv4Packet<&[u8]>, now: Instant) {
        let (from, to) = (packet.src_addr(), packet.dst_addr());
        let Ok(message) = Icmpv4Packet::new_checked(packet.payload()) else { return };
        if message.msg_type() != Icmpv4Message::EchoRequest || !message.verify_checksum() {
            return;
        }
        let (ident, seq_no) = (message.echo_ident(), message.echo_seq_no());
        if [GATEWAY, DNS].contains(&to) {
            let reply = Icmpv4Repr::EchoReply { ident, seq_no, data: message.data() };
            return self.link.send_icmp(to, from, &reply);
        }
        let key =
            Key { kind: Kind::Echo, guest: SocketAddrV4::new(from, ident), remote: SocketAddrV4::new(to, 0) };
        if let Some(id) = self.flows.find(&key) {
            return self.send_datagram(id, packet.payload(), bytes, now);
        }
        // Any port but 0 and those with a meaning: only the address matters.
        match route(SocketAddrV4::new(to, DNS_PORT), false) {
            Route::Outside(_) => self.open_datagram(key, packet.payload(), bytes, now, |world, id| {
                Ok(DatagramFlow::Echo { socket: world.echo_connect(id, to)?, readable: false })
            }),
            Route::NoHost => self.link.send_unreachable(bytes, Icmpv4DstUnreachable::HostUnreachable),
            Route::Prohibited => self.link.send_unreachable(bytes, Icmpv4DstUnreachable::CommProhibited),
            Route::Closed | Route::NameServer | Route::Ignored => {}
        }
    }

    /// A flow's socket became ready.
    pub(super) fn host_ready(&mut self, id: FlowId, readable: bool, writable: bool) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        match &mut flow.body {
            Body::Tcp(tcp) => tcp.host_ready(readable, writable),
            Body::Datagram(datagram) if readable => datagram.host_ready(),
            Body::Datagram(_) => return,
        }
        self.flows.list(id);
    }

    /// Something waits at a forwarded port. Says whether there may be more.
    pub(super) fn forward_ready(&mut self, index: usize, now: Instant) -> bool {
        let Some(forward) = self.config.forwards.get(index).copied() else { return false };
        match forward.protocol {
            Protocol::Tcp => self.accept_forwarded(index, forward, now),
            Protocol::Udp => self.receive_forwarded(index, forward, now),
        }
    }

    fn accept_forwarded(&mut self, index: usize, forward: Forward, now: Instant) -> bool {
        for _ in 0..FORWARD_BURST {
            if !self.make_room_for_tcp(now) {
                match self.world.tcp_turn_away(index) {
                    Ok(()) | Err(Errno::INTR | Errno::CONNABORTED) => continue,
                    Err(_) => return false,
                }
            }
            let Some(from) = self.free_port(Kind::Tcp, forward.guest) else { return false };
            let id = self.flows.reserve_id();
            let host = match self.world.tcp_accept(id, index) {
                Ok(host) => host,
                Err(Errno::INTR | Errno::CONNABORTED) => continue,
                Err(_) => return false, // AGAIN; or out of descriptors, and the next connection tries again.
            };
            let seed = self.seed();
            if let Some(flow) = TcpFlow::forwarded(host, from, forward.guest, seed, &mut self.link, now) {
                let key = Key { kind: Kind::Tcp, guest: forward.guest, remote: from };
                self.flows.insert(id, key, Body::Tcp(flow), now);
                self.flows.list(id);
            }
        }
        true
    }

    fn receive_forwarded(&mut self, index: usize, forward: Forward, now: Instant) -> bool {
        for _ in 0..FORWARD_BURST {
            if !self.link.has_room() {
                return true;
            }
            let (len, peer) = match self.world.forward_recv(index, &mut self.buf) {
                Ok(got) => got,
                Err(Errno::AGAIN) => return false,
                Err(_) => continue, // An error of one datagram.
            };
            let id = match self.flows.find_peer(index, peer) {
                Some(id) => id,
                None => {
                    self.make_room_for_datagrams();
                    let Some(remote) = self.free_port(Kind::Udp, forward.guest) else { return false };
                    let id = self.flows.reserve_id();
                    let body = Body::Datagram(DatagramFlow::Forwarded { forward: index, peer });
                    self.flows.insert(id, Key { kind: Kind::Udp, guest: forward.guest, remote }, body, now);
                    id
                }
            };
            if let Some(flow) = self.flows.get_mut(id)
                && let Body::Datagram(body) = &flow.body
            {
                flow.last_active = now;
                let (key, deadline) = (flow.key, now + body.idle_time());
                self.flows.set_deadline(id, Some(deadline));
                self.link.send_udp(key.remote, key.guest, &self.buf[..len.min(65_507)]);
            }
        }
        true
    }

    /// An address of the gateway that is not in use with this end of the guest.
    fn free_port(&mut self, kind: Kind, guest: SocketAddrV4) -> Option<SocketAddrV4> {
        for _ in EPHEMERAL {
            let port = self.next_port;
            self.next_port = if port == *EPHEMERAL.end() { *EPHEMERAL.start() } else { port + 1 };
            let remote = SocketAddrV4::new(GATEWAY, port);
            if self.flows.find(&Key { kind, guest, remote }).is_none() {
                return Some(remote);
            }
        }
        None
    }

    /// Unpredictable numbers for initial sequence numbers.
    fn seed(&mut self) -> u64 {
        self.seeds_used += 1;
        let mut hasher = self.seeds.build_hasher();
        hasher.write_u64(self.seeds_used);
        hasher.finish()
    }

    /// Does what is to be done now; says when it wants to be called again if nothing happens (`now` or before: at once).
    pub(super) fn service(&mut self, now: Instant) -> Option<Instant> {
        while let Some(id) = self.flows.take_due(now) {
            self.flow_due(id, now);
        }
        for _ in 0..FLOWS_A_SERVICE {
            if !self.link.has_room() {
                // The guest takes nothing; its taking wakes the driver. Only what is not about frames keeps its time.
                return None;
            }
            let Some(id) = self.flows.next_listed() else { break };
            self.pump(id, now);
        }
        if self.flows.has_work() { Some(now) } else { self.flows.next_deadline() }
    }

    /// A flow's time has come: TCP has something to send again, a datagram flow may have been silent too long.
    fn flow_due(&mut self, id: FlowId, now: Instant) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        match &flow.body {
            Body::Tcp(_) => self.flows.list(id),
            Body::Datagram(body) => {
                let ends = flow.last_active + body.idle_time();
                if ends <= now {
                    self.flows.remove(id);
                } else {
                    self.flows.set_deadline(id, Some(ends));
                }
            }
        }
    }

    fn pump(&mut self, id: FlowId, now: Instant) {
        let seed = self.seed();
        let Some(flow) = self.flows.get_mut(id) else { return };
        let key = flow.key;
        match &mut flow.body {
            Body::Tcp(tcp) => {
                match tcp.finish_connect(seed, &mut self.link, now) {
                    Connect::Pending => return,
                    Connect::Failed(error, syn) => {
                        self.flows.remove(id);
                        return self.refuse(error, &syn);
                    }
                    Connect::Open => {}
                }
                match tcp.pump(&mut self.link, now) {
                    Pumped::Finished => _ = self.flows.remove(id),
                    Pumped::More => self.flows.list(id),
                    Pumped::Waiting(at) => self.flows.set_deadline(id, at),
                }
            }
            Body::Datagram(datagram) => {
                match datagram.pump(key.guest, key.remote, &mut self.buf, &mut self.link) {
                    Received::Nothing => {}
                    Received::All => flow.last_active = now,
                    Received::More => {
                        flow.last_active = now;
                        self.flows.list(id);
                    }
                    Received::Refused => {
                        let packet = first_bytes_of_datagram(key);
                        self.flows.list(id);
                        self.link.send_unreachable(&packet, Icmpv4DstUnreachable::PortUnreachable);
                    }
                }
            }
        }
    }
}

/// The head of a datagram that the guest sent in a flow, to quote in an ICMP message.
fn first_bytes_of_datagram(key: Key) -> [u8; IPV4_HEADER + UDP_HEADER] {
    let mut bytes = [0; IPV4_HEADER + UDP_HEADER];
    let len = bytes.len() as u16;
    let mut header = Ipv4Packet::new_unchecked(&mut bytes[..]);
    header.set_version(4);
    header.set_header_len(IPV4_HEADER as u8);
    header.set_total_len(len);
    header.set_hop_limit(64);
    header.set_next_header(IpProtocol::Udp);
    header.set_src_addr(*key.guest.ip());
    header.set_dst_addr(*key.remote.ip());
    header.fill_checksum();
    let mut udp = UdpPacket::new_unchecked(&mut bytes[IPV4_HEADER..]);
    udp.set_src_port(key.guest.port());
    udp.set_dst_port(key.remote.port());
    udp.set_len(UDP_HEADER as u16);
    bytes
}
