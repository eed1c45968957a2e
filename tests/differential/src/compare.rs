//! What must be equal, and what the manuals leave open.

use crate::generate::is_short;
use crate::layout::WINDOW;
use crate::state::{Case, Outcome, Raised};
use iced_x86::{Decoder, DecoderOptions, Instruction, InstructionInfoFactory, Mnemonic as M};
use std::ops::Range;

/// Flags that user code can have: arithmetic, direction, AC, ID.
const FLAGS: u64 = STATUS | 0x400 | 0x24_0000;
/// CF, PF, AF, ZF, SF, OF.
const STATUS: u64 = 0x8D5;
const BOUND_RANGE: u64 = 5;
const PAGE_FAULT: u64 = 14;

/// The instruction of a case.
pub fn decode(case: &Case) -> Instruction {
    let bits = if case.code.is_32 { 32 } else { 64 };
    let bytes = &case.code.bytes[..case.code.len as usize];
    Decoder::with_ip(bits, bytes, case.registers.rip, DecoderOptions::NONE).decode()
}

/// The first difference between the host's outcome and the interpreter's.
pub fn difference(case: &Case, host: &Outcome, ours: &Outcome) -> Option<String> {
    let insn = decode(case);
    if may_touch_all(&insn) && host.raised.vector == Raised::NONE && ours.raised.vector == PAGE_FAULT {
        let (before, after) = (&case.registers, &ours.registers);
        let same = (before.gpr, before.rip, before.mxcsr()) == (after.gpr, after.rip, after.mxcsr());
        return (!same || ours.window != case.window).then(|| "ours faults and has changed something".into());
    }
    if let Some(text) = raised_difference(&insn, &host.raised, &ours.raised) {
        return Some(text);
    }
    let (a, b) = (&host.registers, &ours.registers);
    if a.rip != b.rip {
        return Some(format!("rip: host {:#x}, ours {:#x}", a.rip, b.rip));
    }
    let mask = if case.code.is_32 { 0xFFFF_FFFF } else { u64::MAX };
    let count = if case.code.is_32 { 8 } else { 16 };
    let faulted = host.raised.vector != Raised::NONE;
    let open_halves = open_halves(&insn, case, faulted);
    for i in 0..count {
        let mask = if open_halves.contains(&i) { 0xFFFF_FFFF } else { mask };
        let (a, b) = (a.gpr[i] & mask, b.gpr[i] & mask);
        if a != b {
            return Some(format!("gpr {i}: host {a:#x}, ours {b:#x}"));
        }
    }
    let open = match faulted {
        false => undefined_flags(&insn),
        // Whether those of the elements before the fault show.
        true if is_scan(&insn) => STATUS,
        true => 0,
    };
    let differing = (a.flags ^ b.flags) & FLAGS & !open;
    if differing != 0 {
        return Some(format!("flags: host {:#x}, ours {:#x}, differing {differing:#x}", a.flags, b.flags));
    }
    if (a.selectors, a.bases) != (b.selectors, b.bases) {
        let show = |r: &crate::state::Registers| format!("{:x?} {:x?}", &r.selectors[..6], r.bases);
        return Some(format!("segments: host {}, ours {}", show(a), show(b)));
    }
    if (a.mxcsr() ^ b.mxcsr()) & !open_mxcsr(&insn, host) != 0 {
        return Some(format!("mxcsr: host {:#x}, ours {:#x}", a.mxcsr(), b.mxcsr()));
    }
    for i in 0..count {
        // How much of a gather's mask is cleared up to a fault: only its sign bits mean something.
        let partial = faulted && insn.is_vsib();
        let is_mask = partial && insn.op2_register().number() == i;
        // Whether a gather that faults has cleared the upper half already.
        let words = if partial && insn.op0_register().is_xmm() { 2 } else { 4 };
        if a.ymm(i)[..words] != b.ymm(i)[..words] && !is_mask {
            return Some(format!("ymm{i}: host {:x?}, ours {:x?}", a.ymm(i), b.ymm(i)));
        }
    }
    // Some leave C1, the manual says that they clear it.
    let sets_flags = matches!(insn.mnemonic(), M::Fcomi | M::Fcomip | M::Fucomi | M::Fucomip);
    x87_difference(host, ours, if sets_flags { 0x200 } else { 0 })
        .or_else(|| memory_difference(&insn, case, host, ours))
}

