//! Doorbells: writes that the kernel takes by itself (api.rst, KVM_IOEVENTFD).
//!
//! Called by: the machine, whenever a BAR with notification registers moves.

use crate::engine::host;
use crate::ioctls::ioeventfd;
use crate::partition::Shared;
use hypervisor::{Bell, Doorbells, EngineError, Gpa};
use kvm_ioctls::Cap;
use std::sync::Arc;

/// Width of a write to a notification register where KVM wants to know it (VIRTIO 1.2, 4.1.5.2).
const NOTIFICATION_BYTES: u32 = 2;

/// A partition's.
pub struct Ioeventfds {
    shared: Arc<Shared>,
    bytes: u32,
}

impl Ioeventfds {
    /// `None` where this KVM has none.
    pub fn of(shared: &Arc<Shared>) -> Option<Arc<dyn Doorbells>> {
        if !shared.vm.check_extension(Cap::Ioeventfd) {
            return None;
        }
        // Of any width KVM can take a write without looking at the instruction.
        let any = shared.vm.check_extension_raw(kvm_bindings::KVM_CAP_IOEVENTFD_ANY_LENGTH.into()) > 0;
        Some(Arc::new(Self { shared: shared.clone(), bytes: if any { 0 } else { NOTIFICATION_BYTES } }))
    }
}

impl Doorbells for Ioeventfds {
    fn attach(&self, at: Gpa, bell: &dyn Bell) -> Result<(), EngineError> {
        ioeventfd(&self.shared.vm, at.0, self.bytes, bell.descriptor(), true).map_err(host)
    }
    fn detach(&self, at: Gpa, bell: &dyn Bell) {
        // Fails only for what is not attached.
        let _ = ioeventfd(&self.shared.vm, at.0, self.bytes, bell.descriptor(), false);
    }
}
