//! One TCP connection of the guest: smoltcp speaks TCP with the guest, a host socket with the world, bytes go between.
//!
//! Called by: `usernet::nat`.
//!
//! ```text
//! guest SYN ──► Connecting ──host connect succeeds──► Open (LISTEN ► SYN-RECEIVED ► ESTABLISHED ...)
//!                   │ refused: RST; else ICMP unreachable          │ both directions finished ► TIME-WAIT ► gone
//! hostfwd accept ───────────────────────────────► Open (SYN-SENT ...) either side resets: the other is reset ► gone
//! ```
//! Invariants:
//! - The guest's SYN is held until the host's connect succeeds: a connection the guest sees is a connection that is.
//! - Each direction holds at most `TCP_BUFFER_BYTES`. A full buffer stops reading from the host's socket, or closes the
//!   window towards the guest: back-pressure goes through, nothing is dropped.
//! - A FIN travels alone (half-close); an error on one side becomes a reset on the other.

use std::net::{Ipv4Addr, SocketAddrV4};

use rustix::io::Errno;
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{HardwareAddress, IpCidr, IpListenEndpoint, Ipv4Cidr};

use super::addresses::MTU;
use super::link::Link;
use super::world::HostSocket;

/// What one direction of one connection may buffer.
pub const TCP_BUFFER_BYTES: usize = 128 << 10;
/// How long a forwarded connection waits for the guest to answer.
const GUEST_ANSWER_TIME: Duration = Duration::from_secs(60);
/// Rounds between host and guest before another flow gets its turn.
const ROUNDS: usize = 8;

/// A connection.
pub(super) struct TcpFlow<S> {
    stage: Stage,
    /// Gone once both directions are finished.
    host: Option<S>,
    readable: bool,
    writable: bool,
    /// The host's side has finished sending, and the guest knows or will.
    host_finished: bool,
    /// The guest has finished sending, and the host's side knows.
    guest_finished: bool,
    /// We reset the connection; the RST may still have to go out.
    aborted: bool,
}

enum Stage {
    /// The host's connect is under way; here is the guest's SYN, a whole IPv4 packet.
    Connecting(Vec<u8>),
    Open(Box<Endpoint>),
}

/// What a pump of a flow left behind.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pumped {
    /// Nothing to do until something happens, or until then.
    Waiting(Option<Instant>),
    /// There is more to do right away.
    More,
    /// The flow is over.
    Finished,
}

/// What became of a held SYN.
pub(super) enum Connect {
    /// Not decided.
    Pending,
    /// The connection stands.
    Open,
    /// It failed; here is the SYN, to be refused.
    Failed(Errno, Vec<u8>),
}

impl<S: HostSocket> TcpFlow<S> {
    /// A connection that the guest asked for with `syn`, and whose host side is being connected.
    pub(super) fn connecting(host: S, syn: Vec<u8>) -> TcpFlow<S> {
        TcpFlow::new(Stage::Connecting(syn), host)
    }

    /// A connection from a forwarded port: `host` is accepted, the guest will be called as `from`.
    pub(super) fn forwarded(
        host: S,
        from: SocketAddrV4,
        guest: SocketAddrV4,
        seed: u64,
        link: &mut Link,
        now: Instant,
    ) -> Option<TcpFlow<S>> {
        let mut endpoint = Endpoint::new(from, *guest.ip(), seed, link, now);
        endpoint.call(from, guest)?;
        let mut flow = TcpFlow::new(Stage::Open(Box::new(endpoint)), host);
        (flow.readable, flow.writable) = (true, true);
        Some(flow)
    }

    fn new(stage: Stage, host: S) -> TcpFlow<S> {
        let (readable, writable, host_finished, guest_finished, aborted) =
            (false, false, false, false, false);
        TcpFlow { stage, host: Some(host), readable, writable, host_finished, guest_finished, aborted }
    }

    /// The host's socket became ready.
    pub(super) fn host_ready(&mut self, readable: bool, writable: bool) {
        self.readable |= readable;
        self.writable |= writable;
    }

    /// Looks whether a pending connect is decided, and opens the flow if it succeeded.
    pub(super) fn finish_connect(&mut self, seed: u64, link: &mut Link, now: Instant) -> Connect {
        let (Stage::Connecting(syn), Some(host)) = (&mut self.stage, &self.host) else {
            return Connect::Open;
        };
        match host.connect_result() {
            Err(Errno::AGAIN) => return Connect::Pending,
            Err(error) => return Connect::Failed(error, std::mem::take(syn)),
            Ok(()) => {}
        }
        let syn = std::mem::take(syn);
        let Some(mut endpoint) = Endpoint::answering(&syn, seed, link, now) else {
            return Connect::Failed(Errno::INVAL, syn);
        };
        endpoint.ingress(&syn, link, now);
        self.stage = Stage::Open(Box::new(endpoint));
        (self.readable, self.writable) = (true, true);
        Connect::Open
    }

