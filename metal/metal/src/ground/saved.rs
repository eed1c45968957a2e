//! Saved VMs on bare metal: from a file of the bundle or the beginning of a disk, and to such a disk. The format is the
//! hosted one, so that a VM goes from one ground to the other.
//!
//! Called by: [`super::vm`], with the VM standing still. What is read is hostile: records are checked by
//! `machine::saved_vm`, and none may take more than a piece of the heap.
//!
//! Of the host's records: its spec of the VM is kept as it is, and written back; of disks only the size is compared.

use crate::disk::{SharedStore, Store};
use crate::vm_spec::VmSpec;
use alloc::boxed::Box;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use machine::saved_vm::{
    ByteSink, ByteSource, CRITICAL, KIND_DISK, KIND_HOST, LoadError, RamSaver, Reader, SaveError, SavedDisk,
    StreamError, Writer,
};
use machine::{HostServices, KIND_SPEC, Machine};
use machine_spec::{DeviceSpec, MachineSpec};

/// Longest record: a group of RAM pages is a MiB.
pub const MAX_RECORD: usize = 4 << 20;
/// Longest spec of a host.
const MAX_HOST_SPEC: usize = 64 << 10;
/// Bytes that are moved at a time.
const PIECE: usize = 64 << 10;

/// What a saved VM says before the machine's own records.
pub struct Saved {
    source: Box<dyn ByteSource>,
    records: u64,
    /// The machine.
    pub machine: MachineSpec,
    /// The host's spec of the VM.
    pub host: Vec<u8>,
    disks: Vec<SavedDisk>,
}

impl Saved {
    /// Reads up to the machine's spec.
    pub fn open(mut source: Box<dyn ByteSource>) -> Result<Self, LoadError> {
        let mut reader = Reader::begin(&mut *source)?.with_longest(MAX_RECORD);
        let (mut host, mut disks) = (Vec::new(), Vec::new());
        let machine = loop {
            let record = reader.next_record()?;
            let record = record.ok_or_else(|| LoadError::Mismatch("it lacks the machine's spec".into()))?;
            match record.kind {
                KIND_HOST if record.body.len() <= MAX_HOST_SPEC => host = record.body,
                KIND_DISK if disks.len() < crate::vm_spec::MAX_DISKS => disks.push(record.state()?),
                KIND_SPEC => break record.state::<MachineSpec>()?,
                _ => record.skip()?,
            }
        };
        let records = reader.records();
        Ok(Self { source, records, machine, host, disks })
    }

    /// Whether disk `key` of `bytes` bytes can be the one it was.
    pub fn check_disk(&self, key: &str, bytes: u64) -> Result<(), String> {
        match self.disks.iter().find(|disk| disk.key == key) {
            Some(disk) if disk.size_bytes != bytes => {
                Err(format!("{key} had {} bytes when the VM was saved, and has {bytes}", disk.size_bytes))
            }
            Some(_) => Ok(()),
            None => Err(format!("the saved VM does not say which disk {key} was")),
        }
    }

    /// Gives `machine`, which was built from it, its state.
    pub fn restore(mut self, machine: &Machine) -> Result<(), LoadError> {
        let mut reader = Reader::resume(&mut *self.source, self.records).with_longest(MAX_RECORD);
        machine.restore(&mut reader)
    }
}

/// Names of a machine's disks in its spec, in the order in which the guest finds them.
pub fn disk_keys(machine: &MachineSpec) -> impl Iterator<Item = &str> {
    machine.devices.iter().filter_map(|device| match device {
        DeviceSpec::Blk(disk) => Some(&*disk.disk.0),
        _ => None,
    })
}

