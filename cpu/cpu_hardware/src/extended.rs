//! x87 and vector registers in an XSAVE area of standard form (SDM vol. 1, 13.4): as the processor loads and stores
//! them, and as the interpreter has them.

use x86_defs::control::{XCR0_AVX, XCR0_SSE, XCR0_X87};
use x86_defs::flags;
use x86_defs::xsave::*;
use x86_emulate::cpu::{ExtendedState, F80, X87};

const BYTES: usize = 832;

/// See the module's header.
#[repr(C, align(64))]
#[derive(Clone)]
pub struct XsaveArea([u8; BYTES]);

impl Default for XsaveArea {
    fn default() -> Self {
        Self([0; BYTES])
    }
}

impl XsaveArea {
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

    /// The registers in `state`, all components present that a processor with (or without) AVX has.
    pub fn set(&mut self, state: &ExtendedState, avx: bool) {
        let x = &state.x87;
        self.put(FCW, x.control.to_le_bytes());
        self.put(FSW, x.status.to_le_bytes());
        self.put(FTW, [x.in_use, 0]);
        self.put(FOP, x.opcode.to_le_bytes());
        self.put(FIP, x.instruction_pointer.to_le_bytes());
        self.put(FDP, x.data_pointer.to_le_bytes());
        for i in 0..8 {
            let register = x.regs[physical(x.status, i)];
            self.put(ST0 + 16 * i, register.mantissa.to_le_bytes());
            self.put(ST0 + 16 * i + 8, register.sign_exponent.to_le_bytes());
        }
        self.put(MXCSR, state.mxcsr.to_le_bytes());
        for (i, register) in state.ymm.iter().enumerate() {
            for (half, word) in register.iter().enumerate() {
                let at = if half < 2 { XMM0 } else { YMM_HIGH - 16 };
                self.put(at + 16 * i + 8 * half, word.to_le_bytes());
            }
        }
        self.put(XSTATE_BV, (XCR0_X87 | XCR0_SSE | if avx { XCR0_AVX } else { 0 }).to_le_bytes());
    }

    /// What the processor stored. Selectors of the last x87 instruction are lost, as on processors that have
    /// deprecated them.
    pub fn state(&self) -> ExtendedState {
        let present = self.u64(XSTATE_BV);
        let mut state = ExtendedState::default();
        if present & XCR0_X87 != 0 {
            state.x87 = self.x87();
        }
        if present & (XCR0_SSE | XCR0_AVX) != 0 {
            state.mxcsr = u32::from_le_bytes(self.get(MXCSR)) & flags::MXCSR_MASK;
        }
        for (i, register) in state.ymm.iter_mut().enumerate() {
            for (half, word) in register.iter_mut().enumerate() {
                let (at, component) = if half < 2 { (XMM0, XCR0_SSE) } else { (YMM_HIGH - 16, XCR0_AVX) };
                if present & component != 0 {
                    *word = self.u64(at + 16 * i + 8 * half);
                }
            }
        }
        state
    }

    fn x87(&self) -> X87 {
        let status = self.u16(FSW);
        let mut regs = [F80::default(); 8];
        for i in 0..8 {
            let at = ST0 + 16 * i;
            regs[physical(status, i)] = F80 { mantissa: self.u64(at), sign_exponent: self.u16(at + 8) };
        }
        X87 {
            regs,
            control: self.u16(FCW),
            status,
            in_use: self.0[FTW],
            opcode: self.u16(FOP),
            instruction_pointer: self.u64(FIP),
            data_pointer: self.u64(FDP),
            ..X87::default()
        }
    }
}

/// Physical register that is ST(i).
fn physical(status: u16, i: usize) -> usize {
    (usize::from(status >> 11 & 7) + i) & 7
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy() -> ExtendedState {
        let mut state = ExtendedState::default();
        for (i, register) in state.ymm.iter_mut().enumerate() {
            *register = core::array::from_fn(|half| (i * 4 + half) as u64 + 1);
        }
        state.mxcsr = 0x1F85;
        state.x87.status = 3 << 11;
        state.x87.in_use = 0x81;
        for (i, register) in state.x87.regs.iter_mut().enumerate() {
            *register = F80 { mantissa: 1 << 63 | i as u64, sign_exponent: 0x3FFF };
        }
        (state.x87.opcode, state.x87.instruction_pointer, state.x87.data_pointer) = (0x123, 0x4567, 0x89AB);
        state
    }

    #[test]
    fn registers_come_back() {
        let (state, mut area) = (busy(), XsaveArea::default());
        area.set(&state, true);
        assert_eq!(std::format!("{:?}", area.state()), std::format!("{state:?}"));
        // ST(0) is the first in the area, wherever TOP is.
        assert_eq!(area.u64(ST0), 1 << 63 | 3);
    }

    /// AMD's processors let any program set MXCSR.MM, which the CPU models lack: a state with it could not be restored.
    #[test]
    fn what_no_cpu_model_has_in_mxcsr_is_not_read() {
        let mut area = XsaveArea::default();
        area.set(&busy(), true);
        area.put(MXCSR, 0x2_1F81u32.to_le_bytes());
        assert_eq!(area.state().mxcsr, 0x1F81);
    }

    #[test]
    fn components_in_their_initial_state_are_not_read() {
        let mut area = XsaveArea::default();
        area.set(&busy(), true);
        area.put(XSTATE_BV, 0u64.to_le_bytes());
        assert_eq!(std::format!("{:?}", area.state()), std::format!("{:?}", ExtendedState::default()));
        area.put(XSTATE_BV, XCR0_SSE.to_le_bytes());
        assert_eq!((area.state().ymm[1], area.state().x87.control), ([5, 6, 0, 0], 0x37F));
    }
}
