//! The user-mode network against Linux's sockets on loopback, with a smoltcp stack as its guest.
#![allow(missing_docs)]

mod guest;

use std::hash::{DefaultHasher, Hasher};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};

use guest::{Guest, icmp_socket, tcp_socket, udp_socket};
use host_io::usernet::{Forward, Protocol, Resolvers, UserNet, UserNetConfig, UserNetError};
use smoltcp::socket::{dhcpv4, tcp};
use smoltcp::wire::{Icmpv4Packet, Icmpv4Repr};

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
const TEN_MB: usize = 10_000_000;

fn loopback() -> UserNetConfig {
    UserNetConfig { host_loopback: true, ..UserNetConfig::default() }
}

fn with_forward(protocol: Protocol, guest_port: u16) -> UserNetConfig {
    let host = "127.0.0.1:0".parse().unwrap();
    let guest = std::net::SocketAddrV4::new(Ipv4Addr::new(10, 0, 2, 15), guest_port);
    UserNetConfig { forwards: vec![Forward { protocol, host, guest }], ..UserNetConfig::default() }
}

/// Bytes that a shifted, lost or doubled piece would not reproduce.
fn data(len: usize) -> Vec<u8> {
    let mut state = 88_172_645_463_325_252u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

fn checksum(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish()
}

/// Reads everything that a connection of the guest brings until its end, and closes it.
fn read_to_end(guest: &mut Guest, handle: smoltcp::iface::SocketHandle) -> Vec<u8> {
    let mut all = Vec::new();
    guest.run(|guest| {
        let socket = guest.tcp(handle);
        while socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), all.extend_from_slice(bytes))).unwrap();
        }
        (socket.state() != tcp::State::SynSent && !socket.may_recv()).then_some(())
    });
    guest.tcp(handle).close();
    all
}

/// Sends everything on a connection of the guest.
fn write_all(guest: &mut Guest, handle: smoltcp::iface::SocketHandle, bytes: &[u8]) {
    let mut sent = 0;
    guest.run(|guest| {
        let socket = guest.tcp(handle);
        if socket.can_send() {
            sent += socket.send_slice(&bytes[sent..]).unwrap();
        }
        (sent == bytes.len()).then_some(())
    });
}

#[test]
fn dhcp_gives_the_address_the_router_and_the_name_server() {
    let mut guest = Guest::start(UserNetConfig::default());
    let handle = guest.sockets.add(dhcpv4::Socket::new());
    let lease = guest.run(|guest| match guest.dhcp(handle).poll() {
        Some(dhcpv4::Event::Configured(lease)) => Some((lease.address, lease.router, lease.dns_servers)),
        _ => None,
    });
    assert_eq!(lease.0.to_string(), "10.0.2.15/24");
    assert_eq!((lease.1, &lease.2[..]), (Some(GATEWAY), &[DNS][..]));
}

#[test]
fn the_guest_fetches_ten_megabytes_over_nat() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut request = [0; 4];
        client.read_exact(&mut request).unwrap();
        assert_eq!(&request, b"GET\n");
        client.write_all(&data(TEN_MB)).unwrap();
    });
    let mut guest = Guest::start(loopback());
    let handle = guest.connect((GATEWAY, port), 50_001);
    write_all(&mut guest, handle, b"GET\n");
    let got = read_to_end(&mut guest, handle);
    assert_eq!((got.len(), checksum(&got)), (TEN_MB, checksum(&data(TEN_MB))));
    server.join().unwrap();
    guest.run(|guest| {
        (!guest.tcp(handle).is_active() || guest.tcp(handle).state() == tcp::State::Closed).then_some(())
    });
}