    /// A TCP packet of the guest.
    pub(super) fn guest_packet(&mut self, packet: &[u8], link: &mut Link, now: Instant) {
        match &mut self.stage {
            Stage::Connecting(_) => {} // The SYN again; it is being worked on.
            Stage::Open(endpoint) => endpoint.ingress(packet, link, now),
        }
    }

    /// Whether the connection is over but for the wait that TCP prescribes: a new SYN may replace it.
    pub(super) fn is_over(&self) -> bool {
        match &self.stage {
            Stage::Connecting(_) => false,
            Stage::Open(endpoint) => matches!(endpoint.state(), State::TimeWait | State::Closed),
        }
    }

    /// Whether the connection may be ended when connections run out and it was silent for long: it is half closed, or
    /// the world never answered.
    pub(super) fn is_dispensable(&self) -> bool {
        self.host_finished || self.guest_finished || matches!(self.stage, Stage::Connecting(_))
    }

    /// Moves what can be moved.
    pub(super) fn pump(&mut self, link: &mut Link, now: Instant) -> Pumped {
        if matches!(self.stage, Stage::Connecting(_)) {
            return Pumped::Waiting(None);
        }
        let mut progress = false;
        for _ in 0..ROUNDS {
            progress = self.host_to_guest();
            let Stage::Open(endpoint) = &mut self.stage else { break };
            progress |= endpoint.egress(link, now);
            progress |= self.guest_to_host();
            if !progress {
                break;
            }
        }
        let Stage::Open(endpoint) = &mut self.stage else { return Pumped::Finished };
        match endpoint.tcp().state() {
            State::Established => endpoint.tcp().set_timeout(None),
            // A RST takes a connection that was not established back to LISTEN; there is nobody else to listen for.
            State::Closed | State::Listen if !self.aborted || link.has_room() => {
                if !(self.host_finished && self.guest_finished)
                    && let Some(host) = &self.host
                {
                    host.reset_on_close();
                }
                return Pumped::Finished;
            }
            State::TimeWait if self.host_finished && self.guest_finished => self.host = None,
            _ => {}
        }
        match endpoint.poll_at(now) {
            _ if progress => Pumped::More,
            // Due, but nothing went out: the link is full (its room will call us), or there is nothing to it.
            Some(at) if at <= now => Pumped::Waiting(Some(now + Duration::from_millis(10))),
            at => Pumped::Waiting(at),
        }
    }

    fn host_to_guest(&mut self) -> bool {
        let (Stage::Open(endpoint), Some(host)) = (&mut self.stage, &self.host) else { return false };
        let tcp = endpoint.tcp();
        let mut progress = false;
        while self.readable && !self.host_finished && tcp.can_send() {
            let got = tcp.send(|buf| match host.recv(buf) {
                Ok(0) if buf.is_empty() => (0, Err(Errno::INTR)),
                Ok(got) => (got, Ok(got)),
                Err(error) => (0, Err(error)),
            });
            match got {
                Ok(Ok(0)) => {
                    self.host_finished = true;
                    tcp.close();
                }
                Ok(Ok(_)) => {}
                Ok(Err(Errno::AGAIN)) => self.readable = false,
                Ok(Err(Errno::INTR)) => continue,
                Ok(Err(_)) | Err(_) => {
                    self.abort();
                    return true;
                }
            }
            progress = true;
        }
        progress
    }

    fn guest_to_host(&mut self) -> bool {
        let (Stage::Open(endpoint), Some(host)) = (&mut self.stage, &self.host) else { return false };
        let tcp = endpoint.tcp();
        let mut progress = false;
        while self.writable && tcp.can_recv() {
            let sent = tcp.recv(|buf| match host.send(buf) {
                Ok(sent) => (sent.min(buf.len()), Ok(())),
                Err(error) => (0, Err(error)),
            });
            match sent {
                Ok(Ok(())) => progress = true,
                Ok(Err(Errno::AGAIN)) => self.writable = false,
                Ok(Err(Errno::INTR)) => {}
                Ok(Err(_)) | Err(_) => {
                    self.abort();
                    return true;
                }
            }
        }
        let fin = matches!(tcp.state(), State::CloseWait | State::LastAck | State::Closing | State::TimeWait);
        if fin && !self.guest_finished && tcp.recv_queue() == 0 {
            self.guest_finished = true;
            host.shutdown_write();
            progress = true;
        }
        progress
    }

