//! A saved VM as a file: the machine's records, and before them what of the host it was made of.
//!
//! Called by: the driver, through a [`crate::driver::SaveJob`] of [`crate::desk`]; `launch` for a restore.
//!
//! Invariants:
//! - Nothing is opened by name: who asks for the save made its files, and puts them in their places
//!   ([`crate::control::save`]).
//! - Disks are named by path, and known by identity: one that moved on since the save is refused.
//! - With `and_continue`, every writable disk is frozen and goes on in an overlay before the guest runs again. The
//!   save says so ([`crate::wire::DiskSpec::frozen`]): brought back, it leaves the frozen images as they are, too.

use crate::disk::OpenDisk;
use crate::host::Host;
use crate::wire::{DiskSpec, SpecError, VmSpec};
use disk_formats::{DiskError, DiskIdentity, NewFile};
use machine::Machine;
use machine::saved_vm::{
    ByteSink, ByteSource, CRITICAL, KIND_DISK, KIND_HOST, LoadError, RamSaver, Reader, SaveError, SavedDisk,
    StreamError, Writer,
};
use machine_spec::MachineSpec;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most disks that a file may name.
const MAX_DISKS: usize = crate::wire::MAX_DEVICES;

/// Why a VM could not be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveFileError {
    /// The file cannot be written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The files that came with it are not those that it needs.
    #[error("{0}")]
    Files(&'static str),
    /// The machine cannot be saved.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// A disk cannot be made durable, named or moved to an overlay.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A disk cannot be flushed.
    #[error("disk {}: {source}", path.display())]
    Flush {
        /// The image.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// Why a saved VM cannot be brought back.
#[derive(Debug, thiserror::Error)]
pub enum LoadFileError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// It is damaged, or not for this version.
    #[error("{}: {source}", path.display())]
    Load {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: LoadError,
    },
    /// What it says of the host cannot be.
    #[error("{}: {source}", path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: SpecError,
    },
    /// A disk is not the one it was, or not as it was.
    #[error(
        "disk {}: {problem}; the saved VM can go on only with the disk as it was left (saved: {saved}; here: {here})",
        disk.display()
    )]
    DiskMovedOn {
        /// The image.
        disk: PathBuf,
        /// In what it differs.
        problem: &'static str,
        /// As saved.
        saved: DiskIdentity,
        /// As found.
        here: DiskIdentity,
    },
}

/// One save.
pub struct Save<'a> {
    /// What the file will be called.
    pub name: &'a Path,
    /// The file: new, and empty.
    pub file: File,
    /// The VM.
    pub vm: &'a VmSpec,
    /// Its ground.
    pub host: &'a Host,
    /// Compress RAM.
    pub compress: bool,
    /// If the guest goes on: an overlay for each disk that it writes, with the image that it is for.
    pub overlays: Option<Vec<(PathBuf, NewFile)>>,
}

impl Save<'_> {
    /// Writes the file; the machine stands still. Gives a sentence about it.
    pub fn write(mut self, machine: &Machine) -> Result<String, SaveFileError> {
        let mut vm = self.vm.clone();
        vm.disks = self.host.present_disks();
        for disk in &mut vm.disks {
            disk.frozen = self.overlays.is_some() && !disk.read_only;
        }
        let disks = self.host.disks();
        let overlays = match self.overlays.take() {
            Some(overlays) => assign(&disks, overlays)?,
            None => Vec::new(),
        };
        let bytes = self.write_file(&vm, &disks, machine)?;
        let mut message = format!("saved to {} ({} MiB)", self.name.display(), bytes.div_ceil(1 << 20));
        for (disk, overlay) in overlays {
            disk.continue_in(overlay)?;
            let option = disk.spec().to_option();
            message.push_str(&format!("\na disk goes on in an overlay; to start it again: --disk {option}"));
        }
        Ok(message)
    }

    /// Writes all of the file, and makes it durable; its size.
    fn write_file(
        &self,
        vm: &VmSpec,
        disks: &[(String, Arc<OpenDisk>)],
        machine: &Machine,
    ) -> Result<u64, SaveFileError> {
        // The error names the file that people asked for, whatever it is called meanwhile.
        let fail = |source| SaveFileError::Io { path: self.name.into(), source };
        let found = self.file.metadata().map_err(fail)?;
        if !found.is_file() || found.len() != 0 {
            return Err(SaveFileError::Files("the file to save to is no new, empty file"));
        }
        let saved = disks.iter().map(|(key, disk)| saved_disk(key, disk)).collect::<Result<Vec<_>, _>>()?;
        let mut sink = Sink(BufWriter::with_capacity(1 << 20, &self.file));
        let stream = |error| SaveFileError::Save(SaveError::Stream(error));
        let mut writer = Writer::begin(&mut sink).map_err(stream)?;
        writer.record(KIND_HOST, CRITICAL, vm.to_toml().as_bytes()).map_err(stream)?;
        for disk in &saved {
            writer.state(KIND_DISK, CRITICAL, disk).map_err(stream)?;
        }
        machine.save(&mut writer, RamSaver { compress: self.compress }, self.host, |_| {})?;
        writer.finish().map_err(stream)?;
        sink.0.flush().map_err(fail)?;
        drop(sink);
        self.file.sync_all().map_err(fail)?;
        Ok(self.file.metadata().map_err(fail)?.len())
    }
}

