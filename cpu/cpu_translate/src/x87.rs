//! x87 instructions, which are copied: which ones, and the way of the unit's state into the host's and back.
//!
//! [`slot::X87_STATE`] says where the guest's unit is: in the core, in the host's unit, or in the image of FNSAVE between
//! them, where calls of Rust put it. All exceptions are masked in the host (contexts with others emit calls). What the
//! host notes as last instruction and operand are its own addresses; the guest's come from [`slot::X87_SITE`] and
//! [`slot::X87_DATA`], which emitted code keeps.

use crate::encoding::Encoding;
use crate::engine::Engine;
use crate::thunks::slot;
use cpu_soft::SoftCore;
use x86_decode::{Code, Instruction, Mnemonic as M, OpKind};
use x86_emulate::cpu::{Cpu, F80};
use x86_emulate::x87;

/// Values of [`slot::X87_STATE`].
pub mod state {
    /// In the core.
    pub const CORE: u64 = 0;
    /// In the host's unit.
    pub const HOST: u64 = 1;
    /// In the image.
    pub const IMAGE: u64 = 2;
}
/// In [`slot::X87_SITE`]: nothing was run since the core had the unit.
pub const NO_SITE: u64 = u64::MAX;

/// The masks of the control word.
pub const MASKS: u16 = 0x3F;
const SUMMARY: u16 = 0x80;
/// Words before the registers in the image: FSAVE's 28 bytes of environment.
const ENVIRONMENT: usize = 28;
const IMAGE_BYTES: usize = ENVIRONMENT + 8 * 10;

/// What an instruction does besides computing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Becomes the last instruction that the unit remembers.
    Compute,
    /// FNSTSW AX and FNSTCW.
    Status,
    /// FLDCW.
    LoadControl,
}

/// Whether the unit can be the host's: no exception is or can become pending.
pub fn masks_all(cpu: &Cpu) -> bool {
    let unit = &cpu.x.x87;
    unit.control & MASKS == MASKS && unit.status & SUMMARY == 0
}

/// How `insn` is emitted if it may be copied: its kind, and its encoding if it has a memory operand.
pub fn plan(insn: &Instruction, bytes: &[u8], long: bool) -> Option<(Kind, Option<Encoding>)> {
    let in_memory = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
    let kind = match insn.code() {
        Code::Fnstsw_AX | Code::Fnstcw_m2byte => Kind::Status,
        Code::Fldcw_m2byte => Kind::LoadControl,
        Code::Fbld_m80bcd | Code::Fbstp_m80bcd => return None,
        _ if x87::computes(insn) => Kind::Compute,
        _ => return None,
    };
    let encoding = if in_memory { Some(Encoding::parse(bytes, long)?) } else { None };
    Some((kind, encoding))
}

/// Whether `insn` writes its memory operand.
pub fn stores(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fnstcw)
}

/// Whether `insn` compares into RFLAGS.
pub fn sets_flags(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), M::Fcomi | M::Fcomip | M::Fucomi | M::Fucomip)
}

/// Takes the unit out of the image into the core, if it is there.
pub fn to_core(core: &mut SoftCore, engine: &Engine) {
    if core.hot.slots[slot::X87_STATE] != state::IMAGE {
        return;
    }
    core.hot.slots[slot::X87_STATE] = state::CORE;
    let mut image = [0; IMAGE_BYTES];
    let words = &core.hot.slots[slot::X87_IMAGE..];
    image.iter_mut().zip(words.iter().flat_map(|w| w.to_le_bytes())).for_each(|(to, from)| *to = from);
    let word = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
    let site = engine.sites.get(core.hot.slots[slot::X87_SITE] as usize);
    let (data, segment) = (core.hot.slots[slot::X87_DATA], core.hot.slots[slot::X87_DATA_SEGMENT]);
    let selectors = core.cpu.seg.map(|s| s.selector);
    let unit = &mut core.cpu.x.x87;
    unit.set_control(word(0));
    unit.set_status(word(4));
    let tags = word(8);
    unit.in_use = (0..8).fold(0, |set, i| set | u8::from(tags >> (2 * i) & 3 != 3) << i);
    let top = unit.top();
    for (i, raw) in image[ENVIRONMENT..].chunks_exact(10).enumerate() {
        let mantissa = raw[..8].iter().rev().fold(0, |acc, b| acc << 8 | u64::from(*b));
        unit.regs[(top + i) & 7] = F80 { mantissa, sign_exponent: u16::from_le_bytes([raw[8], raw[9]]) };
    }
    if let Some(site) = site {
        let page = engine.blocks[site.block as usize].linear_page();
        unit.instruction_pointer = page.wrapping_add(site.op.at.into());
        unit.instruction_selector = selectors[1];
        unit.opcode = site.op.imm as u16 & 0x7FF;
    }
    if let Some(segment) = (segment as usize).checked_sub(1) {
        (unit.data_pointer, unit.data_selector) = (data, selectors[segment.min(5)]);
    }
}

/// Puts the unit into the image, if the core has it.
pub fn to_image(core: &mut SoftCore) {
    if core.hot.slots[slot::X87_STATE] != state::CORE {
        return;
    }
    let unit = &core.cpu.x.x87;
    let mut image = [0; slot::X87_IMAGE_WORDS * 8];
    image[0..2].copy_from_slice(&unit.control.to_le_bytes());
    image[4..6].copy_from_slice(&unit.status.to_le_bytes());
    let tags = (0..8).fold(0u16, |tags, i| tags | if unit.in_use >> i & 1 == 0 { 3 << (2 * i) } else { 0 });
    image[8..10].copy_from_slice(&tags.to_le_bytes());
    for (i, raw) in image[ENVIRONMENT..IMAGE_BYTES].chunks_exact_mut(10).enumerate() {
        let value = &unit.regs[(unit.top() + i) & 7];
        raw[..8].copy_from_slice(&value.mantissa.to_le_bytes());
        raw[8..].copy_from_slice(&value.sign_exponent.to_le_bytes());
    }
    let slots = &mut core.hot.slots;
    for (word, raw) in slots[slot::X87_IMAGE..].iter_mut().zip(image.chunks_exact(8)) {
        *word = raw.iter().rev().fold(0, |acc, b| acc << 8 | u64::from(*b));
    }
    slots[slot::X87_STATE] = state::IMAGE;
    slots[slot::X87_SITE] = NO_SITE;
    slots[slot::X87_DATA_SEGMENT] = 0;
}
