//! The guest's registers between `x86_emulate::Cpu` and the VMCS.
//!
//! Called by: `vcpu`, around the guest. General registers besides RSP are moved by the switch itself; CR2, MSRs that are no
//! fields and extended state by `vcpu`.

use crate::controls::enter;
use crate::segments::{self, Mode};
use crate::vmcs::{Fields, control, guest};
use x86_defs::control::*;
use x86_defs::flags;
use x86_emulate::Cpu;
use x86_emulate::cpu::{RIP, reg};

/// CR0 bits that the guest changes without an exit. The others are the interpreter's, which knows what else they change.
pub const CR0_OWN: u64 = CR0_MP | CR0_EM | CR0_TS | CR0_WP | CR0_AM;
/// CR4 bits of that kind.
pub const CR4_OWN: u64 = CR4_TSD | CR4_PGE;
/// CR0 bits that never reach the processor: caching is the host's.
const CR0_HIDDEN: u64 = CR0_CD | CR0_NW;
const CR4_VMXE: u64 = 1 << 13;

/// Interruptibility (SDM vol. 3C, table 25-3).
const BY_STI: u64 = 1 << 0;
const BY_MOV_SS: u64 = 1 << 1;
const BY_NMI: u64 = 1 << 3;

fn uses_pdptes(cpu: &Cpu) -> bool {
    cpu.cr0 & CR0_PG != 0 && cpu.cr4 & CR4_PAE != 0 && cpu.efer & EFER_LMA == 0
}

fn interruptibility(cpu: &Cpu) -> u64 {
    let shadow = match (cpu.interrupt_shadow, cpu.shadow_blocks_debug || cpu.rflags & flags::IF == 0) {
        (false, _) => 0,
        // Blocking by STI wants IF.
        (true, true) => BY_MOV_SS,
        (true, false) => BY_STI,
    };
    shadow | if cpu.nmi_blocked { BY_NMI } else { 0 }
}

/// Into the VMCS. True if what the processor cached of the guest's paging does not hold any more.
pub fn load(cpu: &Cpu, fields: &mut impl Fields) -> bool {
    let long = cpu.efer & EFER_LMA != 0;
    let rflags = cpu.rflags_all();
    let mode = Mode { long, virtual_8086: rflags & flags::VM != 0, cpl: cpu.cpl };
    segments::load(fields, &cpu.seg, mode);
    segments::load_ldtr(fields, &cpu.ldtr);
    segments::load_tr(fields, &cpu.tr, long);
    let mut stale = false;
    for (field, value) in [
        (guest::EFER, cpu.efer),
        (guest::CR0, cpu.cr0 & !CR0_HIDDEN | CR0_NE),
        (guest::CR3, cpu.cr3),
        (guest::CR4, cpu.cr4 | CR4_VMXE),
    ] {
        stale |= fields.get(field) != value;
        fields.set(field, value);
    }
    let entry = fields.get(control::ENTRY) & !u64::from(enter::LONG_MODE);
    let shadow = interruptibility(cpu);
    // A step that waits for the end of a shadow is pending (SDM vol. 3C, 27.3.1.5).
    let step = shadow & (BY_STI | BY_MOV_SS) != 0 && rflags & flags::TF != 0;
    let code_is_long = long && cpu.seg[x86_defs::SegmentIndex::Cs as usize].attributes.long();
    for (field, value) in [
        (control::ENTRY, entry | if long { u64::from(enter::LONG_MODE) } else { 0 }),
        (control::CR0_SHADOW, cpu.cr0),
        (control::CR4_SHADOW, cpu.cr4),
        (guest::GDTR_BASE, cpu.gdtr.base),
        (guest::GDTR_LIMIT, u64::from(cpu.gdtr.limit)),
        (guest::IDTR_BASE, cpu.idtr.base),
        (guest::IDTR_LIMIT, u64::from(cpu.idtr.limit)),
        (guest::DR7, cpu.dr[7] & 0xFFFF_FFFF),
        (guest::RFLAGS, rflags),
        (guest::RIP, if code_is_long { cpu.gpr[RIP] } else { cpu.gpr[RIP] & 0xFFFF_FFFF }),
        (guest::RSP, cpu.gpr[reg::RSP]),
        (guest::PAT, cpu.msrs.pat),
        (guest::SYSENTER_CS, cpu.msrs.sysenter_cs),
        (guest::SYSENTER_ESP, cpu.msrs.sysenter_esp),
        (guest::SYSENTER_EIP, cpu.msrs.sysenter_eip),
        (guest::INTERRUPTIBILITY, shadow),
        (guest::PENDING_DEBUG, if step { DR6_BS } else { 0 }),
    ] {
        fields.set(field, value);
    }
    if uses_pdptes(cpu) {
        (0..).zip(cpu.pdpte).for_each(|(n, entry)| fields.set(guest::pdpte(n), entry));
    }
    stale
}

