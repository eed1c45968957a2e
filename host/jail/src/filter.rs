//! The table as programs of the kernel's (seccomp, `Documentation/userspace-api/seccomp_filter.rst`).
//!
//! Called by: `enter`. A call that is not allowed raises SIGSYS, which [`crate::violation`] answers; another architecture's
//! calls kill the process.

use crate::table::{Row, TABLE, When};
use crate::{JailError, Thread};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

/// The programs of a thread: where they differ the stricter one counts.
pub fn programs(thread: Thread) -> Result<Vec<BpfProgram>, JailError> {
    let mine = || TABLE.iter().filter(|row| row.who & thread.bit() != 0);
    let absent = mine().filter(|row| matches!(row.when, When::Absent));
    let absent: BTreeMap<_, _> = absent.map(|row| (i64::from(row.call.id()), Vec::new())).collect();
    let mut programs = Vec::new();
    if !absent.is_empty() {
        programs.push(compile(absent, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))?);
    }
    programs.push(compile(rules(mine())?, SeccompAction::Trap, SeccompAction::Allow)?);
    Ok(programs)
}

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn rules<'a>(rows: impl Iterator<Item = &'a Row>) -> Result<Rules, BackendError> {
    let mut rules = Rules::new();
    for row in rows {
        let more = alternatives(row.when)?;
        let of_call = rules.entry(row.call.id().into());
        match of_call {
            std::collections::btree_map::Entry::Vacant(vacant) => _ = vacant.insert(more),
            // No alternatives are "always".
            std::collections::btree_map::Entry::Occupied(mut there) if more.is_empty() => {
                there.get_mut().clear()
            }
            std::collections::btree_map::Entry::Occupied(there) if there.get().is_empty() => {}
            std::collections::btree_map::Entry::Occupied(mut there) => there.get_mut().extend(more),
        }
    }
    Ok(rules)
}

fn alternatives(when: When) -> Result<Vec<SeccompRule>, BackendError> {
    let one = |condition| SeccompRule::new(vec![condition]);
    let equal = |arg, value| SeccompCondition::new(arg, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value);
    match when {
        When::Any | When::Absent => Ok(Vec::new()),
        When::One(arg, values) => values.iter().map(|value| one(equal(arg, *value)?)).collect(),
        When::Bits(arg, mask, value) => {
            let masked = SeccompCmpOp::MaskedEq(mask);
            Ok(vec![one(SeccompCondition::new(arg, SeccompCmpArgLen::Qword, masked, value)?)?])
        }
        When::Ourselves => Ok(vec![one(equal(0, std::process::id().into())?)?]),
    }
}

fn compile(rules: Rules, otherwise: SeccompAction, found: SeccompAction) -> Result<BpfProgram, JailError> {
    let filter = SeccompFilter::new(rules, otherwise, found, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_thread_has_a_program_that_the_kernel_takes() {
        for thread in Thread::ALL {
            for program in programs(thread).unwrap() {
                assert!(program.len() < 4096, "{thread:?}: {}", program.len());
            }
        }
    }
}