/// Whether a processor may access bytes that it does not write: the components of a save area that are not requested
/// or not in use (SDM vol. 1, 13.13). Intel's leave them alone, ours wants the whole area.
fn may_touch_all(insn: &Instruction) -> bool {
    use M::{Xsave, Xsave64, Xsavec, Xsavec64, Xsaveopt, Xsaveopt64};
    matches!(insn.mnemonic(), Xsave | Xsave64 | Xsavec | Xsavec64 | Xsaveopt | Xsaveopt64)
}

fn raised_difference(insn: &Instruction, host: &Raised, ours: &Raised) -> Option<String> {
    let has_code = matches!(host.vector, 10..=14 | 17);
    let mut same = host.vector == ours.vector && (!has_code || host.error == ours.error);
    // Which byte of a large area faults first is the processor's choice; so is which word of a frame.
    let frame = matches!(insn.mnemonic(), M::Enter | M::Retf | M::Iret | M::Iretd | M::Iretq);
    let large = insn.op_code().is_save_restore()
        || frame
        || insn.memory_size().size() > 32
        || matches!(insn.memory_size().size(), 14 | 28);
    if large && host.vector == PAGE_FAULT && ours.vector == PAGE_FAULT {
        return None;
    }
    // Pages of the host's kernel may be present.
    const PRESENT: u64 = 1;
    if host.vector == PAGE_FAULT && host.address >> 63 != 0 {
        same = host.vector == ours.vector && (host.error ^ ours.error) & !PRESENT == 0;
    }
    // Whether the second bound is read where the first is broken.
    if insn.mnemonic() == M::Bound && host.vector == BOUND_RANGE && ours.vector == PAGE_FAULT {
        return None;
    }
    if host.vector == PAGE_FAULT && is_cmps(insn) {
        return (ours.vector != PAGE_FAULT).then(|| format!("host exception 14, ours {}", ours.vector));
    }
    if same && host.vector == PAGE_FAULT {
        same = host.address == ours.address;
    }
    if same {
        return None;
    }
    let show = |r: &Raised| match r.vector {
        Raised::NONE => "no exception".to_string(),
        v => format!("exception {v}, code {:#x}, address {:#x}", r.error, r.address),
    };
    Some(format!("host {}, ours {}", show(host), show(ours)))
}

/// Registers of which the upper half is the processor's choice: those of a repeated string instruction with 32-bit
/// addresses in 64-bit code before it has done anything.
fn open_halves(insn: &Instruction, case: &Case, faulted: bool) -> &'static [usize] {
    const RCX: usize = 1;
    let repeated = insn.is_string_instruction() && (insn.has_rep_prefix() || insn.has_repne_prefix());
    let short = (0..insn.op_count()).any(|i| is_short(insn.op_kind(i)));
    let idle = faulted || case.registers.gpr[RCX] as u32 == 0;
    if repeated && short && idle { &[RCX, 6, 7] } else { &[] }
}

/// Whether `insn` is CMPS or SCAS.
fn is_scan(insn: &Instruction) -> bool {
    is_cmps(insn) || matches!(insn.mnemonic(), M::Scasb | M::Scasw | M::Scasd | M::Scasq)
}

/// Which of its two operands CMPS reads first is the processor's choice.
fn is_cmps(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq) && insn.is_string_instruction()
}

/// Flags that the instruction leaves undefined.
fn undefined_flags(insn: &Instruction) -> u64 {
    use iced_x86::RflagsBits as B;
    let bits = insn.rflags_undefined();
    let mut mask = 0;
    if matches!(insn.mnemonic(), M::Rcl | M::Rcr) && insn.immediate8() != 1 {
        mask |= 0x800; // iced does not say so for a count of a whole turn
    }
    for (bit, flag) in [(B::CF, 1), (B::PF, 4), (B::AF, 0x10), (B::ZF, 0x40), (B::SF, 0x80), (B::OF, 0x800)] {
        if bits & bit != 0 {
            mask |= flag;
        }
    }
    mask
}

