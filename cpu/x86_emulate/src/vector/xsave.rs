//! FXSAVE, FXRSTOR and the XSAVE family (SDM vol. 1, 10.5 and chapter 13).
//!
//! Components: x87 (0), SSE (1), AVX (2). The compacted format has AVX at the same place as the standard
//! one, because nothing lies before it. No supervisor components exist, so IA32_XSS is always 0 here.

use super::memory;
use crate::core::{Core, Fault};
use crate::cpu::{ExtendedState, reg};
use crate::lower::{LowerContext, raising};
use crate::mode::ModeKey;
use crate::op::{Handler, Op, Step};
use crate::x87::image;
use x86_decode::{Instruction, Mnemonic as M};
use x86_defs::control::{XCR0_AVX, XCR0_SSE, XCR0_X87};
use x86_defs::{Exception, flags};

const LEGACY: usize = 512;
const HEADER: usize = 64;
/// Place and size of the upper YMM halves.
const AVX_AT: usize = LEGACY + HEADER;
const AVX_BYTES: usize = 256;
const MXCSR_AT: usize = 24;
const ST_AT: usize = 32;
const XMM_AT: usize = 160;
/// Bit 63 of XCOMP_BV: compacted format.
const COMPACTED: u64 = 1 << 63;

/// Lowers these instructions.
pub fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let (run, is_xsave): (Handler<C>, bool) = match insn.mnemonic() {
        M::Fxsave | M::Fxsave64 => (fxsave::<C>, false),
        M::Fxrstor | M::Fxrstor64 => (fxrstor::<C>, false),
        M::Xsave | M::Xsave64 => (xsave::<C, PLAIN>, true),
        M::Xsaveopt | M::Xsaveopt64 => (xsave::<C, OPTIMISED>, true),
        M::Xsavec | M::Xsavec64 => (xsave::<C, COMPACT>, true),
        M::Xsaves | M::Xsaves64 => (xsave::<C, SUPERVISOR>, true),
        M::Xrstor | M::Xrstor64 => (xrstor::<C, false>, true),
        M::Xrstors | M::Xrstors64 => (xrstor::<C, true>, true),
        _ => return None,
    };
    let mode = ctx.mode;
    let supervisor = matches!(insn.mnemonic(), M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64);
    let exception = if is_xsave && !mode.has(ModeKey::OSXSAVE) {
        Some(Exception::InvalidOpcode)
    } else if mode.has(ModeKey::TS) || (!is_xsave && mode.has(ModeKey::EM)) {
        Some(Exception::DeviceNotAvailable)
    } else if supervisor && mode.cpl() != 0 {
        Some(Exception::GeneralProtection)
    } else {
        None
    };
    if let Some(exception) = exception {
        return Some(Op { len: insn.len() as u8, ..raising(exception, ctx) });
    }
    let mut op = ctx.op(insn, run);
    // `aux`: 64-bit instruction and data pointers.
    op.aux = u8::from(matches!(
        insn.mnemonic(),
        M::Fxsave64
            | M::Fxrstor64
            | M::Xsave64
            | M::Xsaveopt64
            | M::Xsavec64
            | M::Xsaves64
            | M::Xrstor64
            | M::Xrstors64
    ));
    Some(op)
}

const PLAIN: u8 = 0;
const OPTIMISED: u8 = 1;
const COMPACT: u8 = 2;
const SUPERVISOR: u8 = 3;

/// How many XMM registers the mode shows.
fn registers<C: Core>(c: &C) -> usize {
    if c.cpu().mode.is_long() { 16 } else { 8 }
}

/// The first 160 bytes: x87 environment, MXCSR, x87 registers.
fn legacy_head<C: Core>(c: &C, op: &Op<C>) -> [u8; XMM_AT] {
    let x = &c.cpu().x;
    let mut bytes = [0; XMM_AT];
    bytes[..MXCSR_AT].copy_from_slice(&image::fxsave_environment(&x.x87, op.aux != 0));
    bytes[MXCSR_AT..MXCSR_AT + 4].copy_from_slice(&x.mxcsr.to_le_bytes());
    bytes[MXCSR_AT + 4..MXCSR_AT + 8].copy_from_slice(&flags::MXCSR_MASK.to_le_bytes());
    bytes[ST_AT..].copy_from_slice(&image::fxsave_registers(&x.x87));
    bytes
}

fn xmm_bytes(x: &ExtendedState) -> [u8; 256] {
    halves(x, 0)
}

/// Low (0) or high (16) 16 bytes of each register.
fn halves(x: &ExtendedState, from: usize) -> [u8; 256] {
    let mut bytes = [0; 256];
    for (chunk, v) in bytes.chunks_exact_mut(16).zip(&x.ymm) {
        chunk.copy_from_slice(&memory::to_bytes(v)[from..from + 16]);
    }
    bytes
}

