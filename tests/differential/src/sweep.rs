//! The whole opcode map: is an encoding that the host refuses (#UD) refused, and no other?
//!
//! Cases of a form come from the decoder's own table, so they cannot show what the table lacks. Here the bytes
//! are counted through instead: every opcode of every map, behind the prefixes that choose forms, with each
//! `reg` of ModRM and an operand in memory and in a register. EVEX is left out.

use crate::interpreted::{self, features};
use crate::layout::*;
use crate::native::{self, Native};
use crate::state::{Case, Code, Registers};
use iced_x86::{Decoder, DecoderOptions};
use std::io;
use x86_decode::Decoded;

/// #UD.
const UNDEFINED: u64 = 6;
/// Bytes that end a case wherever an instruction stops: INT3.
const TAIL: u8 = 0xCC;

/// What a sweep found.
#[derive(Debug, Default)]
pub struct Sweep {
    /// Encodings that ran.
    pub cases: usize,
    /// Encodings of instructions that the model lacks and the host has.
    pub hidden: usize,
    /// Encodings that AMD's processors, on one of which this runs, see another way than the interpreter.
    pub vendors: usize,
    /// Encodings that only one side refuses.
    pub differences: Vec<String>,
}

/// Runs it in 64-bit or in 32-bit code.
pub fn run(is_32: bool) -> io::Result<Sweep> {
    let mut native = Native::new()?;
    let mut sweep = Sweep::default();
    let mut batch = Vec::with_capacity(BATCH);
    for opcode in opcodes(is_32) {
        for modrm in [0, 0xC1].into_iter().flat_map(|rm| (0..8u8).map(move |reg| rm | reg << 3)) {
            batch.push(case(&[&opcode[..], &[modrm]].concat(), batch.len() as u32, is_32));
            if batch.len() == BATCH {
                flush(&mut native, &mut batch, &mut sweep)?;
            }
        }
    }
    flush(&mut native, &mut batch, &mut sweep)?;
    Ok(sweep)
}

/// Prefixes, map and opcode of every encoding.
fn opcodes(is_32: bool) -> Vec<Vec<u8>> {
    let legacy: &[&[u8]] = &[&[], &[0x66], &[0xF3], &[0xF2], &[0xF0]];
    let wide: &[&[u8]] = &[&[0x48], &[0x66, 0x48], &[0xF3, 0x48], &[0xF2, 0x48], &[0x41]];
    let mut all = Vec::new();
    for prefix in legacy.iter().chain(wide.iter().filter(|_| !is_32)) {
        for map in [&[][..], &[0x0F], &[0x0F, 0x38], &[0x0F, 0x3A]] {
            let opcodes = (0..=255).filter(|o| !leads_on(map, *o, is_32));
            all.extend(opcodes.map(|opcode| [*prefix, map, &[opcode]].concat()));
        }
    }
    for map in 1..=3u8 {
        // W, L and pp, with VVVV unused and used.
        for rest in (0..=255u8).filter(|b| [0, 0x78].contains(&(b & 0x78))) {
            all.extend((0..=255).map(|opcode| vec![0xC4, 0xE0 | map, rest, opcode]));
        }
    }
    all
}

/// Prefixes, escapes, and what is no question.
fn leads_on(map: &[u8], opcode: u8, is_32: bool) -> bool {
    match map {
        [] => match opcode {
            0x0F | 0x26 | 0x2E | 0x36 | 0x3E | 0x62 | 0x64..=0x67 | 0xC4 | 0xC5 | 0xF0 | 0xF2 | 0xF3 => true,
            0x40..=0x4F => !is_32,
            _ => false,
        },
        // SYSENTER and SYSEXIT in 64-bit code: vendors differ.
        [0x0F] => matches!(opcode, 0x38 | 0x3A | 0x34 | 0x35),
        _ => false,
    }
}

