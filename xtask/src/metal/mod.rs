//! `cargo xtask metal`: the bare-metal image, built, booted in an emulator, and judged by its serial log.

mod bundle;
mod emulator;
mod toolchain;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use guest_trials::Outcome;

use crate::summary::Summary;
use crate::{exec, workspace};
use bundle::BundleOptions;
use emulator::{Ending, Qemu};

#[derive(Debug, Subcommand)]
pub enum Metal {
    /// Build the image for the target without an operating system; its path is the last line.
    Build,
    /// Make a bundle of a guest of the catalogue; its path is the last line.
    Bundle(BundleOptions),
    /// Boot the image in QEMU with AMD SVM, serial line on this terminal (Ctrl-A x ends QEMU).
    Run(RunOptions),
    /// Boot it, with and without guests, and judge its serial log.
    Test,
}

#[derive(Debug, Args)]
pub struct RunOptions {
    /// Memory of the machine, in MiB.
    #[arg(long, default_value_t = 1024)]
    machine_memory: u32,
    /// Processors of the machine.
    #[arg(long, default_value_t = 1)]
    machine_cpus: u32,
    #[command(flatten)]
    bundle: BundleOptions,
}

pub fn run(task: &Metal) -> Result<()> {
    match task {
        Metal::Build => {
            println!("{}", build()?.display());
            Ok(())
        }
        Metal::Bundle(options) => {
            println!("{}", bundle::make(options)?.display());
            Ok(())
        }
        Metal::Run(options) => interactive(options),
        Metal::Test => {
            let mut summary = Summary::new(format!("cargo xtask metal test, commit {}", workspace::commit()));
            test(&mut summary);
            summary.finish()
        }
    }
}

/// The image.
fn build() -> Result<PathBuf> {
    let toolchain = toolchain::find()?;
    eprintln!("for bare metal: {}", toolchain.name());
    toolchain.build("metal", "bedplate-metal")
}

fn interactive(options: &RunOptions) -> Result<()> {
    let bundle = bundle::make(&options.bundle)?;
    let qemu = Qemu {
        memory_mib: options.machine_memory,
        cpus: options.machine_cpus,
        bundle: Some(bundle),
        ..Qemu::new(build()?)?
    };
    let status = qemu.command("mon:stdio").status().context("cannot run QEMU")?;
    eprintln!("{}", if Ending::of(status) == Ending::Good { "ended well" } else { "did not end well" });
    Ok(())
}

/// All verdicts of the image; also part of `cargo xtask test`.
pub fn test(summary: &mut Summary) {
    if exec::find(emulator::QEMU).is_none() {
        return summary.not_run("metal", "QEMU is not installed: cargo xtask setup");
    }
    let mut image = None;
    summary.step("metal: build", || {
        image = Some(build()?);
        Ok(Outcome::Passed)
    });
    let Some(image) = image else {
        return summary.not_run("metal: boots", "the image was not built");
    };
    summary.step("metal: PVH boot, memory map on serial", || memory_map(&image));
    summary.step("metal: too little memory is refused", || too_little_memory(&image));
    summary.step("metal: a processor without SVM is refused", || no_svm(&image));
    summary.step("metal: a damaged bundle is refused", || damaged_bundle(&image));
    if bundle::is_ready(GUEST) {
        summary.step("metal: Linux boots, 1 vCPU", || linux(&image, 1, &[JOB]));
    } else {
        summary.not_run("metal: Linux boots", "its guest is not prepared: bedplate guest fetch cloud");
    }
}

/// The guest of the boot rows.
const GUEST: &str = "cloud";
/// A guest that works and switches itself off.
const JOB: &str = "bedplate.checksum=4,64 bedplate.poweroff";
const ROUNDS: u32 = 4;
const POOL_KIB: usize = 64;
/// A guest takes this long (in seconds) only if it hangs: emulated virtualization on a busy machine is slow.
const PATIENCE: u64 = 600;

