//! General, segment, control and debug registers.

use hypervisor::VcpuState;
use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs, kvm_sregs2};
use std::io;
use x86_defs::control::{CR0_PG, CR4_PAE, EFER_LMA};
use x86_defs::{DescriptorTable, Segment, SegmentAttributes};

/// Flag of `kvm_sregs2`: its PDPTEs are those loaded.
const PDPTRS_VALID: u64 = 1;

/// The longer form of what comes with an exit; `None` where PDPTEs are in use, which do not come with it.
pub fn without_pdptes(s: &kvm_sregs) -> Option<kvm_sregs2> {
    if has_pdptes(s.cr0, s.cr4, s.efer) {
        return None;
    }
    let &kvm_sregs { cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, .. } = s;
    let &kvm_sregs { cr0, cr2, cr3, cr4, cr8, efer, apic_base, .. } = s;
    let (flags, pdptrs) = (0, [0; 4]);
    Some(kvm_sregs2 {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        flags,
        pdptrs,
    })
}

/// Paging with a table of four entries that the processor holds (SDM vol. 3, 4.4).
fn has_pdptes(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0 && efer & EFER_LMA == 0
}

/// Into `state`.
pub fn read(state: &mut VcpuState, regs: &kvm_regs, sregs: &kvm_sregs2) {
    state.gpr = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8, regs.r9,
        regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    (state.rip, state.rflags) = (regs.rip, regs.rflags);
    state.segments = [sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs].map(|s| segment(&s));
    (state.ldtr, state.tr) = (segment(&sregs.ldt), segment(&sregs.tr));
    (state.gdtr, state.idtr) = (table(&sregs.gdt), table(&sregs.idt));
    (state.cr0, state.cr2, state.cr3, state.cr4) = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4);
    state.efer = sregs.efer;
    state.pdpte = if sregs.flags & PDPTRS_VALID != 0 { sregs.pdptrs } else { [0; 4] };
}

/// DR0–3, 6, 7.
pub fn read_debug(state: &mut VcpuState, debug: &kvm_debugregs) {
    let [dr0, dr1, dr2, dr3] = debug.db;
    state.dr = [dr0, dr1, dr2, dr3, debug.dr6, debug.dr7];
}

/// The other way.
pub fn to_debug(state: &VcpuState) -> kvm_debugregs {
    let [dr0, dr1, dr2, dr3, dr6, dr7] = state.dr;
    kvm_debugregs { db: [dr0, dr1, dr2, dr3], dr6, dr7, ..kvm_debugregs::default() }
}

/// General registers, RIP, RFLAGS.
pub fn to_regs(state: &VcpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    let (rip, rflags) = (state.rip, state.rflags);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

/// Everything of `state` but CR8 and APIC_BASE, which are the APIC's.
pub fn to_sregs(state: &VcpuState, sregs: &mut kvm_sregs2) {
    let [es, cs, ss, ds, fs, gs] = state.segments.map(|s| to_segment(&s));
    (sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs) = (es, cs, ss, ds, fs, gs);
    (sregs.ldt, sregs.tr) = (to_segment(&state.ldtr), to_segment(&state.tr));
    (sregs.gdt, sregs.idt) = (to_table(&state.gdtr), to_table(&state.idtr));
    (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4) = (state.cr0, state.cr2, state.cr3, state.cr4);
    sregs.efer = state.efer;
    let pae = has_pdptes(state.cr0, state.cr4, state.efer);
    (sregs.flags, sregs.pdptrs) = if pae { (PDPTRS_VALID, state.pdpte) } else { (0, [0; 4]) };
}

/// An error if the control registers `here` are not those of `state`.
pub fn must_control(here: &kvm_sregs2, state: &VcpuState) -> io::Result<()> {
    let registers = [
        ("CR0", here.cr0, state.cr0),
        ("CR3", here.cr3, state.cr3),
        ("CR4", here.cr4, state.cr4),
        ("EFER", here.efer, state.efer),
    ];
    match registers.iter().find(|(_, here, wanted)| here != wanted) {
        Some((name, here, wanted)) => {
            Err(io::Error::other(format!("{name} does not take {wanted:#x}, it is {here:#x}")))
        }
        None => Ok(()),
    }
}

/// Whether [`to_sregs`] gives something else.
pub fn system_differs(a: &VcpuState, b: &VcpuState) -> bool {
    (a.segments, a.ldtr, a.tr, a.gdtr, a.idtr) != (b.segments, b.ldtr, b.tr, b.gdtr, b.idtr)
        || (a.cr0, a.cr2, a.cr3, a.cr4, a.efer, a.pdpte) != (b.cr0, b.cr2, b.cr3, b.cr4, b.efer, b.pdpte)
}

/// From KVM's broken-up form. CS and SS carry the privilege level, as in `VcpuState`.
fn segment(s: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u16::from(value & 1) << at;
    let attributes = u16::from(s.type_ & 0xF)
        | bit(s.s, 4)
        | u16::from(s.dpl & 3) << 5
        | bit(s.present, 7)
        | bit(s.avl, 8)
        | bit(s.l, 9)
        | bit(s.db, 10)
        | bit(s.g, 11);
    Segment {
        selector: s.selector,
        attributes: SegmentAttributes(attributes),
        limit: s.limit,
        base: s.base,
        unusable: s.unusable != 0,
    }
}

fn to_segment(s: &Segment) -> kvm_segment {
    let a = s.attributes;
    let bit = |at: u32| (a.0 >> at & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: a.kind(),
        present: bit(7),
        dpl: a.dpl(),
        db: bit(10),
        s: bit(4),
        l: bit(9),
        g: bit(11),
        avl: bit(8),
        unusable: s.unusable.into(),
        padding: 0,
    }
}

fn table(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: t.base, limit: t.limit }
}

fn to_table(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, ..kvm_dtable::default() }
}
