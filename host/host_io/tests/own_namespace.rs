//! What needs a network of one's own: TAP devices and unprivileged ping sockets, in a network namespace made for the test.
//! Where a namespace cannot be made (no privilege), each test says so and has nothing to do.
#![allow(missing_docs)]

use std::process::Command;
use std::sync::mpsc::channel;

use host_io::event_loop::EventLoop;
use host_io::net::NetPort;
use host_io::net::tap::{TapError, TapPort};
use host_io::usernet::{UserNet, UserNetConfig};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::*;

/// Runs `test` on a thread with an empty network of its own.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: only the network namespace of this thread changes, which no other thread relies on.
        let made = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
        match made {
            Ok(()) => test(),
            Err(error) => eprintln!("not run: a network namespace cannot be made here ({error})"),
        }
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` in the thread's namespace; `false` if it is not installed.
fn ip(args: &str) -> bool {
    match Command::new("ip").args(args.split_whitespace()).status() {
        Ok(status) => {
            assert!(status.success(), "ip {args}");
            true
        }
        Err(error) => {
            eprintln!("not run: ip (apt install iproute2): {error}");
            false
        }
    }
}

const GUEST_MAC: EthernetAddress = EthernetAddress([0x52, 0x54, 0, 1, 2, 3]);

fn arp_request(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let arp = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr: GUEST_MAC,
        source_protocol_addr: from.into(),
        target_hardware_addr: EthernetAddress::BROADCAST,
        target_protocol_addr: to.into(),
    };
    let mut frame = vec![0; 14 + arp.buffer_len()];
    EthernetRepr {
        src_addr: GUEST_MAC,
        dst_addr: EthernetAddress::BROADCAST,
        ethertype: EthernetProtocol::Arp,
    }
    .emit(&mut EthernetFrame::new_unchecked(&mut frame[..]));
    arp.emit(&mut ArpPacket::new_unchecked(&mut frame[14..]));
    frame
}

#[test]
fn a_tap_device_carries_frames_both_ways() {
    in_namespace(|| {
        let events = EventLoop::start("test").unwrap();
        let (wake, woken) = channel();
        let port = match TapPort::open("tap-test", &events.handle(), Box::new(move || _ = wake.send(()))) {
            Ok(port) => port,
            Err(error @ (TapError::Driver { .. } | TapError::NotPermitted { .. })) => {
                return eprintln!("not run: {error}");
            }
            Err(error) => panic!("{error}"),
        };
        if !ip("link set tap-test mtu 1400")
            || !ip("addr add 10.9.9.1/24 dev tap-test")
            || !ip("link set tap-test up")
        {
            return;
        }
        assert_eq!(port.mtu(), 1500, "as it was when it was opened");
        let second = TapPort::open("tap-test", &events.handle(), Box::new(|| {}));
        let text = second.unwrap_err().to_string();
        assert!(text.contains("tap-test") && text.contains("another process"), "{text}");

        let mut frame = Vec::new();
        loop {
            port.send(&arp_request([10, 9, 9, 2], [10, 9, 9, 1])).unwrap();
            woken.recv().unwrap();
            while port.try_recv(&mut frame) {
                let ethernet = EthernetFrame::new_checked(&frame[..]).unwrap();
                if ethernet.ethertype() == EthernetProtocol::Arp && ethernet.dst_addr() == GUEST_MAC {
                    let arp = ArpRepr::parse(&ArpPacket::new_checked(ethernet.payload()).unwrap()).unwrap();
                    let ArpRepr::EthernetIpv4 { operation, source_protocol_addr, .. } = arp else { continue };
                    assert_eq!(
                        (operation, source_protocol_addr),
                        (ArpOperation::Reply, [10, 9, 9, 1].into())
                    );
                    return;
                }
            }
        }
    });
}

fn echo_request(to: [u8; 4], ident: u16, seq_no: u16, data: &[u8]) -> Vec<u8> {
    let icmp = Icmpv4Repr::EchoRequest { ident, seq_no, data };
    let mut frame = vec![0; 34 + icmp.buffer_len()];
    let gateway = EthernetAddress([0x52, 0x55, 10, 0, 2, 2]);
    EthernetRepr { src_addr: GUEST_MAC, dst_addr: gateway, ethertype: EthernetProtocol::Ipv4 }
        .emit(&mut EthernetFrame::new_unchecked(&mut frame[..]));
    let header = Ipv4Repr {
        src_addr: [10, 0, 2, 15].into(),
        dst_addr: to.into(),
        next_header: IpProtocol::Icmp,
        payload_len: icmp.buffer_len(),
        hop_limit: 64,
    };
    let caps = ChecksumCapabilities::default();
    header.emit(&mut Ipv4Packet::new_unchecked(&mut frame[14..]), &caps);
    icmp.emit(&mut Icmpv4Packet::new_unchecked(&mut frame[34..]), &caps);
    frame
}

#[test]
fn pings_go_out_where_the_host_allows_them() {
    in_namespace(|| {
        if !ip("link set lo up") || !ip("addr add 192.0.2.1/32 dev lo") {
            return;
        }
        let (wake, woken) = channel();
        let net = UserNet::start(UserNetConfig::default(), Box::new(move || _ = wake.send(()))).unwrap();
        let answer = |ident, seq_no| {
            net.send(&echo_request([192, 0, 2, 1], ident, seq_no, b"ping data")).unwrap();
            let mut frame = Vec::new();
            while !net.try_recv(&mut frame) {
                woken.recv().unwrap();
            }
            let icmp = Icmpv4Packet::new_checked(&frame[34..]).unwrap();
            (
                icmp.msg_type(),
                icmp.msg_code(),
                icmp.echo_ident(),
                icmp.echo_seq_no(),
                frame.ends_with(b"ping data"),
            )
        };
        // A new namespace allows nobody; nor does this tell the guest nothing.
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "1 0").unwrap();
        let (kind, code, ..) = answer(7, 1);
        assert_eq!((kind, code), (Icmpv4Message::DstUnreachable, 13));
        std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap();
        for (ident, seq_no) in [(7, 2), (7, 3), (9, 1)] {
            assert_eq!(answer(ident, seq_no), (Icmpv4Message::EchoReply, 0, ident, seq_no, true));
        }
    });
}