fn memory_map(image: &Path) -> Result<Outcome> {
    let (log, ending) = Qemu::new(image.to_owned())?.run(60)?;
    expect(&log, &["bedplate-metal ", "memory map:", "usable memory: 1023 MiB", "TSC ", "free memory: "])?;
    if ending != Ending::Good {
        bail!("it did not end well:\n{log}");
    }
    Ok(Outcome::Passed)
}

fn too_little_memory(image: &Path) -> Result<Outcome> {
    let (log, ending) = Qemu { memory_mib: 16, ..Qemu::new(image.to_owned())? }.run(60)?;
    expect(&log, &["REFUSED: too little memory", "HALTED"])?;
    if ending == Ending::Good {
        bail!("it ended as if all was well:\n{log}");
    }
    Ok(Outcome::Passed)
}

fn no_svm(image: &Path) -> Result<Outcome> {
    let bundle = bundle_file("no-svm.cpio", b"any")?;
    let (log, _) = Qemu { cpu: "max,-svm", bundle: Some(bundle), ..Qemu::new(image.to_owned())? }.run(60)?;
    expect(&log, &["REFUSED: this processor has no AMD virtualization", "HALTED"])?;
    Ok(Outcome::Passed)
}

fn damaged_bundle(image: &Path) -> Result<Outcome> {
    let bundle = bundle_file("damaged.cpio", &[0x30; 5000])?;
    let (log, _) = Qemu { bundle: Some(bundle), ..Qemu::new(image.to_owned())? }.run(60)?;
    expect(&log, &["REFUSED: the bundle is no cpio archive at byte 0", "HALTED"])?;
    Ok(Outcome::Passed)
}

fn bundle_file(name: &str, content: &[u8]) -> Result<PathBuf> {
    let folder = workspace::target_folder()?.join("metal");
    std::fs::create_dir_all(&folder).context("cannot make a folder for bundles")?;
    let path = folder.join(name);
    std::fs::write(&path, content).context("cannot write a bundle")?;
    Ok(path)
}

/// Every VM reaches the initrd's marker, gets its job right and switches itself off.
fn linux(image: &Path, cpus: u32, vms: &[&str]) -> Result<Outcome> {
    let options = BundleOptions {
        guest: GUEST.into(),
        vm: vms.iter().map(ToString::to_string).collect(),
        cpus,
        memory: 256,
        cpu_model: "x86-64-v3,-vme".into(),
        output: None,
    };
    let started = Instant::now();
    let bundle = Some(bundle::make(&options)?);
    let (log, ending) = Qemu { bundle, ..Qemu::new(image.to_owned())? }.run(PATIENCE)?;
    let sum = format!("BEDPLATE-CHECKSUM final {}", guest_trials::checksum_job(ROUNDS, POOL_KIB));
    let ready = format!("{} {cpus} cpus", guest_catalog::READY_MARKER);
    for vm in 1..=vms.len() {
        let mark = if vms.len() > 1 { format!("[vm{vm}] ") } else { String::new() };
        let own: Vec<&str> = log.lines().filter(|line| line.starts_with(&mark)).collect();
        expect(&own.join("\n"), &[guest_catalog::INIT_MARKER, &ready, &sum])
            .with_context(|| format!("VM {vm}"))?;
        expect(&log, &[&format!("VM `vm{vm}` has ended: PoweredOff")])?;
    }
    if ending != Ending::Good {
        bail!("it did not end well:\n{log}");
    }
    eprintln!("{} VMs of {cpus} vCPUs: {:.1} s", vms.len(), started.elapsed().as_secs_f64());
    Ok(Outcome::Passed)
}

/// Whether all words are in the log, in this order.
fn expect(log: &str, words: &[&str]) -> Result<()> {
    let mut rest = log;
    for word in words {
        let Some(at) = rest.find(word) else {
            bail!("`{word}` is not in the serial log, or too early:\n{log}")
        };
        rest = &rest[at + word.len()..];
    }
    Ok(())
}
