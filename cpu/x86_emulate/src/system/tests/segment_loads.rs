//! MOV and POP to segment registers, LDS and its kin: checks, accessed bits, shadows.

use super::machine::*;
use crate::cpu::reg::*;
use crate::op::Step;
use x86_defs::{Exception, SegmentIndex};

const MOV_DS_AX: &[u8] = &[0x8E, 0xD8];
const MOV_SS_AX: &[u8] = &[0x8E, 0xD0];

#[track_caller]
fn mov_faults(m: Machine, insn: &[u8], selector: u16, exception: Exception, code: u16) {
    let mut m = m;
    m.cpu.gpr[RAX] = u64::from(selector);
    m.faults(insn, exception, u32::from(code));
}

#[test]
fn data_segments_every_error_code() {
    use Exception::*;
    let gp = GeneralProtection;
    for machine in [Machine::long, Machine::protected] {
        mov_faults(machine(0), MOV_DS_AX, BEYOND, gp, BEYOND);
        mov_faults(machine(0), MOV_DS_AX, 0x0C, gp, 0x0C);
        mov_faults(machine(0), MOV_DS_AX, TR, gp, TR);
        mov_faults(machine(0), MOV_DS_AX, EXECUTE_ONLY, gp, EXECUTE_ONLY);
        // DPL below CPL or RPL, whether data or non-conforming code.
        mov_faults(machine(3), MOV_DS_AX, DATA0, gp, DATA0);
        mov_faults(machine(0), MOV_DS_AX, DATA0 | 1, gp, DATA0);
        mov_faults(machine(3), MOV_DS_AX, CODE0_32, gp, CODE0_32);
        mov_faults(machine(0), MOV_DS_AX, ABSENT_DATA, SegmentNotPresent, ABSENT_DATA);
        // Conforming code is readable by all.
        let mut m = machine(3);
        m.cpu.gpr[RAX] = u64::from(CONFORMING | 3);
        m.step(MOV_DS_AX);
        assert_eq!(m.cpu.seg[3].selector, CONFORMING | 3);
        // A null selector may be loaded, whatever its RPL.
        m.cpu.gpr[RAX] = 3;
        m.step(MOV_DS_AX);
        assert_eq!((m.cpu.seg[3].selector, m.cpu.seg[3].unusable), (3, true));
    }
}

#[test]
fn stack_segments_every_error_code() {
    use Exception::*;
    let gp = GeneralProtection;
    for machine in [Machine::long, Machine::protected] {
        mov_faults(machine(0), MOV_SS_AX, BEYOND, gp, BEYOND);
        mov_faults(machine(0), MOV_SS_AX, DATA3, gp, DATA3 & !3);
        mov_faults(machine(3), MOV_SS_AX, DATA0, gp, DATA0);
        mov_faults(machine(3), MOV_SS_AX, DATA3 & !3, gp, DATA3 & !3);
        mov_faults(machine(0), MOV_SS_AX, CODE0, gp, CODE0);
        mov_faults(machine(0), MOV_SS_AX, READ_ONLY, gp, READ_ONLY);
        mov_faults(machine(3), MOV_SS_AX, ABSENT_DATA | 3, StackFault, ABSENT_DATA);
    }
    mov_faults(Machine::protected(0), MOV_SS_AX, 0, gp, 0);
    mov_faults(Machine::long(3), MOV_SS_AX, 3, gp, 0);
    mov_faults(Machine::long(0), MOV_SS_AX, 1, gp, 0);
    let mut m = Machine::long(0);
    m.cpu.gpr[RAX] = 0;
    m.step(MOV_SS_AX);
    assert!(m.cpu.seg[2].unusable);
    // MOV CS is no instruction.
    Machine::long(0).faults(&[0x8E, 0xC8], InvalidOpcode, 0);
}

#[test]
fn the_accessed_bit_is_set_where_it_was_clear() {
    let mut m = Machine::protected(0);
    m.set_descriptor(SLOT_A, segment(0x1234_5678, 0xFFFF, 0x092));
    m.cpu.gpr[RAX] = u64::from(SLOT_A);
    m.step(MOV_DS_AX);
    assert_eq!(m.descriptor(SLOT_A), segment(0x1234_5678, 0xFFFF, 0x093));
    let ds = m.cpu.seg[3];
    assert_eq!((ds.base, ds.limit, ds.attributes.0), (0x1234_5678, 0xFFFF, 0x093));
    assert_eq!(m.cpu.seg_base[3], 0x1234_5678);
    // A read-only table is no obstacle if the bit is set already, and a page fault otherwise.
    m.pages.insert(GDT >> 12, (true, false, false));
    m.step(MOV_DS_AX);
    m.set_descriptor(SLOT_A, segment(0x1234_5678, 0xFFFF, 0x092));
    m.faults(MOV_DS_AX, Exception::PageFault, 3);
}

#[test]
fn limits_are_scaled_by_granularity() {
    let mut m = Machine::protected(0);
    m.set_descriptor(SLOT_A, segment(0, 0x12345, 0x893));
    m.cpu.gpr[RAX] = u64::from(SLOT_A);
    m.step(MOV_DS_AX);
    assert_eq!(m.cpu.seg[3].limit, 0x1234_5FFF);
}

