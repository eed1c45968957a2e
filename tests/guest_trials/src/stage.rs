//! What a row gets to work with: the VMM under trial, the prepared guests, a scratch folder, its patience, and the
//! transcripts of every VM that it started.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

use guest_catalog::{Cache, Prepared};

use crate::config::{VmConfig, Vmm};
use crate::console::ConsoleError;
use crate::lab::quoted;
use crate::vm::Vm;

/// When a row runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// In `cargo xtask test`, within 25 minutes on two cores.
    Test,
    /// In `cargo xtask campaign` only.
    Campaign,
    /// There too, but it takes so long that one engine does it.
    Endurance,
}

/// Why a row failed, in words for the summary.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Failure(String);

impl Failure {
    /// A failure with its reason.
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }

    /// `Ok` if the condition holds.
    ///
    /// # Errors
    /// The reason, if it does not.
    pub fn unless(condition: bool, reason: impl FnOnce() -> String) -> Result<(), Self> {
        if condition { Ok(()) } else { Err(Self(reason())) }
    }
}

impl From<ConsoleError> for Failure {
    fn from(error: ConsoleError) -> Self {
        Self(error.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self(format!("the trial itself could not go on: {error}"))
    }
}

/// The place where one row runs.
#[derive(Debug)]
pub struct Stage {
    vmm: Vmm,
    cache: Cache,
    scratch: tempfile::TempDir,
    transcripts: Mutex<Vec<u8>>,
    seed: u64,
}

impl Stage {
    /// A fresh scratch folder below the system's temporary one.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(vmm: Vmm, cache: Cache, seed: u64) -> std::io::Result<Self> {
        let scratch = tempfile::Builder::new().prefix("bedplate-trial-").tempdir()?;
        Ok(Self { vmm, cache, scratch, transcripts: Mutex::new(Vec::new()), seed })
    }

    /// The VMM under trial.
    pub fn vmm(&self) -> &Vmm {
        &self.vmm
    }

    /// The seed of this run's random choices; it stands in the summary.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// A folder that goes away with the row.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// A prepared guest; the runner prepared it before the row started.
    ///
    /// # Errors
    /// It is not in the cache.
    pub fn guest(&self, name: &str) -> Result<Prepared, Failure> {
        let guest = guest_catalog::find(name).map_err(|e| Failure::new(e.to_string()))?;
        self.cache.ready(guest).ok_or_else(|| Failure::new(format!("guest {name} is not prepared")))
    }

    /// How long to wait for something that takes QEMU about `seconds` on an idle machine. Generous: it only has to
    /// end a hang.
    pub fn patience(&self, seconds: u64) -> Duration {
        let factor = match self.vmm {
            Vmm::Qemu { .. } => 10,
            Vmm::Bedplate { .. } => 60,
            // Emulated twice, and the laboratory boots first.
            Vmm::Lab { .. } => 120,
        };
        Duration::from_secs(seconds * factor).max(Duration::from_secs(60))
    }

    /// Starts a VM.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start(&self, config: &VmConfig) -> Result<Vm, Failure> {
        self.start_on(&self.vmm, config)
    }

    /// Starts a VM on another VMM than the one under trial.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn start_on(&self, vmm: &Vmm, config: &VmConfig) -> Result<Vm, Failure> {
        let config = VmConfig { scratch: Some(self.scratch().to_path_buf()), ..config.clone() };
        Vm::start(vmm, &config).map_err(|e| Failure::new(format!("cannot start {}: {e}", vmm.name())))
    }

    /// `bedplate ctl NAME …` for `vm`, which has that name; it must succeed. What it said.
    ///
    /// # Errors
    /// It fails, or the VMM under trial is not Bedplate.
    pub fn ctl(&self, vm: &Vm, name: &str, words: &[&str]) -> Result<String, Failure> {
        let all = ["ctl", name].into_iter().chain(words.iter().copied());
        let binary = match (&self.vmm, vm.lab()) {
            (_, Some(lab)) => {
                let words: Vec<_> = std::iter::once("bedplate").chain(all).map(OsStr::new).collect();
                return lab.control(&quoted(&words), self.patience(10));
            }
            (Vmm::Bedplate { binary, .. }, None) => binary,
            // A VM beside the laboratory.
            (Vmm::Lab { lab, .. }, None) => &lab.bedplate,
            _ => return Err(Failure::new("only Bedplate has a control socket")),
        };
        let done = Command::new(binary).args(all).output()?;
        Failure::unless(done.status.success(), || {
            let said = String::from_utf8_lossy(&done.stderr);
            format!("ctl {} ended with {}: {said}", words.join(" "), done.status)
        })?;
        Ok(String::from_utf8_lossy(&done.stdout).into_owned())
    }

    /// A writable copy of a guest's master disk (sparse, so it takes no more room than it must).
    ///
    /// # Errors
    /// The copy fails.
    pub fn disk_copy(&self, master: &Path) -> Result<PathBuf, Failure> {
        let copy = self.scratch().join(master.file_name().unwrap_or_default());
        let status =
            Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(master).arg(&copy).status()?;
        Failure::unless(status.success(), || format!("cannot copy {}", master.display()))?;
        Ok(copy)
    }

    /// An empty raw disk.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn empty_disk(&self, name: &str, bytes: u64) -> Result<PathBuf, Failure> {
        let path = self.scratch().join(name);
        std::fs::File::create(&path)?.set_len(bytes)?;
        Ok(path)
    }

    /// Keeps a VM's transcript for the row's log file.
    pub fn keep(&self, vm: &Vm) {
        let mut kept = self.transcripts.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        kept.extend_from_slice(&vm.transcript());
    }

    /// All kept transcripts.
    pub fn transcripts(&self) -> Vec<u8> {
        self.transcripts.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}
