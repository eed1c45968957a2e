//! The NAT in a world of memory and in virtual time: held SYNs, limits, lossy links, hostile frames.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::rc::Rc;

use proptest::prelude::*;
use rustix::io::Errno;
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, HardwareAddress, Icmpv4Packet, IpCidr,
    IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr,
};

use super::addresses::{GUEST, OUR_MAC};
use super::config::{Limits, UserNetConfig};
use super::link::{ETHERNET_HEADER, IPV4_HEADER};
use super::nat::Nat;
use super::world::{FlowId, HostSocket, World};

const MAC: EthernetAddress = EthernetAddress([0x52, 0x54, 0, 0, 0, 1]);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Ports of `OUTSIDE` and what happens there.
const ECHO: u16 = 7;
const SLOW: u16 = 8;
const REFUSED: u16 = 9;
const NO_NET: u16 = 10;
const NO_HOST: u16 = 11;
const BREAKS: u16 = 12;

/// An echo server's memory.
#[derive(Debug, Default)]
struct Peer {
    connected: Option<Result<(), Errno>>,
    stream: VecDeque<u8>,
    datagrams: VecDeque<Vec<u8>>,
    is_stream: bool,
    finished: bool,
    breaks: bool,
    reset: bool,
}

#[derive(Clone, Debug)]
struct MemorySocket(Rc<RefCell<Peer>>);

impl HostSocket for MemorySocket {
    fn connect_result(&self) -> Result<(), Errno> {
        self.0.borrow().connected.unwrap_or(Err(Errno::AGAIN))
    }
    fn recv(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        let mut peer = self.0.borrow_mut();
        if !peer.is_stream {
            let datagram = peer.datagrams.pop_front().ok_or(Errno::AGAIN)?;
            buf[..datagram.len()].copy_from_slice(&datagram);
            return Ok(datagram.len());
        }
        if peer.stream.is_empty() {
            return if peer.finished { Ok(0) } else { Err(Errno::AGAIN) };
        }
        let got = buf.len().min(peer.stream.len());
        peer.stream.drain(..got).zip(buf).for_each(|(from, to)| *to = from);
        Ok(got)
    }
    fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        let mut peer = self.0.borrow_mut();
        if peer.breaks {
            return Err(Errno::CONNRESET);
        }
        if !peer.is_stream {
            peer.datagrams.truncate(4);
            peer.datagrams.push_back(bytes.to_vec());
            return Ok(bytes.len());
        }
        let room = 10_000usize.saturating_sub(peer.stream.len());
        if room == 0 {
            return Err(Errno::AGAIN);
        }
        let sent = room.min(bytes.len());
        peer.stream.extend(&bytes[..sent]);
        Ok(sent)
    }
    fn shutdown_write(&self) {
        self.0.borrow_mut().finished = true;
    }
    fn reset_on_close(&self) {
        self.0.borrow_mut().reset = true;
    }
}

#[derive(Debug, Default)]
struct Memory {
    peers: HashMap<FlowId, MemorySocket>,
}

impl Memory {
    fn open(&mut self, flow: FlowId, port: u16, is_stream: bool) -> Result<MemorySocket, Errno> {
        let connected = match port {
            REFUSED => return Err(Errno::CONNREFUSED),
            NO_NET => return Err(Errno::NETUNREACH),
            NO_HOST => Some(Err(Errno::HOSTUNREACH)),
            SLOW => None,
            _ => Some(Ok(())),
        };
        let peer = Peer { connected, is_stream, breaks: port == BREAKS, ..Peer::default() };
        let socket = MemorySocket(Rc::new(RefCell::new(peer)));
        self.peers.insert(flow, socket.clone());
        Ok(socket)
    }
}

impl World for Memory {
    type Socket = MemorySocket;
    fn tcp_connect(&mut self, flow: FlowId, to: SocketAddr) -> Result<MemorySocket, Errno> {
        self.open(flow, to.port(), true)
    }
    fn tcp_accept(&mut self, _: FlowId, _: usize) -> Result<MemorySocket, Errno> {
        Err(Errno::AGAIN)
    }
    fn tcp_turn_away(&mut self, _: usize) -> Result<(), Errno> {
        Err(Errno::AGAIN)
    }
    fn udp_connect(&mut self, flow: FlowId, to: SocketAddr) -> Result<MemorySocket, Errno> {
        self.open(flow, to.port(), false)
    }
    fn echo_connect(&mut self, _: FlowId, _: Ipv4Addr) -> Result<MemorySocket, Errno> {
        Err(Errno::ACCESS)
    }
    fn forward_recv(&mut self, _: usize, _: &mut [u8]) -> Result<(usize, SocketAddr), Errno> {
        Err(Errno::AGAIN)
    }
    fn forward_send(&mut self, _: usize, _: &[u8], _: SocketAddr) -> Result<(), Errno> {
        Ok(())
    }
    fn name_servers(&mut self) -> Vec<SocketAddr> {
        vec![SocketAddr::from((OUTSIDE, 53))]
    }
    fn local_name_answer(&mut self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }
}