fn case(start: &[u8], slot: u32, is_32: bool) -> Case {
    let mut bytes = [TAIL; 16];
    bytes[..start.len()].copy_from_slice(start);
    let mut registers = Registers::new();
    registers.rip = CODE + SLOT * u64::from(slot) + INSTRUCTION;
    registers.gpr = [QUIET_BOUNDARY + 64; 16];
    registers.gpr[1] = 1; // few repetitions
    let code = Code { bytes, len: x86_decode::MAX_LENGTH as u32, slot, is_32 };
    Case { registers, window_at: QUIET_BOUNDARY - WINDOW as u64 / 2, window: [0; WINDOW], code }
}

fn flush(native: &mut Native, batch: &mut Vec<Case>, sweep: &mut Sweep) -> io::Result<()> {
    let outcomes = native.run(batch)?;
    for (case, outcome) in batch.drain(..).zip(outcomes) {
        // Those that end the process (system calls) are no #UD either way.
        let Some(outcome) = outcome else { continue };
        sweep.cases += 1;
        let host = outcome.raised.vector == UNDEFINED && outcome.registers.rip == case.registers.rip;
        let ours = is_refused(&case);
        if host == ours {
            continue;
        }
        if !host && is_hidden(&case.code) {
            sweep.hidden += 1;
            continue;
        }
        if native::is_amd() && is_otherwise_on_amd(&case.code) {
            sweep.vendors += 1;
            continue;
        }
        let who = if host { "the host" } else { "the interpreter" };
        sweep.differences.push(format!("{:02x?}: #UD only by {who}", &case.code.bytes[..8]));
    }
    Ok(())
}

fn bitness(code: &Code) -> u32 {
    if code.is_32 { 32 } else { 64 }
}

/// Whether the interpreter raises #UD.
fn is_refused(case: &Case) -> bool {
    let mut case = *case;
    if let Decoded::Instruction(insn) =
        x86_decode::decode(&case.code.bytes, bitness(&case.code), 0, features())
    {
        case.code.len = insn.len() as u32;
    }
    interpreted::run(&case).is_some_and(|outcome| outcome.raised.vector == UNDEFINED)
}

/// Whether processors of AMD refuse this where Intel's do not, or the other way round; the interpreter goes with Intel's.
fn is_otherwise_on_amd(code: &Code) -> bool {
    let mut bytes = &code.bytes[..];
    let mut lock = false;
    while let [prefix @ (0x40..=0x4F | 0x66 | 0xF0 | 0xF2 | 0xF3), rest @ ..] = bytes {
        lock |= *prefix == 0xF0;
        bytes = rest;
    }
    match bytes {
        // SYSRET exists in 32-bit code, too, and is for privileged code (#GP).
        [0x0F, 0x07, ..] => code.is_32,
        // PREFETCH of a register.
        [0x0F, 0x0D, modrm, ..] => *modrm >= 0xC0,
        // VERW of memory may have LOCK (Zen).
        [0x0F, 0x00, 0x28, ..] => lock,
        // VPERMQ and VPERMPD without W.
        [0xC4, 0xE3, 0x7D, 0x00 | 0x01, ..] => true,
        // VPINSRQ and VPEXTRQ have no 32-bit form: W is no hint there.
        [0xC4, 0xE3, 0x81 | 0xF9, 0x16 | 0x22, ..] => code.is_32,
        _ => false,
    }
}

/// Whether this is an instruction that the CPU model does not have, or a call of the host's hypervisor.
fn is_hidden(code: &Code) -> bool {
    let mut bytes = &code.bytes[..];
    while let [0x40..=0x4F | 0x66 | 0xF0 | 0xF2 | 0xF3, rest @ ..] = bytes {
        bytes = rest;
    }
    // VMCALL and VMMCALL; MOV CR8 as AMD's processors spell it.
    if matches!(bytes, [0x0F, 0x01, 0xC1 | 0xD9, ..] | [0x0F, 0x20 | 0x22, ..]) {
        return true;
    }
    let insn = Decoder::new(bitness(code), &code.bytes, DecoderOptions::NONE).decode();
    !insn.is_invalid() && !x86_decode::allowed(&insn, features())
}
