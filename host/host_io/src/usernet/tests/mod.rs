//! The NAT in a world of memory and in virtual time: held SYNs, limits; lossy links and hostile frames in their own files.

mod bad_link;
mod hostile;
mod memory;

use smoltcp::time::Instant;
use smoltcp::wire::{IpProtocol, Ipv4Packet, TcpControl, UdpPacket};
use std::net::SocketAddrV4;

use self::memory::*;
use super::addresses::GUEST;
use super::fragments::Reassembly;
use super::link::{ETHERNET_HEADER, IPV4_HEADER};
use super::nat::Nat;

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
    let mut reassembly = Reassembly::default();
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
