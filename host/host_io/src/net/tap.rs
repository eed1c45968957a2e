//! A TAP device of the host as a network port: for bridges and everything else an administrator sets up.
//!
//! Called by: `vmm` for `--net tap,...`.
//!
//! The device is opened with `IFF_VNET_HDR`, so that offloads can be switched on later; until then every header is zero,
//! is put before the guest's frames and taken from the world's.
//!
//! Invariants: nothing blocks; the event loop watches the device only while somebody waits for it.
#![allow(unsafe_code)]

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Setter, ioctl, opcode};

use super::{Busy, NetPort};
use crate::event_loop::{EventLoopHandle, FdWatch, Readiness};

const DEVICE: &str = "/dev/net/tun";
/// `struct virtio_net_hdr_v1`, VIRTIO 1.2 §5.1.6.
const HEADER_BYTES: usize = 12;
/// The largest frame: with offloads off, an Ethernet frame of the largest MTU.
const FRAME_BYTES: usize = 65_550;
const NAME_BYTES: usize = libc::IFNAMSIZ - 1;

const TUNSETIFF: rustix::ioctl::Opcode = opcode::write::<libc::c_int>(b'T', 202);
const TUNSETVNETHDRSZ: rustix::ioctl::Opcode = opcode::write::<libc::c_int>(b'T', 216);

/// Why a TAP device could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name cannot be an interface's.
    #[error("tap `{name}`: an interface name has 1 to 15 characters, without `/`, `%`, `:` or blanks")]
    Name {
        /// What was written.
        name: String,
    },
    /// There is no TAP driver here, or it may not be opened.
    #[error("tap `{name}`: cannot open {DEVICE}: {source}; load the module `tun`, or use --net user")]
    Driver {
        /// The interface.
        name: String,
        /// The system's answer.
        source: io::Error,
    },
    /// We may not use (or make) this interface.
    #[error(
        "tap `{name}`: not permitted; let an administrator run `ip tuntap add dev {name} mode tap user $USER vnet_hdr && ip link set {name} up`, or use --net user"
    )]
    NotPermitted {
        /// The interface.
        name: String,
    },
    /// Another process has it.
    #[error("tap `{name}`: another process uses it; stop that one or choose another interface")]
    InUse {
        /// The interface.
        name: String,
    },
    /// The interface exists, and is something else.
    #[error(
        "tap `{name}`: the interface exists and is no TAP device with these properties ({source}); choose another name"
    )]
    NotATap {
        /// The interface.
        name: String,
        /// The system's answer.
        source: io::Error,
    },
    /// Something else failed.
    #[error("tap `{name}`: cannot {what}: {source}")]
    System {
        /// The interface.
        name: String,
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

/// An open TAP device.
#[derive(Debug)]
pub struct TapPort {
    fd: OwnedFd,
    mtu: u16,
    watch: Arc<OnceLock<FdWatch>>,
}

impl TapPort {
    /// Opens the interface `name`, which is made if it does not exist and we may. `wake` is called on `events`' thread.
    pub fn open(
        name: &str,
        events: &EventLoopHandle,
        wake: Box<dyn Fn() + Send + Sync>,
    ) -> Result<TapPort, TapError> {
        let fd = open_interface(name)?;
        let fail = |what| move |source| TapError::System { name: name.into(), what, source };
        let watch: Arc<OnceLock<FdWatch>> = Arc::default();
        let armed = Arc::downgrade(&watch);
        let registration = events
            .watch(&fd, Readiness { readable: true, writable: false }, move |_| {
                // Silent until somebody looks and finds nothing.
                if let Some(watch) = armed.upgrade()
                    && let Some(watch) = watch.get()
                {
                    let _ = watch.set_interest(Readiness::default());
                }
                wake();
            })
            .map_err(fail("watch it"))?;
        let _ = watch.set(registration);
        let port = TapPort { fd, mtu: read_mtu(name).map_err(fail("read its MTU"))?, watch };
        port.wait_for(Readiness { readable: true, writable: false });
        Ok(port)
    }

    fn wait_for(&self, interest: Readiness) {
        if let Some(watch) = self.watch.get() {
            let _ = watch.set_interest(interest);
        }
    }
}

impl NetPort for TapPort {
    fn send(&self, frame: &[u8]) -> Result<(), Busy> {
        if frame.len() > FRAME_BYTES {
            return Ok(());
        }
        let header = [0; HEADER_BYTES];
        match rustix::io::writev(&self.fd, &[IoSlice::new(&header), IoSlice::new(frame)]) {
            Err(Errno::AGAIN) => {
                self.wait_for(Readiness { readable: true, writable: true });
                Err(Busy)
            }
            _ => Ok(()), // Sent; or an interface that is down, or a frame that makes no sense, which a wire loses too.
        }
    }

    fn try_recv(&self, frame: &mut Vec<u8>) -> bool {
        let mut header = [0; HEADER_BYTES];
        frame.resize(FRAME_BYTES, 0);
        let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(frame)];
        let got = loop {
            match rustix::io::readv(&self.fd, &mut parts) {
                Ok(got) => break got.saturating_sub(HEADER_BYTES),
                Err(Errno::INTR) => {}
                Err(_) => {
                    // Armed now: a frame that came in between is reported, for the watch is level-triggered.
                    self.wait_for(Readiness { readable: true, writable: false });
                    break 0;
                }
            }
        };
        frame.truncate(got);
        got > 0
    }

    fn mtu(&self) -> u16 {
        self.mtu
    }
}

