//! A guest made of smoltcp, on the guest's side of a real user-mode network.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration as StdDuration, Instant as StdInstant};

use host_io::net::NetPort;
use host_io::usernet::{UserNet, UserNetConfig, UserNetPort};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, icmp, tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr};

/// Nothing in these tests takes this long; a test that would hang fails instead.
const HANG: StdDuration = StdDuration::from_secs(120);

pub struct Nic {
    pub port: UserNetPort,
    pending: VecDeque<Vec<u8>>,
}

impl Nic {
    fn flush(&mut self) {
        while let Some(frame) = self.pending.pop_front() {
            if self.port.send(&frame).is_err() {
                return self.pending.push_front(frame);
            }
        }
    }
}

pub struct Rx(Vec<u8>);
pub struct Tx<'a>(&'a mut VecDeque<Vec<u8>>);

impl RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        self.0.push_back(frame);
        result
    }
}

impl Device for Nic {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        let mut frame = Vec::new();
        self.port.try_recv(&mut frame).then_some((Rx(frame), Tx(&mut self.pending)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        self.flush();
        self.pending.is_empty().then_some(Tx(&mut self.pending))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

pub struct Guest {
    pub nic: Nic,
    pub iface: Interface,
    pub sockets: SocketSet<'static>,
    woken: Receiver<()>,
    origin: StdInstant,
}

pub fn tcp_socket() -> tcp::Socket<'static> {
    let buffer = || tcp::SocketBuffer::new(vec![0; 256 << 10]);
    tcp::Socket::new(buffer(), buffer())
}

pub fn udp_socket() -> udp::Socket<'static> {
    let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 16], vec![0; 64 << 10]);
    udp::Socket::new(buffer(), buffer())
}

pub fn icmp_socket(ident: u16) -> icmp::Socket<'static> {
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 16], vec![0; 64 << 10]);
    let mut socket = icmp::Socket::new(buffer(), buffer());
    socket.bind(icmp::Endpoint::Ident(ident)).unwrap();
    socket
}

impl Guest {
    pub fn start(config: UserNetConfig) -> Guest {
        let (wake, woken) = channel();
        let port = UserNet::start(config, Box::new(move || _ = wake.send(()))).unwrap();
        let mut nic = Nic { port, pending: VecDeque::new() };
        let mac = EthernetAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        let iface = Interface::new(Config::new(mac.into()), &mut nic, Instant::ZERO);
        let mut guest =
            Guest { nic, iface, sockets: SocketSet::new(Vec::new()), woken, origin: StdInstant::now() };
        guest.set_address(Ipv4Addr::new(10, 0, 2, 15));
        guest
    }

    pub fn set_address(&mut self, address: Ipv4Addr) {
        self.iface.update_ip_addrs(|all| {
            all.clear();
            all.push(IpCidr::new(address.into(), 24)).unwrap();
        });
        self.iface.routes_mut().add_default_ipv4_route(Ipv4Addr::new(10, 0, 2, 2)).unwrap();
    }

    /// Runs the guest until `done` says so.
    pub fn run<R>(&mut self, mut done: impl FnMut(&mut Guest) -> Option<R>) -> R {
        let start = StdInstant::now();
        loop {
            let now = Instant::from_micros(self.origin.elapsed().as_micros() as i64);
            self.nic.flush();
            self.iface.poll(now, &mut self.nic, &mut self.sockets);
            self.nic.flush();
            if let Some(result) = done(self) {
                return result;
            }
            assert!(start.elapsed() < HANG, "nothing happens any more");
            let delay = self.iface.poll_delay(now, &self.sockets).map_or(50, |d| d.total_millis().min(50));
            let _ = self.woken.recv_timeout(StdDuration::from_millis(delay));
        }
    }

    pub fn tcp(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn udp(&mut self, handle: SocketHandle) -> &mut udp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn icmp(&mut self, handle: SocketHandle) -> &mut icmp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    pub fn dhcp(&mut self, handle: SocketHandle) -> &mut dhcpv4::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Opens a connection to `to`; its outcome shows later.
    pub fn connect(&mut self, to: (Ipv4Addr, u16), from: u16) -> SocketHandle {
        let handle = self.sockets.add(tcp_socket());
        let Guest { iface, sockets, .. } = self;
        sockets.get_mut::<tcp::Socket<'_>>(handle).connect(iface.context(), to, from).unwrap();
        handle
    }
}
