//! Who may depend on whom, from `cargo metadata` (ARCHITECTURE.md section 1). Dev-dependencies are free: tests may
//! reach anywhere.

use cargo_metadata::{DependencyKind, Metadata, Package};

use super::Findings;

/// A folder and the folders that its crates may depend on besides itself.
const LAYERS: &[(&str, &[&str])] = &[
    ("base", &[]),
    ("cpu", &["base"]),
    ("devices", &["base"]),
    ("machine", &["base", "cpu", "devices"]),
    ("host", &["base", "cpu", "devices", "machine"]),
    ("metal", &["base", "cpu", "devices", "machine"]),
    ("manage", &["base", "machine", "host"]),
    ("tests", &["base", "cpu", "devices", "machine", "host", "manage"]),
    ("xtask", &["host", "tests"]),
];

/// What of cpu/ devices may name: the sinks of interrupts, never what executes instructions.
const CPU_FOR_DEVICES: &[&str] = &["hypervisor", "apic"];

/// Engines are named only where a process chooses one.
const ENGINES: &[&str] = &["cpu_soft", "cpu_translate", "cpu_kvm", "cpu_svm", "cpu_vmx"];
/// `cpu_kvm` completes with the interpreter what KVM cannot emulate (ADR 7); `cpu_svm` and `cpu_vmx` are hardware
/// behind it (ADR 9), and have `cpu_hardware` in common (ADR 19).
const MAY_NAME_ENGINES: &[&str] =
    &["vmm", "metal", "cpu_translate", "cpu_kvm", "cpu_hardware", "cpu_svm", "cpu_vmx"];

/// Serialization, wires and runtimes stop at vmm.
const WIRE: &[&str] = &["serde", "serde_json", "toml", "http", "hyper", "axum", "reqwest", "tokio", "utoipa"];
const BELOW_WIRE_FOLDERS: &[&str] = &["base", "cpu", "devices", "machine", "metal"];
const BELOW_WIRE_CRATES: &[&str] = &["host_io", "disk_formats", "guest_catalog"];

const FORBIDDEN_NAMES: &[&str] = &["common", "util", "utils", "helper", "helpers", "manager", "managers"];

pub fn check(metadata: &Metadata, findings: &mut Findings) {
    let members = metadata.workspace_packages();
    for package in &members {
        let Some(folder) = folder_of(metadata, package) else {
            findings.violation(format!("{}: stands outside the layers' folders", package.name));
            continue;
        };
        if package.name.split(['_', '-']).any(|word| FORBIDDEN_NAMES.contains(&word)) {
            findings.violation(format!("crate {}: its name says nothing", package.name));
        }
        let dependencies = package.dependencies.iter().filter(|d| d.kind != DependencyKind::Development);
        for dependency in dependencies {
            let name = dependency.name.as_str();
            if let Some(other) = members.iter().find(|member| member.name.as_str() == name) {
                if let Some(reason) =
                    objection(&folder, &package.name, folder_of(metadata, other).as_deref(), name)
                {
                    findings.violation(format!("{} depends on {name}: {reason}", package.name));
                }
            } else if WIRE.contains(&name) && is_below_wire(&folder, &package.name) {
                findings.violation(format!("{} depends on {name}: wire types stop at vmm", package.name));
            }
        }
    }
}

/// The first folder below the workspace's root.
pub fn folder_of(metadata: &Metadata, package: &Package) -> Option<String> {
    let inside = package.manifest_path.strip_prefix(&metadata.workspace_root).ok()?;
    let folder = inside.components().next()?.as_str().to_string();
    LAYERS.iter().any(|(name, _)| *name == folder).then_some(folder)
}

fn objection(folder: &str, name: &str, other_folder: Option<&str>, other: &str) -> Option<String> {
    let other_folder = other_folder?;
    let allowed = LAYERS.iter().find(|(layer, _)| *layer == folder).map_or(&[][..], |(_, below)| below);
    if folder == "devices" && CPU_FOR_DEVICES.contains(&other) {
        return None;
    }
    if folder != other_folder && !allowed.contains(&other_folder) {
        return Some(format!("{folder}/ may not reach {other_folder}/"));
    }
    let may_name = MAY_NAME_ENGINES.contains(&name) || folder == "tests";
    (ENGINES.contains(&other) && !may_name).then(|| "an engine is named only by vmm and metal".into())
}

fn is_below_wire(folder: &str, name: &str) -> bool {
    BELOW_WIRE_FOLDERS.contains(&folder) || BELOW_WIRE_CRATES.contains(&name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_laws_of_the_layers() {
        let objects =
            |folder, name, other_folder, other| objection(folder, name, Some(other_folder), other).is_some();
        assert!(!objects("machine", "machine", "devices", "virtio"));
        assert!(!objects("devices", "virtio", "devices", "device"));
        assert!(!objects("host", "vmm", "cpu", "cpu_soft"));
        assert!(!objects("devices", "pci", "cpu", "hypervisor"));
        assert!(objects("devices", "virtio", "cpu", "cpu_soft"));
        assert!(objects("cpu", "cpu_soft", "devices", "device"));
        assert!(objects("machine", "machine", "cpu", "cpu_soft"));
        assert!(objects("host", "vmm", "manage", "bedplate"));
        assert!(is_below_wire("host", "disk_formats") && !is_below_wire("host", "vmm"));
    }
}