#[test]
fn the_guest_sends_ten_megabytes_and_half_closes() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        client.read_to_end(&mut all).unwrap();
        client.write_all(&checksum(&all).to_le_bytes()).unwrap();
        all.len()
    });
    let mut guest = Guest::start(loopback());
    let handle = guest.connect((GATEWAY, port), 50_002);
    write_all(&mut guest, handle, &data(TEN_MB));
    guest.tcp(handle).close(); // Our direction only; the answer comes after it.
    let answer = guest.run(|guest| {
        let socket = guest.tcp(handle);
        let mut answer = [0; 8];
        (socket.recv_queue() == 8).then(|| socket.recv_slice(&mut answer).map(|_| answer).unwrap())
    });
    assert_eq!(u64::from_le_bytes(answer), checksum(&data(TEN_MB)));
    assert_eq!(server.join().unwrap(), TEN_MB);
    guest.run(|guest| {
        matches!(guest.tcp(handle).state(), tcp::State::TimeWait | tcp::State::Closed).then_some(())
    });
}

#[test]
fn the_guest_serves_through_hostfwd() {
    let mut guest = Guest::start(with_forward(Protocol::Tcp, 8080));
    let address = guest.nic.port.forwards()[0];
    let handle = guest.sockets.add(tcp_socket());
    guest.tcp(handle).listen(8080).unwrap();
    let client = std::thread::spawn(move || {
        let mut server = TcpStream::connect(address).unwrap();
        server.write_all(b"GET\n").unwrap();
        server.shutdown(std::net::Shutdown::Write).unwrap();
        let mut all = Vec::new();
        server.read_to_end(&mut all).unwrap();
        all
    });
    let request = guest.run(|guest| {
        let socket = guest.tcp(handle);
        let mut request = [0; 4];
        (socket.recv_queue() == 4).then(|| socket.recv_slice(&mut request).map(|_| request).unwrap())
    });
    assert_eq!(&request, b"GET\n");
    assert_eq!(guest.tcp(handle).remote_endpoint().unwrap().addr, GATEWAY.into());
    write_all(&mut guest, handle, &data(TEN_MB));
    guest.tcp(handle).close();
    guest.run(|guest| (!guest.tcp(handle).is_open()).then_some(()));
    let got = client.join().unwrap();
    assert_eq!((got.len(), checksum(&got)), (TEN_MB, checksum(&data(TEN_MB))));
}

#[test]
fn a_slow_reader_on_either_side_loses_nothing() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // The server echoes; it reads nothing before the guest has filled every buffer in between.
    let (go, gone) = std::sync::mpsc::channel::<()>();
    let server = std::thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        gone.recv().unwrap();
        std::io::copy(&mut &client, &mut &client).unwrap()
    });
    let mut guest = Guest::start(loopback());
    let handle = guest.connect((GATEWAY, port), 50_003);
    let bytes = data(TEN_MB);
    let (mut sent, mut quiet) = (0, 0);
    guest.run(|guest| {
        let socket = guest.tcp(handle);
        let more = if socket.can_send() { socket.send_slice(&bytes[sent..]).unwrap() } else { 0 };
        sent += more;
        quiet = if more == 0 && socket.state() == tcp::State::Established { quiet + 1 } else { 0 };
        (quiet == 10).then_some(())
    });
    assert!(sent < TEN_MB, "back-pressure reaches the guest");
    go.send(()).unwrap();
    let mut back = Vec::new();
    guest.run(|guest| {
        let socket = guest.tcp(handle);
        if socket.can_send() && sent < bytes.len() {
            sent += socket.send_slice(&bytes[sent..]).unwrap();
        } else if sent == bytes.len() && socket.may_send() {
            socket.close();
        }
        if socket.can_recv() {
            socket
                .recv(|bytes| {
                    (bytes.len().min(5000), back.extend_from_slice(&bytes[..bytes.len().min(5000)]))
                })
                .unwrap();
        }
        (back.len() == TEN_MB).then_some(())
    });
    assert_eq!(checksum(&back), checksum(&bytes));
    assert_eq!(server.join().unwrap(), TEN_MB as u64);
}

