//! `cargo xtask demo`: one command from a fresh clone to Debian's login prompt on this terminal.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use guest_catalog::Cache;

use crate::progress::Bars;
use crate::{exec, setup, trials, workspace};

#[derive(Debug, Args)]
pub struct DemoOptions {
    /// Another guest of the catalogue.
    #[arg(long, default_value = "debian-12")]
    guest: String,
    /// vCPUs.
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// RAM.
    #[arg(long, default_value = "1G")]
    memory: String,
    /// Start from a fresh disk instead of the one the last demo left.
    #[arg(long)]
    fresh: bool,
    /// More arguments for `bedplate run`.
    #[arg(last = true)]
    more: Vec<String>,
}

pub fn run(options: &DemoOptions) -> Result<()> {
    setup::packages()?;
    let guest = guest_catalog::find(&options.guest)?;
    let cache = Cache::of_user()?;
    if cache.ready(guest).is_none() {
        eprintln!("preparing {} ({} MB; done once)", guest.name, guest.prepared_mib);
    }
    let prepared = cache.fetch(guest, &mut Bars::new())?;
    let binary = workspace::bedplate("release")?;

    let mut command = Command::new(binary);
    command.arg("run").arg("--kernel").arg(&prepared.kernel);
    if let Some(initrd) = &prepared.initrd {
        command.arg("--initrd").arg(initrd);
    }
    command.args(["--append", prepared.append]);
    if let Some((master, format)) = &prepared.disk {
        let disk = own_disk(&cache, guest.name, master, options.fresh)?;
        command.arg("--disk").arg(format!("{},format={}", disk.display(), format.name()));
    }
    command.args(["--net", "user", "--cpus", &options.cpus.to_string(), "--memory", &options.memory]);
    // The proven engine, whatever the host offers, unless another is asked for.
    command.args(trials::options(&options.more));
    eprintln!("\n{} on this terminal; Ctrl-A x stops it, Ctrl-A h helps.", guest.summary);
    // The VM takes this process's place: its terminal, its signals, its exit code.
    let error = command.exec();
    Err(anyhow!(error)).context("cannot start bedplate")
}

/// The master disk stays as it is; the demo writes to a copy.
fn own_disk(cache: &Cache, guest: &str, master: &Path, fresh: bool) -> Result<PathBuf> {
    let folder = cache.folder().join("demo").join(guest);
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let disk = folder.join(master.file_name().unwrap_or_default());
    let newer = |a: &Path, b: &Path| {
        Some(fs::metadata(a).ok()?.modified().ok()? > fs::metadata(b).ok()?.modified().ok()?)
    };
    if fresh || !disk.is_file() || newer(master, &disk) == Some(true) {
        let partial = folder.join("partial");
        exec::run(&folder, "cp", &[Path::new("--sparse=always"), master, &partial])?;
        fs::rename(&partial, &disk).with_context(|| format!("cannot create {}", disk.display()))?;
    }
    Ok(disk)
}
