//! Extended state by component, in an XSAVE area of standard form (SDM vol. 1, 13.4), and XCR0.

use hypervisor::VcpuState;
use hypervisor::state::Float80;
use kvm_bindings::{kvm_xcr, kvm_xcrs, kvm_xsave};
use x86_defs::control::{XCR0_AVX, XCR0_SSE, XCR0_X87};
use x86_defs::flags;
use x86_defs::xsave::*;

/// Of the kernel's structure.
pub fn xcr0(xcrs: &kvm_xcrs) -> u64 {
    let used = &xcrs.xcrs[..(xcrs.nr_xcrs as usize).min(xcrs.xcrs.len())];
    used.iter().find(|x| x.xcr == 0).map_or(XCR0_X87, |x| x.value)
}

/// The other way.
pub fn to_xcrs(value: u64) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value, ..kvm_xcr::default() };
    xcrs
}

/// The area as bytes.
struct Area([u8; 4096]);

impl Area {
    fn of(xsave: &kvm_xsave) -> Self {
        let mut bytes = [0; 4096];
        for (to, word) in bytes.chunks_exact_mut(4).zip(&xsave.region) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        Self(bytes)
    }
    fn into(self, xsave: &mut kvm_xsave) {
        for (word, from) in xsave.region.iter_mut().zip(self.0.chunks_exact(4)) {
            *word = u32::from_le_bytes([from[0], from[1], from[2], from[3]]);
        }
    }
    fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        core::array::from_fn(|i| self.0[at + i])
    }
    fn put<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        self.0[at..at + N].copy_from_slice(&bytes);
    }
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.get(at))
    }
    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.get(at))
    }
    fn pairs(&self, at: usize) -> [[u64; 2]; 16] {
        core::array::from_fn(|i| [self.u64(at + 16 * i), self.u64(at + 16 * i + 8)])
    }
    fn put_pairs(&mut self, at: usize, pairs: &[[u64; 2]; 16]) {
        for (i, [low, high]) in pairs.iter().enumerate() {
            self.put(at + 16 * i, low.to_le_bytes());
            self.put(at + 16 * i + 8, high.to_le_bytes());
        }
    }
}

/// Physical register that is ST(i).
fn physical(status: u16, i: usize) -> usize {
    (usize::from(status >> 11 & 7) + i) & 7
}

/// Into `state`.
pub fn read(state: &mut VcpuState, xsave: &kvm_xsave) {
    let area = Area::of(xsave);
    let present = area.u64(XSTATE_BV);
    state.x87 = Default::default();
    if present & XCR0_X87 != 0 {
        let x = &mut state.x87;
        (x.control, x.status, x.opcode) = (area.u16(FCW), area.u16(FSW), area.u16(FOP));
        x.in_use = area.0[FTW];
        (x.instruction_pointer, x.data_pointer) = (area.u64(FIP), area.u64(FDP));
        for i in 0..8 {
            let at = ST0 + 16 * i;
            x.registers[physical(x.status, i)] =
                Float80 { mantissa: area.u64(at), sign_exponent: area.u16(at + 8) };
        }
    }
    state.sse = Default::default();
    if present & (XCR0_SSE | XCR0_AVX) != 0 {
        state.sse.mxcsr = u32::from_le_bytes(area.get(MXCSR)) & flags::MXCSR_MASK;
    }
    if present & XCR0_SSE != 0 {
        state.sse.xmm = area.pairs(XMM0);
    }
    state.avx = if present & XCR0_AVX != 0 { area.pairs(YMM_HIGH) } else { [[0; 2]; 16] };
}

/// Over the components of `state` in the area.
pub fn write(state: &VcpuState, xsave: &mut kvm_xsave) {
    let mut area = Area::of(xsave);
    let x = &state.x87;
    area.put(FCW, x.control.to_le_bytes());
    area.put(FSW, x.status.to_le_bytes());
    area.put(FTW, [x.in_use, 0]);
    area.put(FOP, x.opcode.to_le_bytes());
    area.put(FIP, x.instruction_pointer.to_le_bytes());
    area.put(FDP, x.data_pointer.to_le_bytes());
    for i in 0..8 {
        let register = x.registers[physical(x.status, i)];
        area.put(ST0 + 16 * i, register.mantissa.to_le_bytes());
        area.put(ST0 + 16 * i + 8, register.sign_exponent.to_le_bytes());
    }
    area.put(MXCSR, state.sse.mxcsr.to_le_bytes());
    area.put_pairs(XMM0, &state.sse.xmm);
    let mut present = area.u64(XSTATE_BV) | XCR0_X87 | XCR0_SSE;
    if state.avx == [[0; 2]; 16] {
        // Its initial state, which a processor without AVX has, too.
        present &= !XCR0_AVX;
    } else {
        present |= XCR0_AVX;
        area.put_pairs(YMM_HIGH, &state.avx);
    }
    area.put(XSTATE_BV, present.to_le_bytes());
    area.into(xsave);
}