#[test]
fn a_refusal_becomes_a_reset_and_a_held_syn_is_answered_later() {
    // A port that was free a moment ago refuses.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut guest = Guest::start(loopback());
    let handle = guest.connect((GATEWAY, port), 50_004);
    guest.run(|guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));

    // Without hostloopback the host is not reachable, even where somebody listens.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::start(UserNetConfig::default());
    let handle = guest.connect((GATEWAY, port), 50_005);
    guest.run(|guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
}

#[test]
fn a_reset_travels_in_both_directions() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::start(loopback());
    let handle = guest.connect((GATEWAY, port), 50_006);
    guest.run(|guest| guest.tcp(handle).may_send().then_some(()));
    let (client, _) = listener.accept().unwrap();
    rustix::net::sockopt::set_socket_linger(&client, Some(std::time::Duration::ZERO)).unwrap();
    drop(client);
    guest.run(|guest| (guest.tcp(handle).state() == tcp::State::Closed).then_some(()));

    let handle = guest.connect((GATEWAY, port), 50_007);
    guest.run(|guest| guest.tcp(handle).may_send().then_some(()));
    let (mut client, _) = listener.accept().unwrap();
    guest.tcp(handle).abort();
    let reader = std::thread::spawn(move || client.read(&mut [0; 1]).unwrap_err().kind());
    guest.run(|_| reader.is_finished().then_some(()));
    assert_eq!(reader.join().unwrap(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn connections_beyond_the_limit_are_refused_and_room_comes_back() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut config = loopback();
    config.limits.tcp_flows = 3;
    let mut guest = Guest::start(config);
    let open: Vec<_> = (0..3).map(|i| guest.connect((GATEWAY, port), 51_000 + i)).collect();
    guest.run(|guest| open.iter().all(|h| guest.tcp(*h).may_send()).then_some(()));
    let refused = guest.connect((GATEWAY, port), 51_100);
    guest.run(|guest| (guest.tcp(refused).state() == tcp::State::Closed).then_some(()));
    guest.tcp(open[0]).abort();
    let again = guest.connect((GATEWAY, port), 51_200);
    guest.run(|guest| guest.tcp(again).may_send().then_some(()));
}

/// A name server that answers every query with the query itself and its own mark.
fn name_server(mark: u8) -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buf = [0; 2000];
        while let Ok((len, from)) = socket.recv_from(&mut buf) {
            buf[len] = mark;
            let _ = socket.send_to(&buf[..len + 1], from);
        }
    });
    address
}

fn ask(guest: &mut Guest, from: u16, query: &[u8]) -> Vec<u8> {
    let handle = guest.sockets.add(udp_socket());
    guest.udp(handle).bind(from).unwrap();
    guest.udp(handle).send_slice(query, (DNS, 53)).unwrap();
    let mut rounds = 0;
    let query = query.to_vec();
    guest.run(|guest| {
        rounds += 1;
        if rounds % 40 == 0 {
            guest.udp(handle).send_slice(&query, (DNS, 53)).unwrap(); // As a resolver does after a while.
        }
        guest.udp(handle).recv().ok().map(|(answer, _)| answer.to_vec())
    })
}

#[test]
fn names_are_asked_of_the_hosts_servers_and_a_dead_one_is_passed_over() {
    let alive = name_server(7);
    let dead = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    for servers in [vec![alive], vec![dead, alive]] {
        let config = UserNetConfig { resolvers: Resolvers::Fixed(servers), ..UserNetConfig::default() };
        let mut guest = Guest::start(config);
        assert_eq!(ask(&mut guest, 40_000, b"\x12\x34what?"), b"\x12\x34what?\x07");
    }
}

#[test]
fn without_name_servers_the_hosts_file_answers() {
    let config = UserNetConfig { resolvers: Resolvers::Fixed(Vec::new()), ..UserNetConfig::default() };
    let mut guest = Guest::start(config);
    let query = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x09localhost\0\0\x01\0\x01";
    let answer = ask(&mut guest, 40_001, query);
    assert_eq!(&answer[..2], b"\x12\x34");
    assert_eq!(&answer[answer.len() - 4..], &[127, 0, 0, 1]);
}

