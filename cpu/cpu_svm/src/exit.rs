//! What an exit means (APM vol. 2, appendix C): the code and the two words beside it.

use crate::vmcb::{Vmcb, control, save};
use cpu_hardware::exit::Interrupted;
use cpu_hardware::{Exit, Port};
use x86_defs::Exception;
use x86_emulate::cpu::PendingException;

/// The code of a machine check, which the machine itself has to handle.
pub const MACHINE_CHECK: u64 = 0x40 + Exception::MachineCheck as u64;

/// From EXITCODE, EXITINFO1 and EXITINFO2. Failure is −1 in 64 bits, or (QEMU) in 32.
pub fn decode(code: u64, info_1: u64, info_2: u64) -> Exit {
    match code {
        MACHINE_CHECK => Exit::Host,
        0x40..=0x5F => Exit::Exception { vector: (code - 0x40) as u8, error_code: info_1 as u32 },
        0x60..=0x63 => Exit::Host,
        0x64 => Exit::Window,
        0x6E => Exit::ReadTsc,
        0x72 => Exit::Cpuid,
        0x77 => Exit::Pause,
        0x78 => Exit::Halt,
        0x7B => Exit::Port(port(info_1, info_2)),
        0x7C => Exit::Msr { write: info_1 & 1 != 0 },
        0x7F => Exit::TripleFault,
        0x400 => Exit::NestedFault { gpa: info_2, access: info_1 },
        u64::MAX | 0xFFFF_FFFF => Exit::Invalid,
        _ => Exit::Instruction(code),
    }
}

/// The exception to deliver in the guest, before anything else. DR6 has what a #DB adds (APM vol. 2, 15.12.2).
pub fn exception(vmcb: &Vmcb, exit: &Exit) -> Option<PendingException> {
    exit.exception(interrupted(vmcb), vmcb.get(save::CR2), 0)
}

/// The event whose delivery the exit interrupted.
pub fn interrupted(vmcb: &Vmcb) -> Interrupted {
    let word = vmcb.get(control::EXIT_INT_INFO);
    Interrupted { event: word as u32, error_code: (word >> 32) as u32 }
}

/// From a port access's two words (APM vol. 2, 15.10.2); every processor tells the next RIP there.
fn port(info: u64, next_rip: u64) -> Port {
    Port {
        number: (info >> 16) as u16,
        bytes: (info >> 4 & 7) as u8,
        input: info & 1 != 0,
        string: info & 0b1100 != 0,
        next_rip,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_what_the_manual_says() {
        assert_eq!(decode(0x60, 0, 0), Exit::Host);
        assert_eq!(decode(0x52, 0, 0), Exit::Host, "a machine check is not the guest's");
        assert_eq!(decode(0x51, 0, 0), Exit::Exception { vector: 17, error_code: 0 });
        assert_eq!(decode(0x7C, 1, 0), Exit::Msr { write: true });
        assert_eq!(decode(0x400, 6, 0xFEC0_0000), Exit::NestedFault { gpa: 0xFEC0_0000, access: 6 });
        assert_eq!(decode(u64::MAX, 0, 0), Exit::Invalid);
        assert_eq!(decode(u64::from(u32::MAX), 0, 0), Exit::Invalid);
        assert_eq!(decode(0x8D, 0, 0), Exit::Instruction(0x8D));
    }

    #[test]
    fn an_interrupted_exception_is_not_the_instructions() {
        let mut vmcb = Vmcb::default();
        vmcb.set(save::CR2, 0x1234);
        // A page fault, its frame where no RAM is.
        let exit = decode(0x400, 6, 0xFEC0_0000);
        assert_eq!(exception(&vmcb, &exit), None);
        vmcb.set(control::EXIT_INT_INFO, 6 << 32 | 1 << 31 | 1 << 11 | 3 << 8 | 14);
        let fault = exception(&vmcb, &exit).unwrap();
        assert_eq!((fault.error_code, fault.address), (6, 0x1234));
    }

    #[test]
    fn ports_are_read_out() {
        // OUT 3F8h, AL
        let out = Port { number: 0x3F8, bytes: 1, input: false, string: false, next_rip: 0x1001 };
        assert_eq!(decode(0x7B, 0x03F8_0090, 0x1001), Exit::Port(out));
        // IN EAX, 0CFCh
        let input = Port { number: 0xCFC, bytes: 4, input: true, string: false, next_rip: 7 };
        assert_eq!(decode(0x7B, 0x0CFC_0141, 7), Exit::Port(input));
        // REP OUTSB
        let Exit::Port(string) = decode(0x7B, 0x03F8_009C, 7) else { panic!("a port access") };
        assert!(string.string && !string.input);
    }
}
