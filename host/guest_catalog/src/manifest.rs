//! The record beside a prepared guest: which files belong to it, their sizes and checksums, the packages they came
//! from. It is written last, so that its presence means the guest is whole. Read by [`crate::Cache`].
//!
//! The text is one `key value…` per line; it was written by this crate but is read as any file of the user's:
//! unknown keys are skipped, a name that is not a plain file name is refused.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::{CatalogError, IoContext};

pub(crate) const FILE_NAME: &str = "manifest";
const HEADER: &str = "bedplate-guest 1";
/// A manifest is a dozen lines.
const MAX_BYTES: u64 = 64 << 10;

/// How a disk file is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFormat {
    /// Sector for sector.
    Raw,
    /// QEMU's copy-on-write format.
    Qcow2,
}

impl DiskFormat {
    /// The name used in `--disk PATH,format=NAME`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A guest that is ready to boot. Its disk is a master: copy it, or put an overlay over it, before it is written.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// The guest's name in the catalogue.
    pub guest: &'static str,
    /// The folder of its files.
    pub folder: PathBuf,
    /// The kernel's release.
    pub version: String,
    /// The packages it was made from, with their versions.
    pub packages: Vec<String>,
    /// A bzImage.
    pub kernel: PathBuf,
    /// The same kernel as an ELF with a PVH entry, if it has one.
    pub vmlinux: Option<PathBuf>,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The root disk and its format.
    pub disk: Option<(PathBuf, DiskFormat)>,
    /// The kernel command line that boots it to its console.
    pub append: &'static str,
}

/// What a manifest holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) recipe: String,
    pub(crate) version: String,
    pub(crate) packages: Vec<String>,
    pub(crate) files: Vec<FileRecord>,
}

/// One file of a guest.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct FileRecord {
    pub(crate) role: String,
    pub(crate) name: String,
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
}

impl Manifest {
    /// Adds a file that stands in `folder`.
    pub(crate) fn add(&mut self, role: &str, folder: &Path, name: &str) -> Result<(), CatalogError> {
        let path = folder.join(name);
        let bytes = fs::metadata(&path).context("look at", &path)?.len();
        let sha256 = checksum(&path)?;
        self.files.push(FileRecord { role: role.into(), name: name.into(), bytes, sha256 });
        Ok(())
    }

    pub(crate) fn write(&self, folder: &Path) -> Result<(), CatalogError> {
        let path = folder.join(FILE_NAME);
        let mut text = format!("{HEADER}\nrecipe {}\nversion {}\n", self.recipe, self.version);
        for package in &self.packages {
            text.push_str(&format!("package {package}\n"));
        }
        for file in &self.files {
            text.push_str(&format!("file {} {} {} {}\n", file.role, file.name, file.bytes, file.sha256));
        }
        let mut out = File::create(&path).context("create", &path)?;
        out.write_all(text.as_bytes()).context("write", &path)?;
        out.sync_all().context("write", &path)
    }

    /// `None` if there is no manifest or it is not one of ours.
    pub(crate) fn read(folder: &Path) -> Option<Self> {
        let mut text = String::new();
        File::open(folder.join(FILE_NAME)).ok()?.take(MAX_BYTES).read_to_string(&mut text).ok()?;
        Self::parse(&text)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        if lines.next()? != HEADER {
            return None;
        }
        let mut manifest = Self::default();
        for line in lines {
            let (key, value) = line.split_once(' ')?;
            match key {
                "recipe" => manifest.recipe = value.to_string(),
                "version" => manifest.version = value.to_string(),
                "package" => manifest.packages.push(value.to_string()),
                "file" => manifest.files.push(FileRecord::parse(value)?),
                _ => {}
            }
        }
        Some(manifest)
    }

    pub(crate) fn file(&self, role: &str) -> Option<&FileRecord> {
        self.files.iter().find(|file| file.role == role)
    }
}

impl FileRecord {
    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let (role, name) = (words.next()?.to_string(), words.next()?.to_string());
        let (bytes, sha256) = (words.next()?.parse().ok()?, words.next()?.to_string());
        let plain = !name.is_empty() && !name.contains('/') && name != ".." && name != ".";
        plain.then_some(Self { role, name, bytes, sha256 })
    }
}

/// The SHA-256 of a file, in hexadecimal.
pub(crate) fn checksum(path: &Path) -> Result<String, CatalogError> {
    let mut file = File::open(path).context("open", path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer).context("read", path)?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
    }
    Ok(hex(&hasher.finalize()))
}

/// Two digits for each byte.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_is_read_back_as_written() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("vmlinuz"), b"kernel").unwrap();
        let mut manifest = Manifest {
            recipe: "3".into(),
            version: "6.1.0-50".into(),
            packages: vec!["linux-image 6.1.176-1".into()],
            ..Manifest::default()
        };
        manifest.add("kernel", folder.path(), "vmlinuz").unwrap();
        manifest.write(folder.path()).unwrap();
        assert_eq!(Manifest::read(folder.path()).unwrap(), manifest);
        assert_eq!(manifest.file("kernel").unwrap().bytes, 6);
    }

    #[test]
    fn foreign_and_cunning_manifests_are_refused() {
        assert!(Manifest::parse("something else\n").is_none());
        assert!(Manifest::parse("bedplate-guest 1\nfile kernel ../../etc/shadow 1 00\n").is_none());
        assert!(Manifest::parse("bedplate-guest 1\nfile kernel x many 00\n").is_none());
        assert!(Manifest::parse("bedplate-guest 1\nfuture thing\n").is_some());
    }
}
