//! A VM as people write it: a TOML file, completed by the command line.
//!
//! Called by: the `bedplate` command, which makes a [`VmSpec`] and hands it to [`crate::launch`]; the saved-VM
//! file, which carries one. Everything that is understood here was validated; what names files is checked when
//! they are opened.
//!
//! Invariants: unknown fields are refused; `VmSpec` → TOML → `VmSpec` is the identity; a resolved spec
//! ([`VmSpec::resolve`]) has no field whose meaning depends on the folder or the host.

mod error;
mod net;
mod size;

pub use error::SpecError;
pub use net::{NetKind, NetSpec};
pub use size::ByteSize;

use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Most vCPUs that a spec may ask for: what the engine can address.
pub const MAX_CPUS: u32 = 254;
/// Slots of the board for disks, networks, consoles and the random number generator together.
pub const MAX_DEVICES: usize = 23;

/// Which engine runs the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// The fastest that works on this host.
    #[default]
    Auto,
    /// The host's KVM.
    Kvm,
    /// The software engine: works everywhere. What runs often is translated.
    #[serde(alias = "soft-translate")]
    Soft,
    /// The software engine's interpreter alone.
    #[serde(rename = "soft,tier=interp")]
    SoftInterpreter,
    /// The software engine with all that is translated compared with the interpreter: to find its mistakes. One CPU.
    #[serde(rename = "soft,lockstep")]
    SoftLockstep,
}

/// What a guest's own reset does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnReset {
    /// The machine starts again.
    #[default]
    Reboot,
    /// The VM ends.
    Stop,
}

/// What a kernel panic seen on the serial console does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnPanic {
    /// The VM ends.
    #[default]
    Stop,
    /// Nothing.
    Keep,
}

/// What is booted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSpec {
    /// bzImage, or ELF with a PVH note.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub append: String,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// The image.
    pub path: PathBuf,
    /// `raw` or `qcow2`; left out, it goes by the file's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// Refuse writes.
    #[serde(default, skip_serializing_if = "is_false")]
    pub read_only: bool,
    /// Ignore the guest's discards.
    #[serde(default, skip_serializing_if = "is_false")]
    pub ignore_discard: bool,
    /// Backing files that the image may name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub backing: Vec<PathBuf>,
    /// The image stays as it is: what the guest writes goes to a new overlay beside it.
    #[serde(default, skip_serializing_if = "is_false")]
    pub frozen: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// A whole VM. See `docs/guide` for an example file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VmSpec {
    /// Its name: letters, digits, `-`, `_` and `.`; names the control socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// vCPUs.
    pub cpus: u32,
    /// RAM, a multiple of 2 MiB.
    pub memory: ByteSize,
    /// Named CPU model with extras, as in `x86-64-v3,+sha`. Absent: [`DEFAULT_CPU_MODEL`], without what an engine that
    /// was asked for by name lacks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_model: Option<String>,
    /// Physical address bits that the guest's processors tell; absent: 46. A VM that is to go over to a processor that
    /// has fewer must be told fewer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address_bits: Option<u8>,
    /// Engine.
    pub engine: EngineChoice,
    /// Guest time runs at this rate of host time, as in `1/8`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clock_rate: Option<String>,
    /// On a guest's reset.
    pub on_reset: OnReset,
    /// On a guest kernel's panic.
    pub on_panic: OnPanic,
    /// virtio-rng.
    pub rng: bool,
    /// COM1 to COM4: `stdio`, `unix:PATH`, `file:PATH` or `none`.
    pub serial: Vec<String>,
    /// virtio consoles, as `serial`.
    #[serde(rename = "console", skip_serializing_if = "Vec::is_empty")]
    pub consoles: Vec<String>,
    /// What is booted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootSpec>,
    /// Disks, in the order of their names in the guest.
    #[serde(rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSpec>,
    /// Network cards.
    #[serde(rename = "net", skip_serializing_if = "Vec::is_empty")]
    pub nets: Vec<NetSpec>,
}

/// The CPU model of a VM that names none.
pub const DEFAULT_CPU_MODEL: &str = "x86-64-v3";

impl VmSpec {
    /// Its CPU model.
    pub fn cpu_model(&self) -> &str {
        self.cpu_model.as_deref().unwrap_or(DEFAULT_CPU_MODEL)
    }
}