fn nat(tcp_flows: usize, datagram_flows: usize) -> Nat<Memory> {
    let limits = Limits { tcp_flows, datagram_flows };
    Nat::new(UserNetConfig { limits, ..UserNetConfig::default() }, Memory::default())
}

/// Tells the NAT that every socket is ready, and has it work until it waits.
fn settle(nat: &mut Nat<Memory>, now: Instant) {
    let flows: Vec<FlowId> = nat.world().peers.keys().copied().collect();
    for flow in flows {
        nat.host_ready(flow, true, true);
    }
    for _ in 0..1000 {
        if nat.service(now).is_none_or(|at| at > now) {
            return;
        }
    }
    panic!("the NAT does not come to rest");
}

fn frames(nat: &mut Nat<Memory>) -> Vec<Vec<u8>> {
    std::iter::from_fn(|| nat.link.take()).collect()
}

/// An Ethernet frame of the guest around an IPv4 payload.
fn ipv4_frame(to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET_HEADER + IPV4_HEADER + payload.len()];
    let ethernet = EthernetRepr { src_addr: MAC, dst_addr: OUR_MAC, ethertype: EthernetProtocol::Ipv4 };
    ethernet.emit(&mut EthernetFrame::new_unchecked(&mut frame[..]));
    let header = Ipv4Repr {
        src_addr: GUEST,
        dst_addr: to,
        next_header: protocol,
        payload_len: payload.len(),
        hop_limit: 64,
    };
    let caps = ChecksumCapabilities::default();
    header.emit(&mut Ipv4Packet::new_unchecked(&mut frame[ETHERNET_HEADER..]), &caps);
    frame[ETHERNET_HEADER + IPV4_HEADER..].copy_from_slice(payload);
    frame
}

fn segment(
    from: u16,
    to: SocketAddrV4,
    control: TcpControl,
    seq: i32,
    ack: Option<i32>,
    payload: &[u8],
) -> Vec<u8> {
    let repr = TcpRepr {
        src_port: from,
        dst_port: to.port(),
        control,
        seq_number: TcpSeqNumber(seq),
        ack_number: ack.map(TcpSeqNumber),
        window_len: 64_000,
        window_scale: if control == TcpControl::Syn { Some(3) } else { None },
        max_seg_size: if control == TcpControl::Syn { Some(1460) } else { None },
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload,
    };
    let mut bytes = vec![0; repr.buffer_len()];
    let (from, to_ip) = (GUEST.into(), (*to.ip()).into());
    repr.emit(&mut TcpPacket::new_unchecked(&mut bytes[..]), &from, &to_ip, &ChecksumCapabilities::default());
    ipv4_frame(*to.ip(), IpProtocol::Tcp, &bytes)
}

fn datagram(from: u16, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 8 + payload.len()];
    UdpRepr { src_port: from, dst_port: to.port() }.emit(
        &mut UdpPacket::new_unchecked(&mut bytes[..]),
        &GUEST.into(),
        &(*to.ip()).into(),
        payload.len(),
        |buf| buf.copy_from_slice(payload),
        &ChecksumCapabilities::default(),
    );
    ipv4_frame(*to.ip(), IpProtocol::Udp, &bytes)
}

fn outside(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(OUTSIDE, port)
}

