//! XSAVE's optimisations and formats, and the x87 environment in real mode.

use super::flat::Flat;
use crate::cpu::reg::{RAX, RCX, RDX};
use x86_defs::Exception::GeneralProtection as Gp;

const AREA: u64 = 0x2000;
const XSAVE: &[u8] = &[0x0F, 0xAE, 0x21]; // [rcx]
const XSAVEOPT: &[u8] = &[0x0F, 0xAE, 0x31];
const XSAVEC: &[u8] = &[0x0F, 0xC7, 0x21];
const XRSTOR: &[u8] = &[0x0F, 0xAE, 0x29];
const XRSTORS: &[u8] = &[0x0F, 0xC7, 0x19];

/// A CPU with something in every component, RCX at the area, all components requested.
fn full() -> Flat {
    let mut flat = Flat::long();
    flat.cpu.gpr[RCX] = AREA;
    flat.cpu.gpr[RAX] = !0;
    flat.cpu.gpr[RDX] = !0;
    for (i, ymm) in flat.cpu.x.ymm.iter_mut().enumerate() {
        *ymm = [i as u64, 0x11, 0x22, 0x33 + i as u64];
    }
    flat.run_all(&[&[0xD9, 0xE8]]); // fld1
    flat.cpu.x.mxcsr = 0x1FA0;
    flat
}

fn header(flat: &mut Flat) -> (u64, u64) {
    (flat.word(AREA + 512), flat.word(AREA + 520))
}

#[test]
fn xsave_and_back() {
    let mut flat = full();
    let saved = flat.cpu.x;
    flat.run_all(&[XSAVE]);
    assert_eq!(header(&mut flat), (7, 0));
    flat.cpu.x = Default::default();
    flat.run_all(&[XRSTOR]);
    assert_eq!(flat.cpu.x.ymm, saved.ymm);
    assert_eq!(flat.cpu.x.mxcsr, saved.mxcsr);
    let (ours, theirs) = (&flat.cpu.x.x87, &saved.x87);
    assert_eq!((ours.regs, ours.status, ours.in_use), (theirs.regs, theirs.status, theirs.in_use));
}

#[test]
fn initial_components_are_left_out() {
    let mut flat = full();
    for ymm in &mut flat.cpu.x.ymm {
        (ymm[2], ymm[3]) = (0, 0);
    }
    flat.ram[AREA as usize..AREA as usize + 832].fill(0xAA);
    flat.ram[AREA as usize + 512..AREA as usize + 576].fill(0);
    flat.run_all(&[XSAVEOPT]);
    assert_eq!(header(&mut flat), (3, 0));
    assert_eq!(flat.ram[AREA as usize + 576], 0xAA, "not written");
    flat.run_all(&[XSAVEC]);
    assert_eq!(header(&mut flat), (3, 1 << 63 | 7));
    // And restoring puts them into their initial state.
    flat.cpu.x.ymm[5] = [1, 2, 3, 4];
    flat.run_all(&[XRSTOR]);
    assert_eq!(flat.cpu.x.ymm[5], [5, 0x11, 0, 0]);
    // XSAVE keeps the bits of components that it was not asked for.
    flat.ram[AREA as usize + 512] = 7;
    flat.ram[AREA as usize + 527] = 0;
    flat.cpu.gpr[RAX] = 1;
    flat.run_all(&[XSAVE]);
    assert_eq!(header(&mut flat).0, 7);
}

#[test]
fn mxcsr_belongs_to_sse_when_compacted() {
    let mut flat = full();
    flat.cpu.x.ymm = [[0; 4]; 16];
    flat.run_all(&[XSAVEC]);
    assert_eq!(header(&mut flat).0, 3, "MXCSR is not in its initial state, so SSE is in use");
    flat.cpu.x.mxcsr = 0x1F80;
    flat.run_all(&[XSAVEC]);
    assert_eq!(header(&mut flat).0, 1);
    flat.cpu.x.mxcsr = 0x1FBF;
    flat.run_all(&[XRSTOR]);
    assert_eq!(flat.cpu.x.mxcsr, 0x1F80);
}