impl Default for VmSpec {
    fn default() -> Self {
        Self {
            name: None,
            cpus: 1,
            memory: ByteSize(1 << 30),
            cpu_model: None,
            address_bits: None,
            engine: EngineChoice::Auto,
            clock_rate: None,
            on_reset: OnReset::Reboot,
            on_panic: OnPanic::Stop,
            rng: true,
            serial: vec!["stdio".into()],
            consoles: Vec::new(),
            boot: None,
            disks: Vec::new(),
            nets: Vec::new(),
        }
    }
}

impl VmSpec {
    /// Reads a spec file. Relative paths in it are relative to its folder.
    pub fn load(path: &Path) -> Result<Self, SpecError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| SpecError::Read { path: path.into(), source })?;
        let mut spec = Self::from_toml(&text)
            .map_err(|source| SpecError::Toml { path: path.into(), source: Box::new(source) })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        spec.each_path(|p| *p = folder.join(&*p));
        spec.check().map_err(|source| SpecError::File { path: path.into(), source: Box::new(source) })?;
        Ok(spec)
    }

    /// Reads a spec from text.
    pub fn from_toml(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// The spec as a file that `load` reads.
    pub fn to_toml(&self) -> String {
        // Every field is a string, number, list or table of such: TOML can hold them all.
        toml::to_string_pretty(self).unwrap_or_else(|error| format!("# cannot be written as TOML: {error}\n"))
    }

    /// Checks every field, makes paths absolute, and writes out what was left to be derived.
    pub fn resolve(mut self, current_folder: &Path) -> Result<Self, SpecError> {
        self.check()?;
        for (index, net) in self.nets.iter_mut().enumerate() {
            if net.kind == NetKind::Tap && net.mac.is_none() && self.name.is_none() {
                let way_out =
                    "give the VM a --name or the card a mac=, so that no other VM has the same address";
                return Err(SpecError::field("net.mac", "", way_out));
            }
            let [a, b, c, d, e, f] =
                net.mac_address(self.name.as_deref().unwrap_or(crate::convert::UNNAMED), index)?;
            net.mac = Some(format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"));
        }
        for disk in &mut self.disks {
            disk.format = Some(format_name(disk.to_disk_format()?.resolved_format()).into());
        }
        self.each_path(|p| *p = current_folder.join(&*p));
        Ok(self)
    }

    /// Checks every field that can be checked without opening files.
    fn check(&self) -> Result<(), SpecError> {
        if let Some(name) = &self.name {
            check_name(name)?;
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(SpecError::field("cpus", self.cpus, "use 1 to 254"));
        }
        let memory = self.memory;
        if !memory.0.is_multiple_of(2 << 20) || memory.0 < 16 << 20 {
            return Err(SpecError::field(
                "memory",
                memory,
                "use a multiple of 2M from 16M on, as in 512M or 4G",
            ));
        }
        if let Some(rate) = &self.clock_rate {
            parse_rate(rate)?;
        }
        if self.serial.len() > 4 {
            return Err(SpecError::field("serial", self.serial.len(), "the board has four serial ports"));
        }
        for (field, ends) in [("serial", &self.serial), ("console", &self.consoles)] {
            for end in ends {
                end.parse::<host_io::serial::ConsoleSpec>()
                    .map_err(|error| SpecError::field(field, end, error.to_string()))?;
            }
        }
        let on_stdio = self.serial.iter().chain(&self.consoles).filter(|end| *end == "stdio").count();
        if on_stdio > 1 {
            return Err(SpecError::field(
                "serial",
                "stdio",
                "only one serial port or console can have the terminal",
            ));
        }
        let devices = self.disks.len() + self.nets.len() + self.consoles.len() + usize::from(self.rng);
        if devices > MAX_DEVICES {
            let way_out = "the board has 23 slots; leave some out (rng = false in a spec file frees one)";
            return Err(SpecError::field("disk, net, console, rng", devices, way_out));
        }
        for disk in &self.disks {
            disk.to_disk_format()?;
        }
        for net in &self.nets {
            net.check()?;
        }
        crate::convert::cpus(self)?;
        Ok(())
    }

    /// Whether everything that a run opens is there.
    pub fn check_files(&self) -> Result<(), SpecError> {
        let boot = self.boot.iter().flat_map(|boot| [Some(&boot.kernel), boot.initrd.as_ref()]).flatten();
        let disks = self.disks.iter().flat_map(|disk| std::iter::once(&disk.path).chain(&disk.backing));
        for path in boot.chain(disks) {
            std::fs::File::open(path).map_err(|source| SpecError::Read { path: path.into(), source })?;
        }
        Ok(())
    }

    /// Every file that the spec names: kernel, initrd, images, backing files, ends of consoles.
    pub fn files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        self.clone().each_path(|path| files.push(path.clone()));
        files
    }

    fn each_path(&mut self, mut change: impl FnMut(&mut PathBuf)) {
        if let Some(boot) = &mut self.boot {
            change(&mut boot.kernel);
            boot.initrd.iter_mut().for_each(&mut change);
        }
        for disk in &mut self.disks {
            change(&mut disk.path);
            disk.backing.iter_mut().for_each(&mut change);
        }
        for end in self.serial.iter_mut().chain(&mut self.consoles) {
            for kind in ["unix:", "file:"] {
                if let Some(path) = end.strip_prefix(kind) {
                    let mut path = PathBuf::from(path);
                    change(&mut path);
                    *end = format!("{kind}{}", path.display());
                }
            }
        }
    }
}

