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
//! ```
//!
//! Of TOML it takes what stands here: tables `[[vm]]`, numbers, strings in double quotes without escapes, comments.
//! Called by: [`crate::ground`].

use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// Most VMs of a bundle.
pub const MAX_VMS: usize = 8;

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
            });
            continue;
        }
        let vm = vms.last_mut().ok_or_else(|| at(number, "a VM starts with [[vm]]"))?;
        let (key, value) =
            line.split_once('=').ok_or_else(|| at(number, "neither [[vm]] nor key = value"))?;
        set(vm, key.trim(), value.trim()).map_err(|problem| at(number, problem))?;
    }
    let end = text.lines().count();
    match vms.iter().find(|vm| vm.kernel.is_empty()) {
        _ if vms.is_empty() => Err(at(end, "there is no [[vm]]")),
        Some(vm) => Err(at(end, &alloc::format!("VM `{}` has no kernel", vm.name))),
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
        _ => return Err("there is no such key"),
    }
    Ok(())
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
    fn what_is_wrong_is_told_with_its_line() {
        let error = |text: &str| parse(text.as_bytes()).unwrap_err();
        assert_eq!(error("").problem, "there is no [[vm]]");
        assert_eq!(error("[[vm]]\n").problem, "VM `vm1` has no kernel");
        assert_eq!(error("kernel = \"k\"").problem, "a VM starts with [[vm]]");
        assert_eq!(error("[[vm]]\nkernel = k").line, 2);
        assert_eq!(error("[[vm]]\n\ncpus = -1").line, 3);
        assert_eq!(error("[[vm]]\ncolour = 1").problem, "there is no such key");
        assert_eq!(error(&"[[vm]]\n".repeat(9)).line, 9);
        assert_eq!(parse(&[0xFF]).unwrap_err().line, 1);
    }
}
