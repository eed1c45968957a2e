//! Linux' own tests of x86 (tools/testing/selftests/x86), run as programs inside the guest: signals and segments,
//! LDT and GDT, system calls by every gate, single step, vsyscall, FSGSBASE, vm86. Each must pass or skip itself.

use super::{Row, cpus_name};
use crate::config::{Boot, VmConfig};
use crate::stage::{Failure, Stage, Tier};

/// kselftest's exit status for "cannot be tried here".
const SKIPPED: &str = "4";

pub(super) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for guest in ["selftests", "selftests-686"] {
        for cpus in [1, 2] {
            let name = format!("{guest}/{}", cpus_name(cpus));
            rows.push(Row::new(name, Tier::Campaign, guest, move |stage| selftests(stage, guest, cpus)));
        }
    }
    rows
}

fn selftests(stage: &Stage, guest: &str, cpus: u32) -> Result<(), Failure> {
    let guest = stage.guest(guest)?;
    let words = "bedplate.selftests bedplate.poweroff";
    let mut vm = stage.start(&VmConfig::new(&guest, Boot::BzImage, cpus, words)?)?;
    let outcome = (|| {
        vm.console().expect(guest_catalog::READY_MARKER, stage.patience(30))?;
        let mut failed = Vec::new();
        let mut seen = 0;
        loop {
            let line = vm.console().expect_line("BEDPLATE-SELFTEST ", stage.patience(120))?;
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["status", _, "0" | SKIPPED] => seen += 1,
                ["status", name, status] => {
                    seen += 1;
                    failed.push(format!("{name} ended with {status}"));
                }
                ["done", count] => {
                    Failure::unless(seen > 0 && count == seen.to_string(), || {
                        format!("{count} tests ran and {seen} told how they ended")
                    })?;
                    break;
                }
                _ => {}
            }
        }
        Failure::unless(failed.is_empty(), || {
            format!("{} of {seen} failed: {}", failed.len(), failed.join(", "))
        })?;
        vm.wait(stage.patience(10)).map(|_| ())
    })();
    stage.keep(&vm);
    outcome
}