/// Guest nanoseconds per host nanosecond, as a fraction.
pub fn parse_rate(text: &str) -> Result<(u32, u32), SpecError> {
    let (numerator, denominator) = text.split_once('/').unwrap_or((text, "1"));
    match (numerator.trim().parse(), denominator.trim().parse()) {
        (Ok(n @ 1..=1000), Ok(d @ 1..=1000)) if n > d => {
            let way_out = "guest time cannot run faster than the host's; use a fraction up to 1, as in 1/8";
            Err(SpecError::field("clock_rate", text, way_out))
        }
        (Ok(n @ 1..=1000), Ok(d @ 1..=1000)) => Ok((n, d)),
        _ => Err(SpecError::field("clock_rate", text, "use a fraction of numbers from 1 to 1000, as in 1/8")),
    }
}

/// Names become file names of sockets: nothing that could leave the folder or confuse a shell.
pub fn check_name(name: &str) -> Result<(), SpecError> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    if name.is_empty() || name.len() > 64 || name.starts_with('.') || !name.chars().all(fine) {
        let way_out = "use up to 64 letters, digits, `-`, `_` and `.`, not starting with a dot";
        return Err(SpecError::field("name", name, way_out));
    }
    Ok(())
}

impl DiskSpec {
    /// From the command line's `PATH[,ro][,format=…]`.
    pub fn from_option(text: &str) -> Result<Self, SpecError> {
        let spec: disk_formats::DiskSpec = text
            .parse()
            .map_err(|error: disk_formats::DiskError| SpecError::field("disk", text, error.to_string()))?;
        Ok(Self {
            path: spec.path,
            format: spec.format.map(|f| format_name(f).into()),
            read_only: spec.read_only,
            ignore_discard: !spec.discard,
            backing: spec.backing_allow,
            frozen: false,
        })
    }

    /// What to write on the command line for it.
    pub fn to_option(&self) -> String {
        let mut text = self.path.display().to_string();
        if self.read_only {
            text.push_str(",ro");
        }
        if let Some(format) = &self.format {
            text.push_str(&format!(",format={format}"));
        }
        if self.ignore_discard {
            text.push_str(",discard=off");
        }
        for path in &self.backing {
            text.push_str(&format!(",backing={}", path.display()));
        }
        text
    }

    /// As the disk library wants it.
    pub fn to_disk_format(&self) -> Result<disk_formats::DiskSpec, SpecError> {
        let format = match &self.format {
            None => None,
            Some(name) => {
                Some(name.parse().map_err(|way_out| SpecError::field("disk.format", name, way_out))?)
            }
        };
        if self.path.as_os_str().is_empty() {
            return Err(SpecError::field("disk.path", "", "name the image file"));
        }
        let mut spec = disk_formats::DiskSpec::new(&self.path);
        spec.format = format;
        spec.read_only = self.read_only || self.frozen;
        spec.discard = !self.ignore_discard;
        spec.backing_allow = self.backing.clone();
        Ok(spec)
    }
}

fn format_name(format: disk_formats::Format) -> &'static str {
    match format {
        disk_formats::Format::Raw => "raw",
        disk_formats::Format::Qcow2 => "qcow2",
    }
}

#[cfg(test)]
mod tests;
