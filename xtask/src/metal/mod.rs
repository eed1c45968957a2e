//! `cargo xtask metal`: the bare-metal image, built, booted in an emulator, and judged by its serial log.

mod bochs;
mod bochs_rows;
mod bundle;
mod costs;
mod emulator;
mod iommu;
mod isolation;
mod loadable;
mod rows;
mod screen;
mod state;
mod toolchain;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use guest_trials::Outcome;

use crate::summary::Summary;
use crate::workspace;
use bochs::Bochs;
pub use bochs::VGA as BOCHS_VGA;
use bundle::BundleOptions;
use emulator::{Boot, Ending, Qemu};
pub use rows::test;
pub use toolchain::install as install_toolchain;
use toolchain::{NONE, UEFI};

/// The campaign's part: the rows, and costs beside Xen and KVM.
pub fn steps(summary: &mut Summary) {
    test(summary, None, true);
    let costs = || costs::run(&costs::CostsOptions::default()).map(|()| Outcome::Passed);
    summary.step("metal: costs beside Xen and KVM", costs);
}

#[derive(Debug, Subcommand)]
pub enum Metal {
    /// Build the image for the target without an operating system, and the UEFI application that holds it; their
    /// paths are the last lines.
    Build,
    /// Make a bundle of a guest of the catalogue; its path is the last line.
    Bundle(BundleOptions),
    /// Boot the image in QEMU with AMD SVM, serial line on this terminal (Ctrl-A x ends QEMU); or in Bochs.
    Run(RunOptions),
    /// Boot it, with and without guests, and judge its serial log.
    Test(TestOptions),
    /// Count what exits, the start and memory cost beside Xen and KVM on the same emulated machine; a table.
    Costs(costs::CostsOptions),
}

#[derive(Debug, Args)]
pub struct TestOptions {
    /// Only rows with this in their name.
    #[arg(long)]
    only: Option<String>,
    /// Also those that only the campaign runs.
    #[arg(long)]
    long: bool,
}

#[derive(Debug, Args)]
pub struct RunOptions {
    /// Boot the UEFI application by OVMF.
    #[arg(long)]
    uefi: bool,
    /// Boot it in Bochs instead of QEMU, on this processor (`corei7_skylake_x` has VMX, `ryzen` has SVM): the serial
    /// line is shown, typing is not.
    #[arg(long, value_name = "MODEL", conflicts_with_all = ["qemu", "machine_memory", "machine_cpus"])]
    bochs: Option<String>,
    /// More arguments for QEMU, each given by itself.
    #[arg(long, allow_hyphen_values = true)]
    qemu: Vec<String>,
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
            let image = build()?;
            println!("{}", image.display());
            println!("{}", build_efi(&image)?.display());
            Ok(())
        }
        Metal::Bundle(options) => {
            println!("{}", bundle::make(options)?.display());
            Ok(())
        }
        Metal::Run(options) => interactive(options),
        Metal::Costs(options) => costs::run(options),
        Metal::Test(options) => {
            let mut summary = Summary::new(format!("cargo xtask metal test, commit {}", workspace::commit()));
            test(&mut summary, options.only.as_deref(), options.long);
            summary.finish()
        }
    }
}

/// The image.
fn build() -> Result<PathBuf> {
    let toolchain = toolchain::find(&NONE)?;
    eprintln!("for bare metal: {}", toolchain.name());
    toolchain.build(&NONE, "metal", "bedplate-metal", &[])
}

/// The guest that tells what its exits cost.
fn build_exit_bench() -> Result<PathBuf> {
    toolchain::find(&NONE)?.build(&NONE, "metal", "bedplate-exit-bench", &[])
}

/// The UEFI application with `image` inside.
fn build_efi(image: &Path) -> Result<PathBuf> {
    let inside = inside()?;
    let whole = std::fs::read(image).context("cannot read the image")?;
    std::fs::write(&inside, loadable::loadable(&whole)?)
        .context("cannot write what of the image is loaded")?;
    let built = build_loader("bedplate-loader")?;
    let efi = inside.with_extension("efi");
    std::fs::copy(&built, &efi).context("cannot copy the UEFI application")?;
    Ok(efi)
}

/// What the UEFI application has inside: of the image what is loaded.
fn inside() -> Result<PathBuf> {
    let folder = workspace::target_folder()?.join("metal");
    std::fs::create_dir_all(&folder).context("cannot make a folder for the UEFI application")?;
    Ok(folder.join("bedplate-metal.elf"))
}

/// A binary of the loader with what [`build_efi`] has put inside.
fn build_loader(binary: &str) -> Result<PathBuf> {
    let environment = [("BEDPLATE_METAL_IMAGE", &*inside()?)];
    toolchain::find(&UEFI)?.build(&UEFI, "uefi_loader", binary, &environment)
}

fn interactive(options: &RunOptions) -> Result<()> {
    let bundle = bundle::make(&options.bundle)?;
    let image = build()?;
    if let Some(model) = &options.bochs {
        let machine = Bochs { bundle: Some(bundle), shown: true, ..Bochs::new(&build_efi(&image)?, model) };
        machine.run(u64::from(u32::MAX))?;
        return Ok(());
    }
    let boot = if options.uefi { Boot::Uefi(build_efi(&image)?) } else { Boot::Pvh(image) };
    let qemu = Qemu {
        memory_mib: options.machine_memory,
        cpus: options.machine_cpus,
        bundle: Some(bundle),
        more: options.qemu.clone(),
        ..Qemu::new(boot)?
    };
    let status = qemu.command("mon:stdio")?.status().context("cannot run QEMU")?;
    eprintln!("{}", if Ending::of(status) == Ending::Good { "ended well" } else { "did not end well" });
    Ok(())
}
