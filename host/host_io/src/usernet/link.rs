//! Our end of the guest's cable: Ethernet, ARP, and the packets that we make ourselves.
//!
//! Called by: `usernet::nat` and the protocols below it, to send to the guest.
//!
//! Invariants:
//! - What waits for the guest is bounded: data only while `has_room`, answers up to a second limit, then they are dropped.
//! - Hardware addresses are learned from the guest's own packets, a bounded number of them.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddrV4};

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    Icmpv4Packet, Icmpv4Repr, IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber,
    UdpPacket, UdpRepr,
};

use super::addresses::{DNS, GATEWAY, MTU, OUR_MAC, can_be_guest};

/// Frames for the guest beyond which connections and datagrams wait.
const DATA_FRAMES: usize = 512;
/// Frames beyond which even answers are dropped.
const ANSWER_FRAMES: usize = 1024;
/// Frames that wait for an ARP answer; the oldest makes room.
const PARKED_FRAMES: usize = 16;
/// Guests behind the one NIC (containers on a bridge inside the guest).
const NEIGHBOURS: usize = 64;

pub(super) const ETHERNET_HEADER: usize = 14;
pub(super) const IPV4_HEADER: usize = 20;
pub(super) const UDP_HEADER: usize = 8;

/// Frames on their way to the guest, and who is where.
#[derive(Debug, Default)]
pub(super) struct Link {
    frames: VecDeque<Vec<u8>>,
    /// Frames that the port holds for the guest already.
    waiting_outside: usize,
    neighbours: Vec<(Ipv4Addr, EthernetAddress)>,
    /// Frames that wait until their guest has answered an ARP request.
    parked: Vec<(Ipv4Addr, Vec<u8>)>,
    next_ident: u16,
}

impl Link {
    /// Whether data may be put on the link; answers may be a little longer.
    pub(super) fn has_room(&self) -> bool {
        self.frames.len() + self.waiting_outside < DATA_FRAMES
    }

    /// Tells how many frames the port holds that the guest has not taken.
    pub(super) fn set_waiting_outside(&mut self, frames: usize) {
        self.waiting_outside = frames;
    }

    /// The next frame for the port.
    pub(super) fn take(&mut self) -> Option<Vec<u8>> {
        self.frames.pop_front()
    }

    fn push(&mut self, frame: Vec<u8>) {
        if self.frames.len() + self.waiting_outside < ANSWER_FRAMES {
            self.frames.push_back(frame);
        }
    }

    /// Remembers which hardware address a guest address has.
    pub(super) fn learn(&mut self, address: Ipv4Addr, mac: EthernetAddress) {
        if !can_be_guest(address) || !mac.is_unicast() {
            return;
        }
        match self.neighbours.iter_mut().find(|(known, _)| *known == address) {
            Some(entry) => entry.1 = mac,
            None => {
                self.neighbours.truncate(NEIGHBOURS - 1);
                self.neighbours.insert(0, (address, mac));
                let (ready, parked) = self.parked.drain(..).partition(|(to, _)| *to == address);
                self.parked = parked;
                for (_, mut frame) in ready {
                    EthernetFrame::new_unchecked(&mut frame[..]).set_dst_addr(mac);
                    self.push(frame);
                }
            }
        }
    }

