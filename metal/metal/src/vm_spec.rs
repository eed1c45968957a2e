//! `bedplate.toml` of a bundle: which VMs to run.
//!
//! ```toml
//! [[vm]]
//! name = "one"
//! memory_mib = 256
//! cpus = 1
//! kernel = "vmlinuz"
//! initrd = "initrd.cpio"
//! append = "console=ttyS0"
//! # A copy of a file of the bundle; a virtio disk of the machine, all of it.
//! disk = "ram:root.img"
//! disk = "machine:0"
//! # The machine's switch.
//! net = "switch"
//! # Typing goes to hvc0 instead of ttyS0.
//! console = "virtio"
//! # A crash (triple fault, kernel panic) ends it, or: "restart".
//! on_crash = "end"
//! # It goes on from a saved VM: a file of the bundle, or what stands on a disk of the machine.
//! restore = "bundle:web.saved"
//! restore = "machine:1"
//! # `save` of the monitor writes to this disk of the machine.
//! save = "machine:1"
//! ```
//!
//! Of TOML it takes what stands here: tables `[[vm]]`, numbers, strings in double quotes without escapes, comments;
//! `disk` may stand several times.
//! Called by: [`crate::ground`].

use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// Most VMs of a bundle.
pub const MAX_VMS: usize = 8;

/// Most disks of a VM.
pub const MAX_DISKS: usize = 4;

/// What a disk of a VM is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSource {
    /// A copy, in memory, of a file of the bundle.
    Ram(String),
    /// A disk of the machine, counted from 0.
    Machine(usize),
}

/// What a crash of the guest does: a triple fault, a kernel's panic, an engine that cannot go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCrash {
    /// The VM ends.
    #[default]
    End,
    /// It starts again.
    Restart,
}

/// Where a saved VM stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SavedSource {
    /// A file of the bundle.
    File(String),
    /// The beginning of a disk of the machine, counted from 0.
    Machine(usize),
}

/// A VM as the bundle describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmSpec {
    /// What it is called.
    pub name: String,
    /// RAM.
    pub memory_mib: u64,
    /// vCPUs.
    pub cpus: u32,
    /// CPU model.
    pub cpu_model: String,
    /// File of the bundle.
    pub kernel: String,
    /// File of the bundle; empty: none.
    pub initrd: String,
    /// The kernel's command line.
    pub append: String,
    /// virtio-blk, in the order in which the guest finds them.
    pub disks: Vec<DiskSource>,
    /// virtio-net, on the machine's switch.
    pub net: bool,
    /// A virtio console, to which typing goes.
    pub virtio_console: bool,
    /// What a crash does.
    pub on_crash: OnCrash,
    /// It goes on from here instead of booting.
    pub restore: Option<SavedSource>,
    /// Disk of the machine that it is saved to.
    pub save_to: Option<usize>,
}

/// What is wrong, and in which line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("bedplate.toml, line {line}: {problem}")]
pub struct VmSpecError {
    /// Counted from 1.
    pub line: usize,
    /// For people.
    pub problem: String,
}

/// The VMs of a spec.
pub fn parse(text: &[u8]) -> Result<Vec<VmSpec>, VmSpecError> {
    let at = |line: usize, problem: &str| VmSpecError { line, problem: problem.into() };
    let text = core::str::from_utf8(text).map_err(|_| at(1, "it is not UTF-8"))?;
    let mut vms: Vec<VmSpec> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if line == "[[vm]]" {
            if vms.len() == MAX_VMS {
                return Err(at(number, "there are too many VMs"));
            }
            vms.push(VmSpec {
                name: alloc::format!("vm{}", vms.len() + 1),
                memory_mib: 256,
                cpus: 1,
                cpu_model: "x86-64-v3".to_string(),
                kernel: String::new(),
                initrd: String::new(),
                append: String::new(),
                disks: Vec::new(),
                net: false,
                virtio_console: false,
                on_crash: OnCrash::End,
                restore: None,
                save_to: None,
            });
            continue;
        }
        let vm = vms.last_mut().ok_or_else(|| at(number, "a VM starts with [[vm]]"))?;
        let (key, value) =
            line.split_once('=').ok_or_else(|| at(number, "neither [[vm]] nor key = value"))?;
        set(vm, key.trim(), value.trim()).map_err(|problem| at(number, problem))?;
    }
    let end = text.lines().count();
    match vms.iter().find(|vm| vm.kernel.is_empty() && vm.restore.is_none()) {
        _ if vms.is_empty() => Err(at(end, "there is no [[vm]]")),
        Some(vm) => {
            Err(at(end, &alloc::format!("VM `{}` needs a kernel, or a saved VM to go on from", vm.name)))
        }
        None => Ok(vms),
    }
}

