//! COM1 of the machine that we run on (16550): polled output, polled input.

use super::{in8, out8};

const BASE: u16 = 0x3F8;
const LINE_STATUS: u16 = BASE + 5;
const DATA_READY: u8 = 1 << 0;
const TRANSMITTER_EMPTY: u8 = 1 << 5;
/// A port that is not there never becomes ready.
const PATIENCE: u32 = 1_000_000;

/// 115200 baud, 8 bits, FIFOs on.
pub fn initialize() {
    for (register, value) in [(1, 0), (3, 0x80), (0, 1), (1, 0), (3, 3), (2, 0xC7), (4, 3)] {
        out8(BASE + register, value);
    }
}

/// Sends a byte, once there is room.
pub fn send(byte: u8) {
    for _ in 0..PATIENCE {
        if in8(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
            break;
        }
    }
    out8(BASE, byte);
}

/// A byte that arrived.
pub fn receive() -> Option<u8> {
    let status = in8(LINE_STATUS);
    // All ones: there is no port.
    (status != 0xFF && status & DATA_READY != 0).then(|| in8(BASE))
}
