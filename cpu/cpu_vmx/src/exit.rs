//! What an exit means (SDM vol. 3D, appendix C, and vol. 3C, 28.2): the reason and what is beside it.

use crate::vmcs::{Fields, guest, told};
use cpu_hardware::exit::Interrupted;
use cpu_hardware::{Exit, Port};
use x86_defs::Exception;
use x86_defs::control::DR6_BS;
use x86_emulate::cpu::PendingException;

/// An event's type (SDM vol. 3C, table 25-17).
const NMI: u64 = 2;
const EXCEPTION: u64 = 3;
const MACHINE_CHECK: u8 = Exception::MachineCheck as u8;
/// Reason: the entry failed.
const FAILED_ENTRY: u64 = 1 << 31;

/// From the fields. What has no name of its own is the interpreter's to look at.
pub fn decode(fields: &impl Fields) -> Exit {
    let reason = fields.get(told::REASON);
    if reason & FAILED_ENTRY != 0 {
        return Exit::Invalid;
    }
    match reason & 0xFFFF {
        0 => event(fields),
        // External interrupt, INIT, SMIs.
        1 | 3 | 5 | 6 => Exit::Host,
        2 => Exit::TripleFault,
        7 => Exit::Window,
        10 => Exit::Cpuid,
        12 => Exit::Halt,
        16 | 51 => Exit::ReadTsc,
        30 => Exit::Port(port(fields)),
        31 => Exit::Msr { write: false },
        32 => Exit::Msr { write: true },
        40 => Exit::Pause,
        48 => nested_fault(fields),
        // Tables that no processor understands.
        49 => Exit::Invalid,
        52 => Exit::Timer,
        other => Exit::Instruction(other),
    }
}

/// An exception, or what is not the guest's: an NMI or a machine check of the machine that we run on.
fn event(fields: &impl Fields) -> Exit {
    let event = fields.get(told::EVENT);
    match (event >> 8 & 7, event as u8) {
        (NMI, _) | (EXCEPTION, MACHINE_CHECK) => Exit::Host,
        (EXCEPTION, vector) => {
            Exit::Exception { vector, error_code: fields.get(told::EVENT_ERROR_CODE) as u32 }
        }
        // INT1: RIP is still at it.
        _ => Exit::Instruction(0),
    }
}

/// The vector of what the machine itself has to handle, and nobody has yet: an NMI stays blocked until then.
pub fn of_the_machine(fields: &impl Fields) -> Option<Exception> {
    let event = fields.get(told::EVENT);
    match (fields.get(told::REASON), event >> 8 & 7, event as u8) {
        (0, NMI, _) => Some(Exception::Nmi),
        (0, EXCEPTION, MACHINE_CHECK) => Some(Exception::MachineCheck),
        _ => None,
    }
}

/// A port access (SDM vol. 3C, table 28-5).
fn port(fields: &impl Fields) -> Port {
    let what = fields.get(told::QUALIFICATION);
    Port {
        number: (what >> 16) as u16,
        bytes: (what & 7) as u8 + 1,
        input: what & 1 << 3 != 0,
        string: what & 1 << 4 != 0,
        next_rip: next_rip(fields),
    }
}

/// RIP behind the instruction that exited.
pub fn next_rip(fields: &impl Fields) -> u64 {
    fields.get(guest::RIP).wrapping_add(fields.get(told::INSTRUCTION_BYTES))
}

/// An EPT violation (SDM vol. 3C, table 28-7): bits 0 to 2 read, write, fetch; 3 to 5 what the tables allow.
fn nested_fault(fields: &impl Fields) -> Exit {
    let what = fields.get(told::QUALIFICATION);
    let bit = |at: u32, to: u32| (what >> at & 1) << to;
    let present = u64::from(what >> 3 & 7 != 0);
    Exit::NestedFault { gpa: fields.get(told::GUEST_PHYSICAL), access: present | bit(1, 1) | bit(2, 4) }
}

/// The exception to deliver in the guest, before anything else.
pub fn exception(fields: &impl Fields, exit: &Exit, cr2: u64) -> Option<PendingException> {
    // What DR6 is to have: B0 to B3, BD, BS (SDM vol. 3C, table 28-1).
    let debug =
        if matches!(exit, Exit::Exception { .. }) { fields.get(told::QUALIFICATION) & 0x600F } else { 0 };
    let pending = exit.exception(interrupted(fields), cr2, debug)?;
    let is_trap = pending.vector == Some(Exception::Debug) && is_debug_trap(debug, fields.get(guest::DR7));
    Some(PendingException { is_trap, ..pending })
}

