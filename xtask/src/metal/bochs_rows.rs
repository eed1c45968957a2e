//! Rows on Bochs's processors: Intel's VMX, an AMD with next RIPs and flushing by address space, and some that are refused.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use guest_trials::Outcome;

use super::bochs::{self, AMD, Bochs, INTEL, OLD_INTEL, PLAIN};
use super::bundle;
use super::emulator::Ending;
use super::rows::{self, GUEST, NO_GUEST, expect};
use crate::summary::Summary;
use crate::workspace;

/// A boot takes this long (in seconds) only if it hangs: Bochs is slow, and slower on a busy machine.
const PATIENCE: u64 = 1800;

/// A row.
pub struct Row {
    pub name: &'static str,
    /// What it does with the UEFI application.
    pub run: fn(&Path) -> Result<Outcome>,
    /// Its guest is of the catalogue.
    pub with_guest: bool,
    /// Only the campaign runs it.
    pub long: bool,
}

const fn row(name: &'static str, run: fn(&Path) -> Result<Outcome>) -> Row {
    Row { name, run, with_guest: false, long: false }
}

const ROWS: &[Row] = &[
    row("metal: Bochs, processors that are refused", refused),
    row("metal: Bochs, VMX that firmware has locked is refused", locked),
    row("metal: Bochs, what exits cost on VMX", |efi| exits(efi, INTEL, VMX, COSTS_ON_VMX)),
    row("metal: Bochs, what exits cost on SVM with next RIPs", |efi| exits(efi, AMD, SVM, COSTS_ON_SVM)),
    Row { with_guest: true, ..row("metal: Bochs, Linux boots on VMX", |efi| linux(efi, INTEL, VMX, 1)) },
    Row {
        with_guest: true,
        long: true,
        ..row("metal: Bochs, Linux boots on SVM with next RIPs", |efi| linux(efi, AMD, SVM, 1))
    },
    Row {
        with_guest: true,
        long: true,
        ..row("metal: Bochs, Linux boots on VMX, 2 vCPUs", |efi| linux(efi, INTEL, VMX, 2))
    },
];

/// The rows that `chosen` wants, one behind the other.
pub fn steps(summary: &mut Summary, application: &Path, chosen: impl Fn(&Row) -> bool) {
    for row in ROWS.iter().filter(|row| chosen(row)) {
        if !bochs::missing().is_empty() {
            let reason = format!("{} not installed: cargo xtask setup", bochs::missing().join(", "));
            summary.not_run(row.name, &reason);
        } else if row.with_guest && !bundle::is_ready(GUEST) {
            summary.not_run(row.name, NO_GUEST);
        } else {
            summary.step(row.name, || (row.run)(application));
        }
    }
}

/// Where these rows' bundles are: those of QEMU's rows are made at the same time.
fn bundle_path() -> Result<PathBuf> {
    Ok(workspace::target_folder()?.join("metal/bochs.cpio"))
}

fn exit_bench_bundle() -> Result<PathBuf> {
    rows::exit_bench_bundle(Some(&bundle_path()?))
}

/// What the image says of the processor's virtualization.
const VMX: &str = "VMX: EPT with pages of 1 GiB, accessed and dirty bits true, VPID true";
const SVM: &str = "next RIP true, flush by space true";

/// Ticks of Bochs's time-stamp counter, which counts instructions: guest and hypervisor together.
const COSTS_ON_VMX: &[(&str, u64)] = &[
    ("CPUID, leaf 0", 207),
    ("CPUID, leaf 1", 207),
    ("IN from the UART model", 535),
    ("OUT to the UART model", 448),
    ("RDMSR", 6039),
    ("MMIO read", 6626),
    ("virtio-blk read, kick to interrupt", 48752),
];
const COSTS_ON_SVM: &[(&str, u64)] = &[
    ("CPUID, leaf 0", 200),
    ("CPUID, leaf 1", 200),
    ("IN from the UART model", 548),
    ("OUT to the UART model", 461),
    ("RDMSR", 5592),
    ("MMIO read", 6168),
    ("virtio-blk read, kick to interrupt", 46461),
];

/// Without virtualization, and with VMX of before EPT.
fn refused(application: &Path) -> Result<Outcome> {
    let bundle = exit_bench_bundle()?;
    for (model, reason) in [
        (PLAIN, "REFUSED: this processor has no virtualization"),
        (OLD_INTEL, "REFUSED: this processor's VMX has no nested paging (EPT)"),
    ] {
        let machine = Bochs { bundle: Some(bundle.clone()), ..Bochs::new(application, model) };
        let (log, _) = machine.run(PATIENCE)?;
        expect(&log, &["bedplate-metal ", reason, "HALTED"])?;
    }
    Ok(Outcome::Passed)
}

/// With VMX that was locked off before the loader started.
fn locked(_: &Path) -> Result<Outcome> {
    let application = super::build_loader("bedplate-loader-locked")?;
    let machine = Bochs { bundle: Some(exit_bench_bundle()?), ..Bochs::new(&application, INTEL) };
    let (log, _) = machine.run(PATIENCE)?;
    expect(&log, &["REFUSED: firmware has locked Intel virtualization (VMX) off", "HALTED"])?;
    Ok(Outcome::Passed)
}

/// The guest of our own says what its exits cost.
fn exits(application: &Path, model: &str, engine: &str, costs: &[(&str, u64)]) -> Result<Outcome> {
    let machine = Bochs { bundle: Some(exit_bench_bundle()?), ..Bochs::new(application, model) };
    let (log, ending) = machine.run(PATIENCE)?;
    expect(&log, &[engine, "EXIT-COST end", "VM `vm1` has ended: PoweredOff", "all VMs have ended"])?;
    finished(ending, &log)?;
    rows::compare_costs(&log, costs)
}

/// Debian's cloud kernel with busybox reaches its marker, computes, and switches itself off.
fn linux(application: &Path, model: &str, engine: &str, cpus: u32) -> Result<Outcome> {
    let started = Instant::now();
    let machine =
        Bochs { bundle: Some(rows::linux_bundle(cpus, &bundle_path()?)?), ..Bochs::new(application, model) };
    let (log, ending) = machine.run(PATIENCE)?;
    expect(&log, &[engine, "all VMs have ended"])?;
    rows::expect_linux(&log, cpus)?;
    finished(ending, &log)?;
    eprintln!("{model}, {cpus} vCPUs: {:.1} s", started.elapsed().as_secs_f64());
    Ok(Outcome::Passed)
}

fn finished(ending: Ending, log: &str) -> Result<()> {
    if ending != Ending::Good {
        bail!("Bochs was still running:\n{log}");
    }
    Ok(())
}