/// Out of the VMCS.
pub fn store(fields: &impl Fields, cpu: &mut Cpu) {
    let long = cpu.efer & EFER_LMA != 0;
    segments::store(fields, &mut cpu.seg);
    cpu.cpl = cpu.seg[x86_defs::SegmentIndex::Ss as usize].attributes.dpl();
    cpu.ldtr = segments::ldtr(fields);
    cpu.tr = segments::tr(fields, &cpu.tr, long);
    (cpu.gdtr.base, cpu.gdtr.limit) = (fields.get(guest::GDTR_BASE), fields.get(guest::GDTR_LIMIT) as u16);
    (cpu.idtr.base, cpu.idtr.limit) = (fields.get(guest::IDTR_BASE), fields.get(guest::IDTR_LIMIT) as u16);
    cpu.cr0 = cpu.cr0 & !CR0_OWN | fields.get(guest::CR0) & CR0_OWN;
    cpu.cr3 = fields.get(guest::CR3);
    cpu.cr4 = cpu.cr4 & !CR4_OWN | fields.get(guest::CR4) & CR4_OWN;
    cpu.dr[7] = fields.get(guest::DR7);
    cpu.gpr[RIP] = fields.get(guest::RIP);
    cpu.gpr[reg::RSP] = fields.get(guest::RSP);
    let m = &mut cpu.msrs;
    m.sysenter_cs = fields.get(guest::SYSENTER_CS);
    (m.sysenter_esp, m.sysenter_eip) = (fields.get(guest::SYSENTER_ESP), fields.get(guest::SYSENTER_EIP));
    let interruptibility = fields.get(guest::INTERRUPTIBILITY);
    cpu.interrupt_shadow = interruptibility & (BY_STI | BY_MOV_SS) != 0;
    cpu.shadow_blocks_debug = interruptibility & BY_MOV_SS != 0;
    cpu.nmi_blocked = interruptibility & BY_NMI != 0;
    if uses_pdptes(cpu) {
        cpu.pdpte = core::array::from_fn(|n| fields.get(guest::pdpte(n as u32)));
    }
    cpu.set_rflags_all(fields.get(guest::RFLAGS));
    cpu.refresh();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmcs::tests::Table;
    use x86_defs::{Segment, SegmentAttributes};

    /// A processor in long mode with a different value in every register that the VMCS holds.
    fn busy() -> Cpu {
        let mut cpu = Cpu::default();
        for (n, segment) in (1..).zip(cpu.seg.iter_mut()) {
            let attributes = SegmentAttributes(0xC93);
            let base = u64::from(n) << 20;
            *segment = Segment { selector: n * 8, attributes, limit: u32::MAX, base, unusable: false };
        }
        cpu.seg[1].attributes = SegmentAttributes(0xA9B);
        cpu.tr = Segment { attributes: SegmentAttributes(0x8B), limit: 0x67, ..cpu.seg[0] };
        cpu.ldtr = Segment { attributes: SegmentAttributes(0x82), limit: 0x67, ..cpu.seg[0] };
        (cpu.ldtr.base, cpu.tr.base, cpu.gdtr.base, cpu.idtr.base) = (11, 12, 13, 14);
        (cpu.gdtr.limit, cpu.idtr.limit) = (0x7F, 0xFFF);
        (cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer) = (0xC005_0013, 0x1000, 0x6A0, 0xD01);
        cpu.dr[7] = 0x500;
        for (n, register) in (100..).zip(cpu.gpr[..17].iter_mut()) {
            *register = n;
        }
        let m = &mut cpu.msrs;
        (m.sysenter_cs, m.sysenter_esp, m.sysenter_eip) = (26, 27, 28);
        cpu.interrupt_shadow = true;
        cpu.nmi_blocked = true;
        cpu.set_rflags_all(0x0024_0A97);
        cpu.refresh();
        cpu
    }

    fn text(cpu: &Cpu) -> std::string::String {
        std::format!("{:?}", Cpu { flags: Default::default(), rflags: cpu.rflags_all(), ..cpu.clone() })
    }

    #[test]
    fn what_goes_in_comes_out() {
        let (cpu, mut table) = (busy(), Table::default());
        assert!(load(&cpu, &mut table));
        assert!(!load(&cpu, &mut table), "the same once more makes nothing stale");
        // What the guest changes without an exit is taken from the fields, the rest stays.
        let mut back = Cpu { cr0: cpu.cr0 & !CR0_WP, cr4: cpu.cr4 & !CR4_PGE, ..cpu.clone() };
        (back.gpr[reg::RSP], back.gpr[RIP], back.cr3, back.dr[7]) = (0, 0, 0, 0);
        (back.seg, back.ldtr, back.tr) = Default::default();
        (back.gdtr, back.idtr) = Default::default();
        (back.interrupt_shadow, back.nmi_blocked, back.msrs.sysenter_eip) = (false, false, 0);
        store(&table, &mut back);
        assert_eq!(text(&back), text(&cpu));
    }

    #[test]
    fn what_vmx_wants_is_not_the_guests() {
        let (cpu, mut table) = (busy(), Table::default());
        load(&cpu, &mut table);
        assert_eq!(table.get(guest::CR0), 0x8005_0033, "caches stay on, NE is set");
        assert_eq!((table.get(control::CR0_SHADOW), table.get(control::CR4_SHADOW)), (0xC005_0013, 0x6A0));
        assert_eq!(table.get(guest::CR4), 0x26A0);
        assert_ne!(table.get(control::ENTRY) & u64::from(enter::LONG_MODE), 0);
        load(&Cpu::default(), &mut table);
        assert_eq!(table.get(control::ENTRY) & u64::from(enter::LONG_MODE), 0);
    }

    #[test]
    fn shadows_are_as_the_processor_takes_them() {
        let mut cpu = busy();
        cpu.nmi_blocked = false;
        assert_eq!(interruptibility(&cpu), BY_STI);
        cpu.set_rflags_all(0x102);
        assert_eq!(interruptibility(&cpu), BY_MOV_SS, "blocking by STI wants IF");
        let mut table = Table::default();
        load(&cpu, &mut table);
        assert_eq!(table.get(guest::PENDING_DEBUG), DR6_BS);
        cpu.interrupt_shadow = false;
        load(&cpu, &mut table);
        assert_eq!((table.get(guest::INTERRUPTIBILITY), table.get(guest::PENDING_DEBUG)), (0, 0));
    }

    #[test]
    fn pae_pagings_pointers_are_kept() {
        let (mut cpu, mut table) = (busy(), Table::default());
        (cpu.efer, cpu.pdpte) = (0, [1, 2, 3, 4]);
        load(&cpu, &mut table);
        table.set(guest::pdpte(2), 0x77);
        store(&table, &mut cpu);
        assert_eq!(cpu.pdpte, [1, 2, 0x77, 4]);
    }
}
