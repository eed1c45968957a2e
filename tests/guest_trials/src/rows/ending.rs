//! How a guest's run ends or begins anew: five reboots, a kernel panic, a triple fault, the escape key, SIGTERM.

use super::{Row, cpus_name};
use crate::config::{Boot, TERMINAL_CHANGED, VmConfig};
use crate::stage::{Failure, Stage, Tier};
use crate::vm::{Exit, Vm};

const REBOOTS: u32 = 5;
/// Promised by `bedplate run --help`.
const STOPPED_FROM_OUTSIDE: i32 = 20;
const TRIPLE_FAULT: i32 = 21;
const KERNEL_PANIC: i32 = 22;

pub(super) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for cpus in [1, 2] {
        let tier = if cpus == 2 { Tier::Test } else { Tier::Campaign };
        let name = format!("ending/reboot-x{REBOOTS}/{}", cpus_name(cpus));
        rows.push(Row::new(name, tier, "cloud", move |stage| reboot_loop(stage, cpus)));
    }
    rows.push(Row::new("ending/panic", Tier::Test, "cloud", panic_row));
    rows.push(Row::new("ending/triple-fault", Tier::Test, "cloud", triple_fault));
    rows.push(
        Row::new("ending/escape-key", Tier::Test, "cloud", escape_key).not_in_lab("it needs a terminal"),
    );
    rows.push(Row::new("ending/sigterm", Tier::Campaign, "cloud", stopped_by_signal).bedplate_only());
    rows
}

fn reboot_loop(stage: &Stage, cpus: u32) -> Result<(), Failure> {
    let guest = stage.guest("cloud")?;
    let mut config = VmConfig::new(&guest, Boot::BzImage, cpus, "bedplate.reboot")?;
    config.reboots = true;
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        for _ in 0..REBOOTS {
            let console = vm.console();
            console.expect(guest_catalog::INIT_MARKER, stage.patience(15))?;
            let ready = console.expect_line(guest_catalog::READY_MARKER, stage.patience(10))?;
            Failure::unless(ready == format!("{cpus} cpus"), || format!("{ready} are up instead of {cpus}"))?;
            console.expect("Restarting system", stage.patience(10))?;
        }
        vm.console().expect(guest_catalog::INIT_MARKER, stage.patience(15))?;
        vm.stop(stage.patience(5)).map(|_| ())
    })();
    stage.keep(&vm);
    outcome
}

fn panic_row(stage: &Stage) -> Result<(), Failure> {
    let guest = stage.guest("cloud")?;
    let mut vm = stage.start(&VmConfig::new(&guest, Boot::BzImage, 1, "bedplate.panic")?)?;
    let outcome = (|| {
        vm.console().expect("Kernel panic - not syncing", stage.patience(20))?;
        let exit = vm.wait(stage.patience(10))?;
        ended_with(stage, &vm, exit, KERNEL_PANIC, "panic")
    })();
    stage.keep(&vm);
    outcome
}

fn triple_fault(stage: &Stage) -> Result<(), Failure> {
    let guest = stage.guest("cloud")?;
    let mut vm = stage.start(&VmConfig::new(&guest, Boot::BzImage, 1, "reboot=t bedplate.reboot")?)?;
    let outcome = (|| {
        vm.console().expect("Restarting system", stage.patience(20))?;
        let exit = vm.wait(stage.patience(10))?;
        ended_with(stage, &vm, exit, TRIPLE_FAULT, "triple fault")
    })();
    stage.keep(&vm);
    outcome
}

fn escape_key(stage: &Stage) -> Result<(), Failure> {
    let guest = stage.guest("cloud")?;
    let mut config = VmConfig::new(&guest, Boot::BzImage, 1, "")?;
    config.terminal = stage.vmm().is_bedplate();
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        vm.console().expect("BEDPLATE-SHELL", stage.patience(20))?;
        if stage.vmm().is_bedplate() {
            vm.console().send("\u{1}h")?;
            vm.console().expect("Ctrl-A x", stage.patience(5))?;
        }
        let exit = vm.stop(stage.patience(5))?;
        if !stage.vmm().is_bedplate() {
            return Ok(());
        }
        // On a terminal, messages and console are one.
        Failure::unless(exit == Exit::Code(STOPPED_FROM_OUTSIDE), || {
            format!("the process ended with {exit:?} instead of code {STOPPED_FROM_OUTSIDE}")
        })?;
        let shown = String::from_utf8_lossy(&vm.console_transcript()).into_owned();
        Failure::unless(!shown.contains(TERMINAL_CHANGED), || "the terminal was not restored".into())
    })();
    stage.keep(&vm);
    outcome
}

fn stopped_by_signal(stage: &Stage) -> Result<(), Failure> {
    let guest = stage.guest("cloud")?;
    let mut vm = stage.start(&VmConfig::new(&guest, Boot::BzImage, 1, "")?)?;
    let outcome = (|| {
        vm.console().expect("BEDPLATE-SHELL", stage.patience(20))?;
        let exit = vm.stop(stage.patience(5))?;
        ended_with(stage, &vm, exit, STOPPED_FROM_OUTSIDE, "ended from outside")
    })();
    stage.keep(&vm);
    outcome
}

/// Bedplate promises the code and a sentence; QEMU only has to end.
fn ended_with(stage: &Stage, vm: &Vm, exit: Exit, code: i32, sentence: &str) -> Result<(), Failure> {
    if !stage.vmm().is_bedplate() {
        return Ok(());
    }
    let messages = vm.messages();
    Failure::unless(exit == Exit::Code(code), || {
        format!("the process ended with {exit:?} instead of code {code}; it said:\n{messages}")
    })?;
    Failure::unless(messages.contains(sentence), || {
        format!("the process did not say {sentence:?}; it said:\n{messages}")
    })
}