/// The reverse of [`halves`], for the first `count` registers.
fn set_halves(x: &mut ExtendedState, bytes: &[u8; 256], word: usize, count: usize) {
    for (v, chunk) in x.ymm.iter_mut().zip(bytes.chunks_exact(16)).take(count) {
        v[word] = u64_at(chunk, 0);
        v[word + 1] = u64_at(chunk, 8);
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).map_or(0, |b| b.iter().rev().fold(0, |acc, &x| acc << 8 | u64::from(x)))
}

fn fxsave<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let save = |c: &mut C| -> Result<(), Fault> {
        let linear = op.linear_write(c, LEGACY as u64)?;
        memory::aligned(c, linear, 16)?;
        c.probe(linear, LEGACY as u64, true)?;
        let end = XMM_AT + 16 * registers(c);
        let mut bytes = [0; XMM_AT + 256];
        bytes[..XMM_AT].copy_from_slice(&legacy_head(c, op));
        bytes[XMM_AT..].copy_from_slice(&xmm_bytes(&c.cpu().x));
        c.store_bytes(linear, &bytes[..end])
    };
    super::step(save(c))
}

fn fxrstor<C: Core>(c: &mut C, op: &Op<C>) -> Step {
    let restore = |c: &mut C| -> Result<(), Fault> {
        let linear = op.linear_read(c, LEGACY as u64)?;
        memory::aligned(c, linear, 16)?;
        let mut bytes = [0; LEGACY];
        c.load_bytes(linear, &mut bytes)?;
        let mxcsr = mxcsr_in(c, &bytes)?;
        let count = registers(c);
        let x = &mut c.cpu_mut().x;
        x.mxcsr = mxcsr;
        restore_x87(x, &bytes, op.aux != 0);
        restore_xmm(x, &bytes, count);
        Ok(())
    };
    super::step(restore(c))
}

/// MXCSR of a save area, or #GP(0) if a reserved bit is set.
fn mxcsr_in<C: Core>(c: &mut C, bytes: &[u8]) -> Result<u32, Fault> {
    let mxcsr = u64_at(bytes, MXCSR_AT) as u32;
    if mxcsr & !flags::MXCSR_MASK != 0 { Err(c.gp(0)) } else { Ok(mxcsr) }
}

fn restore_x87(x: &mut ExtendedState, bytes: &[u8; LEGACY], wide: bool) {
    let (environment, registers) = (bytes.first_chunk(), bytes[ST_AT..].first_chunk());
    if let (Some(environment), Some(registers)) = (environment, registers) {
        image::fxrstor(&mut x.x87, environment, registers, wide);
    }
}

fn restore_xmm(x: &mut ExtendedState, bytes: &[u8; LEGACY], count: usize) {
    if let Some(xmm) = bytes[XMM_AT..].first_chunk() {
        set_halves(x, xmm, 0, count);
    }
}

/// Components that are not in their initial configuration (XINUSE).
fn in_use(x: &ExtendedState) -> u64 {
    let mut components = 0;
    if x.x87 != crate::cpu::X87::default() {
        components |= XCR0_X87;
    }
    if x.ymm.iter().any(|v| v[0] | v[1] != 0) {
        components |= XCR0_SSE;
    }
    if x.ymm.iter().any(|v| v[2] | v[3] != 0) {
        components |= XCR0_AVX;
    }
    components
}

/// The requested components that are enabled: XCR0 and EDX:EAX.
fn requested<C: Core>(c: &C) -> u64 {
    let cpu = c.cpu();
    let mask = (cpu.gpr[reg::RDX] & 0xFFFF_FFFF) << 32 | cpu.gpr[reg::RAX] & 0xFFFF_FFFF;
    mask & cpu.xcr0
}

fn xsave<C: Core, const KIND: u8>(c: &mut C, op: &Op<C>) -> Step {
    super::step(try_xsave::<C, KIND>(c, op))
}

