//! The x87 state in memory: FXSAVE's format (SDM vol. 1, 10.5.1).

use crate::cpu::{F80, X87};

/// Bits of the control word that exist; bit 6 reads as one.
const CONTROL: u16 = 0x1F3F;
const CONTROL_FIXED: u16 = 0x40;
/// Exception flags, stack fault aside.
const EXCEPTIONS: u16 = 0x3F;
/// Error summary and busy.
const SUMMARY: u16 = 0x8080;

impl X87 {
    /// TOP.
    #[inline(always)]
    pub fn top(&self) -> usize {
        usize::from(self.status >> 11 & 7)
    }

    /// Sets the control word; unmasked flags become pending.
    pub fn set_control(&mut self, value: u16) {
        self.control = value & CONTROL | CONTROL_FIXED;
        self.summarise();
    }

    /// Sets the status word; the summary follows from the flags and the masks.
    pub fn set_status(&mut self, value: u16) {
        self.status = value;
        self.summarise();
    }

    fn summarise(&mut self) {
        let pending = self.status & !self.control & EXCEPTIONS != 0;
        self.status = self.status & !SUMMARY | if pending { SUMMARY } else { 0 };
    }
}

/// The first 24 bytes; `wide`: 64-bit pointers without selectors.
pub fn fxsave_environment(x: &X87, wide: bool) -> [u8; 24] {
    let mut bytes = [0; 24];
    bytes[0..2].copy_from_slice(&x.control.to_le_bytes());
    bytes[2..4].copy_from_slice(&x.status.to_le_bytes());
    bytes[4] = x.in_use;
    bytes[6..8].copy_from_slice(&x.opcode.to_le_bytes());
    if wide {
        bytes[8..16].copy_from_slice(&x.instruction_pointer.to_le_bytes());
        bytes[16..24].copy_from_slice(&x.data_pointer.to_le_bytes());
    } else {
        bytes[8..12].copy_from_slice(&(x.instruction_pointer as u32).to_le_bytes());
        bytes[12..14].copy_from_slice(&x.instruction_selector.to_le_bytes());
        bytes[16..20].copy_from_slice(&(x.data_pointer as u32).to_le_bytes());
        bytes[20..22].copy_from_slice(&x.data_selector.to_le_bytes());
    }
    bytes
}

/// ST(0) to ST(7), 16 bytes each.
pub fn fxsave_registers(x: &X87) -> [u8; 128] {
    let mut bytes = [0; 128];
    for (i, chunk) in bytes.chunks_exact_mut(16).enumerate() {
        let r = &x.regs[(x.top() + i) & 7];
        chunk[..8].copy_from_slice(&r.mantissa.to_le_bytes());
        chunk[8..10].copy_from_slice(&r.sign_exponent.to_le_bytes());
    }
    bytes
}

/// Loads what the above two gave.
pub fn fxrstor(x: &mut X87, environment: &[u8; 24], registers: &[u8; 128], wide: bool) {
    let half = |at: usize| u16::from_le_bytes([environment[at], environment[at + 1]]);
    let word = |at: usize| u64::from(half(at)) | u64::from(half(at + 2)) << 16;
    x.set_control(half(0));
    x.set_status(half(2));
    x.in_use = environment[4];
    x.opcode = half(6) & 0x7FF;
    x.instruction_pointer = word(8);
    x.data_pointer = word(16);
    if wide {
        x.instruction_pointer |= word(12) << 32;
        x.data_pointer |= word(20) << 32;
    } else {
        x.instruction_selector = half(12);
        x.data_selector = half(20);
    }
    set_registers(x, registers);
}

/// The control and status words of an FXSAVE image.
pub fn control_and_status(image: &[u8; 512]) -> (u16, u16) {
    (u16::from_le_bytes([image[0], image[1]]), u16::from_le_bytes([image[2], image[3]]))
}

/// Registers, tags, control and status (not the pointers) into an FXSAVE image.
pub fn to_fxsave(x: &X87, image: &mut [u8; 512]) {
    image[0..2].copy_from_slice(&x.control.to_le_bytes());
    image[2..4].copy_from_slice(&x.status.to_le_bytes());
    image[4] = x.in_use;
    image[32..160].copy_from_slice(&fxsave_registers(x));
}

/// The reverse of [`to_fxsave`].
pub fn from_fxsave(x: &mut X87, image: &[u8; 512]) {
    (x.control, x.status) = control_and_status(image);
    x.in_use = image[4];
    if let Some(registers) = image[32..].first_chunk() {
        set_registers(x, registers);
    }
}

fn set_registers(x: &mut X87, registers: &[u8; 128]) {
    for (i, chunk) in registers.chunks_exact(16).enumerate() {
        let mantissa = chunk[..8].iter().rev().fold(0, |acc, &b| acc << 8 | u64::from(b));
        let sign_exponent = u16::from_le_bytes([chunk[8], chunk[9]]);
        x.regs[(x.top() + i) & 7] = F80 { mantissa, sign_exponent };
    }
}