    /// Answers a guest's question for one of our addresses.
    pub(super) fn handle_arp(&mut self, packet: &[u8]) {
        let Ok(packet) = ArpPacket::new_checked(packet) else { return };
        let Ok(ArpRepr::EthernetIpv4 {
            operation,
            source_hardware_addr,
            source_protocol_addr,
            target_protocol_addr,
            ..
        }) = ArpRepr::parse(&packet)
        else {
            return;
        };
        self.learn(source_protocol_addr, source_hardware_addr);
        let ours = [GATEWAY, DNS].contains(&target_protocol_addr);
        if operation == ArpOperation::Request && ours && source_hardware_addr.is_unicast() {
            self.send_arp(&ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Reply,
                source_hardware_addr: OUR_MAC,
                source_protocol_addr: target_protocol_addr,
                target_hardware_addr: source_hardware_addr,
                target_protocol_addr: source_protocol_addr,
            });
        }
    }

    /// Asks who has a guest address; the answer teaches us.
    fn ask_for(&mut self, address: Ipv4Addr) {
        self.send_arp(&ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Request,
            source_hardware_addr: OUR_MAC,
            source_protocol_addr: GATEWAY,
            target_hardware_addr: EthernetAddress::BROADCAST,
            target_protocol_addr: address,
        });
    }

    fn send_arp(&mut self, arp: &ArpRepr) {
        let ArpRepr::EthernetIpv4 { target_hardware_addr, .. } = arp else { return };
        let mut frame = ethernet(*target_hardware_addr, EthernetProtocol::Arp, arp.buffer_len());
        arp.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET_HEADER..]));
        self.push(frame);
    }

    /// Sends an IPv4 packet of `len` bytes that `fill` writes, to the guest that has address `to`.
    /// When we have not heard of that guest yet, the packet waits while we ask for it.
    pub(super) fn send_packet<R>(
        &mut self,
        to: Ipv4Addr,
        len: usize,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        let known = self.neighbours.iter().find(|(known, _)| *known == to).map(|(_, mac)| *mac);
        let mut frame = ethernet(known.unwrap_or(EthernetAddress::BROADCAST), EthernetProtocol::Ipv4, len);
        let result = fill(&mut frame[ETHERNET_HEADER..]);
        match known {
            Some(_) => self.push(frame),
            None => {
                if self.parked.len() >= PARKED_FRAMES {
                    self.parked.remove(0);
                }
                self.parked.push((to, frame));
                self.ask_for(to);
            }
        }
        result
    }

    /// Sends a payload in as many packets as it needs (RFC 791 §3.2).
    fn send_fragments(&mut self, from: Ipv4Addr, to: Ipv4Addr, protocol: IpProtocol, payload: &[u8]) {
        self.next_ident = self.next_ident.wrapping_add(1);
        let ident = self.next_ident;
        let piece = (usize::from(MTU) - IPV4_HEADER) & !7;
        let last = payload.len().saturating_sub(1) / piece;
        for (i, part) in payload.chunks(piece).enumerate() {
            self.send_packet(to, IPV4_HEADER + part.len(), |packet| {
                emit_ipv4(packet, from, to, protocol, part.len());
                let mut header = Ipv4Packet::new_unchecked(&mut packet[..]);
                header.set_dont_frag(false);
                header.set_ident(ident);
                header.set_more_frags(i < last);
                header.set_frag_offset((i * piece) as u16);
                header.fill_checksum();
                packet[IPV4_HEADER..].copy_from_slice(part);
            });
        }
    }

    /// Sends a UDP datagram.
    pub(super) fn send_udp(&mut self, from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) {
        let mut datagram = vec![0; UDP_HEADER + payload.len()];
        emit_udp(&mut datagram, from, to, payload);
        self.send_fragments(*from.ip(), *to.ip(), IpProtocol::Udp, &datagram);
    }

    /// Sends a UDP datagram to a hardware address, for a guest that has no IP address yet.
    pub(super) fn send_udp_to_mac(
        &mut self,
        mac: EthernetAddress,
        from: SocketAddrV4,
        to: SocketAddrV4,
        payload: &[u8],
    ) {
        let len = IPV4_HEADER + UDP_HEADER + payload.len();
        let mut frame = ethernet(mac, EthernetProtocol::Ipv4, len);
        let packet = &mut frame[ETHERNET_HEADER..];
        emit_ipv4(packet, *from.ip(), *to.ip(), IpProtocol::Udp, UDP_HEADER + payload.len());
        emit_udp(&mut packet[IPV4_HEADER..], from, to, payload);
        self.push(frame);
    }

    /// Sends an ICMP message. `from` is the address it speaks for.
    pub(super) fn send_icmp(&mut self, from: Ipv4Addr, to: Ipv4Addr, icmp: &Icmpv4Repr<'_>) {
        let mut message = vec![0; icmp.buffer_len()];
        icmp.emit(&mut Icmpv4Packet::new_unchecked(&mut message[..]), &ChecksumCapabilities::default());
        self.send_fragments(from, to, IpProtocol::Icmp, &message);
    }

    /// Tells the sender of `packet` (a whole IPv4 packet of the guest) that it went nowhere.
    pub(super) fn send_unreachable(&mut self, packet: &[u8], reason: smoltcp::wire::Icmpv4DstUnreachable) {
        let Ok(original) = Ipv4Packet::new_checked(packet) else { return };
        let Ok(header) = Ipv4Repr::parse(&original, &ChecksumCapabilities::ignored()) else { return };
        let quoted = original.payload();
        let quoted = &quoted[..quoted.len().min(8)];
        // smoltcp writes the quoted header anew, from `header`; its payload length is what the guest's packet had.
        let icmp = Icmpv4Repr::DstUnreachable { reason, header, data: quoted };
        self.send_icmp(GATEWAY, header.src_addr, &icmp);
    }

    /// Refuses a TCP segment of the guest with RST (RFC 9293 §3.10.7.1).
    pub(super) fn send_tcp_reset(
        &mut self,
        guest: SocketAddrV4,
        remote: SocketAddrV4,
        segment: &TcpPacket<&[u8]>,
    ) {
        if segment.rst() {
            return;
        }
        let length = segment.segment_len();
        let (seq_number, ack_number) = match segment.ack() {
            true => (segment.ack_number(), None),
            false => (TcpSeqNumber(0), Some(segment.seq_number() + length)),
        };
        let reset = TcpRepr {
            src_port: remote.port(),
            dst_port: guest.port(),
            control: TcpControl::Rst,
            seq_number,
            ack_number,
            window_len: 0,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let len = reset.buffer_len();
        self.send_packet(*guest.ip(), IPV4_HEADER + len, |packet| {
            emit_ipv4(packet, *remote.ip(), *guest.ip(), IpProtocol::Tcp, len);
            reset.emit(
                &mut TcpPacket::new_unchecked(&mut packet[IPV4_HEADER..]),
                &(*remote.ip()).into(),
                &(*guest.ip()).into(),
                &ChecksumCapabilities::default(),
            );
        });
    }
}

/// A frame from us with room for a packet of `len` bytes.
fn ethernet(to: EthernetAddress, ethertype: EthernetProtocol, len: usize) -> Vec<u8> {
    let mut frame = vec![0; ETHERNET_HEADER + len];
    let header = EthernetRepr { src_addr: OUR_MAC, dst_addr: to, ethertype };
    header.emit(&mut EthernetFrame::new_unchecked(&mut frame[..]));
    frame
}

fn emit_ipv4(packet: &mut [u8], from: Ipv4Addr, to: Ipv4Addr, protocol: IpProtocol, payload_len: usize) {
    let header = Ipv4Repr { src_addr: from, dst_addr: to, next_header: protocol, payload_len, hop_limit: 64 };
    header.emit(&mut Ipv4Packet::new_unchecked(packet), &ChecksumCapabilities::default());
}

fn emit_udp(datagram: &mut [u8], from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) {
    UdpRepr { src_port: from.port(), dst_port: to.port() }.emit(
        &mut UdpPacket::new_unchecked(datagram),
        &(*from.ip()).into(),
        &(*to.ip()).into(),
        payload.len(),
        |to| to.copy_from_slice(payload),
        &ChecksumCapabilities::default(),
    );
}
