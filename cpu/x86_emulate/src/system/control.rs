//! Control registers: MOV CR, LMSW, SMSW, CLTS, XGETBV, XSETBV (SDM vol. 3, 2.5, 4.1, 9.8.5).

use super::misc::{edx_eax, set_edx_eax};
use super::{handler, require_cpl0, require_no_umip};
use crate::core::{Core, Fault, PagingChange};
use crate::cpu::{Cpu, reg};
use crate::integer::write_reg;
use crate::lower::{LowerContext, gpr};
use crate::op::{Op, Step};
use x86_decode::{Code, Instruction, Mnemonic, OpKind, Register};
use x86_defs::control::*;
use x86_defs::cpuid::Feature;
use x86_defs::paging::PHYSICAL_ADDRESS_BITS;

/// CR0 bits whose change makes translations stale.
const CR0_PAGING: u64 = CR0_PG | CR0_WP | CR0_PE;
/// CR4 bits whose change makes translations stale.
const CR4_PAGING: u64 = CR4_PSE | CR4_PAE | CR4_PGE | CR4_PCIDE | CR4_SMEP | CR4_SMAP;
/// CR4 bits whose change reloads the PDPTEs.
const CR4_PDPTE: u64 = CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP;
/// Bits of a PAE page-directory pointer that must be zero when it is present.
const PDPTE_RESERVED: u64 = !0 << PHYSICAL_ADDRESS_BITS | 0x1E6;
/// In CR3's new value with PCIDs: keep the PCID's translations.
const CR3_KEEP: u64 = 1 << 63;

fn read_cr<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_cpl0(c)?;
    let value = match op.aux {
        0 => c.cpu().cr0,
        2 => c.cpu().cr2,
        3 => c.cpu().cr3,
        4 => c.cpu().cr4,
        _ => u64::from(c.tpr() >> 4),
    };
    let value = if op.width == 8 { value } else { value & 0xFFFF_FFFF };
    c.cpu_mut().gpr[(op.dst & 31) as usize] = value;
    Ok(Step::Next)
}

fn write_cr<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_cpl0(c)?;
    let value = c.cpu().gpr[(op.src & 31) as usize];
    let value = if op.width == 8 { value } else { value & 0xFFFF_FFFF };
    match op.aux {
        0 => set_cr0(c, value)?,
        2 => {
            c.cpu_mut().cr2 = value;
            return Ok(Step::Next);
        }
        3 => set_cr3(c, value)?,
        4 => set_cr4(c, value)?,
        _ if value > 15 => return Err(c.gp(0)),
        _ => c.set_tpr((value as u8) << 4),
    }
    Ok(op.end_block(c))
}

/// The page-directory pointers at CR3 with PAE paging; #GP(0) if one has reserved bits set.
fn load_pdptes<C: Core>(c: &mut C, cr3: u64) -> Result<[u64; 4], Fault> {
    let mut entries = [0; 4];
    for (i, entry) in entries.iter_mut().enumerate() {
        *entry = c.load_physical((cr3 & 0xFFFF_FFE0) + i as u64 * 8);
        if *entry & 1 != 0 && *entry & PDPTE_RESERVED != 0 {
            return Err(c.gp(0));
        }
    }
    Ok(entries)
}

fn uses_pdptes(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0 && efer & EFER_LMA == 0
}

fn set_cr0<C: Core>(c: &mut C, value: u64) -> Result<(), Fault> {
    let has = |bit: u64| value & bit != 0;
    let upper = value >> 32 != 0;
    let value = value & CR0_ALL | CR0_ET;
    if upper || has(CR0_PG) && !has(CR0_PE) || has(CR0_NW) && !has(CR0_CD) {
        return Err(c.gp(0));
    }
    let cpu = c.cpu();
    let (old, cr3, cr4) = (cpu.cr0, cpu.cr3, cpu.cr4);
    let mut efer = cpu.efer;
    let code_is_long = cpu.seg[1].attributes.long();
    if has(CR0_PG) && old & CR0_PG == 0 {
        if efer & EFER_LME != 0 {
            let tss16 = cpu.tr.attributes.kind() & 8 == 0;
            if cr4 & CR4_PAE == 0 || code_is_long || tss16 && old & CR0_PE != 0 && cpu.tr.selector != 0 {
                return Err(c.gp(0));
            }
            efer |= EFER_LMA;
        }
    } else if !has(CR0_PG) && old & CR0_PG != 0 {
        if cr4 & CR4_PCIDE != 0 || efer & EFER_LMA != 0 && code_is_long {
            return Err(c.gp(0));
        }
        efer &= !EFER_LMA;
    }
    let pdptes_change = (old ^ value) & (CR0_CD | CR0_NW | CR0_PG) != 0;
    if uses_pdptes(value, cr4, efer) && pdptes_change {
        c.cpu_mut().pdpte = load_pdptes(c, cr3)?;
    }
    let cpu = c.cpu_mut();
    cpu.cr0 = value;
    cpu.efer = efer;
    cpu.refresh();
    if (old ^ value) & CR0_PAGING != 0 {
        c.paging_changed(PagingChange::All);
    }
    Ok(())
}