fn try_xsave<C: Core, const KIND: u8>(c: &mut C, op: &Op<C>) -> Result<(), Fault> {
    let wanted = requested(c);
    let compact = KIND == COMPACT || KIND == SUPERVISOR;
    let mut used = in_use(&c.cpu().x) & wanted;
    if KIND != PLAIN && wanted & XCR0_SSE != 0 && c.cpu().x.mxcsr != flags::MXCSR_RESET {
        used |= XCR0_SSE;
    }
    let written = if KIND == PLAIN { wanted } else { used };
    let bytes = if wanted & XCR0_AVX != 0 { AVX_AT + AVX_BYTES } else { AVX_AT } as u64;
    let linear = op.linear_write(c, bytes)?;
    memory::aligned(c, linear, 64)?;
    c.probe(linear, bytes, true)?;

    let at = |offset: usize| linear.wrapping_add(offset as u64);
    let head = legacy_head(c, op);
    if written & XCR0_X87 != 0 {
        c.store_bytes(linear, &head[..MXCSR_AT])?;
        c.store_bytes(at(ST_AT), &head[ST_AT..])?;
    }
    let with_mxcsr = if compact { written & XCR0_SSE } else { wanted & (XCR0_SSE | XCR0_AVX) };
    if with_mxcsr != 0 {
        c.store_bytes(at(MXCSR_AT), &head[MXCSR_AT..ST_AT])?;
    }
    let count = registers(c);
    if written & XCR0_SSE != 0 {
        let xmm = xmm_bytes(&c.cpu().x);
        c.store_bytes(at(XMM_AT), &xmm[..16 * count])?;
    }
    if written & XCR0_AVX != 0 {
        let upper = halves(&c.cpu().x, 16);
        c.store_bytes(at(AVX_AT), &upper[..16 * count])?;
    }
    if compact {
        c.store(at(LEGACY), used)?;
        c.store(at(LEGACY + 8), COMPACTED | wanted)
    } else {
        let old: u64 = c.load(at(LEGACY))?;
        c.store(at(LEGACY), old & !wanted | used)
    }
}

fn xrstor<C: Core, const SUPERVISOR_FORM: bool>(c: &mut C, op: &Op<C>) -> Step {
    super::step(try_xrstor::<C, SUPERVISOR_FORM>(c, op))
}

fn try_xrstor<C: Core, const SUPERVISOR_FORM: bool>(c: &mut C, op: &Op<C>) -> Result<(), Fault> {
    let wanted = requested(c);
    let linear = op.linear_read(c, AVX_AT as u64)?;
    memory::aligned(c, linear, 64)?;
    let mut bytes = [0; AVX_AT + AVX_BYTES];
    c.load_bytes(linear, &mut bytes[..AVX_AT])?;
    let (present, layout) = (u64_at(&bytes, LEGACY), u64_at(&bytes, LEGACY + 8));
    let compact = layout & COMPACTED != 0;
    let enabled = c.cpu().xcr0;
    let zero_to = if compact { HEADER } else { 24 };
    let reserved_clear = bytes[LEGACY + 16..LEGACY + zero_to].iter().all(|b| *b == 0);
    let valid = if compact {
        layout & !COMPACTED & !enabled == 0 && present & !layout == 0 && present & COMPACTED == 0
    } else {
        layout == 0 && present & !enabled == 0
    };
    if !valid || !reserved_clear || (SUPERVISOR_FORM && !compact) {
        return Err(c.gp(0));
    }
    let loaded = wanted & present;
    if loaded & XCR0_AVX != 0 {
        let linear = op.linear_read(c, bytes.len() as u64)?;
        c.load_bytes(linear.wrapping_add(AVX_AT as u64), &mut bytes[AVX_AT..])?;
    }
    let from_memory = if compact { loaded & XCR0_SSE } else { wanted & (XCR0_SSE | XCR0_AVX) };
    let mxcsr = if from_memory != 0 {
        Some(mxcsr_in(c, &bytes)?)
    } else if wanted & XCR0_SSE != 0 {
        Some(flags::MXCSR_RESET)
    } else {
        None
    };
    let count = registers(c);
    restore(&mut c.cpu_mut().x, &bytes, wanted, loaded, count, op.aux != 0);
    if let Some(mxcsr) = mxcsr {
        c.cpu_mut().x.mxcsr = mxcsr;
    }
    Ok(())
}

/// Loads the components of `loaded`, and puts those `wanted` beside them into their initial configuration.
fn restore(
    x: &mut ExtendedState,
    bytes: &[u8; AVX_AT + AVX_BYTES],
    wanted: u64,
    loaded: u64,
    count: usize,
    wide: bool,
) {
    let Some(legacy) = bytes.first_chunk::<LEGACY>() else { return };
    if loaded & XCR0_X87 != 0 {
        restore_x87(x, legacy, wide);
    } else if wanted & XCR0_X87 != 0 {
        x.x87 = crate::cpu::X87::default();
    }
    if loaded & XCR0_SSE != 0 {
        restore_xmm(x, legacy, count);
    } else if wanted & XCR0_SSE != 0 {
        set_halves(x, &[0; 256], 0, count);
    }
    if let (true, Some(upper)) = (loaded & XCR0_AVX != 0, bytes[AVX_AT..].first_chunk()) {
        set_halves(x, upper, 2, count);
    } else if wanted & XCR0_AVX != 0 {
        set_halves(x, &[0; 256], 2, count);
    }
}