/// Writes a VM that stands still to the beginning of `store`; how many bytes. `disks`: sizes by key.
pub fn save(
    store: SharedStore,
    machine: &Machine,
    host: &dyn HostServices,
    host_spec: &[u8],
    disks: &[(String, u64)],
) -> Result<u64, SaveError> {
    let mut sink = DiskSink { store, at: 0, piece: Vec::with_capacity(PIECE) };
    let mut writer = Writer::begin(&mut sink)?;
    writer.record(KIND_HOST, CRITICAL, host_spec)?;
    for (key, size_bytes) in disks {
        let (key, size_bytes) = (key.clone(), *size_bytes);
        let disk = SavedDisk { key, uuid: [0; 16], size_bytes, generation: SavedDisk::NO_GENERATION };
        writer.state(KIND_DISK, CRITICAL, &disk)?;
    }
    machine.save(&mut writer, RamSaver { compress: false }, host, |_| {})?;
    writer.finish()?;
    Ok(sink.finish()?)
}

/// How a host is to see a VM that was born here (`vmm::wire::VmSpec` as TOML). Where its disks are is for whoever brings
/// it back to say.
pub fn host_spec(spec: &VmSpec, machine: &MachineSpec) -> String {
    let (cpus, memory) = (spec.cpus, spec.memory_mib);
    let (serial, console) =
        if spec.virtio_console { ("none", "console = [\"stdio\"]\n") } else { ("stdio", "") };
    let mut text = format!(
        "cpus = {cpus}\nmemory = \"{memory}M\"\ncpu_model = \"{}\"\naddress_bits = {}\nserial = [\"{serial}\"]\n{console}",
        spec.cpu_model, machine.cpus.address_bits
    );
    for key in disk_keys(machine) {
        text.push_str(&format!("\n[[disk]]\npath = \"{key}.img\"\nformat = \"raw\"\n"));
    }
    if spec.net {
        text.push_str("\n[[net]]\nkind = \"user\"\n");
    }
    text
}

/// The beginning of a disk as a stream.
pub struct DiskSource {
    store: SharedStore,
    at: u64,
    piece: Vec<u8>,
    /// Of `piece`, taken already.
    taken: usize,
}

impl DiskSource {
    /// From the first byte on.
    pub fn new(store: SharedStore) -> Self {
        Self { store, at: 0, piece: Vec::new(), taken: 0 }
    }

    fn fill(&mut self) -> Result<(), StreamError> {
        let mut store = self.store.lock();
        let left = store.info().bytes.saturating_sub(self.at).min(PIECE as u64) as usize;
        if left == 0 {
            return Err(StreamError("the disk ends before the saved VM does".into()));
        }
        self.piece.resize(left, 0);
        store.read(self.at, &mut self.piece).map_err(|error| StreamError(format!("{error:?}")))?;
        (self.at, self.taken) = (self.at + left as u64, 0);
        Ok(())
    }
}

impl ByteSource for DiskSource {
    fn get(&mut self, mut bytes: &mut [u8]) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            if self.taken == self.piece.len() {
                self.fill()?;
            }
            let part = bytes.len().min(self.piece.len() - self.taken);
            let (now, later) = bytes.split_at_mut(part);
            now.copy_from_slice(&self.piece[self.taken..self.taken + part]);
            (self.taken, bytes) = (self.taken + part, later);
        }
        Ok(())
    }
}

/// A stream to the beginning of a disk.
struct DiskSink {
    store: SharedStore,
    at: u64,
    piece: Vec<u8>,
}

impl DiskSink {
    fn write(&mut self) -> Result<(), StreamError> {
        let mut store = self.store.lock();
        if self.at + self.piece.len() as u64 > store.info().bytes {
            return Err(StreamError("the disk is too small for the saved VM".to_string()));
        }
        store.write(self.at, &self.piece).map_err(|error| StreamError(format!("{error:?}")))?;
        self.at += self.piece.len() as u64;
        self.piece.clear();
        Ok(())
    }

