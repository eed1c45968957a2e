//! TCP over a link that loses, doubles and damages frames.

use std::collections::VecDeque;

use proptest::prelude::*;
use smoltcp::iface::{Config, Interface, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{HardwareAddress, IpCidr, Ipv4Packet};

use super::super::addresses::{GATEWAY, GUEST};
use super::super::link::ETHERNET_HEADER;
use super::memory::*;

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
    iface.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(ProptestConfig::default().cases / 3))]

    #[test]
    fn tcp_carries_its_bytes_over_a_bad_link(seed in any::<u64>(), len in 0usize..60_000, trouble in prop_oneof![Just(0u64), 0u64..20]) {
        let data: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8).collect();
        // A connection may break on a bad link (too many losses in a row), but what arrives is right.
        match echo_over_bad_link(&data, seed, trouble) {
            Some(back) => prop_assert!(back == data, "{} of {} bytes", back.len(), data.len()),
            None => prop_assert!(trouble > 0),
        }
    }
}
