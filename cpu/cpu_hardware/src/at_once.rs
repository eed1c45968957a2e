//! Exits that are served without moving the guest's state, which guests do most: what is the same on every processor.

use crate::exit::Port;
use alloc::vec::Vec;
use cpu_soft::SoftCore;
use x86_emulate::Core;

/// Answers that are remembered.
const ANSWERS: usize = 4;

/// What CPUID was asked: leaf, subleaf, CR4.OSXSAVE.
pub type Question = (u32, u32, bool);

/// The leaf that depends on XCR0: its answers are not remembered.
pub const XSAVE_LEAF: u32 = 0xD;

/// Answers of CPUID, which hold until something else than these exits happens.
#[derive(Default)]
pub struct Answers(Vec<(Question, [u32; 4])>);

impl Answers {
    /// Something else may have happened.
    #[inline]
    pub fn forget(&mut self) {
        self.0.clear();
    }

    /// EAX, EBX, ECX and EDX of the core's CPUID.
    #[inline]
    pub fn get(&mut self, core: &mut SoftCore, question: Question) -> [u32; 4] {
        if let Some((_, answer)) = self.0.iter().find(|(asked, _)| *asked == question) {
            return *answer;
        }
        let answer = core.cpuid(question.0, question.1);
        if self.0.len() == ANSWERS {
            self.0.remove(0);
        }
        self.0.push((question, answer));
        answer
    }
}

/// IN or OUT of one element with this RAX; RAX behind it.
#[inline]
pub fn access_port(core: &mut SoftCore, port: &Port, rax: u64) -> u64 {
    if !port.input {
        core.port_out(port.number, port.bytes, rax as u32);
        return rax;
    }
    let read = u64::from(core.port_in(port.number, port.bytes));
    match port.bytes {
        1 => rax & !0xFF | read & 0xFF,
        2 => rax & !0xFFFF | read & 0xFFFF,
        _ => read,
    }
}
