//! The switch that joins guests' network cards and a card of the machine: it learns where addresses are and floods what
//! it does not know (IEEE 802.1D, without spanning tree: there is one switch).
//!
//! Called by: guests' virtio-net devices, through [`NetBackend`], and by `ground` for the machine's card. A guest sees
//! frames for itself, and floods.

use alloc::collections::{BTreeMap, VecDeque};
use alloc::sync::Arc;
use alloc::vec::Vec;
use device::Waker;
use sync::Mutex;
use virtio_devices::{Busy, NetBackend};

/// Largest packet, without the Ethernet header.
pub const MTU: u16 = 1500;
/// The longest frame: header with a VLAN tag, and packet.
const MAX_FRAME: usize = MTU as usize + 18;
/// Shorter ones have no header.
const MIN_FRAME: usize = 14;
/// Frames that wait at a port; more are lost, as on a wire.
const MAX_WAITING: usize = 256;
/// Addresses that are remembered.
const MAX_ADDRESSES: usize = 1024;

type Address = [u8; 6];

#[derive(Default)]
struct Port {
    /// Somebody has the other end of its cable.
    plugged: bool,
    waiting: VecDeque<Arc<[u8]>>,
    waker: Option<Waker>,
}

/// See the module's header.
#[derive(Default)]
pub struct Switch {
    ports: Vec<Port>,
    addresses: BTreeMap<Address, usize>,
}

impl Switch {
    /// A port for a new cable; its number.
    fn add_port(&mut self) -> usize {
        let free = self.ports.iter().position(|port| !port.plugged);
        let number = free.unwrap_or_else(|| {
            self.ports.push(Port::default());
            self.ports.len() - 1
        });
        self.ports[number].plugged = true;
        number
    }

    /// The cable is pulled.
    fn remove_port(&mut self, number: usize) -> Port {
        self.addresses.retain(|_, at| *at != number);
        core::mem::take(&mut self.ports[number])
    }

    /// A frame came in at `from`.
    fn forward(&mut self, from: usize, frame: &[u8]) {
        if !(MIN_FRAME..=MAX_FRAME).contains(&frame.len()) {
            return;
        }
        let address = |at: usize| -> Address { core::array::from_fn(|n| frame[at + n]) };
        let (to, source) = (address(0), address(6));
        let is_group = |address: &Address| address[0] & 1 != 0;
        let known = self.addresses.len() < MAX_ADDRESSES || self.addresses.contains_key(&source);
        if !is_group(&source) && known {
            self.addresses.insert(source, from);
        }
        let only = self.addresses.get(&to).copied().filter(|_| !is_group(&to));
        let frame: Arc<[u8]> = frame.into();
        for (number, port) in self.ports.iter_mut().enumerate() {
            let wanted = number != from && port.plugged && only.is_none_or(|only| only == number);
            if wanted && port.waiting.len() < MAX_WAITING {
                port.waiting.push_back(frame.clone());
                if let Some(waker) = &port.waker {
                    waker.wake();
                }
            }
        }
    }
}

/// An end of a cable to the switch.
pub struct SwitchPort {
    switch: Arc<Mutex<Switch>>,
    number: usize,
}

impl SwitchPort {
    /// Plugs one in.
    pub fn plug(switch: &Arc<Mutex<Switch>>) -> Self {
        let number = switch.lock().add_port();
        Self { switch: switch.clone(), number }
    }

    /// The next frame for it.
    pub fn next_frame(&self) -> Option<Arc<[u8]>> {
        self.switch.lock().ports[self.number].waiting.pop_front()
    }

    /// Gives the switch a frame.
    pub fn give(&self, frame: &[u8]) {
        self.switch.lock().forward(self.number, frame);
    }
}

impl Drop for SwitchPort {
    fn drop(&mut self) {
        // Its waker is dropped without the lock.
        let port = self.switch.lock().remove_port(self.number);
        drop(port);
    }
}

impl NetBackend for SwitchPort {
    fn set_waker(&mut self, waker: Waker) {
        self.switch.lock().ports[self.number].waker = Some(waker);
    }
    fn send(&mut self, frame: &[u8]) -> Result<(), Busy> {
        self.give(frame);
        Ok(())
    }
    fn receive(&mut self, buf: &mut [u8]) -> Option<usize> {
        let frame = self.next_frame()?;
        let bytes = frame.len().min(buf.len());
        buf[..bytes].copy_from_slice(&frame[..bytes]);
        Some(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(to: u8, from: u8) -> Vec<u8> {
        let mut frame = std::vec![0x55; 60];
        frame[..6].fill(to);
        frame[6..12].fill(from);
        frame
    }

    fn three() -> [SwitchPort; 3] {
        let switch = Arc::default();
        core::array::from_fn(|_| SwitchPort::plug(&switch))
    }

    /// Which ports have something; it is gone afterwards.
    fn arrived(ports: &[SwitchPort; 3]) -> [usize; 3] {
        core::array::from_fn(|n| core::iter::from_fn(|| ports[n].next_frame()).count())
    }

    #[test]
    fn it_floods_what_it_does_not_know_and_learns() {
        let ports = three();
        ports[0].give(&frame(4, 2));
        assert_eq!(arrived(&ports), [0, 1, 1]);
        ports[1].give(&frame(2, 4));
        assert_eq!(arrived(&ports), [1, 0, 0]);
        ports[0].give(&frame(4, 2));
        assert_eq!(arrived(&ports), [0, 1, 0]);
        // Broadcast goes everywhere; who speaks with a group's address is not remembered.
        ports[2].give(&frame(0xFF, 0xFF));
        assert_eq!(arrived(&ports), [1, 1, 0]);
        ports[2].give(&frame(0xFF, 6));
        assert_eq!(arrived(&ports), [1, 1, 0]);
        // A frame for its own port goes nowhere.
        ports[2].give(&frame(6, 8));
        assert_eq!(arrived(&ports), [0, 0, 0]);
    }

    #[test]
    fn queues_and_frames_have_an_end() {
        let mut ports = three();
        (0..2 * MAX_WAITING).for_each(|_| ports[0].give(&frame(4, 2)));
        assert_eq!(arrived(&ports), [0, MAX_WAITING, MAX_WAITING]);
        ports[0].give(&[1; 13]);
        ports[0].give(&[0; 2000]);
        assert_eq!(arrived(&ports), [0; 3]);
        ports[0].give(&frame(4, 2));
        let mut short = [0; 20];
        assert_eq!(ports[1].receive(&mut short), Some(20));
        assert_eq!(ports[1].receive(&mut short), None);
        for n in 0..4000u32 {
            let mut one = frame(4, 2);
            one[8..12].copy_from_slice(&n.to_le_bytes());
            ports[0].give(&one);
        }
        assert!(ports[0].switch.lock().addresses.len() <= MAX_ADDRESSES);
    }
}