type Overlaid = Vec<(Arc<OpenDisk>, NewFile)>;

/// Each disk that the guest writes with its overlay. There must be one for each: the images may have changed since the
/// files were made.
fn assign(
    disks: &[(String, Arc<OpenDisk>)],
    mut overlays: Vec<(PathBuf, NewFile)>,
) -> Result<Overlaid, SaveFileError> {
    let mut assigned = Vec::new();
    for (_, disk) in disks.iter().filter(|(_, disk)| !disk.spec().read_only) {
        let image = disk.image();
        let at = overlays.iter().position(|(of, _)| of == image.path());
        let at =
            at.ok_or(SaveFileError::Files("the VM's disks have changed meanwhile: save it once more"))?;
        assigned.push((disk.clone(), overlays.swap_remove(at).1));
    }
    Ok(assigned)
}

fn saved_disk(key: &str, disk: &OpenDisk) -> Result<SavedDisk, SaveFileError> {
    let image = disk.image();
    image.flush().map_err(|source| SaveFileError::Flush { path: image.path().into(), source })?;
    let DiskIdentity { uuid, size_bytes, generation } = image.identity()?;
    Ok(SavedDisk { key: key.into(), uuid, size_bytes, generation })
}

/// A saved VM that is being read: what comes before the machine's own records was.
pub struct SavedVm {
    path: PathBuf,
    source: Source,
    /// The VM.
    pub vm: VmSpec,
    /// Its machine, with the shape that it had.
    pub machine: MachineSpec,
    disks: Vec<SavedDisk>,
    records_before: u64,
}

impl SavedVm {
    /// Opens the file and reads what the machine is to be built from.
    pub fn open(path: &Path) -> Result<Self, LoadFileError> {
        let io_error = |source| LoadFileError::Io { path: path.into(), source };
        let mut source = Source(BufReader::with_capacity(1 << 20, File::open(path).map_err(io_error)?));
        let load = |source| LoadFileError::Load { path: path.into(), source };
        let lacks = |what: &str| load(LoadError::Mismatch(format!("it lacks {what}")));
        let mut reader = Reader::begin(&mut source).map_err(load)?;
        let (mut vm, mut disks) = (None, Vec::new());
        let machine = loop {
            let record = reader.next_record().map_err(load)?.ok_or_else(|| lacks("the machine's spec"))?;
            match record.kind {
                KIND_HOST => {
                    let text = String::from_utf8_lossy(&record.body).into_owned();
                    let spec = VmSpec::from_toml(&text)
                        .map_err(|source| SpecError::Toml { path: path.into(), source: Box::new(source) });
                    let spec = spec.and_then(|spec| spec.resolve(Path::new("/")));
                    vm = Some(spec.map_err(|source| LoadFileError::Spec { path: path.into(), source })?);
                }
                KIND_DISK if disks.len() < MAX_DISKS => {
                    disks.push(record.state::<SavedDisk>().map_err(load)?)
                }
                machine::KIND_SPEC => break record.state::<MachineSpec>().map_err(load)?,
                _ => record.skip().map_err(load)?,
            }
        };
        let vm = vm.ok_or_else(|| lacks("the VM's spec"))?;
        if vm.cpus != machine.cpus.count || vm.memory.0 != machine.ram.bytes {
            return Err(load(LoadError::Mismatch("the VM's spec and the machine's differ".into())));
        }
        let records_before = reader.records();
        Ok(Self { path: path.into(), source, vm, machine, disks, records_before })
    }

