//! Linux's sockets as the NAT's world: non-blocking, close-on-exec, announced to one epoll by edges.
//!
//! Called by: `usernet::driver`. Invariants: nothing here blocks; a socket's epoll token is its flow's id, a listener's is
//! `FORWARD_TOKEN` plus its index; sockets that are dropped leave epoll by themselves.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use jail::FileUse;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, sockopt};

use super::UserNetError;
use super::config::{Forward, Protocol, Resolvers};
use super::dns::{Hosts, parse_resolv_conf};
use super::world::{FlowId, HostSocket, World};

/// Tokens from here on are forwarded ports.
pub(super) const FORWARD_TOKEN: u64 = 1 << 63;
/// How often `/etc/resolv.conf` is looked at.
const RESOLVERS_AGE: Duration = Duration::from_secs(5);
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// What is read of a configuration file.
const FILE_BYTES: u64 = 256 << 10;

/// A socket of one flow.
#[derive(Debug)]
pub(super) struct LinuxSocket {
    fd: OwnedFd,
}

impl HostSocket for LinuxSocket {
    fn connect_result(&self) -> Result<(), Errno> {
        sockopt::socket_error(&self.fd)??;
        match rustix::net::getpeername(&self.fd) {
            Ok(Some(_)) => Ok(()),
            Ok(None) | Err(Errno::NOTCONN) => Err(Errno::AGAIN),
            Err(error) => Err(error),
        }
    }

    fn recv(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        rustix::net::recv(&self.fd, buf, RecvFlags::DONTWAIT).map(|(got, _)| got)
    }

    fn send(&self, bytes: &[u8]) -> Result<usize, Errno> {
        rustix::net::send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
    }

    fn shutdown_write(&self) {
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write);
    }

    fn reset_on_close(&self) {
        let _ = sockopt::set_socket_linger(&self.fd, Some(Duration::ZERO));
    }
}

/// The host's network.
pub(super) struct Linux {
    epoll: OwnedFd,
    forwards: Vec<OwnedFd>,
    resolvers: Resolvers,
    cached: Option<(Instant, Option<SystemTime>, Vec<SocketAddr>)>,
    hosts: Option<Hosts>,
}

impl Linux {
    /// Listens on the forwarded ports; their readiness goes to `epoll`.
    pub(super) fn new(
        epoll: OwnedFd,
        forwards: &[Forward],
        resolvers: Resolvers,
    ) -> Result<Linux, UserNetError> {
        let mut linux = Linux { epoll, forwards: Vec::new(), resolvers, cached: None, hosts: None };
        for forward in forwards {
            let fail = |source: Errno| UserNetError::Listen { forward: *forward, source: source.into() };
            let fd = linux.listen(forward).map_err(fail)?;
            linux.forwards.push(fd);
        }
        Ok(linux)
    }

    /// Where the forwarded ports really listen.
    pub(super) fn forward_addresses(&self) -> Vec<SocketAddr> {
        let address = |fd| rustix::net::getsockname(fd).ok().and_then(|any| SocketAddr::try_from(any).ok());
        self.forwards.iter().filter_map(address).collect()
    }

    fn listen(&self, forward: &Forward) -> Result<OwnedFd, Errno> {
        let token = FORWARD_TOKEN + self.forwards.len() as u64;
        let fd = match forward.protocol {
            Protocol::Tcp => {
                let fd = self.socket(forward.host, SocketType::STREAM)?;
                sockopt::set_socket_reuseaddr(&fd, true)?;
                rustix::net::bind(&fd, &forward.host)?;
                rustix::net::listen(&fd, 128)?;
                fd
            }
            Protocol::Udp => {
                let fd = self.socket(forward.host, SocketType::DGRAM)?;
                rustix::net::bind(&fd, &forward.host)?;
                fd
            }
        };
        epoll::add(&self.epoll, &fd, EventData::new_u64(token), EventFlags::IN | EventFlags::ET)?;
        Ok(fd)
    }

    fn socket(&self, to: SocketAddr, kind: SocketType) -> Result<OwnedFd, Errno> {
        let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
    }

    /// Announces a connected (or connecting) socket of a flow.
    fn announce(&self, flow: FlowId, fd: OwnedFd) -> Result<LinuxSocket, Errno> {
        let events = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
        epoll::add(&self.epoll, &fd, EventData::new_u64(flow.0), events)?;
        Ok(LinuxSocket { fd })
    }
}

