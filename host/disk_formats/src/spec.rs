//! How a person names a disk: `PATH[,ro][,format=raw|qcow2][,discard=on|off][,backing=PATH]...`.
//!
//! Called by: the command line and the vmm's spec. Invariants: what is not understood is refused with the field's name;
//! the format comes from the text or the file name, never from the content.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::DiskError;

/// A disk image format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file's bytes are the disk's bytes.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
}

/// Which image to open, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// The image.
    pub path: PathBuf,
    /// Its format; `None` goes by the file name (`.qcow2`), else raw.
    pub format: Option<Format>,
    /// Refuse every change.
    pub read_only: bool,
    /// Give discarded space back to the host (default), or ignore the guest's discards.
    pub discard: bool,
    /// Files that may be opened because an image names them as its backing file.
    pub backing_allow: Vec<PathBuf>,
}

impl DiskSpec {
    /// A writable disk with every default.
    pub fn new(path: impl Into<PathBuf>) -> DiskSpec {
        DiskSpec {
            path: path.into(),
            format: None,
            read_only: false,
            discard: true,
            backing_allow: Vec::new(),
        }
    }

    /// The format that will be used.
    pub fn resolved_format(&self) -> Format {
        self.format.unwrap_or_else(|| format_by_name(&self.path))
    }
}

fn format_by_name(path: &Path) -> Format {
    match path.extension() {
        Some(extension) if extension.eq_ignore_ascii_case("qcow2") => Format::Qcow2,
        _ => Format::Raw,
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Format, String> {
        match text {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(format!("`{text}` is no known format; use raw or qcow2")),
        }
    }
}

impl FromStr for DiskSpec {
    type Err = DiskError;

    fn from_str(text: &str) -> Result<DiskSpec, DiskError> {
        let fail = |field: &str, problem: String| DiskError::Spec {
            text: text.into(),
            field: field.into(),
            problem,
        };
        let mut parts = text.split(',');
        let path = parts.next().unwrap_or_default();
        if path.is_empty() {
            return Err(fail("path", "is empty; write the image's path first, as in disk.qcow2,ro".into()));
        }
        let mut spec = DiskSpec::new(path);
        for part in parts {
            let (key, value) = part.split_once('=').unwrap_or((part, ""));
            match (key, value) {
                ("ro", "" | "on") => spec.read_only = true,
                ("ro", "off") => spec.read_only = false,
                ("format", _) => {
                    spec.format = Some(value.parse().map_err(|problem| fail("format", problem))?)
                }
                ("discard", "on" | "unmap") => spec.discard = true,
                ("discard", "off" | "ignore") => spec.discard = false,
                ("backing", path) if !path.is_empty() => spec.backing_allow.push(path.into()),
                ("ro" | "discard", _) => return Err(fail(key, format!("`{value}` is neither on nor off"))),
                ("backing", _) => return Err(fail(key, "is empty; name the allowed backing file".into())),
                _ => {
                    let known = "ro, format=raw|qcow2, discard=on|off, backing=PATH";
                    return Err(fail(key, format!("is not an option; known are {known}")));
                }
            }
        }
        Ok(spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_understood() {
        let spec: DiskSpec = "a.img".parse().unwrap();
        assert_eq!(spec, DiskSpec::new("a.img"));
        assert_eq!(spec.resolved_format(), Format::Raw);
        assert_eq!(DiskSpec::new("a.QCOW2").resolved_format(), Format::Qcow2);

        let spec: DiskSpec = "a.img,ro,format=qcow2,discard=off,backing=b.raw,backing=c".parse().unwrap();
        assert_eq!(spec.format, Some(Format::Qcow2));
        assert!(spec.read_only && !spec.discard);
        assert_eq!(spec.backing_allow, [PathBuf::from("b.raw"), PathBuf::from("c")]);
    }

    #[test]
    fn errors_name_the_field_and_the_way_out() {
        for (text, field, hint) in [
            ("", "path", "write the image's path"),
            ("a,format=vmdk", "format", "use raw or qcow2"),
            ("a,discard=maybe", "discard", "neither on nor off"),
            ("a,backing", "backing", "name the allowed"),
            ("a,cache=none", "cache", "known are ro"),
        ] {
            let error = text.parse::<DiskSpec>().unwrap_err().to_string();
            assert!(error.contains(&format!("{field}: ")) && error.contains(hint), "{error}");
        }
    }
}