    /// Resets the guest's side; the host's is broken already.
    fn abort(&mut self) {
        self.aborted = true;
        (self.readable, self.writable) = (false, false);
        if let Stage::Open(endpoint) = &mut self.stage {
            endpoint.tcp().abort();
        }
    }
}

/// smoltcp's half: an interface of its own with one socket, so that a packet costs the same however many flows there are.
struct Endpoint {
    interface: Interface,
    sockets: SocketSet<'static>,
    handle: SocketHandle,
    guest: Ipv4Addr,
}

impl Endpoint {
    fn new(local: SocketAddrV4, guest: Ipv4Addr, seed: u64, link: &mut Link, now: Instant) -> Endpoint {
        let mut config = Config::new(HardwareAddress::Ip);
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut Cable { incoming: None, link, guest }, now);
        // The whole world is our neighbour: packets go onto the cable as they are.
        interface
            .update_ip_addrs(|addresses| _ = addresses.push(IpCidr::Ipv4(Ipv4Cidr::new(*local.ip(), 0))));
        let buffer = || SocketBuffer::new(vec![0; TCP_BUFFER_BYTES]);
        let mut tcp = Socket::new(buffer(), buffer());
        tcp.set_nagle_enabled(false);
        tcp.set_ack_delay(None);
        let mut sockets = SocketSet::new(Vec::new());
        let handle = sockets.add(tcp);
        Endpoint { interface, sockets, handle, guest }
    }

    /// An endpoint that listens for the held SYN.
    fn answering(syn: &[u8], seed: u64, link: &mut Link, now: Instant) -> Option<Endpoint> {
        let ip = smoltcp::wire::Ipv4Packet::new_checked(syn).ok()?;
        let tcp = smoltcp::wire::TcpPacket::new_checked(ip.payload()).ok()?;
        let local = SocketAddrV4::new(ip.dst_addr(), tcp.dst_port());
        let mut endpoint = Endpoint::new(local, ip.src_addr(), seed, link, now);
        let at = IpListenEndpoint { addr: Some((*local.ip()).into()), port: local.port() };
        endpoint.tcp().listen(at).ok()?;
        Some(endpoint)
    }

    /// Calls the guest.
    fn call(&mut self, from: SocketAddrV4, guest: SocketAddrV4) -> Option<()> {
        let Endpoint { interface, sockets, handle, .. } = self;
        let tcp = sockets.get_mut::<Socket<'static>>(*handle);
        tcp.set_timeout(Some(GUEST_ANSWER_TIME));
        tcp.connect(interface.context(), guest, from).ok()
    }

    fn tcp(&mut self) -> &mut Socket<'static> {
        self.sockets.get_mut(self.handle)
    }

    fn state(&self) -> State {
        self.sockets.get::<Socket<'static>>(self.handle).state()
    }

    fn ingress(&mut self, packet: &[u8], link: &mut Link, now: Instant) {
        let mut cable = Cable { incoming: Some(packet), link, guest: self.guest };
        let _: PollIngressSingleResult =
            self.interface.poll_ingress_single(now, &mut cable, &mut self.sockets);
    }

    /// Sends what there is to send and the link takes; says whether anything went out.
    fn egress(&mut self, link: &mut Link, now: Instant) -> bool {
        let mut cable = Cable { incoming: None, link, guest: self.guest };
        let mut sent = false;
        while cable.link.has_room()
            && self.interface.poll_egress(now, &mut cable, &mut self.sockets)
                == PollResult::SocketStateChanged
        {
            sent = true;
        }
        sent
    }

    fn poll_at(&mut self, now: Instant) -> Option<Instant> {
        self.interface.poll_at(now, &self.sockets)
    }
}

/// The link as smoltcp wants to see it, for the length of one call.
struct Cable<'a> {
    incoming: Option<&'a [u8]>,
    link: &'a mut Link,
    guest: Ipv4Addr,
}

impl Device for Cable<'_> {
    type RxToken<'t>
        = Incoming<'t>
    where
        Self: 't;
    type TxToken<'t>
        = Outgoing<'t>
    where
        Self: 't;

    fn receive(&mut self, _now: Instant) -> Option<(Incoming<'_>, Outgoing<'_>)> {
        let packet = self.incoming.take()?;
        Some((Incoming(packet), Outgoing { link: self.link, guest: self.guest }))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Outgoing<'_>> {
        Some(Outgoing { link: self.link, guest: self.guest })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU.into();
        capabilities
    }
}

struct Incoming<'a>(&'a [u8]);

impl RxToken for Incoming<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(self.0)
    }
}

struct Outgoing<'a> {
    link: &'a mut Link,
    guest: Ipv4Addr,
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        self.link.send_packet(self.guest, len, f)
    }
}