fn open_interface(name: &str) -> Result<OwnedFd, TapError> {
    let is_plain = |b: u8| b.is_ascii_graphic() && !b"/%:".contains(&b);
    if name.is_empty()
        || name.len() > NAME_BYTES
        || !name.bytes().all(is_plain)
        || [".", ".."].contains(&name)
    {
        return Err(TapError::Name { name: name.into() });
    }
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fd = rustix::fs::open(DEVICE, flags, Mode::empty())
        .map_err(|source| TapError::Driver { name: name.into(), source: source.into() })?;
    // SAFETY: a plain C struct for which all-zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `Setter` keeps for the call; the name is terminated.
    let attached = unsafe { ioctl(&fd, Setter::<TUNSETIFF, libc::ifreq>::new(request)) };
    attached.map_err(|error| match error {
        Errno::PERM | Errno::ACCESS => TapError::NotPermitted { name: name.into() },
        Errno::BUSY => TapError::InUse { name: name.into() },
        source => TapError::NotATap { name: name.into(), source: source.into() },
    })?;
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    unsafe { ioctl(&fd, Setter::<TUNSETVNETHDRSZ, libc::c_int>::new(HEADER_BYTES as libc::c_int)) }.map_err(
        |source| TapError::System { name: name.into(), what: "set its header size", source: source.into() },
    )?;
    Ok(fd)
}

fn read_mtu(name: &str) -> io::Result<u16> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    // Any socket of this network namespace answers for the interface; sysfs may show another namespace.
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: a plain C struct for which all-zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    const SIOCGIFMTU: rustix::ioctl::Opcode = libc::SIOCGIFMTU as rustix::ioctl::Opcode;
    // SAFETY: SIOCGIFMTU reads the name and writes the MTU of one `struct ifreq`.
    unsafe { ioctl(&socket, rustix::ioctl::Updater::<SIOCGIFMTU, libc::ifreq>::new(&mut request))? };
    // SAFETY: the kernel has just written this member.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    Ok(u16::try_from(mtu).unwrap_or(u16::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_are_refused_before_anything_is_opened() {
        for name in ["", "a/b", "tap%d", "a b", "sixteen-letters!", "..", "ä"] {
            let error = open_interface(name).unwrap_err();
            assert!(matches!(error, TapError::Name { .. }), "{error}");
        }
    }
}