impl World for Linux {
    type Socket = LinuxSocket;

    fn tcp_connect(&mut self, flow: FlowId, to: SocketAddr) -> Result<LinuxSocket, Errno> {
        let fd = self.socket(to, SocketType::STREAM)?;
        sockopt::set_tcp_nodelay(&fd, true)?;
        match rustix::net::connect(&fd, &to) {
            Ok(()) | Err(Errno::INPROGRESS) => self.announce(flow, fd),
            Err(error) => Err(error),
        }
    }

    fn tcp_accept(&mut self, flow: FlowId, forward: usize) -> Result<LinuxSocket, Errno> {
        let listener = self.forwards.get(forward).ok_or(Errno::BADF)?;
        let fd = rustix::net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        sockopt::set_tcp_nodelay(&fd, true)?;
        self.announce(flow, fd)
    }

    fn tcp_turn_away(&mut self, forward: usize) -> Result<(), Errno> {
        let listener = self.forwards.get(forward).ok_or(Errno::BADF)?;
        let fd = rustix::net::accept_with(listener, SocketFlags::CLOEXEC)?;
        sockopt::set_socket_linger(&fd, Some(Duration::ZERO))
    }

    fn udp_connect(&mut self, flow: FlowId, to: SocketAddr) -> Result<LinuxSocket, Errno> {
        let fd = self.socket(to, SocketType::DGRAM)?;
        rustix::net::connect(&fd, &to)?;
        self.announce(flow, fd)
    }

    fn echo_connect(&mut self, flow: FlowId, to: Ipv4Addr) -> Result<LinuxSocket, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let fd =
            rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, flags, Some(ipproto::ICMP))?;
        rustix::net::connect(&fd, &SocketAddr::new(to.into(), 0))?;
        self.announce(flow, fd)
    }

    fn forward_recv(&mut self, forward: usize, buf: &mut [u8]) -> Result<(usize, SocketAddr), Errno> {
        let fd = self.forwards.get(forward).ok_or(Errno::BADF)?;
        let (got, _, from) = rustix::net::recvfrom(fd, buf, RecvFlags::DONTWAIT)?;
        let from = from.and_then(|any| SocketAddr::try_from(any).ok()).ok_or(Errno::INVAL)?;
        Ok((got, from))
    }

    fn forward_send(&mut self, forward: usize, datagram: &[u8], to: SocketAddr) -> Result<(), Errno> {
        let fd = self.forwards.get(forward).ok_or(Errno::BADF)?;
        match rustix::net::sendto(fd, datagram, SendFlags::DONTWAIT | SendFlags::NOSIGNAL, &to) {
            Ok(_) | Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS | Errno::MSGSIZE) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn name_servers(&mut self) -> Vec<SocketAddr> {
        if let Resolvers::Fixed(servers) = &self.resolvers {
            return servers.clone();
        }
        let now = Instant::now();
        if let Some((checked, _, servers)) = &self.cached
            && now < *checked + RESOLVERS_AGE
        {
            return servers.clone();
        }
        let path = Path::new(RESOLV_CONF);
        let changed = std::fs::metadata(path).and_then(|meta| meta.modified()).ok();
        let servers = match self.cached.take() {
            Some((_, before, servers)) if before == changed => servers,
            _ => parse_resolv_conf(&read_file(path)),
        };
        self.cached = Some((now, changed, servers.clone()));
        servers
    }

    fn local_name_answer(&mut self, query: &[u8]) -> Option<Vec<u8>> {
        let hosts = self.hosts.get_or_insert_with(|| Hosts::parse(&read_file(Path::new("/etc/hosts"))));
        hosts.answer(query)
    }
}

/// The files that this reads. They are replaced by others of the same name: their folders count.
pub(super) fn configuration_files() -> Vec<FileUse> {
    let linked = std::fs::canonicalize(RESOLV_CONF).ok();
    let linked = linked.as_deref().and_then(Path::parent).filter(|folder| *folder != Path::new("/"));
    [Some(Path::new("/etc")), linked]
        .into_iter()
        .flatten()
        .map(|folder| FileUse::Read(folder.into()))
        .collect()
}

/// The beginning of a text file; empty if there is none.
fn read_file(path: &Path) -> String {
    use std::io::Read;
    let mut bytes = Vec::new();
    if let Ok(file) = std::fs::File::open(path) {
        let _ = file.take(FILE_BYTES).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

impl AsFd for LinuxSocket {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
