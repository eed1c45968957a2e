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

#[cfg(test)]
mod tests {
    use super::*;
    use saved_state::{from_blob, to_blob};

    /// The bytes of version 1. They stay as they are; a new version adds its own.
    const GOLDEN_V1: &[u8] = &[
        1, 0, 23, 0, 0, 0, 15, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 2, 0, 2, 0, 0, 0, 52, 18, 0, 0, 0, 0, 2, 0, 18,
        0, 0, 0, 14, 0, 0, 0, 1, 0, 8, 0, 0, 0, 1, 0, 0, 0, 6, 0, 1, 0,
    ];

    #[test]
    fn golden_bytes() {
        let ports = alloc::vec![PortState { guest_open: true, sent: 0x1234 }, PortState::default()];
        let messages = [Message(alloc::vec![1, 0, 0, 0, 6, 0, 1, 0])].into();
        let shared = Shared { ports, messages };
        assert_eq!(to_blob(&shared).data, GOLDEN_V1);
        let blob =
            saved_state::StateBlob { kind: "virtio-console".into(), version: 1, data: GOLDEN_V1.into() };
        assert_eq!(from_blob::<Shared>(&blob).unwrap(), shared);
    }
}