    /// Its disks are these, in the order of their names in the guest.
    pub fn use_disks(&mut self, disks: &[DiskSpec]) -> Result<(), LoadFileError> {
        if disks.len() != self.vm.disks.len() {
            let (has, given) = (self.vm.disks.len(), disks.len());
            let source = LoadError::Mismatch(format!("it has {has} disks, {given} are named"));
            return Err(LoadFileError::Load { path: self.path.clone(), source });
        }
        self.vm.disks = disks.to_vec();
        Ok(())
    }

    /// Gives `machine`, which was built from it, its state. Checks the disks first; `disks_moved`: they may be other
    /// files, such as copies or the same ones on another mount, of the same size and time of the last change.
    pub fn restore(mut self, machine: &Machine, host: &Host, disks_moved: bool) -> Result<(), LoadFileError> {
        self.check_disks(host, disks_moved)?;
        let load = |source| LoadFileError::Load { path: self.path.clone(), source };
        let mut reader = Reader::resume(&mut self.source, self.records_before);
        machine.restore(&mut reader).map_err(load)
    }

    fn check_disks(&self, host: &Host, moved: bool) -> Result<(), LoadFileError> {
        for (key, disk) in host.disks() {
            let (image, here) = (disk.image(), disk.image().opened_as());
            let missing = || LoadFileError::Load {
                path: self.path.clone(),
                source: LoadError::Mismatch(format!("it does not say which disk {key} was")),
            };
            let saved = self.disks.iter().find(|saved| saved.key == key).ok_or_else(missing)?;
            let SavedDisk { uuid, size_bytes, generation, .. } = *saved;
            let saved = DiskIdentity { uuid, size_bytes, generation };
            let unknown = generation == SavedDisk::NO_GENERATION;
            let problem = if saved.size_bytes != here.size_bytes {
                "its size is another"
            } else if unknown && !moved {
                "whether it is as it was left is not known (it was saved on bare metal): --disks-moved takes it"
            } else if saved.uuid != here.uuid && !moved {
                "it is another file (one that was moved, or copied with its times, is taken by --disks-moved)"
            } else if saved.generation != here.generation && !unknown {
                "it was written since the VM was saved"
            } else {
                continue;
            };
            return Err(LoadFileError::DiskMovedOn { disk: image.path().into(), problem, saved, here });
        }
        Ok(())
    }
}

struct Sink<'a>(BufWriter<&'a File>);

impl ByteSink for Sink<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        self.0.write_all(bytes).map_err(|error| StreamError(error.to_string()))
    }
}

struct Source(BufReader<File>);

impl ByteSource for Source {
    fn get(&mut self, bytes: &mut [u8]) -> Result<(), StreamError> {
        self.0.read_exact(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => StreamError("the file is cut off".into()),
            _ => StreamError(error.to_string()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bytes of version 1. They stay as they are; a new version adds its own.
    #[test]
    fn golden_bytes_of_a_disk() {
        let disk = SavedDisk { key: "disk0".into(), uuid: [0xA5; 16], size_bytes: 0x12_3456, generation: 7 };
        let blob = saved_state::to_blob(&disk);
        let hex: String = blob.data.iter().map(|b| format!("{b:02x}")).collect();
        let golden = "0100050000006469736b30\
            020010000000a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5\
            030003000000563412\
            04000100000007";
        assert_eq!((hex.as_str(), blob.version), (golden, 1));
        assert_eq!(saved_state::from_blob::<SavedDisk>(&blob), Ok(disk));
    }
}
