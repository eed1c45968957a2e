//! This host as the machine's ground: memory, files, consoles, disks and networks by key.
//!
//! Called by: `machine::build` and `machine::boot`, through [`HostServices`].
//!
//! Invariant: what a key means stands in the resolved [`VmSpec`]; nothing else of the host can be reached from below.

use crate::console;
use crate::convert::{INITRD, KERNEL, index_of, key};
use crate::disk::{self, OpenDisk};
use crate::input_gate::InputGate;
use crate::network;
use crate::serial::{self, OnPanic};
use crate::services::{DeviceEvents, lock};
use crate::vcpu_threads::Bed;
use crate::wire::{DiskSpec, VmSpec};
use chipset::SerialOut;
use device::{Register, Waker};
use guest_memory::HostSpan;
use guest_time::{GuestClock, Timer};
use host_io::ram::RamMapping;
use host_io::serial::ConsoleSpec;
use hypervisor::{Bell, Wake};
use machine::{DeviceSlot, HostError, HostServices, PanicWatch, RequestQueue, SerialInput};
use machine_spec::{HostKey, RamBacking, RamSpec};
use rustix::rand::GetRandomFlags;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use virtio_devices::{BlockBackend, ConsoleBackend, EntropySource, NetBackend};

/// Largest kernel or initial RAM disk that is read.
const MAX_BOOT_FILE_BYTES: u64 = 4 << 30;

/// See the module's header.
pub struct Host {
    vm: VmSpec,
    events: DeviceEvents,
    beds: Vec<Arc<Bed>>,
    requests: Arc<RequestQueue>,
    watch: Arc<PanicWatch>,
    on_panic: OnPanic,
    gate: Arc<InputGate>,
    ram: Mutex<Option<Arc<RamMapping>>>,
    disks: Mutex<BTreeMap<String, Arc<OpenDisk>>>,
    /// Kernel and initial RAM disk by path, for resets: later they may be out of reach.
    boot_files: Mutex<BTreeMap<PathBuf, Arc<File>>>,
}

impl Host {
    /// The ground of `vm`. `on_panic` hears of the last words of a kernel that panicked.
    pub fn new(
        vm: VmSpec,
        events: DeviceEvents,
        requests: Arc<RequestQueue>,
        watch: Arc<PanicWatch>,
        on_panic: OnPanic,
    ) -> Self {
        let beds = (0..vm.cpus).map(|_| Bed::new()).collect();
        Self {
            vm,
            events,
            beds,
            requests,
            watch,
            on_panic,
            gate: Arc::default(),
            ram: Mutex::new(None),
            disks: Mutex::default(),
            boot_files: Mutex::default(),
        }
    }

    /// Where the vCPU threads sleep.
    pub fn beds(&self) -> &[Arc<Bed>] {
        &self.beds
    }

    /// Where typed input waits while the machine stands still.
    pub fn gate(&self) -> &InputGate {
        &self.gate
    }

    /// Time and wake-ups.
    pub fn events(&self) -> &DeviceEvents {
        &self.events
    }

    /// The VM's disks as they would be opened again now.
    pub fn present_disks(&self) -> Vec<DiskSpec> {
        let open = lock(&self.disks);
        let present = |(index, asked): (usize, &DiskSpec)| {
            open.get(&key("disk", index).0).map_or_else(|| asked.clone(), |disk| disk.spec())
        };
        self.vm.disks.iter().enumerate().map(present).collect()
    }

    /// The kernel or initial RAM disk that a key names.
    fn boot_file(&self, file: &HostKey) -> Option<&Path> {
        let boot = self.vm.boot.as_ref()?;
        match file.0.as_str() {
            KERNEL => Some(&boot.kernel),
            INITRD => boot.initrd.as_deref(),
            _ => None,
        }
    }

    /// Opens what a reset reads; what is not there is told of then.
    pub fn open_boot_files(&self) {
        for key in [KERNEL, INITRD] {
            if let Some(path) = self.boot_file(&HostKey(key.into())) {
                let _ = self.open_boot_file(path);
            }
        }
    }

    fn open_boot_file(&self, path: &Path) -> io::Result<Arc<File>> {
        let mut files = lock(&self.boot_files);
        if let Some(file) = files.get(path) {
            return Ok(file.clone());
        }
        let file = Arc::new(File::open(path)?);
        files.insert(path.into(), file.clone());
        Ok(file)
    }

    /// The console end that a key names.
    fn end(&self, kind: &str, stream: Option<&HostKey>, ends: &[String]) -> Result<ConsoleSpec, HostError> {
        let Some(key) = stream else { return Ok(ConsoleSpec::Null) };
        let text = index_of(kind, key).and_then(|index| ends.get(index));
        let text = text.ok_or_else(|| HostError(format!("the spec names no such {kind}")))?;
        text.parse().map_err(host_error)
    }

    /// The disks that are open, by key.
    pub fn disks(&self) -> Vec<(String, Arc<OpenDisk>)> {
        lock(&self.disks).iter().map(|(key, disk)| (key.clone(), disk.clone())).collect()
    }

    fn mapping(&self) -> Result<Arc<RamMapping>, HostError> {
        lock(&self.ram).clone().ok_or_else(|| HostError("no memory was allocated".into()))
    }
}

