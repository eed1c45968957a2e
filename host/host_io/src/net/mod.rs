//! Network ports: what stands behind one guest NIC, whatever it is made of.
//!
//! Called by: `vmm`, which connects virtio-net to a `NetPort`; implemented by `usernet` and `net::tap`.

pub mod tap;

/// The port cannot take the frame now; `wake` will be called when it can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the network port is busy")]
pub struct Busy;

/// Frames between a guest and the world. Ethernet frames without a virtio header and without FCS.
///
/// A port is made with a `wake` callback, which it calls (from its own thread) when a frame can be received after
/// `try_recv` had found none, and when there is room after `send` had answered `Busy`. It may be called for nothing.
pub trait NetPort: Send + Sync {
    /// Takes a frame from the guest. Frames that make no sense are taken and dropped.
    fn send(&self, frame: &[u8]) -> Result<(), Busy>;

    /// Puts the next frame for the guest into `frame` (cleared first); says whether there was one.
    fn try_recv(&self, frame: &mut Vec<u8>) -> bool;

    /// Largest IP packet in a frame, in bytes.
    fn mtu(&self) -> u16;
}