#[test]
fn datagrams_go_out_and_come_back_even_large_ones() {
    let echo = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = echo.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut buf = [0; 65_536];
        while let Ok((len, from)) = echo.recv_from(&mut buf) {
            let _ = echo.send_to(&buf[..len], from);
        }
    });
    let mut guest = Guest::start(loopback());
    let handle = guest.sockets.add(udp_socket());
    guest.udp(handle).bind(40_002).unwrap();
    for len in [0, 1, 1400] {
        let sent = data(len);
        guest.udp(handle).send_slice(&sent, (GATEWAY, port)).unwrap();
        let (got, from) =
            guest.run(|guest| guest.udp(handle).recv().ok().map(|(b, m)| (b.to_vec(), m.endpoint)));
        assert_eq!((got, from), (sent, (GATEWAY, port).into()));
    }
}

#[test]
fn udp_hostfwd_keeps_peers_apart() {
    let mut guest = Guest::start(with_forward(Protocol::Udp, 7000));
    let address = guest.nic.port.forwards()[0];
    let handle = guest.sockets.add(udp_socket());
    guest.udp(handle).bind(7000).unwrap();
    // The guest says something first, so that the network knows where it is.
    guest.udp(handle).send_slice(b"hello", (GATEWAY, 9)).unwrap();
    let peers: Vec<UdpSocket> = (0..3).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    let mut heard = std::collections::BTreeSet::new();
    let mut rounds = 0;
    guest.run(|guest| {
        if rounds % 40 == 0 {
            for (i, peer) in peers.iter().enumerate() {
                peer.send_to(&[i as u8], address).unwrap();
            }
        }
        rounds += 1;
        while let Ok((datagram, meta)) = guest.udp(handle).recv() {
            let answer = [datagram[0], 100];
            heard.insert((datagram[0], meta.endpoint));
            guest.udp(handle).send_slice(&answer, meta.endpoint).unwrap();
        }
        (heard.len() == 3).then_some(())
    });
    guest.run(|guest| (guest.udp(handle).send_queue() == 0).then_some(()));
    for (i, peer) in peers.iter().enumerate() {
        let mut buf = [0; 10];
        let (len, from) = peer.recv_from(&mut buf).unwrap();
        assert_eq!((&buf[..len], from), (&[i as u8, 100][..], address));
    }
}

#[test]
fn the_gateway_answers_pings_and_outside_is_pinged_or_prohibited() {
    let mut guest = Guest::start(loopback());
    let handle = guest.sockets.add(icmp_socket(0x77));
    let ping = |guest: &mut Guest, to: Ipv4Addr, seq_no: u16| {
        let repr = Icmpv4Repr::EchoRequest { ident: 0x77, seq_no, data: b"some bytes to come back" };
        let socket = guest.icmp(handle);
        let buf = socket.send(repr.buffer_len(), to.into()).unwrap();
        repr.emit(&mut Icmpv4Packet::new_unchecked(buf), &Default::default());
        guest.run(|guest| {
            let (bytes, from) = guest.icmp(handle).recv().ok()?;
            let packet = Icmpv4Packet::new_checked(bytes).unwrap();
            Some((packet.msg_type(), packet.echo_seq_no(), from))
        })
    };
    for (seq_no, to) in [(1, GATEWAY), (2, DNS)] {
        let (kind, seq, from) = ping(&mut guest, to, seq_no);
        assert_eq!((kind, seq, from), (smoltcp::wire::Icmpv4Message::EchoReply, seq_no, to.into()));
    }
}

#[test]
fn a_taken_port_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let config: UserNetConfig = format!("user,hostfwd=tcp:{address}-:22").parse().unwrap();
    let error = UserNet::start(config, Box::new(|| {})).unwrap_err();
    assert!(matches!(error, UserNetError::Listen { .. }));
    let text = error.to_string();
    assert!(text.contains(&address.to_string()) && text.contains("another port"), "{text}");
}
