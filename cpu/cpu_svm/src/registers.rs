//! The guest's registers between `x86_emulate::Cpu` and the VMCB's state-save area.
//!
//! Called by: `vcpu`, around VMRUN. General registers besides RAX and RSP are moved by the switch itself, extended state
//! by `cpu_hardware`.

use crate::vmcb::{Vmcb, control, save};
use x86_defs::control::{CR0_PE, CR0_PG, CR4_PAE, EFER_LMA};
use x86_emulate::Cpu;
use x86_emulate::cpu::{RIP, reg};

/// EFER.SVME: VMRUN wants it in the guest's EFER, where the guest must not see it.
pub const EFER_SVME: u64 = 1 << 12;

/// Into the VMCB. True if what the processor cached of the guest's paging does not hold any more.
pub fn load(cpu: &Cpu, vmcb: &mut Vmcb) -> bool {
    for (index, segment) in cpu.seg.iter().enumerate() {
        vmcb.set_segment(save::SEGMENTS + 16 * index, segment);
    }
    vmcb.set_segment(save::LDTR, &cpu.ldtr);
    vmcb.set_segment(save::TR, &cpu.tr);
    vmcb.set_table(save::GDTR, &cpu.gdtr);
    vmcb.set_table(save::IDTR, &cpu.idtr);
    vmcb.set(save::CPL, cpu.cpl);
    let mut stale = false;
    for (field, value) in
        [(save::EFER, cpu.efer | EFER_SVME), (save::CR0, cpu.cr0), (save::CR3, cpu.cr3), (save::CR4, cpu.cr4)]
    {
        stale |= vmcb.get(field) != value;
        vmcb.set(field, value);
    }
    for (field, value) in [
        (save::CR2, cpu.cr2),
        (save::DR6, cpu.dr[6]),
        (save::DR7, cpu.dr[7]),
        (save::RFLAGS, cpu.rflags_all()),
        (save::RIP, cpu.gpr[RIP]),
        (save::RSP, cpu.gpr[reg::RSP]),
        (save::RAX, cpu.gpr[reg::RAX]),
        (save::STAR, cpu.msrs.star),
        (save::LSTAR, cpu.msrs.lstar),
        (save::CSTAR, cpu.msrs.cstar),
        (save::SFMASK, cpu.msrs.sfmask),
        (save::KERNEL_GS_BASE, cpu.msrs.kernel_gs_base),
        (save::SYSENTER_CS, cpu.msrs.sysenter_cs),
        (save::SYSENTER_ESP, cpu.msrs.sysenter_esp),
        (save::SYSENTER_EIP, cpu.msrs.sysenter_eip),
        (save::PAT, cpu.msrs.pat),
    ] {
        vmcb.set(field, value);
    }
    vmcb.set(control::INTERRUPT_SHADOW, u64::from(cpu.interrupt_shadow));
    stale
}