/// What an answer says, in a word.
fn meaning(frame: &[u8]) -> String {
    let frame = EthernetFrame::new_checked(frame).unwrap();
    assert!(frame.payload().len() <= 1500, "longer than the link's packets");
    let EthernetProtocol::Ipv4 = frame.ethertype() else { return "arp".into() };
    let packet = Ipv4Packet::new_checked(frame.payload()).unwrap();
    assert!(packet.verify_checksum());
    let (from, to) = (packet.src_addr().into(), packet.dst_addr().into());
    match packet.next_header() {
        IpProtocol::Tcp => {
            let tcp = TcpPacket::new_checked(packet.payload()).unwrap();
            assert!(tcp.verify_checksum(&from, &to));
            match (tcp.syn(), tcp.ack(), tcp.rst(), tcp.fin()) {
                (true, true, false, false) => "syn-ack".into(),
                (false, _, true, false) => "rst".into(),
                other => format!("tcp {other:?}"),
            }
        }
        IpProtocol::Icmp => {
            let icmp = Icmpv4Packet::new_checked(packet.payload()).unwrap();
            assert!(icmp.verify_checksum());
            format!("icmp {} {}", u8::from(icmp.msg_type()), icmp.msg_code())
        }
        IpProtocol::Udp => "udp".into(),
        other => format!("{other}"),
    }
}

fn answers(nat: &mut Nat<Memory>, frame: &[u8]) -> Vec<String> {
    nat.guest_frame(frame, Instant::ZERO);
    settle(nat, Instant::ZERO);
    frames(nat).iter().map(|frame| meaning(frame)).collect()
}

#[test]
fn a_syn_is_held_until_the_connect_is_decided() {
    let mut nat = nat(10, 10);
    let syn = |port, from| segment(from, outside(port), TcpControl::Syn, 100, None, &[]);
    assert_eq!(answers(&mut nat, &syn(ECHO, 1)), ["syn-ack"]);
    assert_eq!(answers(&mut nat, &syn(REFUSED, 2)), ["rst"]);
    assert_eq!(answers(&mut nat, &syn(NO_NET, 3)), ["icmp 3 0"]);
    assert_eq!(answers(&mut nat, &syn(NO_HOST, 4)), ["icmp 3 1"]);

    // Undecided: nothing is said, however often the guest asks.
    for _ in 0..3 {
        assert!(answers(&mut nat, &syn(SLOW, 5)).is_empty());
    }
    let pending: Vec<MemorySocket> =
        nat.world().peers.values().filter(|p| p.0.borrow().connected.is_none()).cloned().collect();
    assert_eq!(pending.len(), 1, "a repeated SYN makes no second connection");
    pending[0].0.borrow_mut().connected = Some(Ok(()));
    settle(&mut nat, Instant::ZERO);
    assert_eq!(frames(&mut nat).iter().map(|f| meaning(f)).collect::<Vec<_>>(), ["syn-ack"]);
    assert_eq!(nat.flow_counts(), (2, 0));
}

#[test]
fn what_leads_nowhere_is_answered_at_once() {
    let mut nat = nat(10, 10);
    let syn = |ip: [u8; 4]| segment(1, SocketAddrV4::new(ip.into(), 80), TcpControl::Syn, 1, None, &[]);
    assert_eq!(answers(&mut nat, &syn([10, 0, 2, 2])), ["rst"]);
    assert_eq!(answers(&mut nat, &syn([10, 0, 2, 99])), ["icmp 3 1"]);
    assert_eq!(answers(&mut nat, &syn([127, 0, 0, 1])), ["icmp 3 13"]);
    assert_eq!(answers(&mut nat, &syn([169, 254, 169, 254])), ["icmp 3 13"]);
    assert!(answers(&mut nat, &syn([224, 0, 0, 1])).is_empty());
    let stray = segment(1, outside(80), TcpControl::None, 1, Some(7), b"x");
    assert_eq!(answers(&mut nat, &stray), ["rst"], "a connection of before a restore");
    assert!(answers(&mut nat, &segment(1, outside(80), TcpControl::Rst, 1, Some(7), &[])).is_empty());
    assert_eq!(answers(&mut nat, &ipv4_frame(OUTSIDE, IpProtocol::Unknown(47), &[0; 20])), ["icmp 3 2"]);
    assert_eq!(
        answers(&mut nat, &datagram(1, SocketAddrV4::new([10, 0, 2, 2].into(), 9), b"x")),
        ["icmp 3 3"]
    );
    let ping = [8, 0, 0xf7, 0xfd, 0, 1, 0, 1];
    assert_eq!(answers(&mut nat, &ipv4_frame(OUTSIDE, IpProtocol::Icmp, &ping)), ["icmp 3 13"]);
    assert_eq!(nat.flow_counts(), (0, 0));
}