    /// Writes what is left, up to a whole sector, and makes it durable.
    fn finish(mut self) -> Result<u64, StreamError> {
        let bytes = self.at + self.piece.len() as u64;
        if !self.piece.is_empty() {
            let sector = self.store.info().block_bytes as usize;
            self.piece.resize(self.piece.len().next_multiple_of(sector.max(1)), 0);
            self.write()?;
        }
        self.store.lock().flush().map_err(|error| StreamError(format!("{error:?}")))?;
        Ok(bytes)
    }
}

impl ByteSink for DiskSink {
    fn put(&mut self, mut bytes: &[u8]) -> Result<(), StreamError> {
        while !bytes.is_empty() {
            let part = bytes.len().min(PIECE - self.piece.len());
            self.piece.extend_from_slice(&bytes[..part]);
            bytes = &bytes[part..];
            if self.piece.len() == PIECE {
                self.write()?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RamDisk;
    use alloc::sync::Arc;
    use sync::Mutex;
    use virtio_devices::{BlockError, BlockInfo};

    fn disk(bytes: usize) -> SharedStore {
        let memory = Box::leak(alloc::vec![0; bytes].into_boxed_slice());
        Arc::new(Mutex::new(Box::new(Strict(RamDisk::new(memory))) as Box<dyn Store>))
    }

    /// Takes whole sectors and no empty transfers, as disks of the machine do.
    struct Strict(RamDisk);

    impl Store for Strict {
        fn info(&self) -> BlockInfo {
            self.0.info()
        }
        fn read(&mut self, at: u64, to: &mut [u8]) -> Result<(), BlockError> {
            self.0.read(at, to)
        }
        fn write(&mut self, at: u64, from: &[u8]) -> Result<(), BlockError> {
            if from.is_empty() || !from.len().is_multiple_of(512) {
                return Err(BlockError::Io);
            }
            self.0.write(at, from)
        }
        fn flush(&mut self) -> Result<(), BlockError> {
            self.0.flush()
        }
    }

    #[test]
    fn streams_on_disks_keep_every_byte() {
        let store = disk(1 << 20);
        let bytes: Vec<u8> = (0..200_001u32).map(|n| ((n * 7) >> 3) as u8).collect();
        let mut sink = DiskSink { store: store.clone(), at: 0, piece: Vec::new() };
        bytes.chunks(777).for_each(|chunk| sink.put(chunk).unwrap());
        assert_eq!(sink.finish().unwrap(), bytes.len() as u64);
        let mut source = DiskSource::new(store);
        let mut back = alloc::vec![0; bytes.len()];
        back.chunks_mut(1_001).for_each(|chunk| source.get(chunk).unwrap());
        assert_eq!(back, bytes);
        let mut beyond = alloc::vec![0; 1 << 20];
        assert!(source.get(&mut beyond).is_err());
    }

    #[test]
    fn a_stream_of_whole_pieces_ends_without_an_empty_one() {
        let mut sink = DiskSink { store: disk(2 * PIECE), at: 0, piece: Vec::new() };
        sink.put(&alloc::vec![1; 2 * PIECE]).unwrap();
        assert_eq!(sink.finish().unwrap(), 2 * PIECE as u64);
    }

    #[test]
    fn a_disk_that_is_too_small_is_an_error() {
        let mut sink = DiskSink { store: disk(PIECE), at: 0, piece: Vec::new() };
        assert!(sink.put(&alloc::vec![1; 2 * PIECE]).is_err());
    }

    #[test]
    fn what_is_no_saved_vm_is_refused() {
        assert!(matches!(Saved::open(Box::new(DiskSource::new(disk(PIECE)))), Err(LoadError::Magic)));
        let mut long = b"BEDPLATE\x01\0\0\0HOST\x01\0\0\0".to_vec();
        long.extend((MAX_RECORD as u32 + 1).to_le_bytes());
        long.extend([0; 4]);
        let long: &'static [u8] = Box::leak(long.into_boxed_slice());
        assert!(matches!(Saved::open(Box::new(long)), Err(LoadError::TooLong { .. })));
    }
}