fn set(vm: &mut VmSpec, key: &str, value: &str) -> Result<(), &'static str> {
    let text = || {
        let inside = value.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
        inside
            .filter(|text| !text.contains(['"', '\\']))
            .map(String::from)
            .ok_or("a string stands in double quotes")
    };
    let number = || value.parse::<u32>().map_err(|_| "this must be a whole number");
    match key {
        "name" => vm.name = text()?,
        "memory_mib" => vm.memory_mib = number()?.into(),
        "cpus" => vm.cpus = number()?,
        "cpu_model" => vm.cpu_model = text()?,
        "kernel" => vm.kernel = text()?,
        "initrd" => vm.initrd = text()?,
        "append" => vm.append = text()?,
        "disk" if vm.disks.len() == MAX_DISKS => return Err("there are too many disks"),
        "disk" => vm.disks.push(disk(&text()?)?),
        "net" if text()? == "switch" => vm.net = true,
        "net" => return Err("the only network is \"switch\""),
        "console" => match &*text()? {
            "serial" => vm.virtio_console = false,
            "virtio" => vm.virtio_console = true,
            _ => return Err("a console is \"serial\" or \"virtio\""),
        },
        "on_crash" => match &*text()? {
            "end" => vm.on_crash = OnCrash::End,
            "restart" => vm.on_crash = OnCrash::Restart,
            _ => return Err("a crash is to \"end\" a VM or to \"restart\" it"),
        },
        "restore" => vm.restore = Some(saved(&text()?)?),
        "save" => match saved(&text()?)? {
            SavedSource::Machine(number) => vm.save_to = Some(number),
            SavedSource::File(_) => return Err("a VM is saved to \"machine:NUMBER\""),
        },
        _ => return Err("there is no such key"),
    }
    Ok(())
}

fn saved(text: &str) -> Result<SavedSource, &'static str> {
    match text.split_once(':') {
        Some(("bundle", file)) => Ok(SavedSource::File(file.into())),
        Some(("machine", number)) => machine_disk(number).map(SavedSource::Machine),
        _ => Err("a saved VM is \"bundle:FILE\" or \"machine:NUMBER\""),
    }
}

fn machine_disk(number: &str) -> Result<usize, &'static str> {
    number.parse().map_err(|_| "a disk of the machine has a number, counted from 0")
}

fn disk(text: &str) -> Result<DiskSource, &'static str> {
    match text.split_once(':') {
        Some(("ram", file)) => Ok(DiskSource::Ram(file.into())),
        Some(("machine", number)) => machine_disk(number).map(DiskSource::Machine),
        _ => Err("a disk is \"ram:FILE\" or \"machine:NUMBER\""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vms_are_read() {
        let text = b"# two\n[[vm]]\nname = \"one\"\nmemory_mib = 128\nkernel = \"k\"\nappend = \"a=b c\"\n\n[[vm]]\nkernel=\"k\"\ncpus = 2\n";
        let vms = parse(text).unwrap();
        assert_eq!(
            (&*vms[0].name, vms[0].memory_mib, vms[0].cpus, &*vms[0].append),
            ("one", 128, 1, "a=b c")
        );
        assert_eq!((&*vms[1].name, vms[1].memory_mib, vms[1].cpus), ("vm2", 256, 2));
    }

    #[test]
    fn devices_are_read() {
        let text = b"[[vm]]\nkernel = \"k\"\ndisk = \"ram:a\"\ndisk = \"machine:1\"\nnet = \"switch\"\nconsole = \"virtio\"\n";
        let vm = parse(text).unwrap().remove(0);
        assert_eq!(vm.disks, [DiskSource::Ram("a".into()), DiskSource::Machine(1)]);
        assert!(vm.net && vm.virtio_console);
        for wrong in ["disk = \"a\"", "disk = \"machine:x\"", "net = \"other\"", "console = \"vga\""] {
            let text = alloc::format!("[[vm]]\nkernel = \"k\"\n{wrong}\n");
            assert_eq!(parse(text.as_bytes()).unwrap_err().line, 3, "{wrong}");
        }
        let many = alloc::format!("[[vm]]\n{}", "disk = \"ram:a\"\n".repeat(MAX_DISKS + 1));
        assert_eq!(parse(many.as_bytes()).unwrap_err().problem, "there are too many disks");
    }

    #[test]
    fn ends_and_saves_are_read() {
        let text = b"[[vm]]\nrestore = \"bundle:s\"\non_crash = \"restart\"\nsave = \"machine:2\"\n[[vm]]\nrestore = \"machine:0\"\n";
        let vms = parse(text).unwrap();
        assert_eq!((vms[0].on_crash, vms[1].on_crash), (OnCrash::Restart, OnCrash::End));
        assert_eq!(vms[0].restore, Some(SavedSource::File("s".into())));
        assert_eq!((vms[0].save_to, &vms[1].restore), (Some(2), &Some(SavedSource::Machine(0))));
        for wrong in ["save = \"bundle:s\"", "restore = \"s\"", "on_crash = \"go\""] {
            let text = alloc::format!("[[vm]]\nkernel = \"k\"\n{wrong}\n");
            assert_eq!(parse(text.as_bytes()).unwrap_err().line, 3, "{wrong}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line() {
        let error = |text: &str| parse(text.as_bytes()).unwrap_err();
        assert_eq!(error("").problem, "there is no [[vm]]");
        assert_eq!(error("[[vm]]\n").problem, "VM `vm1` needs a kernel, or a saved VM to go on from");
        assert_eq!(error("kernel = \"k\"").problem, "a VM starts with [[vm]]");
        assert_eq!(error("[[vm]]\nkernel = k").line, 2);
        assert_eq!(error("[[vm]]\n\ncpus = -1").line, 3);
        assert_eq!(error("[[vm]]\ncolour = 1").problem, "there is no such key");
        assert_eq!(error(&"[[vm]]\n".repeat(9)).line, 9);
        assert_eq!(parse(&[0xFF]).unwrap_err().line, 1);
    }
}