#[test]
fn flows_are_bounded_and_idle_ones_end() {
    let mut nat = nat(5, 7);
    for port in 1000..1100 {
        let answer = answers(&mut nat, &segment(port, outside(ECHO), TcpControl::Syn, 1, None, &[]));
        assert_eq!(answer, [if port < 1005 { "syn-ack" } else { "rst" }]);
        assert_eq!(answers(&mut nat, &datagram(port, outside(ECHO), b"hello")), ["udp"]);
    }
    assert_eq!(nat.flow_counts(), (5, 7));
    let silent = |nat: &mut Nat<Memory>, seconds| {
        settle(nat, Instant::from_secs(seconds));
        nat.flow_counts().1
    };
    assert_eq!((silent(&mut nat, 119), silent(&mut nat, 121)), (7, 0));
}

#[test]
fn large_datagrams_travel_in_fragments_both_ways() {
    let mut nat = nat(1, 1);
    let payload: Vec<u8> = (0..20_000u32).map(|i| (i % 251) as u8).collect();
    let whole = datagram(1, outside(ECHO), &payload);
    for (i, part) in whole[ETHERNET_HEADER + IPV4_HEADER..].chunks(1480).enumerate() {
        let mut frame = ipv4_frame(OUTSIDE, IpProtocol::Udp, part);
        let mut header = Ipv4Packet::new_unchecked(&mut frame[ETHERNET_HEADER..]);
        header.set_more_frags((i + 1) * 1480 < payload.len() + 8);
        header.set_frag_offset((i * 1480) as u16);
        header.set_ident(77);
        header.fill_checksum();
        nat.guest_frame(&frame, Instant::ZERO);
    }
    settle(&mut nat, Instant::ZERO);
    let mut reassembly = super::fragments::Reassembly::default();
    let back: Vec<Vec<u8>> = frames(&mut nat)
        .iter()
        .inspect(|frame| assert_eq!(meaning(frame), "udp"))
        .filter_map(|f| {
            reassembly.add(&Ipv4Packet::new_checked(&f[ETHERNET_HEADER..]).unwrap(), Instant::ZERO)
        })
        .collect();
    assert_eq!(back.len(), 1);
    let packet = Ipv4Packet::new_checked(&back[0][..]).unwrap();
    let udp = UdpPacket::new_checked(packet.payload()).unwrap();
    assert!(udp.verify_checksum(&OUTSIDE.into(), &GUEST.into()));
    assert!(udp.payload() == payload);
}

#[test]
fn unanswered_connections_make_room_after_a_while() {
    let mut nat = nat(2, 2);
    let syn = |port, from| segment(from, outside(port), TcpControl::Syn, 1, None, &[]);
    assert!(answers(&mut nat, &syn(SLOW, 1)).is_empty());
    assert!(answers(&mut nat, &syn(SLOW, 2)).is_empty());
    assert_eq!(answers(&mut nat, &syn(ECHO, 3)), ["rst"]);
    let later = Instant::from_secs(100);
    nat.guest_frame(&syn(ECHO, 4), later);
    settle(&mut nat, later);
    assert_eq!(frames(&mut nat).iter().map(|f| meaning(f)).collect::<Vec<_>>(), ["syn-ack"]);
    assert_eq!(nat.flow_counts(), (2, 0));
}

#[test]
fn a_guest_that_takes_nothing_holds_back_a_bounded_number_of_frames() {
    let mut nat = nat(10, 10);
    for i in 0..5000u32 {
        nat.guest_frame(&datagram(1, outside(ECHO), &i.to_le_bytes()), Instant::ZERO);
        nat.guest_frame(&segment(9, outside(80), TcpControl::None, 1, Some(7), b"x"), Instant::ZERO);
        let _ = nat.service(Instant::ZERO);
    }
    let held = frames(&mut nat).len();
    assert!((500..=1024).contains(&held), "{held}");
}

/// The guest's stack on a link that loses, doubles and damages frames.
struct BadLink {
    to_nat: VecDeque<Vec<u8>>,
    to_guest: VecDeque<Vec<u8>>,
    random: u64,
    trouble_percent: u64,
}

impl BadLink {
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.random >> 33
    }

    /// The frames that come out of the link for a frame that went in.
    fn pass(&mut self, mut frame: Vec<u8>) -> Vec<Vec<u8>> {
        if self.random() % 100 >= self.trouble_percent {
            return vec![frame];
        }
        match self.random() % 3 {
            0 => vec![],
            1 => vec![frame.clone(), frame],
            _ => {
                // Behind the addresses: damage there would only be another lost frame.
                let at = ETHERNET_HEADER + self.random() as usize % (frame.len() - ETHERNET_HEADER);
                frame[at] ^= 1 << (self.random() % 8);
                vec![frame]
            }
        }
    }
}

