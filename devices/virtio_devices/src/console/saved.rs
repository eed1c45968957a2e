//! Saved state of a console: what the guest did to its ports, and control messages under way.

use super::control::{MAX_MESSAGE_BYTES, MAX_MESSAGES, Message};
use super::{MAX_PORTS, PortState, Shared};
use saved_state::{FieldWriter, Fields, RestoreError, SavedState};

pub const PORTS: u16 = 1;
const MESSAGES: u16 = 2;

impl SavedState for PortState {
    const KIND: &'static str = "virtio-console-port";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { guest_open, sent } = self;
        w.flag(1, *guest_open).uint(2, *sent);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self { guest_open: r.flag(1)?, sent: r.uint(2)? })
    }
}

impl SavedState for Message {
    const KIND: &'static str = "virtio-console-message";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self(bytes) = self;
        w.bytes(1, bytes);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self(r.bytes(1, MAX_MESSAGE_BYTES)?.to_vec()))
    }
}

impl SavedState for Shared {
    const KIND: &'static str = "virtio-console";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { ports, messages } = self;
        w.list(PORTS, ports).list(MESSAGES, messages);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let ports = r.list(PORTS, MAX_PORTS)?;
        let messages = r.list::<Message>(MESSAGES, MAX_MESSAGES)?;
        Ok(Self { ports, messages: messages.into() })
    }
}
