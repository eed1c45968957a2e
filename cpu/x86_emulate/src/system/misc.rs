//! CPUID, time stamps, random numbers, HLT, cache and TLB instructions, fences, hints (SDM vol. 2).

use super::{handler, is_canonical, require_cpl0};
use crate::core::{Core, Fault, PagingChange};
use crate::cpu::reg;
use crate::integer::write_reg;
use crate::lower::{LowerContext, gpr};
use crate::op::{Op, Step};
use x86_decode::{Instruction, Mnemonic, OpKind};
use x86_defs::{control, flags};

fn cpuid<C: Core>(c: &mut C, _: &Op<C>) -> Result<Step, Fault> {
    let leaf = c.cpu().gpr[reg::RAX] as u32;
    let subleaf = c.cpu().gpr[reg::RCX] as u32;
    let [eax, ebx, ecx, edx] = c.cpuid(leaf, subleaf).map(u64::from);
    let gpr = &mut c.cpu_mut().gpr;
    (gpr[reg::RAX], gpr[reg::RBX], gpr[reg::RCX], gpr[reg::RDX]) = (eax, ebx, ecx, edx);
    Ok(Step::Next)
}

/// EDX:EAX.
pub(super) fn set_edx_eax<C: Core>(c: &mut C, value: u64) {
    let gpr = &mut c.cpu_mut().gpr;
    gpr[reg::RAX] = value & 0xFFFF_FFFF;
    gpr[reg::RDX] = value >> 32;
}
/// EDX:EAX.
pub(super) fn edx_eax<C: Core>(c: &C) -> u64 {
    let gpr = &c.cpu().gpr;
    gpr[reg::RAX] & 0xFFFF_FFFF | gpr[reg::RDX] << 32
}

fn rdtsc<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    if c.cpu().cr4 & control::CR4_TSD != 0 && c.cpu().cpl > 0 {
        return Err(c.gp(0));
    }
    let tsc = c.tsc();
    set_edx_eax(c, tsc);
    if op.aux != 0 {
        // RDTSCP
        let cpu = c.cpu_mut();
        cpu.gpr[reg::RCX] = cpu.msrs.tsc_aux & 0xFFFF_FFFF;
    }
    Ok(Step::Next)
}

fn rdpid<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let cpu = c.cpu_mut();
    cpu.gpr[(op.dst & 31) as usize] = cpu.msrs.tsc_aux & 0xFFFF_FFFF;
    Ok(Step::Next)
}

/// There are no performance counters.
fn rdpmc<C: Core>(c: &mut C, _: &Op<C>) -> Result<Step, Fault> {
    Err(c.gp(0))
}

/// RDRAND and RDSEED always succeed: CF is set, the other flags clear.
fn random<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let value = c.random();
    match op.width {
        2 => write_reg(c, op.dst, value as u16),
        4 => write_reg(c, op.dst, value as u32),
        _ => write_reg(c, op.dst, value),
    }
    c.cpu_mut().flags = crate::flags::LazyFlags::from_bits(flags::CF);
    Ok(Step::Next)
}

fn hlt<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_cpl0(c)?;
    op.end_block(c);
    c.cpu_mut().halted = true;
    Ok(Step::Exit)
}

fn invlpg<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_cpl0(c)?;
    let linear = c.cpu().seg_base[(op.seg & 7) as usize].wrapping_add(op.effective(c));
    // In 64-bit mode a non-canonical address is ignored.
    if !c.cpu().mode.is_long() || is_canonical(linear) {
        let linear = super::descriptor::wrap(c, linear);
        c.invalidate_page(linear);
    }
    Ok(op.end_block(c))
}