fn set_cr3<C: Core>(c: &mut C, value: u64) -> Result<(), Fault> {
    let cpu = c.cpu();
    let pcids = cpu.cr4 & CR4_PCIDE != 0;
    let keep = pcids && value & CR3_KEEP != 0;
    let value = if pcids { value & !CR3_KEEP } else { value };
    if value >> PHYSICAL_ADDRESS_BITS != 0 {
        return Err(c.gp(0));
    }
    if uses_pdptes(cpu.cr0, cpu.cr4, cpu.efer) {
        c.cpu_mut().pdpte = load_pdptes(c, value)?;
    }
    c.cpu_mut().cr3 = value;
    c.paging_changed(PagingChange::Cr3 { keep });
    Ok(())
}

/// CR4 bits of the CPU model.
fn cr4_bits<C: Core>(c: &C) -> u64 {
    const FEATURES: [(Feature, u64); 18] = [
        (Feature::Vme, CR4_VME | CR4_PVI),
        (Feature::Tsc, CR4_TSD),
        (Feature::De, CR4_DE),
        (Feature::Pse, CR4_PSE),
        (Feature::Pae, CR4_PAE),
        (Feature::Mce, CR4_MCE),
        (Feature::Pge, CR4_PGE),
        (Feature::Msr, CR4_PCE),
        (Feature::Fxsr, CR4_OSFXSR),
        (Feature::Sse, CR4_OSXMMEXCPT),
        (Feature::Umip, CR4_UMIP),
        (Feature::Fsgsbase, CR4_FSGSBASE),
        (Feature::Pcid, CR4_PCIDE),
        (Feature::Xsave, CR4_OSXSAVE),
        (Feature::Smep, CR4_SMEP),
        (Feature::Smap, CR4_SMAP),
        (Feature::Pse36, CR4_PSE),
        (Feature::Sse2, CR4_OSXMMEXCPT),
    ];
    FEATURES.iter().filter(|(f, _)| c.has_feature(*f)).fold(0, |bits, (_, b)| bits | b)
}

fn set_cr4<C: Core>(c: &mut C, value: u64) -> Result<(), Fault> {
    if value & !cr4_bits(c) != 0 {
        return Err(c.gp(0));
    }
    let Cpu { cr0, cr3, cr4: old, efer, .. } = *c.cpu();
    let long = efer & EFER_LMA != 0;
    let gains = |bit: u64| value & !old & bit != 0;
    if long && value & CR4_PAE == 0 || gains(CR4_PCIDE) && (!long || cr3 & 0xFFF != 0) {
        return Err(c.gp(0));
    }
    if uses_pdptes(cr0, value, efer) && (old ^ value) & CR4_PDPTE != 0 {
        c.cpu_mut().pdpte = load_pdptes(c, cr3)?;
    }
    c.cpu_mut().cr4 = value;
    c.cpu_mut().refresh();
    if (old ^ value) & CR4_PAGING != 0 {
        c.paging_changed(PagingChange::All);
    }
    Ok(())
}

/// LMSW: the low four bits of CR0; PE can only be set.
fn lmsw<C: Core, const MEM: bool>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_cpl0(c)?;
    let value = if MEM {
        let at = op.linear_read(c, 2)?;
        u64::from(c.load::<u16>(at)?)
    } else {
        c.cpu().gpr[(op.dst & 31) as usize]
    };
    let cr0 = c.cpu().cr0;
    set_cr0(c, cr0 & !0xE | value & 0xF)?;
    Ok(op.end_block(c))
}

fn smsw<C: Core, const MEM: bool>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_no_umip(c)?;
    let cr0 = c.cpu().cr0;
    if MEM {
        let at = op.linear_write(c, 2)?;
        c.store(at, cr0 as u16)?;
        return Ok(Step::Next);
    }
    match op.width {
        2 => write_reg(c, op.dst, cr0 as u16),
        4 => write_reg(c, op.dst, cr0 as u32),
        _ => write_reg(c, op.dst, cr0),
    }
    Ok(Step::Next)
}

