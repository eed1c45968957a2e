//! Exits that are served without moving the guest's state: port accesses and CPUID, which guests do most.
//!
//! Called by: `vcpu`, right behind VMRUN. What is needed of the state is read from the VMCB, and written there; the core's
//! registers besides the general ones are old meanwhile. Whatever is not plain goes the long way.

use crate::exit;
use crate::vmcb::{Vmcb, control, save};
use cpu_hardware::at_once::{Answers, XSAVE_LEAF, access_port};
use cpu_hardware::processor::DR7_ENABLED;
use cpu_hardware::{Exit, Port};
use cpu_soft::SoftCore;
use x86_defs::control::{CR0_PE, CR0_PG, CR4_LA57, CR4_OSXSAVE, EFER_LMA};
use x86_defs::flags;
use x86_defs::paging::{PTE_ADDR, PTE_P, PTE_PS};
use x86_emulate::Core;
use x86_emulate::cpu::reg;

/// Attribute L of a code segment: 64-bit mode.
const LONG: u16 = 1 << 9;
/// The bytes of CPUID.
const CPUID: u64 = 0xA20F;
const CPUID_BYTES: u64 = 2;

/// Serves the exit that the VMCB tells, if it is one of these; otherwise nothing was done. `next_rip`: the processor
/// tells where the next instruction is.
pub fn serve(vmcb: &mut Vmcb, core: &mut SoftCore, answers: &mut Answers, next_rip: bool) -> Option<Exit> {
    let debugged = vmcb.get(save::RFLAGS) & flags::TF != 0 || vmcb.get(save::DR7) & DR7_ENABLED != 0;
    if debugged || exit::interrupted(vmcb).is_valid() {
        return None;
    }
    let exit = exit::decode(
        vmcb.get(control::EXIT_CODE),
        vmcb.get(control::EXIT_INFO_1),
        vmcb.get(control::EXIT_INFO_2),
    );
    let next = match exit {
        Exit::Port(port) if !port.string => access(vmcb, core, &port),
        Exit::Cpuid => cpuid(vmcb, core, answers, next_rip)?,
        _ => return None,
    };
    vmcb.set(save::RIP, next);
    vmcb.set(save::RFLAGS, vmcb.get(save::RFLAGS) & !flags::RF);
    vmcb.set(control::INTERRUPT_SHADOW, 0);
    vmcb.set(control::TLB_CONTROL, 0);
    Some(exit)
}

/// IN or OUT of one element; the next RIP.
fn access(vmcb: &mut Vmcb, core: &mut SoftCore, port: &Port) -> u64 {
    let rax = access_port(core, port, vmcb.get(save::RAX));
    vmcb.set(save::RAX, rax);
    port.next_rip
}

/// CPUID; the next RIP.
fn cpuid(vmcb: &mut Vmcb, core: &mut SoftCore, answers: &mut Answers, next_rip: bool) -> Option<u64> {
    let next = if next_rip {
        vmcb.get(control::NEXT_RIP)
    } else if code_word(vmcb, |gpa| core.load_physical(gpa))? == CPUID {
        vmcb.get(save::RIP) + CPUID_BYTES
    } else {
        return None;
    };
    let leaf = vmcb.get(save::RAX) as u32;
    let cr4 = vmcb.get(save::CR4);
    if leaf == XSAVE_LEAF {
        return None;
    }
    // What answers depend on and the guest changes without an exit.
    core.cpu.cr4 = cr4;
    let question = (leaf, core.cpu.gpr[reg::RCX] as u32, cr4 & CR4_OSXSAVE != 0);
    let [eax, ebx, ecx, edx] = answers.get(core, question).map(u64::from);
    vmcb.set(save::RAX, eax);
    (core.cpu.gpr[reg::RBX], core.cpu.gpr[reg::RCX], core.cpu.gpr[reg::RDX]) = (ebx, ecx, edx);
    Some(next)
}

