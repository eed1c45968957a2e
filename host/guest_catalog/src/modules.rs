//! Picks the kernel modules a guest needs out of an unpacked kernel package, with all they depend on, in an order
//! in which `insmod` can load them. The package holds no `modules.dep` (depmod runs when it is installed), so the
//! dependencies are read from each module's own `.modinfo` section. Called by [`crate::initrd`].

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::elf;
use crate::error::{CatalogError, IoContext};

/// A module and its content, dependencies first in a list of them.
#[derive(Debug)]
pub(crate) struct Module {
    pub(crate) name: String,
    pub(crate) data: Vec<u8>,
}

/// Folders of a package are not deeper than this; it bounds the walk.
const MAX_DEPTH: u32 = 12;

/// `wanted` names the modules by their file names without `.ko`; those built into the kernel are skipped.
pub(crate) fn pick(modules_folder: &Path, wanted: &[&str]) -> Result<Vec<Module>, CatalogError> {
    let mut files = BTreeMap::new();
    index(modules_folder, 0, &mut files)?;
    let mut picked = Vec::new();
    let mut visited = BTreeSet::new();
    for name in wanted {
        visit(&canonical(name), &files, &mut visited, &mut picked)?;
    }
    Ok(picked)
}

fn visit(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    visited: &mut BTreeSet<String>,
    picked: &mut Vec<Module>,
) -> Result<(), CatalogError> {
    if !visited.insert(name.to_string()) {
        return Ok(());
    }
    let Some(path) = files.get(name) else { return Ok(()) };
    let data = fs::read(path).context("read", path)?;
    let info = elf::section(&data, ".modinfo").ok_or_else(|| CatalogError::Malformed {
        path: path.clone(),
        reason: "it is not a kernel module (no .modinfo section)".into(),
    })?;
    for needed in dependencies(info) {
        visit(&needed, files, visited, picked)?;
    }
    picked.push(Module { name: name.to_string(), data });
    Ok(())
}

/// `.modinfo` is a row of `key=value` strings, each ended by a zero byte.
fn dependencies(modinfo: &[u8]) -> Vec<String> {
    modinfo
        .split(|&b| b == 0)
        .filter_map(|entry| entry.strip_prefix(b"depends="))
        .flat_map(|list| list.split(|&b| b == b','))
        .filter(|name| !name.is_empty())
        .map(|name| canonical(&String::from_utf8_lossy(name)))
        .collect()
}

/// File names and dependencies mix `-` and `_`.
fn canonical(name: &str) -> String {
    name.replace('-', "_")
}

fn index(folder: &Path, depth: u32, files: &mut BTreeMap<String, PathBuf>) -> Result<(), CatalogError> {
    if depth > MAX_DEPTH {
        return Ok(());
    }
    for entry in fs::read_dir(folder).context("list", folder)? {
        let entry = entry.context("list", folder)?;
        let path = entry.path();
        if entry.file_type().context("look at", &path)?.is_dir() {
            index(&path, depth + 1, files)?;
        } else if let Some(name) =
            path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".ko"))
        {
            files.insert(canonical(name), path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::elf::tests::elf_with;

    fn folder(modules: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, depends) in modules {
            let inside = folder.path().join("kernel/drivers");
            fs::create_dir_all(&inside).unwrap();
            let info = format!("license=GPL\0depends={depends}\0name={name}\0");
            fs::write(inside.join(format!("{name}.ko")), elf_with(".modinfo", info.as_bytes())).unwrap();
        }
        folder
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let folder = folder(&[
            ("virtio-rng", "virtio,virtio_ring"),
            ("virtio_pci", "virtio-pci-modern-dev,virtio,virtio_ring"),
            ("virtio_pci_modern_dev", ""),
            ("virtio_ring", "virtio"),
            ("virtio", ""),
            ("unrelated", ""),
        ]);
        let picked = pick(folder.path(), &["virtio_pci", "virtio-rng", "built_in"]).unwrap();
        let names: Vec<_> = picked.iter().map(|m| m.name.as_str()).collect();
        assert_eq!(names, ["virtio_pci_modern_dev", "virtio", "virtio_ring", "virtio_pci", "virtio_rng"]);
    }

    #[test]
    fn a_circle_of_dependencies_ends() {
        let folder = folder(&[("a", "b"), ("b", "a")]);
        assert_eq!(pick(folder.path(), &["a"]).unwrap().len(), 2);
    }

    #[test]
    fn a_file_that_is_no_module_is_named() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("bad.ko"), b"no elf").unwrap();
        let message = pick(folder.path(), &["bad"]).unwrap_err().to_string();
        assert!(message.contains("bad.ko"), "{message}");
    }
}