fn invpcid<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_cpl0(c)?;
    let kind = c.cpu().gpr[(op.dst & 31) as usize];
    let kind = if c.cpu().mode.is_long() { kind } else { kind & 0xFFFF_FFFF };
    let at = op.linear_read(c, 16)?;
    let mut raw = [0; 16];
    c.load_bytes(at, &mut raw)?;
    let words = u128::from_le_bytes(raw);
    let (low, linear) = (words as u64, (words >> 64) as u64);
    let pcid = (low & 0xFFF) as u16;
    let pcids_off = c.cpu().cr4 & control::CR4_PCIDE == 0;
    if kind > 3 || low >> 12 != 0 && kind < 2 || kind == 0 && !is_canonical(linear) {
        return Err(c.gp(0));
    }
    if kind < 2 && pcid != 0 && pcids_off {
        return Err(c.gp(0));
    }
    c.paging_changed(match kind {
        0 => PagingChange::Address { pcid, linear },
        1 => PagingChange::Pcid(pcid),
        2 => PagingChange::All,
        _ => PagingChange::AllNonGlobal,
    });
    Ok(op.end_block(c))
}

/// WBINVD, INVD: the caches are always coherent.
fn cache<C: Core>(c: &mut C, _: &Op<C>) -> Result<Step, Fault> {
    require_cpl0(c)?;
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    Ok(Step::Next)
}

/// CLFLUSH, CLFLUSHOPT, CLWB: faults as a read of one byte.
fn cache_line<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    let at = op.linear_read(c, 1)?;
    c.probe(at, 1, false)?;
    Ok(Step::Next)
}

/// MFENCE. LFENCE and SFENCE have nothing to do: handlers run in order, and the host's stores are ordered.
fn fence<C: Core>(_: &mut C, _: &Op<C>) -> Result<Step, Fault> {
    core::sync::atomic::fence(core::sync::atomic::Ordering::SeqCst);
    Ok(Step::Next)
}

/// VMCALL, VMMCALL: KVM's hypercall ABI, of which there is no call (ENOSYS as KVM numbers it; EPERM for user code).
fn hypercall<C: Core>(c: &mut C, _: &Op<C>) -> Result<Step, Fault> {
    let answer: i64 = if c.cpu().cpl == 0 { -1000 } else { -1 };
    if c.cpu().mode.is_long() {
        write_reg(c, reg::RAX as u8, answer as u64);
    } else {
        write_reg(c, reg::RAX as u8, answer as u32);
    }
    Ok(Step::Next)
}

/// Prefetches and hints: no effect, no fault.
fn nothing<C: Core>(_: &mut C, _: &Op<C>) -> Result<Step, Fault> {
    Ok(Step::Next)
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    use Mnemonic as M;
    let simple = |run| Some(ctx.op(insn, run));
    let with_register = |run| {
        let register = insn.op0_register();
        Some(Op { dst: gpr(register), width: register.size() as u8, ..ctx.op(insn, run) })
    };
    match insn.mnemonic() {
        M::Cpuid => simple(handler!(cpuid)),
        M::Rdtsc => simple(handler!(rdtsc)),
        M::Rdtscp => Some(Op { aux: 1, ..ctx.op(insn, handler!(rdtsc)) }),
        M::Rdpid => with_register(handler!(rdpid)),
        M::Rdpmc => simple(handler!(rdpmc)),
        M::Rdrand | M::Rdseed => with_register(handler!(random)),
        M::Hlt => simple(handler!(hlt)),
        M::Invlpg => simple(handler!(invlpg)),
        M::Invpcid => with_register(handler!(invpcid)),
        M::Wbinvd | M::Invd => simple(handler!(cache)),
        M::Clflush | M::Clflushopt | M::Clwb => simple(handler!(cache_line)),
        M::Vmcall | M::Vmmcall => simple(handler!(hypercall)),
        M::Mfence => simple(handler!(fence)),
        M::Lfence | M::Sfence => simple(handler!(nothing)),
        M::Prefetchnta | M::Prefetcht0 | M::Prefetcht1 | M::Prefetcht2 => simple(handler!(nothing)),
        M::Prefetch | M::Prefetchw | M::Prefetchwt1 | M::Cldemote => simple(handler!(nothing)),
        M::Prefetchit0 | M::Prefetchit1 => simple(handler!(nothing)),
        M::Rdsspd | M::Rdsspq => simple(handler!(nothing)),
        M::Bndmk | M::Bndcl | M::Bndcu | M::Bndcn | M::Bndmov | M::Bndldx | M::Bndstx
            if insn.op_kind(0) == OpKind::Register || insn.op_kind(0) == OpKind::Memory =>
        {
            simple(handler!(nothing))
        }
        _ => None,
    }
}
