//! How a VM ended: exit codes and sentences for people. The codes are a promise (see `bedplate run --help`).
//!
//! Called by: the `bedplate` command, after `launch::run` has returned.

use machine::Verdict;

/// A documented exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitCode {
    /// The number.
    pub code: u8,
    /// What it means.
    pub meaning: &'static str,
}

/// All of them, for the help text. 1 and 2 are the command's own: an error before the guest ran, and a wrong
/// command line.
pub const EXIT_CODES: [ExitCode; 9] = [
    ExitCode { code: 0, meaning: "the guest powered off, or the VM was saved" },
    ExitCode { code: 1, meaning: "the VM could not be started" },
    ExitCode { code: 2, meaning: "the command line is wrong" },
    ExitCode { code: 20, meaning: "ended from outside (Ctrl-A x, ctl kill)" },
    ExitCode { code: 21, meaning: "triple fault: a processor could not deliver a fault" },
    ExitCode { code: 22, meaning: "the guest's kernel panicked" },
    ExitCode { code: 23, meaning: "the guest asked for a reset, and --on-reset is stop" },
    ExitCode { code: 24, meaning: "the engine or the host could not go on" },
    ExitCode { code: 25, meaning: "the VM's process made a system call that its jail forbids" },
];

/// The process exit code of `verdict`.
pub fn exit_code(verdict: &Verdict) -> u8 {
    match verdict {
        Verdict::PoweredOff | Verdict::Saved => 0,
        Verdict::Killed => 20,
        Verdict::TripleFault { .. } => 21,
        Verdict::Panicked { .. } => 22,
        Verdict::ResetRefused => 23,
        Verdict::Failed { .. } => 24,
    }
}

/// What happened, and what to do about it, in a line or two.
pub fn message(verdict: &Verdict) -> String {
    match verdict {
        Verdict::PoweredOff => "the guest powered off".into(),
        Verdict::Saved => "the VM was saved".into(),
        Verdict::Killed => "the VM was ended from outside".into(),
        Verdict::TripleFault { vcpu, detail } => format!(
            "triple fault on CPU {vcpu}: the guest could not handle a fault and nothing can go on\n  {detail}\n  \
             If the kernel printed nothing, it may need another CPU model (--cpu-model max) or more memory"
        ),
        Verdict::Panicked { detail } => format!(
            "the guest's kernel panicked: {detail}\n  Its console shows why; --on-panic keep leaves such a guest running"
        ),
        Verdict::ResetRefused => "the guest asked for a reset, and --on-reset is stop".into(),
        Verdict::Failed { reason } => format!("the VM could not go on: {reason}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_documented_once() {
        let verdicts = [
            Verdict::PoweredOff,
            Verdict::Saved,
            Verdict::Killed,
            Verdict::TripleFault { vcpu: 3, detail: "rip 0".into() },
            Verdict::Panicked { detail: "VFS".into() },
            Verdict::ResetRefused,
            Verdict::Failed { reason: "x".into() },
        ];
        for verdict in &verdicts {
            let code = exit_code(verdict);
            assert_eq!(EXIT_CODES.iter().filter(|c| c.code == code).count(), 1, "{verdict:?}");
            assert!(!message(verdict).is_empty());
        }
        let jails = i32::from(EXIT_CODES[8].code);
        assert_eq!(jails, jail::violation::EXIT_CODE);
        assert!(message(&verdicts[3]).contains("CPU 3"));
    }
}
