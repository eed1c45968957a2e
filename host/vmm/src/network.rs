//! virtio-net's backend on the host: the user-mode network, or a TAP interface.
//!
//! Called by: [`crate::host`] when a machine is built; then by the device.

use crate::services::lock;
use crate::wire::{NetKind, NetSpec};
use device::Waker;
use host_io::event_loop::EventLoopHandle;
use host_io::net::NetPort;
use host_io::net::tap::{TapError, TapPort};
use host_io::usernet::{UserNet, UserNetConfig, UserNetError};
use std::sync::{Arc, Mutex};
use virtio_devices::{Busy, NetBackend};

/// Why a network cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The user-mode network.
    #[error(transparent)]
    User(#[from] UserNetError),
    /// The TAP interface.
    #[error(transparent)]
    Tap(#[from] TapError),
}

/// The description of a user-mode network as the library reads it.
pub fn user_config(spec: &NetSpec) -> Result<UserNetConfig, UserNetError> {
    let mut text = String::from("user");
    for forward in &spec.hostfwd {
        text.push_str(",hostfwd=");
        text.push_str(forward);
    }
    if spec.hostloopback {
        text.push_str(",hostloopback=on");
    }
    text.parse()
}

/// Opens the network that `spec` names; also the largest packet it carries.
pub fn open(spec: &NetSpec, events: &EventLoopHandle) -> Result<(Box<dyn NetBackend>, u16), NetworkError> {
    let waker: Arc<Mutex<Option<Waker>>> = Arc::default();
    let theirs = waker.clone();
    let wake = move || {
        let waker = lock(&theirs).clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    };
    let port: Box<dyn NetPort> = match spec.kind {
        NetKind::User => Box::new(UserNet::start(user_config(spec)?, Box::new(wake))?),
        NetKind::Tap => {
            let name = spec.ifname.as_deref().unwrap_or_default();
            Box::new(TapPort::open(name, events, Box::new(wake))?)
        }
    };
    let mtu = port.mtu();
    Ok((Box::new(Backend { port, waker, frame: Vec::new() }), mtu))
}

struct Backend {
    port: Box<dyn NetPort>,
    waker: Arc<Mutex<Option<Waker>>>,
    frame: Vec<u8>,
}

impl NetBackend for Backend {
    fn set_waker(&mut self, waker: Waker) {
        *lock(&self.waker) = Some(waker);
    }
    fn send(&mut self, frame: &[u8]) -> Result<(), Busy> {
        self.port.send(frame).map_err(|_| Busy)
    }
    fn receive(&mut self, buf: &mut [u8]) -> Option<usize> {
        if !self.port.try_recv(&mut self.frame) {
            return None;
        }
        let len = self.frame.len().min(buf.len());
        buf[..len].copy_from_slice(&self.frame[..len]);
        Some(len)
    }
}