/// The event whose delivery the exit interrupted.
pub fn interrupted(fields: &impl Fields) -> Interrupted {
    let [event, error_code] =
        [told::INTERRUPTED_EVENT, told::INTERRUPTED_ERROR_CODE].map(|field| fields.get(field) as u32);
    Interrupted { event, error_code }
}

/// Whether a #DB came behind its instruction: a step, or a breakpoint on data. Those on execution and an access to a
/// debug register are faults.
fn is_debug_trap(found: u64, dr7: u64) -> bool {
    let on_data = |n: u64| found & 1 << n != 0 && dr7 >> (16 + 4 * n) & 3 != 0;
    found & DR6_BS != 0 || (0..4).any(on_data)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmcs::tests::Table;

    fn told(reason: u64, qualification: u64) -> Table {
        let mut table = Table::default();
        table.set(told::REASON, reason);
        table.set(told::QUALIFICATION, qualification);
        table.set(guest::RIP, 0x1000);
        table.set(told::INSTRUCTION_BYTES, 2);
        table
    }

    #[test]
    fn reasons_are_what_the_manual_says() {
        for (reason, exit) in [
            (1, Exit::Host),
            (2, Exit::TripleFault),
            (7, Exit::Window),
            (10, Exit::Cpuid),
            (12, Exit::Halt),
            (16, Exit::ReadTsc),
            (32, Exit::Msr { write: true }),
            (40, Exit::Pause),
            (52, Exit::Timer),
            (28, Exit::Instruction(28)),
            (1 << 31 | 33, Exit::Invalid),
            (49, Exit::Invalid),
        ] {
            assert_eq!(decode(&told(reason, 0)), exit);
        }
    }

    #[test]
    fn ports_are_read_out() {
        // OUT 3F8h, AL
        let out = Port { number: 0x3F8, bytes: 1, input: false, string: false, next_rip: 0x1002 };
        assert_eq!(decode(&told(30, 0x03F8_0000)), Exit::Port(out));
        // IN EAX, DX
        let input = Port { number: 0xCFC, bytes: 4, input: true, ..out };
        assert_eq!(decode(&told(30, 0x0CFC_000B)), Exit::Port(input));
        // REP OUTSB
        let Exit::Port(string) = decode(&told(30, 0x03F8_0030)) else { panic!("a port access") };
        assert!(string.string && !string.input);
    }

    #[test]
    fn memory_that_is_no_ram_is_told_as_page_faults_are() {
        let mut table = told(48, 0x182);
        table.set(told::GUEST_PHYSICAL, 0xFEC0_0010);
        assert_eq!(decode(&table), Exit::NestedFault { gpa: 0xFEC0_0010, access: 2 });
        table.set(told::QUALIFICATION, 0b001_100);
        assert_eq!(decode(&table), Exit::NestedFault { gpa: 0xFEC0_0010, access: 0x11 });
    }

    #[test]
    fn exceptions_are_told_with_what_is_beside_them() {
        const VALID: u64 = 1 << 31;
        let mut table = told(0, 0x4001);
        table.set(told::EVENT, VALID | 3 << 8 | 1);
        let exit = decode(&table);
        assert_eq!(exit, Exit::Exception { vector: 1, error_code: 0 });
        let debug = exception(&table, &exit, 0).unwrap();
        assert_eq!((debug.vector, debug.address), (Some(Exception::Debug), 0x4001));
        assert!(debug.is_trap && !is_debug_trap(1, 0x401) && is_debug_trap(2, 0x0010_0000));
        let mut table = told(48, 1);
        table.set(told::INTERRUPTED_EVENT, VALID | 1 << 11 | 3 << 8 | 14);
        table.set(told::INTERRUPTED_ERROR_CODE, 6);
        let fault = exception(&table, &decode(&table), 0x1234).unwrap();
        assert_eq!((fault.vector, fault.error_code, fault.address), (Some(Exception::PageFault), 6, 0x1234));
        assert!(interrupted(&table).is_valid());
        // The machine's own NMI is not the guest's.
        let mut table = told(0, 0);
        table.set(told::EVENT, VALID | 2 << 8 | 2);
        assert_eq!((decode(&table), of_the_machine(&table)), (Exit::Host, Some(Exception::Nmi)));
        table.set(told::EVENT, VALID | 3 << 8 | 18);
        assert_eq!((decode(&table), of_the_machine(&table)), (Exit::Host, Some(Exception::MachineCheck)));
        // INT1 is executed again, not delivered at itself.
        table.set(told::EVENT, VALID | 5 << 8 | 1);
        assert_eq!((decode(&table), of_the_machine(&table)), (Exit::Instruction(0), None));
        assert_eq!(exception(&table, &decode(&table), 0), None);
    }
}