/// The two bytes at RIP, for processors that do not tell how long an instruction is. `None` where finding them takes
/// more than a walk through long mode's tables, or none.
fn code_word(vmcb: &Vmcb, mut load: impl FnMut(u64) -> u64) -> Option<u64> {
    let (cr0, rip) = (vmcb.get(save::CR0), vmcb.get(save::RIP));
    let cs = vmcb.segment(save::SEGMENTS + 16 * x86_defs::SegmentIndex::Cs as usize);
    let long = vmcb.get(save::EFER) & EFER_LMA != 0 && cs.attributes.0 & LONG != 0;
    let linear = if long { rip } else { cs.base.wrapping_add(rip) & 0xFFFF_FFFF };
    let at = if cr0 & CR0_PG == 0 || cr0 & CR0_PE == 0 {
        linear
    } else if vmcb.get(save::EFER) & EFER_LMA != 0 && vmcb.get(save::CR4) & CR4_LA57 == 0 {
        walk(&mut load, vmcb.get(save::CR3), linear)?
    } else {
        return None;
    };
    if at & 0xFFF == 0xFFF {
        // The next page is another mapping's.
        return None;
    }
    let inside = at & 7;
    let low = load(at & !7) >> (8 * inside);
    let high = if inside == 7 { load(at + 1) << 8 } else { 0 };
    Some((low | high) & 0xFFFF)
}

/// Where `linear` is mapped to by four levels of tables.
fn walk(load: &mut impl FnMut(u64) -> u64, cr3: u64, linear: u64) -> Option<u64> {
    let mut table = cr3 & PTE_ADDR;
    for shift in [39, 30, 21, 12] {
        let entry = load(table + (linear >> shift & 511) * 8);
        if entry & PTE_P == 0 {
            return None;
        }
        if shift == 12 || shift < 39 && entry & PTE_PS != 0 {
            let inside = (1 << shift) - 1;
            return Some(entry & PTE_ADDR & !inside | linear & inside);
        }
        table = entry & PTE_ADDR;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use x86_defs::{Segment, SegmentAttributes};

    fn vmcb(rip: u64, long: bool) -> Vmcb {
        let mut vmcb = Vmcb::default();
        let attributes = SegmentAttributes(0x9B | if long { LONG } else { 0 });
        let code = Segment { selector: 8, attributes, limit: u32::MAX, base: 0x1000, unusable: false };
        vmcb.set_segment(save::SEGMENTS + 16, &code);
        vmcb.set(save::RIP, rip);
        vmcb
    }

    #[test]
    fn code_is_found_without_paging() {
        let memory = |gpa| if gpa == 0x1028 { 0x0000_00A2_0F00_0000 } else { 0 };
        assert_eq!(code_word(&vmcb(0x2B, false), memory), Some(CPUID));
        assert_eq!(code_word(&vmcb(0x2A, false), memory), Some(0x0F00));
        let memory = |gpa| if gpa == 0x1028 { 0x0F << 56 } else { 0xA2 };
        assert_eq!(code_word(&vmcb(0x2F, false), memory), Some(CPUID), "it lies in two words");
        assert_eq!(code_word(&vmcb(0xFFF, false), memory), None, "it lies in two pages");
    }

    #[test]
    fn code_is_found_through_long_modes_tables() {
        let mut vmcb = vmcb(0xFFFF_8000_0040_1004, true);
        vmcb.set(save::CR0, CR0_PG | CR0_PE);
        vmcb.set(save::EFER, EFER_LMA);
        vmcb.set(save::CR3, 0x5018);
        let mut memory: BTreeMap<u64, u64> =
            [(0x5800, 0x6003), (0x6000, 0x7003), (0x7010, 0x8003), (0x8008, 0x9003), (0x9000, 0xA20F << 32)]
                .into();
        let found = |memory: &BTreeMap<u64, u64>, vmcb: &Vmcb| {
            code_word(vmcb, |gpa| memory.get(&gpa).copied().unwrap_or(0))
        };
        assert_eq!(found(&memory, &vmcb), Some(CPUID));
        // A large page instead of the last table.
        memory.insert(0x7010, 0x60_0083);
        memory.insert(0x60_1000, 0x90_A20F << 32);
        assert_eq!(found(&memory, &vmcb), Some(CPUID));
        memory.insert(0x7010, 0);
        assert_eq!(found(&memory, &vmcb), None);
        vmcb.set(save::CR4, CR4_LA57);
        assert_eq!(found(&memory, &vmcb), None);
    }
}