fn clts<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_cpl0(c)?;
    let cpu = c.cpu_mut();
    cpu.cr0 &= !CR0_TS;
    cpu.update_mode();
    Ok(op.end_block(c))
}

fn require_osxsave<C: Core>(c: &mut C) -> Result<(), Fault> {
    if c.cpu().cr4 & CR4_OSXSAVE == 0 { Err(c.ud()) } else { Ok(()) }
}

/// Components of XCR0 that are not in their initial state (XINUSE).
fn components_in_use(cpu: &Cpu) -> u64 {
    let x = &cpu.x;
    let initial = crate::cpu::X87::default();
    let mut used = 0;
    if x.x87 != initial {
        used |= XCR0_X87;
    }
    if x.mxcsr != x86_defs::flags::MXCSR_RESET || x.ymm.iter().any(|r| r[0] | r[1] != 0) {
        used |= XCR0_SSE;
    }
    if x.ymm.iter().any(|r| r[2] | r[3] != 0) {
        used |= XCR0_AVX;
    }
    used
}

fn xgetbv<C: Core>(c: &mut C, _: &Op<C>) -> Result<Step, Fault> {
    require_osxsave(c)?;
    let value = match c.cpu().gpr[reg::RCX] as u32 {
        0 => c.cpu().xcr0,
        1 if c.has_feature(Feature::Xgetbv1) => c.cpu().xcr0 & components_in_use(c.cpu()),
        _ => return Err(c.gp(0)),
    };
    set_edx_eax(c, value);
    Ok(Step::Next)
}

fn xsetbv<C: Core>(c: &mut C, op: &Op<C>) -> Result<Step, Fault> {
    require_osxsave(c)?;
    require_cpl0(c)?;
    let value = edx_eax(c);
    let supported = XCR0_X87 | XCR0_SSE | if c.has_feature(Feature::Avx) { XCR0_AVX } else { 0 };
    let avx_alone = value & (XCR0_AVX | XCR0_SSE) == XCR0_AVX;
    if c.cpu().gpr[reg::RCX] as u32 != 0 || value & XCR0_X87 == 0 || value & !supported != 0 || avx_alone {
        return Err(c.gp(0));
    }
    c.cpu_mut().xcr0 = value;
    c.cpu_mut().update_mode();
    Ok(op.end_block(c))
}

/// Number of a control register that exists.
fn number(register: Register) -> Option<u8> {
    let n = (register as u8).checked_sub(Register::CR0 as u8)?;
    matches!(n, 0 | 2 | 3 | 4 | 8).then_some(n)
}

pub(super) fn lower<C: Core>(insn: &Instruction, ctx: &LowerContext) -> Option<Op<C>> {
    let memory = insn.op_count() > 0 && insn.op0_kind() == OpKind::Memory;
    let simple = |run| Some(ctx.op(insn, run));
    match insn.mnemonic() {
        Mnemonic::Mov => match insn.code() {
            Code::Mov_r32_cr | Code::Mov_r64_cr => {
                let mut op = ctx.op(insn, handler!(read_cr));
                op.aux = number(insn.op1_register())?;
                op.dst = gpr(insn.op0_register());
                op.width = insn.op0_register().size() as u8;
                Some(op)
            }
            Code::Mov_cr_r32 | Code::Mov_cr_r64 => {
                let mut op = ctx.op(insn, handler!(write_cr));
                op.aux = number(insn.op0_register())?;
                op.src = gpr(insn.op1_register());
                op.width = insn.op1_register().size() as u8;
                Some(op)
            }
            _ => None,
        },
        Mnemonic::Lmsw | Mnemonic::Smsw => {
            let run = match (insn.mnemonic() == Mnemonic::Lmsw, memory) {
                (true, true) => handler!(lmsw::<C, true>),
                (true, false) => handler!(lmsw::<C, false>),
                (false, true) => handler!(smsw::<C, true>),
                (false, false) => handler!(smsw::<C, false>),
            };
            let mut op = ctx.op(insn, run);
            if !memory {
                op.dst = gpr(insn.op0_register());
                op.width = insn.op0_register().size() as u8;
            }
            Some(op)
        }
        Mnemonic::Clts => simple(handler!(clts)),
        Mnemonic::Xgetbv => simple(handler!(xgetbv)),
        Mnemonic::Xsetbv => simple(handler!(xsetbv)),
        _ => None,
    }
}