/// Out of the VMCB. True if the page-directory pointers of PAE paging must be read anew: this processor keeps none.
pub fn store(vmcb: &Vmcb, cpu: &mut Cpu) -> bool {
    for (index, segment) in cpu.seg.iter_mut().enumerate() {
        *segment = vmcb.segment(save::SEGMENTS + 16 * index);
    }
    cpu.cpl = vmcb.get(save::CPL) & 3;
    // The privilege level is SS's DPL in a saved state; after SYSCALL and with a null selector it is not here.
    let ss = &mut cpu.seg[x86_defs::SegmentIndex::Ss as usize];
    if vmcb.get(save::CR0) & CR0_PE != 0 {
        ss.attributes.0 = ss.attributes.0 & !0x60 | u16::from(cpu.cpl) << 5;
    }
    cpu.seg[x86_defs::SegmentIndex::Cs as usize].unusable = false;
    cpu.ldtr = vmcb.segment(save::LDTR);
    cpu.tr = vmcb.segment(save::TR);
    cpu.gdtr = vmcb.table(save::GDTR);
    cpu.idtr = vmcb.table(save::IDTR);
    cpu.efer = vmcb.get(save::EFER) & !EFER_SVME;
    (cpu.cr0, cpu.cr2) = (vmcb.get(save::CR0), vmcb.get(save::CR2));
    (cpu.cr3, cpu.cr4) = (vmcb.get(save::CR3), vmcb.get(save::CR4));
    (cpu.dr[6], cpu.dr[7]) = (vmcb.get(save::DR6), vmcb.get(save::DR7));
    cpu.gpr[RIP] = vmcb.get(save::RIP);
    cpu.gpr[reg::RSP] = vmcb.get(save::RSP);
    cpu.gpr[reg::RAX] = vmcb.get(save::RAX);
    let m = &mut cpu.msrs;
    (m.star, m.lstar, m.cstar) = (vmcb.get(save::STAR), vmcb.get(save::LSTAR), vmcb.get(save::CSTAR));
    (m.sfmask, m.kernel_gs_base) = (vmcb.get(save::SFMASK), vmcb.get(save::KERNEL_GS_BASE));
    m.sysenter_cs = vmcb.get(save::SYSENTER_CS);
    (m.sysenter_esp, m.sysenter_eip) = (vmcb.get(save::SYSENTER_ESP), vmcb.get(save::SYSENTER_EIP));
    cpu.interrupt_shadow = vmcb.get(control::INTERRUPT_SHADOW) & 1 != 0;
    cpu.shadow_blocks_debug = false;
    cpu.set_rflags_all(vmcb.get(save::RFLAGS));
    cpu.refresh();
    cpu.cr0 & CR0_PG != 0 && cpu.cr4 & CR4_PAE != 0 && cpu.efer & EFER_LMA == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use x86_defs::{Segment, SegmentAttributes};

    /// A processor with a different value in every register that the VMCB holds.
    fn busy() -> Cpu {
        let mut cpu = Cpu::default();
        let attributes = SegmentAttributes(0xC93);
        for (n, segment) in (1..).zip(cpu.seg.iter_mut()) {
            *segment = Segment {
                selector: n * 8,
                attributes,
                limit: u32::MAX,
                base: u64::from(n) << 20,
                unusable: false,
            };
        }
        cpu.seg[1].attributes = SegmentAttributes(0xA9B);
        (cpu.ldtr.base, cpu.tr.base, cpu.gdtr.base, cpu.idtr.base) = (11, 12, 13, 14);
        (cpu.gdtr.limit, cpu.idtr.limit) = (0x7F, 0xFFF);
        (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4, cpu.efer) = (0x8005_0033, 0x77, 0x1000, 0x6A0, 0xD01);
        (cpu.dr[6], cpu.dr[7]) = (0xFFFF_4FF0, 0x500);
        for (n, register) in (100..).zip(cpu.gpr[..17].iter_mut()) {
            *register = n;
        }
        let m = &mut cpu.msrs;
        (m.star, m.lstar, m.cstar, m.sfmask, m.kernel_gs_base) = (21, 22, 23, 24, 25);
        (m.sysenter_cs, m.sysenter_esp, m.sysenter_eip) = (26, 27, 28);
        cpu.interrupt_shadow = true;
        cpu.set_rflags_all(0x0024_0A97);
        cpu.refresh();
        cpu
    }

    #[test]
    fn what_goes_in_comes_out() {
        let (cpu, mut vmcb) = (busy(), Vmcb::default());
        assert!(load(&cpu, &mut vmcb));
        assert!(!load(&cpu, &mut vmcb), "the same once more makes nothing stale");
        // Registers that the switch moves are not the VMCB's.
        let mut back = Cpu { gpr: cpu.gpr, ..Cpu::default() };
        (back.gpr[reg::RAX], back.gpr[reg::RSP], back.gpr[RIP]) = (0, 0, 0);
        assert!(!store(&vmcb, &mut back));
        let text = |cpu: &Cpu| {
            std::format!("{:?}", Cpu { flags: Default::default(), rflags: cpu.rflags_all(), ..cpu.clone() })
        };
        assert_eq!(text(&back), text(&cpu));
        assert_eq!(vmcb.get(save::EFER), 0xD01 | EFER_SVME);
    }

    #[test]
    fn the_privilege_level_is_the_stacks() {
        let (mut cpu, mut vmcb) = (busy(), Vmcb::default());
        load(&cpu, &mut vmcb);
        vmcb.set(save::CPL, 3);
        store(&vmcb, &mut cpu);
        assert_eq!((cpu.cpl, cpu.seg[2].attributes.dpl()), (3, 3));
    }

    #[test]
    fn pae_paging_asks_for_its_pointers() {
        let (mut cpu, mut vmcb) = (busy(), Vmcb::default());
        cpu.efer = 0;
        load(&cpu, &mut vmcb);
        assert!(store(&vmcb, &mut cpu));
    }
}