struct Received(Vec<u8>);
struct Sent<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for BadLink {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sent<'a>;
    fn receive(&mut self, _: Instant) -> Option<(Received, Sent<'_>)> {
        let frame = self.to_guest.pop_front()?;
        Some((Received(frame), Sent(&mut self.to_nat)))
    }
    fn transmit(&mut self, _: Instant) -> Option<Sent<'_>> {
        Some(Sent(&mut self.to_nat))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip; // ARP is not what is tested here.
        capabilities.max_transmission_unit = 1500;
        capabilities
    }
}

/// Sends `data` through an echo server and returns what comes back, or `None` if the connection broke.
fn echo_over_bad_link(data: &[u8], seed: u64, trouble_percent: u64) -> Option<Vec<u8>> {
    let mut nat = nat(4, 4);
    let mut link =
        BadLink { to_nat: VecDeque::new(), to_guest: VecDeque::new(), random: seed, trouble_percent };
    let mut now = Instant::ZERO;
    let mut iface = Interface::new(Config::new(HardwareAddress::Ip), &mut link, now);
    iface.update_ip_addrs(|all| all.push(IpCidr::new(GUEST.into(), 24)).unwrap());
    iface.routes_mut().add_default_ipv4_route(super::addresses::GATEWAY).unwrap();
    let buffer = || tcp::SocketBuffer::new(vec![0; 20_000]);
    let mut sockets = SocketSet::new(Vec::new());
    let handle = sockets.add(tcp::Socket::new(buffer(), buffer()));
    let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
    socket.connect(iface.context(), (OUTSIDE, ECHO), 40_000).unwrap();
    let (mut sent, mut back) = (0, Vec::new());
    for _ in 0..100_000 {
        iface.poll(now, &mut link, &mut sockets);
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        if socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        } else if sent == data.len() && socket.may_send() && trouble_percent == 0 {
            socket.close();
        }
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), back.extend_from_slice(bytes))).unwrap();
        }
        match socket.state() {
            // Closing is left out on a bad link: smoltcp at both ends can lose a FIN that overtakes data for good.
            _ if trouble_percent > 0 && back.len() >= data.len() => return Some(back),
            tcp::State::TimeWait => return Some(back),
            tcp::State::Closed => return None,
            _ => {}
        }
        while let Some(packet) = link.to_nat.pop_front() {
            let packet = Ipv4Packet::new_unchecked(&packet[..]);
            let frame = ipv4_frame(packet.dst_addr(), packet.next_header(), packet.payload());
            for frame in link.pass(frame) {
                nat.guest_frame(&frame, now);
            }
        }
        settle(&mut nat, now);
        for frame in frames(&mut nat) {
            let passed = link.pass(frame);
            link.to_guest.extend(passed.into_iter().map(|mut frame| frame.split_off(ETHERNET_HEADER)));
        }
        now += Duration::from_millis(if link.to_guest.is_empty() { 50 } else { 1 });
    }
    let state = sockets.get::<tcp::Socket<'_>>(handle).state();
    panic!("the transfer does not end: {state}, {sent} sent, {} back, now {now}", back.len());
}

#[derive(Clone, Debug)]
enum Hostile {
    Noise(Vec<u8>),
    Tcp { from: u16, port: u16, flags: u8, seq: i32, ack: i32, len: usize, options: Vec<u8> },
    Udp { from: u16, port: u16, len: usize },
    Ip { to: u32, protocol: u8, payload: Vec<u8> },
    Arp(Vec<u8>),
    Wait(u64),
}

fn hostile() -> impl Strategy<Value = Hostile> {
    let bytes = |max| proptest::collection::vec(any::<u8>(), 0..max);
    let port = || prop_oneof![ECHO..=BREAKS, Just(53u16), any::<u16>()];
    let near = || prop_oneof![-5i32..100, any::<i32>()];
    prop_oneof![
        1 => bytes(1600).prop_map(Hostile::Noise),
        6 => (1u16..6, port(), prop_oneof![Just(2u8), Just(16), Just(24), Just(17), any::<u8>()], near(), near(), 0usize..1400, bytes(40)).prop_map(
            |(from, port, flags, seq, ack, len, options)| Hostile::Tcp { from, port, flags, seq, ack, len, options }
        ),
        2 => (1u16..6, port(), 0usize..1400).prop_map(|(from, port, len)| Hostile::Udp { from, port, len }),
        2 => (any::<u32>(), prop_oneof![Just(1u8), Just(6), Just(17), any::<u8>()], bytes(100))
            .prop_map(|(to, protocol, payload)| Hostile::Ip { to, protocol, payload }),
        1 => bytes(60).prop_map(Hostile::Arp),
        2 => (0u64..30_000).prop_map(Hostile::Wait),
    ]
}

