//! Frames that mean harm: noise, damaged and cut frames, segments with absurd numbers in connections that stand.

use std::collections::HashMap;
use std::net::Ipv4Addr;

use proptest::prelude::*;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{IpProtocol, Ipv4Packet, TcpPacket};

use super::super::addresses::GUEST;
use super::super::link::{ETHERNET_HEADER, IPV4_HEADER};
use super::memory::*;

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
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 3))]

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