fn host_error(error: impl std::fmt::Display) -> HostError {
    HostError(error.to_string())
}

impl HostServices for Host {
    fn clock(&self) -> &GuestClock {
        self.events.clock()
    }
    fn waker(&self, slot: &DeviceSlot) -> Waker {
        self.events.waker(slot)
    }
    fn timer(&self, slot: &DeviceSlot) -> Box<dyn Timer> {
        self.events.timer(slot)
    }
    fn bell(&self, slot: &DeviceSlot, register: Register) -> Option<Arc<dyn Bell>> {
        self.events.bell(slot, register)
    }
    fn vcpu_wake(&self, id: u32) -> Arc<dyn Wake> {
        match self.beds.get(id as usize) {
            Some(bed) => bed.clone(),
            None => Bed::new(),
        }
    }

    fn allocate_ram(&self, spec: &RamSpec) -> Result<HostSpan, HostError> {
        let backing = match spec.backing {
            RamBacking::Memfd => host_io::ram::RamBacking::Memfd,
            RamBacking::Anonymous => host_io::ram::RamBacking::Anonymous,
            RamBacking::Huge { .. } => return Err(HostError("huge pages are not supported here yet".into())),
        };
        let mapping = Arc::new(RamMapping::map(spec.bytes, backing).map_err(host_error)?);
        *lock(&self.ram) = Some(mapping.clone());
        Ok(mapping.host_span())
    }
    fn clear_ram(&self) -> Result<(), HostError> {
        let mapping = self.mapping()?;
        mapping.discard(0..mapping.len() as u64).map_err(host_error)
    }
    fn populated_ram(&self) -> Result<Vec<Range<u64>>, HostError> {
        self.mapping()?.populated().map_err(host_error)
    }

    fn read_file(&self, file: &HostKey) -> Result<Vec<u8>, HostError> {
        let path = self.boot_file(file).ok_or_else(|| HostError("the spec names no such file".into()))?;
        self.open_boot_file(path)
            .and_then(|file| read_capped(&file))
            .map_err(|error| HostError(format!("{}: {error}", path.display())))
    }
    fn file_name(&self, file: &HostKey) -> String {
        self.boot_file(file).map_or_else(|| file.0.clone(), |path| path.display().to_string())
    }

    fn open_serial(
        &self,
        stream: Option<&HostKey>,
        input: SerialInput,
        waker: Waker,
    ) -> Result<Box<dyn SerialOut>, HostError> {
        let spec = self.end("serial", stream, &self.vm.serial)?;
        let (requests, gate) = (self.requests.clone(), self.gate.clone());
        let (watch, on_panic) = (self.watch.clone(), self.on_panic.clone());
        serial::open(&spec, input, waker, requests, gate, watch, on_panic).map_err(host_error)
    }

    fn open_console(&self, stream: Option<&HostKey>) -> Result<Box<dyn ConsoleBackend>, HostError> {
        let text = self.end("console", stream, &self.vm.consoles)?;
        console::open(&text, self.requests.clone(), self.gate.clone()).map_err(host_error)
    }

    fn open_disk(&self, key: &HostKey) -> Result<Box<dyn BlockBackend>, HostError> {
        let spec = index_of("disk", key).and_then(|index| self.vm.disks.get(index));
        let spec = spec.ok_or_else(|| HostError("the spec names no such disk".into()))?;
        let image = disk_formats::open(&spec.to_disk_format().map_err(host_error)?).map_err(host_error)?;
        let disk = OpenDisk::new(image, spec.clone()).map_err(host_error)?;
        lock(&self.disks).insert(key.0.clone(), disk.clone());
        Ok(Box::new(disk::Backend(disk)))
    }

    fn open_net(&self, key: &HostKey) -> Result<(Box<dyn NetBackend>, u16), HostError> {
        let spec = index_of("net", key).and_then(|index| self.vm.nets.get(index));
        let spec = spec.ok_or_else(|| HostError("the spec names no such network".into()))?;
        network::open(spec, self.events.handle()).map_err(host_error)
    }

    fn entropy(&self) -> Result<Box<dyn EntropySource>, HostError> {
        Ok(Box::new(Entropy))
    }
}

/// The kernel's random numbers.
struct Entropy;

impl EntropySource for Entropy {
    fn fill(&mut self, mut buf: &mut [u8]) {
        while !buf.is_empty() {
            // Fails only by interruption, once the kernel's pool was filled at its start.
            if let Ok(got) = rustix::rand::getrandom(&mut *buf, GetRandomFlags::empty()) {
                buf = &mut buf[got..];
            }
        }
    }
}

/// From its beginning, as often as it is asked for.
fn read_capped(mut file: &File) -> io::Result<Vec<u8>> {
    if file.stream_position().is_ok_and(|at| at != 0) {
        file.rewind()?;
    }
    let mut bytes = Vec::new();
    if file.take(MAX_BOOT_FILE_BYTES + 1).read_to_end(&mut bytes)? as u64 > MAX_BOOT_FILE_BYTES {
        let limit = MAX_BOOT_FILE_BYTES >> 30;
        return Err(io::Error::other(format!("more than {limit} GiB are too much for a kernel or initrd")));
    }
    Ok(bytes)
}