/// MXCSR bits that ours need not have. VCVTPS2PH: the precision flag beside an unmasked overflow or underflow,
/// which hosts set for a denormal source though the result, with an unbounded exponent, is exact.
fn open_mxcsr(insn: &Instruction, host: &Outcome) -> u32 {
    const SIMD: u64 = 19;
    const OVERFLOW_UNDERFLOW: u32 = 0x18;
    const PRECISION: u32 = 0x20;
    let mxcsr = host.registers.mxcsr();
    let unmasked = mxcsr & !(mxcsr >> 7) & OVERFLOW_UNDERFLOW;
    let is_narrowing = insn.mnemonic() == M::Vcvtps2ph;
    if is_narrowing && host.raised.vector == SIMD && unmasked != 0 { PRECISION } else { 0 }
}

fn x87_difference(host: &Outcome, ours: &Outcome, open: u16) -> Option<String> {
    let (a, b) = (&host.registers, &ours.registers);
    let words = |r: &crate::state::Registers| (r.x87_control(), r.x87_status() & !open, r.x87_in_use());
    if words(a) != words(b) {
        return Some(format!("x87 control, status, tags: host {:x?}, ours {:x?}", words(a), words(b)));
    }
    let i = (0..8).find(|&i| a.st(i) != b.st(i))?;
    Some(format!("st({i}): host {:x?}, ours {:x?}", a.st(i), b.st(i)))
}

fn memory_difference(insn: &Instruction, case: &Case, host: &Outcome, ours: &Outcome) -> Option<String> {
    // Intel's processors write the significand of 80 bits before the rest faults; ours writes nothing.
    let faulted = host.raised.vector != Raised::NONE;
    if faulted && insn.mnemonic() == M::Fstp && insn.memory_size().size() == 10 {
        return (ours.window != case.window).then(|| "ours faults and has written something".into());
    }
    let open = open_memory(insn, case);
    let at =
        (0..WINDOW).find(|i| host.window[*i] != ours.window[*i] && !open.iter().any(|r| r.contains(i)))?;
    let end = (at + 16).min(WINDOW);
    Some(format!(
        "memory at {:#x}: host {:02x?}, ours {:02x?}",
        case.window_at + at as u64,
        &host.window[at..end],
        &ours.window[at..end]
    ))
}

/// Bytes that instructions which save the x87 state fill with its instruction and data pointers: ours are
/// current, the child's are not known.
fn open_memory(insn: &Instruction, case: &Case) -> Vec<Range<usize>> {
    let (from, to) = match insn.mnemonic() {
        M::Fxsave
        | M::Fxsave64
        | M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64 => return from_operand(insn, case, &[6..24, 28..32]), // and MXCSR's mask
        M::Fnstenv | M::Fnsave if matches!(insn.memory_size().size(), 28 | 108) => (12, 28),
        M::Fnstenv | M::Fnsave => (6, 14),
        // Recent processors write 16 bits, others zero-extend.
        M::Push if insn.op0_register().is_segment_register() => (2, 4),
        _ => return Vec::new(),
    };
    from_operand(insn, case, std::slice::from_ref(&(from..to)))
}

/// The first bytes of the memory operand, if there is one in the window.
pub fn operand_bytes(case: &Case) -> Option<&[u8]> {
    let mut factory = InstructionInfoFactory::new();
    let memory = factory.info(&decode(case)).used_memory().first().copied()?;
    let at = crate::generate::linear(&memory, case).checked_sub(case.window_at)? as usize;
    case.window.get(at..at + 16)
}

/// Ranges that count from the memory operand, as ranges of the window.
fn from_operand(insn: &Instruction, case: &Case, ranges: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut factory = InstructionInfoFactory::new();
    let Some(memory) = factory.info(insn).used_memory().first().copied() else { return Vec::new() };
    let at = crate::generate::linear(&memory, case).wrapping_sub(case.window_at) as usize;
    ranges.iter().map(|r| at.wrapping_add(r.start)..at.wrapping_add(r.end)).collect()
}