/// `numbers` are the NAT's initial sequence numbers by the guest's port, so that acknowledgements hit.
fn hostile_frame(event: &Hostile, numbers: &HashMap<u16, i32>) -> Vec<u8> {
    match event {
        Hostile::Noise(bytes) => bytes.clone(),
        Hostile::Tcp { from, port, flags, seq, ack, len, options } => {
            let mut tcp = vec![0; 20 + options.len().next_multiple_of(4).min(40) + len];
            let header = 20 + options.len().next_multiple_of(4).min(40);
            tcp[..2].copy_from_slice(&from.to_be_bytes());
            tcp[2..4].copy_from_slice(&port.to_be_bytes());
            tcp[4..8].copy_from_slice(&seq.to_be_bytes());
            let ack = ack.wrapping_add(numbers.get(from).copied().unwrap_or(0));
            tcp[8..12].copy_from_slice(&ack.to_be_bytes());
            tcp[12] = (header as u8 / 4) << 4;
            tcp[13] = *flags;
            tcp[14] = *flags; // A window that is large or small with the flags.
            tcp[20..20 + options.len().min(40)].copy_from_slice(&options[..options.len().min(40)]);
            let mut packet = TcpPacket::new_unchecked(&mut tcp[..]);
            packet.fill_checksum(&GUEST.into(), &OUTSIDE.into());
            ipv4_frame(OUTSIDE, IpProtocol::Tcp, &tcp)
        }
        Hostile::Udp { from, port, len } => datagram(*from, outside(*port), &vec![7; *len]),
        Hostile::Ip { to, protocol, payload } => ipv4_frame(Ipv4Addr::from(*to), (*protocol).into(), payload),
        Hostile::Arp(bytes) => {
            let mut frame = ipv4_frame(OUTSIDE, IpProtocol::Tcp, bytes);
            frame[12..14].copy_from_slice(&[8, 6]);
            frame.drain(ETHERNET_HEADER..ETHERNET_HEADER + IPV4_HEADER);
            frame
        }
        Hostile::Wait(_) => Vec::new(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn tcp_carries_its_bytes_over_a_bad_link(seed in any::<u64>(), len in 0usize..60_000, trouble in prop_oneof![Just(0u64), 0u64..20]) {
        let data: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8).collect();
        // A connection may break on a bad link (too many losses in a row), but what arrives is right.
        match echo_over_bad_link(&data, seed, trouble) {
            Some(back) => prop_assert!(back == data, "{} of {} bytes", back.len(), data.len()),
            None => prop_assert!(trouble > 0),
        }
    }

    #[test]
    fn no_frame_is_a_surprise(
        events in proptest::collection::vec((hostile(), any::<u16>(), 0u8..40), 1..120)
    ) {
        let mut nat = nat(3, 3);
        let mut now = Instant::ZERO;
        let mut numbers = HashMap::new();
        for (event, cut, flip) in events {
            if let Hostile::Wait(ms) = event {
                now += Duration::from_millis(ms);
            }
            let mut frame = hostile_frame(&event, &numbers);
            if flip == 0 && !frame.is_empty() {
                let at = usize::from(cut) % frame.len();
                frame[at] ^= 1 << (cut % 8);
            }
            if flip == 1 {
                frame.truncate(usize::from(cut) % (frame.len() + 1));
            }
            nat.guest_frame(&frame, now);
            settle(&mut nat, now);
            let (tcp, datagrams) = nat.flow_counts();
            prop_assert!(tcp <= 3 && datagrams <= 3);
            let out = frames(&mut nat);
            prop_assert!(out.len() <= 1024);
            for frame in out {
                if meaning(&frame) == "syn-ack" {
                    let ip = Ipv4Packet::new_unchecked(&frame[ETHERNET_HEADER..]);
                    let tcp = TcpPacket::new_unchecked(ip.payload());
                    numbers.insert(tcp.dst_port(), tcp.seq_number().0);
                }
            }
        }
    }
}
