//! A world made of memory: an echo server behind some ports, trouble behind others, and frames to talk to it.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::rc::Rc;

use rustix::io::Errno;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr, Icmpv4Packet, IpProtocol, Ipv4Packet,
    Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber, UdpPacket, UdpRepr,
};

use super::super::addresses::{GUEST, OUR_MAC};
use super::super::config::{Limits, UserNetConfig};
use super::super::link::{ETHERNET_HEADER, IPV4_HEADER};
use super::super::nat::Nat;
use super::super::world::{FlowId, HostSocket, World};

pub(super) const MAC: EthernetAddress = EthernetAddress([0x52, 0x54, 0, 0, 0, 1]);
pub(super) const OUTSIDE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Ports of `OUTSIDE` and what happens there.
pub(super) const ECHO: u16 = 7;
pub(super) const SLOW: u16 = 8;
pub(super) const REFUSED: u16 = 9;
pub(super) const NO_NET: u16 = 10;
pub(super) const NO_HOST: u16 = 11;
pub(super) const BREAKS: u16 = 12;

/// An echo server's memory.
#[derive(Debug, Default)]
pub(super) struct Peer {
    pub(super) connected: Option<Result<(), Errno>>,
    pub(super) stream: VecDeque<u8>,
    pub(super) datagrams: VecDeque<Vec<u8>>,
    pub(super) is_stream: bool,
    pub(super) finished: bool,
    pub(super) breaks: bool,
    pub(super) reset: bool,
}

#[derive(Clone, Debug)]
pub(super) struct MemorySocket(pub(super) Rc<RefCell<Peer>>);

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
pub(super) struct Memory {
    pub(super) peers: HashMap<FlowId, MemorySocket>,
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

pub(super) fn nat(tcp_flows: usize, datagram_flows: usize) -> Nat<Memory> {
    let limits = Limits { tcp_flows, datagram_flows };
    Nat::new(UserNetConfig { limits, ..UserNetConfig::default() }, Memory::default())
}

/// Tells the NAT that every socket is ready, and has it work until it waits.
pub(super) fn settle(nat: &mut Nat<Memory>, now: Instant) {
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

pub(super) fn frames(nat: &mut Nat<Memory>) -> Vec<Vec<u8>> {
    std::iter::from_fn(|| nat.link.take()).collect()
}

/// An Ethernet frame of the guest around an IPv4 payload.
pub(super) fn ipv4_frame(to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]) -> Vec<u8> {
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

pub(super) fn segment(
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

pub(super) fn datagram(from: u16, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
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

pub(super) fn outside(port: u16) -> SocketAddrV4 {
    SocketAddrV4::new(OUTSIDE, port)
}

/// What an answer says, in a word.
pub(super) fn meaning(frame: &[u8]) -> String {
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

pub(super) fn answers(nat: &mut Nat<Memory>, frame: &[u8]) -> Vec<String> {
    nat.guest_frame(frame, Instant::ZERO);
    settle(nat, Instant::ZERO);
    frames(nat).iter().map(|frame| meaning(frame)).collect()
}
