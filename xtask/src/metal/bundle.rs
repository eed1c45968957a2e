//! Bundles: what the bare-metal image runs, as one cpio archive (`metal/src/bundle.rs` and `vm_spec.rs` read it).

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use guest_catalog::Cache;
use guest_catalog::cpio::CpioWriter;

use crate::progress::Bars;
use crate::workspace;

/// Name of a kernel in a bundle.
pub const KERNEL: &str = "vmlinuz";
/// Name of an initial RAM disk in a bundle.
pub const INITRD: &str = "initrd.cpio";
/// A disk image of zeroes.
pub const BLANK: &str = "blank.img";

#[derive(Debug, Clone, Args)]
pub struct BundleOptions {
    /// Guest of the catalogue, prepared if it is not there.
    #[arg(long, default_value = "cloud")]
    pub guest: String,
    /// Words for each VM's kernel command line; given once for each VM.
    #[arg(long, default_values_t = [String::new()])]
    pub vm: Vec<String>,
    /// vCPUs of each VM.
    #[arg(long, default_value_t = 1)]
    pub cpus: u32,
    /// Memory of each VM, in MiB.
    #[arg(long, default_value_t = 256)]
    pub memory: u32,
    /// More lines for every VM in `bedplate.toml`, such as `net = "switch"` or `disk = "ram:blank.img"`.
    #[arg(long = "line")]
    pub lines: Vec<String>,
    /// More lines for each VM of its own.
    #[arg(skip)]
    pub own_lines: Vec<Vec<String>>,
    /// Size of `blank.img` in the bundle, in MiB; 0: there is none.
    #[arg(long, default_value_t = 0)]
    pub blank_mib: usize,
    /// CPU model of each VM. QEMU's SVM has no virtual-8086 extensions.
    #[arg(long, default_value = "x86-64-v3,-vme")]
    pub cpu_model: String,
    /// Where to write it (default: below the target folder).
    #[arg(long)]
    pub output: Option<PathBuf>,
}

/// A file of a bundle: its name and what is in it.
pub type NamedFile = (&'static str, Vec<u8>);

/// Whether the guest is there.
pub fn is_ready(guest: &str) -> bool {
    let ready = || -> Result<bool> { Ok(Cache::of_user()?.ready(guest_catalog::find(guest)?).is_some()) };
    ready().unwrap_or(false)
}

/// The guest, prepared if it is not there.
pub fn fetch(guest: &str) -> Result<guest_catalog::Prepared> {
    Ok(Cache::of_user()?.fetch(guest_catalog::find(guest)?, &mut Bars::new())?)
}

/// Writes the bundle; where it is.
pub fn make(options: &BundleOptions) -> Result<PathBuf> {
    let guest = fetch(&options.guest)?;
    let mut spec = String::new();
    for (index, words) in options.vm.iter().enumerate() {
        let append = format!("{} {words}", guest.append);
        // Writing to a string does not fail.
        let _ = writeln!(
            spec,
            "[[vm]]\nname = \"vm{}\"\nmemory_mib = {}\ncpus = {}\ncpu_model = \"{}\"\nkernel = \"{KERNEL}\"\nappend = \"{}\"",
            index + 1,
            options.memory,
            options.cpus,
            options.cpu_model,
            append.trim()
        );
        if guest.initrd.is_some() {
            let _ = writeln!(spec, "initrd = \"{INITRD}\"");
        }
        let own = options.own_lines.get(index).into_iter().flatten();
        options.lines.iter().chain(own).for_each(|line| {
            let _ = writeln!(spec, "{line}");
        });
    }
    let (_, mut files) = guest_files(&options.guest)?;
    if options.blank_mib > 0 {
        files.push((BLANK, vec![0; options.blank_mib << 20]));
    }
    write(&spec, &files, options.output.as_deref())
}

/// Kernel and initrd of a guest of the catalogue, as [`KERNEL`] and [`INITRD`], and what its kernel wants to be told.
pub fn guest_files(guest: &str) -> Result<(String, Vec<NamedFile>)> {
    let guest = fetch(guest)?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let mut files = vec![(KERNEL, read(&guest.kernel)?)];
    if let Some(initrd) = &guest.initrd {
        files.push((INITRD, read(initrd)?));
    }
    Ok((guest.append.to_string(), files))
}

/// Writes a bundle of `spec` and what it names; where it is.
pub fn write(spec: &str, files: &[(&str, Vec<u8>)], output: Option<&Path>) -> Result<PathBuf> {
    let mut archive = CpioWriter::new(Vec::new());
    archive.file("bedplate.toml", spec.as_bytes())?;
    for (name, content) in files {
        archive.file(name, content)?;
    }
    let folder = workspace::target_folder()?.join("metal");
    let output = output.map_or_else(|| folder.join("bundle.cpio"), Path::to_owned);
    if let Some(folder) = output.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    fs::write(&output, archive.finish()?).with_context(|| format!("cannot write {}", output.display()))?;
    Ok(output)
}
