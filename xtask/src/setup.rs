//! `cargo xtask setup`: what the other commands need, installed once. Idempotent, and quick when all is there.

use anyhow::{Result, bail};
use clap::Args;

use crate::{exec, metal, workspace};

/// A program (or a file that is no program), the Debian package that holds it and what it is for.
struct Need {
    program: &'static str,
    package: &'static str,
    purpose: &'static str,
}

const NEEDS: &[Need] = &[
    Need {
        program: "qemu-system-x86_64",
        package: "qemu-system-x86",
        purpose: "what Bedplate is measured against, and the laboratory",
    },
    Need {
        program: "/usr/share/OVMF/OVMF_CODE_4M.fd",
        package: "ovmf",
        purpose: "UEFI firmware that boots bedplate-metal.efi",
    },
    Need { program: "bochs-bin", package: "bochs", purpose: "emulates Intel's VMX, and SVM with next RIPs" },
    Need {
        program: "/usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so",
        package: "bochs-term",
        purpose: "the smallest display that Bochs's package wants",
    },
    Need {
        program: "/usr/share/bochs/BIOS-bochs-latest",
        package: "bochsbios",
        purpose: "the same for its firmware",
    },
    Need { program: metal::BOCHS_VGA, package: "vgabios", purpose: "the same for its graphics card" },
    Need {
        program: "/boot/xen-4.17-amd64.gz",
        package: "xen-hypervisor-4.17-amd64",
        purpose: "what bare metal is measured against",
    },
    Need { program: "mformat", package: "mtools", purpose: "makes boot volumes for Bochs" },
    Need { program: "qemu-img", package: "qemu-utils", purpose: "checks qcow2 images" },
    Need { program: "mmdebstrap", package: "mmdebstrap", purpose: "builds the Debian disk" },
    Need { program: "iasl", package: "acpica-tools", purpose: "disassembles our ACPI tables" },
    Need { program: "mke2fs", package: "e2fsprogs", purpose: "makes the Debian disk's filesystem" },
    Need { program: "python3", package: "python3", purpose: "runs pip" },
    Need { program: "pip3", package: "python3-pip", purpose: "downloads the Alpine guest" },
    Need { program: "git", package: "git", purpose: "names the commit in reports" },
];

/// Programs of the Rust world: (program, crate).
const TOOLS: &[(&str, &str)] = &[("cargo-nextest", "cargo-nextest"), ("cargo-deny", "cargo-deny")];

#[derive(Debug, Default, Args)]
pub struct SetupOptions {
    /// Also build and install cargo-nextest and cargo-deny (minutes).
    #[arg(long)]
    pub tools: bool,
}

pub fn run(options: &SetupOptions) -> Result<()> {
    all()?;
    let missing: Vec<_> = TOOLS.iter().filter(|(program, _)| exec::find(program).is_none()).collect();
    for (program, name) in missing {
        if options.tools {
            eprintln!("{program} is missing: building it");
            exec::run(&workspace::root(), "cargo", &["install", "--locked", name])?;
        } else {
            eprintln!("{program} is missing (cargo xtask setup --tools builds it)");
        }
    }
    eprintln!("set-up is complete");
    Ok(())
}

/// All but the programs of the Rust world: the packages, and what builds for bare metal.
pub fn all() -> Result<()> {
    packages()?;
    metal::install_toolchain()
}

/// The Debian packages alone.
pub fn packages() -> Result<()> {
    let missing: Vec<_> = NEEDS.iter().filter(|need| exec::find(need.program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    for need in &missing {
        eprintln!("{} is missing: {} (package {})", need.program, need.purpose, need.package);
    }
    let names: Vec<&str> = missing.iter().map(|need| need.package).collect();
    install(&names)
}

/// Installs these Debian packages.
pub fn install(names: &[&str]) -> Result<()> {
    let by_hand = format!("apt-get install --no-install-recommends {}", names.join(" "));
    if exec::find("apt-get").is_none() {
        bail!("this host has no apt-get; install these by hand: {}", names.join(" "));
    }
    let root = exec::output(&workspace::root(), "id", &["-u"])? == "0";
    if !root && exec::find("sudo").is_none() {
        bail!("installing packages takes root or sudo; as root run: {by_hand}");
    }
    let apt = |arguments: &[&str]| {
        let mut words = if root { vec![] } else { vec!["sudo", "--"] };
        words.extend([
            "env",
            "DEBIAN_FRONTEND=noninteractive",
            "apt-get",
            "-q",
            "-o",
            "DPkg::Lock::Timeout=300",
        ]);
        words.extend(arguments);
        exec::run(&workspace::root(), words[0], &words[1..])
    };
    apt(&["update"])?;
    let mut install = vec!["install", "-y", "--no-install-recommends"];
    install.extend(names);
    apt(&install)
}