#[test]
fn bad_areas_are_refused_before_anything_is_loaded() {
    let cases: &[(usize, u8)] = &[
        (26, 1),     // reserved bit of MXCSR
        (512, 8),    // a component that is not enabled
        (520, 1),    // a layout in the standard format
        (528, 1),    // reserved header bytes
        (527, 0x40), // a layout without the compacted bit
    ];
    for (at, bits) in cases {
        let mut flat = full();
        flat.run_all(&[XSAVE]);
        let before = flat.cpu.x.ymm;
        flat.ram[AREA as usize + at] |= bits;
        flat.cpu.x.ymm[0][0] = 99;
        assert_eq!(flat.run(XRSTOR), Some(Gp), "byte {at}");
        assert_eq!(flat.cpu.x.ymm[0][0], 99);
        assert_eq!(flat.cpu.x.ymm[1], before[1]);
    }
    let mut flat = full();
    flat.run_all(&[XSAVE]);
    assert_eq!(flat.run(XRSTORS), Some(Gp), "not compacted");
    flat.cpu.gpr[RCX] += 16;
    assert_eq!(flat.run(XRSTOR), Some(Gp), "not a multiple of 64");
}

#[test]
fn the_environment_in_real_mode_holds_linear_addresses() {
    let mut flat = Flat::real();
    flat.cpu.seg[3].selector = 0x200;
    flat.cpu.seg[3].base = 0x2000;
    flat.run_all(&[&[0xDD, 0x06, 0x34, 0x12]]); // fld qword [0x1234]
    flat.run_all(&[&[0xD9, 0x36, 0x00, 0x01]]); // fnstenv [0x100], 14 bytes
    let words: [u16; 7] = core::array::from_fn(|i| flat.word(0x2100 + 2 * i as u64));
    assert_eq!(words[..3], [0x37F, 0x3800, 0x7FFF]);
    // 0x100:0x20 is 0x1020; 0x200:0x1234 is 0x3234; FOP is DD 06.
    assert_eq!(words[3], 0x1020);
    assert_eq!(words[4] >> 8, 0x05);
    assert_eq!((words[5], words[6]), (0x3234, 0));
    assert_eq!(flat.cpu.x.x87.control, 0x37F);

    flat.run_all(&[&[0x66, 0xD9, 0x36, 0x80, 0x01]]); // 28 bytes
    let words: [u32; 7] = core::array::from_fn(|i| flat.word(0x2180 + 4 * i as u64));
    assert_eq!(words[0], 0xFFFF_037F);
    assert_eq!((words[3], words[5]), (0xFFFF_1020, 0xFFFF_3234));
    let before = flat.cpu.x.x87;
    flat.run_all(&[&[0xDB, 0xE3], &[0x66, 0xD9, 0x26, 0x80, 0x01]]); // fninit; fldenv
    assert_eq!(flat.cpu.x.x87.in_use, before.in_use);
    assert_eq!(flat.cpu.x.x87.instruction_pointer, 0x1020);
}

#[test]
fn fnsave_and_frstor() {
    let mut flat = Flat::long();
    flat.cpu.gpr[RCX] = AREA;
    flat.run_all(&[&[0xD9, 0xE8], &[0xD9, 0xEB], &[0xD9, 0xEE]]); // fld1, fldpi, fldz
    let before = flat.cpu.x.x87;
    flat.run_all(&[&[0xDD, 0x31]]); // fnsave [rcx]
    assert_eq!((flat.cpu.x.x87.in_use, flat.cpu.x.x87.status), (0, 0));
    // R5 zero, R6 and R7 valid, the rest empty.
    assert_eq!(flat.word::<u16>(AREA + 8), 0x07FF);
    flat.run_all(&[&[0xDD, 0x21]]); // frstor [rcx]
    let after = flat.cpu.x.x87;
    assert_eq!((after.regs, after.status, after.in_use), (before.regs, before.status, before.in_use));
}
