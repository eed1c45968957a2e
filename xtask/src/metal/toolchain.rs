//! What builds for `x86_64-unknown-none` and `x86_64-unknown-uefi`: the target of the toolchain in use if it is installed, otherwise Debian's
//! `rustc-web` with the sources in `rust-web-src` (docs/adr/0009-bare-metal.md).

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::{exec, setup, workspace};

/// A target without an operating system.
pub struct Target {
    name: &'static str,
    /// Its name in cargo's environment.
    variable: &'static str,
    rustflags: &'static str,
    /// What a binary's name ends in.
    suffix: &'static str,
}

/// The image's. Where it lies is `link.ld`'s to say; backtraces follow frame pointers.
pub const NONE: Target = Target {
    name: "x86_64-unknown-none",
    variable: "CARGO_TARGET_X86_64_UNKNOWN_NONE",
    rustflags: "-Crelocation-model=static -Cforce-frame-pointers=yes",
    suffix: "",
};
/// The loader's.
pub const UEFI: Target = Target {
    name: "x86_64-unknown-uefi",
    variable: "CARGO_TARGET_X86_64_UNKNOWN_UEFI",
    rustflags: "",
    suffix: ".efi",
};
const DEBIAN_PACKAGES: &[&str] = &["rustc-web", "cargo-web", "rust-web-src"];
const DEBIAN_CARGO: &str = "/usr/bin/cargo";
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CORE: &str = "/usr/lib/rustlib";

/// See the module's header.
pub enum Toolchain {
    /// The one in use has the target.
    Target,
    /// Debian's, which builds `core` and `alloc` itself; the linker is of the toolchain in use.
    Debian {
        /// Path of rust-lld.
        linker: PathBuf,
    },
}

/// The first that there is for `target`.
pub fn find(target: &Target) -> Result<Toolchain> {
    let target = target.name;
    let root = workspace::root();
    let libraries = exec::output(&root, "rustc", &["--print", "target-libdir", "--target", target])?;
    if has_core(Path::new(&libraries)) {
        return Ok(Toolchain::Target);
    }
    let own = exec::output(&root, "rustc", &["--print", "sysroot"])?;
    let host = exec::output(&root, "rustc", &["--print", "host-tuple"])?;
    let linker = Path::new(&own).join("lib/rustlib").join(host).join("bin/rust-lld");
    if is_debian_complete() && linker.is_file() {
        return Ok(Toolchain::Debian { linker });
    }
    bail!(
        "nothing here builds for {target}: run `cargo xtask setup` (or `rustup target add {target}`, or on Debian \
         `apt-get install {}`)",
        DEBIAN_PACKAGES.join(" ")
    )
}

/// Installs one if there is none: rustup's targets, or if these cannot be had Debian's compiler.
pub fn install() -> Result<()> {
    let is_there = || find(&NONE).and(find(&UEFI)).is_ok();
    if is_there() {
        return Ok(());
    }
    eprintln!("what builds for bare metal is missing: installing it");
    let targets = ["target", "add", NONE.name, UEFI.name];
    if exec::find("rustup").is_some()
        && exec::run(&workspace::root(), "rustup", &targets).is_ok()
        && is_there()
    {
        return Ok(());
    }
    setup::install(DEBIAN_PACKAGES)?;
    find(&NONE).and(find(&UEFI)).map(drop)
}

fn has_core(libraries: &Path) -> bool {
    let names = std::fs::read_dir(libraries).into_iter().flatten().flatten();
    names.into_iter().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
}

fn is_debian_complete() -> bool {
    let sources = exec::output(&workspace::root(), DEBIAN_RUSTC, &["--print", "sysroot"])
        .map(|root| Path::new(&root).join("lib/rustlib/src/rust/library/core").is_dir());
    Path::new(DEBIAN_CARGO).is_file()
        && (sources.unwrap_or(false) || Path::new(DEBIAN_CORE).join("src").is_dir())
}

impl Toolchain {
    /// For people.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Target => "the installed target",
            Self::Debian { .. } => "Debian's rustc-web with -Zbuild-std",
        }
    }

    /// Builds a package's binary in release, with `environment`, and gives its path.
    pub fn build(
        &self,
        target: &Target,
        package: &str,
        binary: &str,
        environment: &[(&str, &Path)],
    ) -> Result<PathBuf> {
        let (mut command, folder) = match self {
            Self::Target => (Command::new("cargo"), workspace::target_folder()?),
            Self::Debian { linker } => {
                let mut command = Command::new(DEBIAN_CARGO);
                command.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1").env_remove("RUSTUP_TOOLCHAIN");
                command.env(format!("{}_LINKER", target.variable), linker);
                // Its own folder: another compiler's output would be thrown away at every change between them.
                (command, workspace::target_folder()?.join("metal-debian"))
            }
        };
        command.current_dir(workspace::root()).arg("build").args(["--release", "--target", target.name]);
        command.args(["--package", package, "--bin", binary]).arg("--target-dir").arg(&folder);
        if let Self::Debian { .. } = self {
            command.args([
                "-Zbuild-std=core,alloc,compiler_builtins",
                "-Zbuild-std-features=compiler-builtins-mem",
            ]);
        }
        command.env(format!("{}_RUSTFLAGS", target.variable), target.rustflags);
        command.envs(environment.iter().copied());
        let status = command.status().context("cannot run cargo")?;
        if !status.success() {
            bail!("{binary} was not built ({status})");
        }
        Ok(folder.join(target.name).join("release").join(format!("{binary}{}", target.suffix)))
    }
}