#[test]
fn local_descriptors() {
    let mut m = Machine::protected(3);
    m.cpu.gpr[RAX] = 0x0F;
    m.faults(MOV_DS_AX, Exception::GeneralProtection, 0x0C);
    m.cpu.ldtr = x86_defs::Segment { base: LDT, limit: 0xF, unusable: false, ..m.cpu.ldtr };
    m.set_descriptor(0x0F, segment(0x1000, 0xFFFF, 0x0F3));
    m.step(MOV_DS_AX);
    assert_eq!((m.cpu.seg[3].selector, m.cpu.seg[3].base), (0x0F, 0x1000));
    m.cpu.ldtr.limit = 0xE;
    m.faults(MOV_DS_AX, Exception::GeneralProtection, 0x0C);
}

#[test]
fn loads_of_ss_cast_a_shadow_but_lss_does_not() {
    let mut m = Machine::long(0);
    m.cpu.gpr[RAX] = u64::from(DATA0);
    assert_eq!(m.step(MOV_SS_AX), Step::Branch);
    assert!(m.cpu.interrupt_shadow && m.cpu.shadow_blocks_debug);
    let mut m = Machine::protected(0);
    m.push32(&[u32::from(DATA0)]);
    m.step(&[0x17]);
    assert!(m.cpu.interrupt_shadow && m.cpu.shadow_blocks_debug);
    m.cpu.gpr[RBX] = DATA;
    m.poke(DATA, &[0x00, 0x10, 0x03, 0x00, DATA0 as u8, 0]);
    m.step(&[0x0F, 0xB2, 0x23]); // lss esp, [ebx]
    assert!(!m.cpu.interrupt_shadow);
    assert_eq!(m.gpr(RSP), 0x3_1000);
}

#[test]
fn pops_and_pushes_move_by_the_operand_size() {
    // A word at the end of a page: a 64-bit POP FS reads only the selector, and so does PUSH write.
    let mut m = Machine::long(0);
    m.pages.insert(KERNEL_STACK >> 12, (false, false, false));
    m.cpu.gpr[RSP] = KERNEL_STACK - 2;
    m.poke(KERNEL_STACK - 2, &DATA3.to_le_bytes());
    m.step(&[0x0F, 0xA1]);
    assert_eq!((m.cpu.seg[4].selector, m.gpr(RSP)), (DATA3, KERNEL_STACK + 6));
    let mut m = Machine::protected(0);
    let sp = m.gpr(RSP);
    m.poke(sp - 4, &[0xAA; 4]);
    m.step(&[0x1E]); // push ds
    assert_eq!((m.gpr(RSP), m.stacked::<u32>(0)), (sp - 4, 0xAAAA_0000 | u64::from(DATA0)));
    m.step(&[0x66, 0x07]); // popw es
    assert_eq!((m.cpu.seg[0].selector, m.gpr(RSP)), (DATA0, sp - 2));
    // A fault leaves the stack pointer.
    let mut m = Machine::protected(0);
    m.push32(&[u32::from(BEYOND)]);
    m.faults(&[0x1F], Exception::GeneralProtection, u32::from(BEYOND));
}

#[test]
fn moves_from_segment_registers() {
    let mut m = Machine::long(3);
    m.cpu.gpr[RAX] = !0;
    m.step(&[0x8C, 0xD8]); // mov eax, ds
    assert_eq!(m.gpr(RAX), u64::from(DATA3));
    m.cpu.gpr[RAX] = !0;
    m.step(&[0x66, 0x8C, 0xD8]); // mov ax, ds
    assert_eq!(m.gpr(RAX), !0xFFFF | u64::from(DATA3));
    m.cpu.gpr[RBX] = DATA;
    m.poke(DATA, &[0xAA; 4]);
    m.step(&[0x48, 0x8C, 0x1B]); // mov [rbx], ds
    assert_eq!(m.peek::<u32>(DATA), 0xAAAA_0000 | u64::from(DATA3));
}

#[test]
fn far_pointers() {
    let mut m = Machine::protected(0);
    m.cpu.gpr[RBX] = DATA;
    m.poke(DATA, &[0x78, 0x56, 0x34, 0x12, DATA3 as u8, 0]);
    m.step(&[0xC5, 0x03]); // lds eax, [ebx]
    assert_eq!((m.gpr(RAX), m.cpu.seg[3].selector), (0x1234_5678, DATA3));
    m.poke(DATA + 4, &[BEYOND as u8, (BEYOND >> 8) as u8]);
    m.faults(&[0xC4, 0x03], Exception::GeneralProtection, u32::from(BEYOND));
    let mut m = Machine::long(0);
    m.cpu.gpr[RBX] = DATA;
    m.poke(DATA, &0x7FFF_1234_5678u64.to_le_bytes());
    m.poke(DATA + 8, &DATA3.to_le_bytes());
    m.step(&[0x48, 0x0F, 0xB5, 0x03]); // lgs rax, [rbx]
    assert_eq!((m.gpr(RAX), m.cpu.seg[5].selector), (0x7FFF_1234_5678, DATA3));
}

#[test]
fn real_mode_loads_only_the_base() {
    let mut m = Machine::real();
    m.cpu.seg[3].limit = u32::MAX;
    m.cpu.gpr[RAX] = 0x1234;
    m.step(MOV_DS_AX);
    let ds = m.cpu.segment(SegmentIndex::Ds);
    // "Unreal" mode: the limit stays.
    assert_eq!((ds.selector, ds.base, ds.limit), (0x1234, 0x1_2340, u32::MAX));
    // A null selector of protected mode becomes usable again.
    m.cpu.seg[3].unusable = true;
    m.step(MOV_DS_AX);
    assert_eq!((m.cpu.seg[3].unusable, m.cpu.seg[3].limit), (false, 0xFFFF));
}
